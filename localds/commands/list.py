"""`localds list`: the models that are installed, and the known ones that can be."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localds.commands.common import clear_errors
from localds.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from localds.catalog.installed import Installed
    from localds.catalog.known import KnownModel, KnownQuant

_FIGURES = (2, 3, 5)
_NAME_WIDTH = 46
_OTHER = "other kind"  # of model than localds runs
_UNLIMITED = 1000  # columns, where the output is no terminal


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the installed models, and the known ones.

    The memory that a model wants is about its file and 1 GB; `localds inspect` tells exactly once
    it is installed.
    """
    with clear_errors():
        from localds.catalog.installed import find_installed
        from localds.catalog.known import known_models

        report = _report(find_installed(), known_models().values())
        typer.echo(json.dumps(report, indent=2) if as_json else _text(report))


def _report(installed: Sequence[Installed], known: Iterable[KnownModel]) -> dict[str, Any]:
    from localds.hub.cache import cache_root
    from localds.memory.machine import available_memory, total_memory

    available, total = available_memory(), total_memory()
    present = {(model.known.name, model.label) for model in installed if model.known}
    return {
        "folder": str(cache_root()),
        "memory": {"available_bytes": available, "total_bytes": total},
        "installed": [_installed_entry(model, available, total) for model in installed],
        "known": [
            {
                "name": model.name,
                "title": model.title,
                "repository": model.repository,
                "parameters": model.parameters,
                "context": model.context,
                "license": model.license,
                "default": model.default,
                "notes": model.notes,
                "quants": [
                    _quant_entry(quant, available, total)
                    | {"installed": (model.name, quant.name) in present}
                    for quant in model.quants.values()
                ],
            }
            for model in known
        ],
    }


def _installed_entry(model: Installed, available: int | None, total: int | None) -> dict[str, Any]:
    from localds.catalog.installed import runs

    return {
        "name": model.name,
        "title": model.title,
        "repository": model.repository,
        "quant": model.label,
        "path": str(model.path),
        **_size(model.size, available, total),
        **({} if runs(model.path) else {"fits": _OTHER}),
    }


def _quant_entry(quant: KnownQuant, available: int | None, total: int | None) -> dict[str, Any]:
    return {"quant": quant.name, **_size(quant.size, available, total)}


def _size(size: int, available: int | None, total: int | None) -> dict[str, Any]:
    from localds.memory.plan import estimate

    wanted = estimate(size)
    return {"bytes": size, "memory_bytes": wanted, "fits": _verdict(wanted, available, total)}


def _verdict(wanted: int, available: int | None, total: int | None) -> str:
    """Whether `wanted` bytes fit in this machine's memory, or would if other programs ended.

    Of what is larger, experts are read from disk as they are needed.
    """
    if total is not None and wanted > total:
        return "from disk"
    return "fits" if available is None or wanted <= available else "not now"


def _text(report: dict[str, Any]) -> str:
    memory = report["memory"]
    lines = [f"Installed in {report['folder']}"]
    lines += _installed_lines(report["installed"]) or ["none yet; get one: localds pull NAME"]
    lines += ["", "Known, for localds pull NAME[:QUANT]; * is the quant without :QUANT"]
    lines += _known_lines(report["known"])
    if memory["total_bytes"] is not None:
        free = memory["available_bytes"]
        now = "" if free is None else f", {format_size(free)} of it free (not now: needs more)"
        lines += [
            "",
            "What does not fit runs from disk; `localds inspect` tells how fast.",
            f"This machine has {format_size(memory['total_bytes'])} of memory{now}.",
        ]
    return "\n".join(lines)


def _installed_lines(entries: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in entries:
        name, amount = entry["name"], _amount(entry)
        if len(name) > _NAME_WIDTH:
            lines += [name, f"{'':<{_NAME_WIDTH}}{amount}"]
        else:
            lines.append(f"{name:<{_NAME_WIDTH}}{amount}")
    return lines


def _amount(entry: dict[str, Any]) -> str:
    size, memory = format_size(entry["bytes"]), format_size(entry["memory_bytes"])
    return f"{size:>9} {memory:>9}  {entry['fits']}"


def _known_lines(entries: list[dict[str, Any]]) -> list[str]:
    rows: list[tuple[str, ...]] = [
        ("NAME", "QUANT", "SIZE", "MEMORY", "FITS", "CONTEXT", "LICENSE")
    ]
    for entry in entries:
        context = str(entry["context"] or "")
        first = (entry["name"], context, entry["license"])
        for quant in entry["quants"]:
            mark = "*" if quant["quant"] == entry["default"] else ""
            rows.append(
                (
                    first[0],
                    quant["quant"] + mark,
                    format_size(quant["bytes"]),
                    format_size(quant["memory_bytes"]),
                    "installed" if quant["installed"] else quant["fits"],
                    first[1],
                    first[2],
                )
            )
            first = ("", "", "")
    return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as what they hold, figures to the right; the last one as far as it fits."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(width) if i in _FIGURES else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    most = shutil.get_terminal_size((_UNLIMITED, 24)).columns
    return [line if len(line) <= most else line[: most - 1] + "…" for line in lines]
