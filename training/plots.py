"""The pictures in docs: the loss curve, and how evenly the experts are used."""

from __future__ import annotations

import csv
from itertools import pairwise
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

mpl.use("svg")
# The same picture for the same figures, so that it can be kept under version control.
mpl.rcParams["svg.hashsalt"] = "localds"
_METADATA = {"Date": None, "Creator": None}


def draw_losses(table: Path, picture: Path) -> None:
    """Draw loss.csv: loss in training and on held-out phrasings, with the steps between lengths."""
    with table.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    steps = [int(row["step"]) for row in rows]
    axes.plot(steps, [float(row["loss"]) for row in rows], label="training", linewidth=1)
    checked = [(int(row["step"]), float(row["held_out"])) for row in rows if row["held_out"]]
    axes.plot(*zip(*checked, strict=True), "o-", markersize=3, label="held-out phrasings")
    for before, after in pairwise(rows):
        if before["length"] != after["length"]:
            axes.axvline(int(after["step"]), color="0.85", zorder=0)
            axes.text(
                int(after["step"]),
                0.98,
                f"{after['length']} tokens ",
                transform=axes.get_xaxis_transform(),
                rotation=90,
                ha="right",
                va="top",
                fontsize=6,
            )
    axes.set(xlabel="step", ylabel="loss per token", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(picture, metadata=_METADATA)
    plt.close(figure)


def draw_routing(shares: dict[int, NDArray], picture: Path) -> None:
    """Draw, for each layer, every expert's share of tokens beside a fair share of 1."""
    figure, panels = plt.subplots(
        1, len(shares), figsize=(2 * len(shares), 2.4), sharey=True, layout="constrained"
    )
    for axes, (layer, share) in zip(panels, shares.items(), strict=True):
        axes.bar(range(len(share)), share, color="0.4")
        axes.axhline(1, color="tab:blue", linewidth=1)
        axes.axhline(0.25, color="tab:red", linewidth=1, linestyle=":")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_xlabel("expert", fontsize=8)
    panels[0].set_ylabel("tokens / fair share", fontsize=8)
    figure.savefig(picture, metadata=_METADATA)
    plt.close(figure)
