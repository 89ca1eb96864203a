"""Plots of runs, as SVG for a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fcmae.run_data import Point, RunData

SMOOTHED = 0.02
"""Share of a curve's points that its thick line averages over."""


def curves(
    lines: Sequence[tuple[str, Sequence[Point]]], label: str, level: tuple[float, str] | None = None
) -> str:
    """Curves over steps, the points thin and their running mean thick → SVG.

    Args:
        lines: (name, points) each; its place decides the colour, also of those without points.
        label: of the y axis.
        level: a value to draw a line at, and what it means.
    """
    figure, axes = _axes(label)
    for place, (name, points) in enumerate(lines):
        if not points:
            continue
        steps, values = np.array(points).T
        width = max(1, int(len(values) * SMOOTHED))
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        marker = "o" if len(values) < 30 else None
        style = {"color": f"C{place}", "marker": marker, "markersize": 3}
        axes.plot(steps[width - 1 :], smooth, label=name, **style)
        if width > 1:
            axes.plot(steps, values, color=f"C{place}", alpha=0.25, linewidth=0.7)
    if level is not None:
        axes.axhline(level[0], color="grey", linestyle="--", linewidth=0.8, label=level[1])
    axes.set_xlabel("step")
    axes.legend(fontsize="small")
    return _svg(figure)


def diversity(runs: Sequence[RunData]) -> str:
    """The newest diversity of every block of some runs → SVG."""
    figure, axes = _axes("mean cosine distance of channels")
    for place, run in enumerate(runs):
        keys = run.keys("diversity/")
        if not keys:
            continue
        values = [run.series(key)[-1][1] for key in keys]
        names = [key.split("stages.")[-1].replace(".blocks", "") for key in keys]
        axes.plot(range(len(keys)), values, f"C{place}o-", markersize=4, label=run.name)
        axes.set_xticks(range(len(keys)), names, rotation=90 if len(keys) > 20 else 0)
    axes.set_ylim(0, 0.52)
    axes.set_xlabel("block (stage.number)")
    axes.legend(fontsize="small")
    return _svg(figure)


def _axes(label: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    # Text stays text; names in the file do not change from one run to the next.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fcmae"}):
        content = io.StringIO()
        FigureCanvasSVG(figure).print_svg(content, metadata={"Date": None})
    return content.getvalue()
