"""Figures as Markdown tables, one a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_report import told

Record = dict[str, Any]


def tables(records: Sequence[Record], ends: Mapping[str, str]) -> str:
    """Of each step how it ended, and its figures but for details that did not fail."""
    parts = []
    for step, how in ends.items():
        rows = [record for record in records if record["step"] == step and shown(record)]
        head = f"**{step}**" if how == "done" else f"**{step}** ({how})"
        lines = [row(record) for record in rows]
        if lines:
            head = "\n".join([f"{head}\n", "| | | |", "|---|---|---|", *lines])
        parts.append(head)
    return "\n\n".join(parts) + "\n"


def shown(record: Record) -> bool:
    return not record.get("detail")


def row(record: Record) -> str:
    cells = (record["what"], told(record), record.get("note", ""))
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"
