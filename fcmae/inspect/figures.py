"""Plots of runs and encoders."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

Point = tuple[int, float]
SIZE = (4.8, 3.0)

SMOOTHED = 0.02
"""Share of a curve's points over which its thick line averages."""


def curves(
    lines: Mapping[str, Sequence[Point]], label: str, level: tuple[float, str] | None = None
) -> str:
    """Curves over steps, points as thin and their running mean as thick lines → SVG.

    Args:
        lines: points by name; the position determines the colour, even if others have no points.
        label: of the y axis.
        level: value and label of a horizontal line.
    """
    figure, axes = _axes(label, "step")
    for place, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        steps, values = np.array(points).T
        width = max(1, int(len(values) * SMOOTHED))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        style = {"color": f"C{place}", "marker": "o" if len(values) < 30 else None, "markersize": 3}
        axes.plot(steps[width - 1 :], smooth, label=name, **style)
        if width > 1:
            axes.plot(steps, values, color=f"C{place}", alpha=0.25, linewidth=0.7)
    if level is not None:
        axes.axhline(level[0], color="grey", linestyle="--", linewidth=0.8, label=level[1])
    axes.legend(fontsize="small")
    return svg(figure)


def diversity(lines: Mapping[str, Mapping[str, float]], size: tuple[float, float] = SIZE) -> Figure:
    """A line for every encoder, over the blocks of all encoders.

    Args:
        lines: by name, the diversity by the name of the block; the position determines the colour,
            even if others have no blocks.
        size: width and height in inches.
    """
    figure, axes = _axes("mean cosine distance of channels", "block (stage.number)", size)
    names = sorted({name for blocks in lines.values() for name in blocks}, key=block_order)
    for place, (name, blocks) in enumerate(lines.items()):
        there = [at for at, block in enumerate(names) if block in blocks]
        if there:
            values = [blocks[names[at]] for at in there]
            axes.plot(there, values, color=f"C{place}", marker="o", markersize=4, label=name)
    short = [name.removeprefix("stages.").replace(".blocks", "") for name in names]
    axes.set_xticks(range(len(names)), short, rotation=90 if len(names) > 20 else 0)
    axes.set_ylim(0, 0.52)
    axes.legend(fontsize="small")
    return figure


def label_curves(curves: Mapping[str, Mapping[str, Any]], chance: float) -> Figure:
    """Top-1 over the number of labels with its 90 % interval; forecasts are hollow.

    Args:
        curves: by name, as `fcmae.inspect.label_curve.summary` gives them.
        chance: top-1 in percent of always naming one class.
    """
    figure, axes = _axes("top-1 %", "labels", (7, 4))
    for place, (name, curve) in enumerate(curves.items()):
        certain = [entry for entry in curve["forecast"] if entry["certain"]]
        for entries, filled in ((curve["points"], True), (certain, False)):
            x, y, low, high = ([e[k] for e in entries] for k in ("labels", "top1", "low", "high"))
            axes.errorbar(
                x, y, (np.subtract(y, low), np.subtract(high, y)), color=f"C{place}", marker="o",
                markersize=4, capsize=3, linestyle="-" if filled else ":",
                markerfacecolor=f"C{place}" if filled else "white", label=name if filled else None,
            )  # fmt: skip
    axes.axhline(chance, color="grey", linestyle="--", linewidth=0.8, label="chance")
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    return figure


def block_order(name: str) -> list[int]:
    """Sort key of a block's name: stage and number."""
    return [int(part) for part in name.split(".") if part.isdigit()]


def _axes(y: str, x: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def svg(figure: Figure) -> str:
    """A figure as SVG, with reproducible bytes."""
    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fcmae"}):  # none: text stays text
        figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
