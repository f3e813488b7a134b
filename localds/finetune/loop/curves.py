"""The loss curve of a run as a picture."""

from __future__ import annotations

from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from localds.finetune.loop.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_STEPS_COLOUR = "#4c72b0"
_HELD_OUT_COLOUR = "#c44e52"


def draw_curve(metrics: Path, picture: Path) -> bool:
    """Draw the losses in a log as a PNG; False where matplotlib is not installed."""
    try:
        figures = import_module("matplotlib.figure")
    except ImportError:
        return False
    lines = read_metrics(metrics)
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss per token")
    steps = _points(lines, "step")
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color=_STEPS_COLOUR, alpha=0.3, linewidth=1)
        axes.plot(numbers, smoothed(losses), color=_STEPS_COLOUR, label="training, smoothed")
    held_out = _points(lines, "evaluated")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color=_HELD_OUT_COLOUR, marker="o", label="held out"
        )
    axes.grid(alpha=0.3)
    if steps or held_out:
        axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means over a tenth of the losses around each, at most 51; over fewer near the ends."""
    half = min(25, len(losses) // 20)
    sums = [0.0, *accumulate(losses)]
    means = []
    for at in range(len(losses)):
        reach = min(half, at, len(losses) - 1 - at)
        means.append((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1))
    return means


def _points(lines: list[dict[str, Any]], event: str) -> list[tuple[int, float]]:
    return [
        (line["step"], line["loss"])
        for line in lines
        if line["event"] == event and isinstance(line["loss"], float)
    ]
