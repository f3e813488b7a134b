"""Training data from several sources as one."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from localds.finetune.data import Data, DataReport, load_data
from localds.finetune.data.examples import ExamplesBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from localds.finetune.data import Encoder, Examples

    Progress = Callable[[str, int, int], None]


def load_all(
    sources: Sequence[str | Path],
    encoder: Encoder,
    *,
    valid: str | Path | None,
    share: float,
    seed: int,
    on_progress: Progress | None,
) -> Data:
    """`load_data` of every source; all are evaluated on `valid`, or each on a share of its own."""
    if not sources:
        raise ValueError("data: none are given; name a file, a folder or a data set of the hub")
    loaded = [
        load_data(source, encoder, valid=valid, share=share, seed=seed, on_progress=on_progress)
        for source in sources
    ]
    if len(loaded) == 1:
        return loaded[0]
    evaluated = loaded[:1] if valid is not None else loaded
    return Data(
        _joined(data.train for data in loaded),
        _joined(data.valid for data in evaluated),
        _report(loaded, again=len(loaded) - len(evaluated)),
    )


def _joined(parts: Iterable[Examples]) -> Examples:
    builder = ExamplesBuilder()
    for examples in parts:
        for example in examples:
            builder.add(example)
    return builder.build()


def _report(loaded: Sequence[Data], again: int) -> DataReport:
    """All figures added, without the evaluation's that came `again` with other sources."""
    total = DataReport()
    for data in loaded:
        for field in fields(DataReport):
            value = getattr(data.report, field.name)
            before = getattr(total, field.name)
            more = max(before, value) if field.name == "longest" else before + value
            setattr(total, field.name, more)
    valid = loaded[0].valid
    total.examples -= again * len(valid)
    total.valid -= again * len(valid)
    total.tokens -= again * valid.tokens
    total.trained_tokens -= again * valid.trained_tokens
    return total
