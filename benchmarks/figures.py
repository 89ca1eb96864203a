"""Draw the figures of docs/how_it_works.md and docs/index.md.

.venv/bin/python -m benchmarks.figures [--out docs/figures]
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fcmae.model.mask import random_mask
from sparse.sizes import PATCH

Picture = npt.NDArray[np.float64]
SIDE = 224
GRID = SIDE // PATCH
VISIBLE, HIDDEN, PREDICTED, HALO = "#2b6cb0", "#e2e8f0", "#c05621", "#90cdf4"
HALO_SITES = 3
"""Sites that a 7×7 convolution reaches beyond a patch."""


def cells() -> Picture:
    """A picture of round cells with nuclei, (SIDE, SIDE, 3) from 0 to 1."""
    random = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE]
    image = np.full((SIDE, SIDE, 3), (0.93, 0.88, 0.9))
    for _ in range(26):
        centre, radius = random.uniform(0, SIDE, 2), random.uniform(12, 26)
        distance = np.hypot(y - centre[0], (x - centre[1]) * random.uniform(0.8, 1.25))
        for size, colour in ((1.0, (0.85, 0.62, 0.75)), (0.45, (0.42, 0.25, 0.6))):
            inside = np.clip((size * radius - distance) / 3 + 0.5, 0, 1)[..., None]
            image = image * (1 - 0.8 * inside) + np.array(colour) * 0.8 * inside
    return np.clip(image + random.normal(0, 0.01, image.shape), 0, 1)


def fcmae() -> Figure:
    """Image, masked image, visible sites of each stage, prediction."""
    image, hidden = cells(), random_mask(0, 0, 2, (GRID, GRID), 0.6)
    whole = np.repeat(np.repeat(hidden, PATCH, 0), PATCH, 1)[..., None]
    figure = Figure(figsize=(11, 3.3), layout="constrained")
    axes = figure.subplots(1, 7, width_ratios=[2, 2, 1, 1, 1, 1, 2])
    for place, title, shown in (
        (0, "image, 224×224", image),
        (
            1,
            f"{(~hidden).sum()} of {hidden.size} patches\nare visible",
            np.where(whole, 0.88, image),
        ),
        (6, "decoder: a prediction\nfor each hidden patch", None),
    ):
        plain(axes[place], title)
        if shown is not None:
            axes[place].imshow(shown)
    for stage, width in enumerate((40, 80, 160, 320)):
        draw_sites(axes[2 + stage], hidden, 8 >> stage)
        sites = (~hidden).sum() * (8 >> stage) ** 2
        plain(axes[2 + stage], f"stage {stage + 1}\nstride {4 << stage}\n{sites} × {width}")
    axes[6].imshow(np.where(whole, to_rgb(PREDICTED), 0.95))
    return figure


def to_rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))


def draw_sites(axes: Axes, hidden: npt.NDArray[np.bool_], per_patch: int) -> None:
    """The sites of a stage: a dot for each visible one."""
    sites = np.repeat(np.repeat(~hidden, per_patch, 0), per_patch, 1)
    axes.imshow(np.where(sites[..., None], to_rgb(VISIBLE), 0.94), interpolation="nearest")


def engines() -> Figure:
    """A convolution's window around a visible patch of the first stage."""
    hidden = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0]], bool)
    per_patch = PATCH // 4
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in range(3 * per_patch):
        for column in range(3 * per_patch):
            colour = HIDDEN if hidden[row // per_patch, column // per_patch] else VISIBLE
            for axes in (left, right):
                axes.add_patch(Rectangle((column, row), 0.9, 0.9, color=colour))
    start = per_patch - HALO_SITES
    span = per_patch + 2 * HALO_SITES
    for row in range(start, start + span):
        for column in range(start, start + span):
            inside = per_patch <= row < 2 * per_patch and per_patch <= column < 2 * per_patch
            if not inside and not hidden[row // per_patch, column // per_patch]:
                right.add_patch(Rectangle((column, row), 0.9, 0.9, color=HALO))
    right.add_patch(
        Rectangle((start - 0.05, start - 0.05), span, span, fill=False, ec=PREDICTED, lw=2)
    )
    plain(left, "9 patches of 8×8 sites in stage 1: 4 are visible (blue)")
    plain(
        right,
        "the middle one with its halo of 3 sites: neighbours'\nwhere visible, zeros where hidden",
    )
    for axes in (left, right):
        axes.set(xlim=(-0.5, 3 * per_patch + 0.5), ylim=(3 * per_patch + 0.5, -0.5), aspect="equal")
    return figure


def grn() -> Figure:
    """What GRN's normalised response is for channels of several norms."""
    norms = torch.tensor([0.3, 0.6, 0.8, 1.0, 1.1, 1.4, 1.6, 4.0])
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = range(1, len(norms) + 1)
    left.bar(names, norms, color=VISIBLE)
    left.set(title="G(x): L2 norm of each channel's map", xlabel="channel")
    right.bar(names, norms / norms.mean(), color=PREDICTED)
    right.axhline(1, color="black", lw=0.8)
    right.set(title="N(x): the norm divided by their mean", xlabel="channel")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def plain(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rcParams["svg.hashsalt"] = "fcmae"  # the same file every time
    for draw in (fcmae, engines, grn):
        draw().savefig(out / f"{draw.__name__}.png", dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
