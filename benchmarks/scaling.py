"""Images/s and memory of each engine as images and batches grow: a plot and a table.

    .venv/bin/python benchmarks/scaling.py [--model atto] [--rounds 3] [--plot docs/scaling.png]

Encoder, forward and backward, float32, 60 % hidden. Medians of interleaved rounds; each
memory measurement runs in its own process.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fcmae.commands.bench import BenchConfig
from fcmae.inspect.steps import example, make_step, peak_memory, time_in_turns, visible_share
from sparse import available_engines

SIDES = (96, 160, 224, 320, 448)
SIDES_BATCH = 8
BATCHES = (1, 4, 16, 64)
BATCHES_SIDE = 224


@dataclass(frozen=True)
class Point:
    """One engine at one size: speed in images/s, peak memory in MB."""

    engine: str
    side: int
    batch: int
    speed: float
    memory: float

    @property
    def visible_megapixels(self) -> float:
        """Visible pixels in a batch, in millions."""
        share = visible_share(BenchConfig(img_size=self.side))
        return self.batch * share * self.side**2 / 1e6

    @property
    def pixel_speed(self) -> float:
        """Millions of visible pixels per second."""
        return self.speed / self.batch * self.visible_megapixels


def measure(model: str, side: int, batch: int, rounds: int) -> list[Point]:
    cpu = torch.device("cpu")
    config = BenchConfig(batch_size=batch, img_size=side)
    images, mask = example(config, cpu)
    steps = {
        name: partial(make_step(name, model, cpu), images, mask) for name in available_engines()
    }
    seconds = time_in_turns(steps, rounds, cpu)
    points = []
    for name, value in seconds.items():
        memory = peak_memory(name, model, config)
        points.append(Point(name, side, batch, batch / value, memory or float("nan")))
    return points


def print_table(points: list[Point]) -> None:
    """Print a Markdown table with one row per size."""
    engines = list(dict.fromkeys(point.engine for point in points))
    heads = [f"{engine}, {what}" for engine in engines for what in ("images/s", "Mpx/s", "MB")]
    print(f"| px | batch | {' | '.join(heads)} |")
    print("|---:|---:|" + "---:|" * len(heads))
    for side, batch in dict.fromkeys((point.side, point.batch) for point in points):
        cells = [
            f"{point.speed:.1f} | {point.pixel_speed:.2f} | {point.memory:.0f}"
            for point in points
            if (point.side, point.batch) == (side, batch)
        ]
        print(f"| {side} | {batch} | {' | '.join(cells)} |")


def draw(points: list[Point], model: str, path: Path) -> None:
    """Plot visible megapixels per second, and memory per visible megapixel, over side and batch."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row")
    rows = (
        ("visible megapixels / s", lambda point: point.pixel_speed),
        ("MB per visible megapixel", lambda point: point.memory / point.visible_megapixels),
    )
    columns = (
        (f"image side in px, batch {SIDES_BATCH}", "side", lambda p: p.batch == SIDES_BATCH),
        (f"batch, {BATCHES_SIDE} px", "batch", lambda p: p.side == BATCHES_SIDE),
    )
    for engine in dict.fromkeys(point.engine for point in points):
        for i, (_, value) in enumerate(rows):
            for j, (_, key, belongs) in enumerate(columns):
                line = sorted(
                    (getattr(point, key), value(point))
                    for point in points
                    if point.engine == engine and belongs(point)
                )
                axes[i][j].plot(*zip(*line, strict=True), marker="o", label=engine)
    for i, (ylabel, _) in enumerate(rows):
        for j, (xlabel, _, _) in enumerate(columns):
            axes[i][j].set(xlabel=xlabel, ylabel=ylabel if j == 0 else None, xscale="log")
            ticks = SIDES if j == 0 else (*BATCHES[:2], SIDES_BATCH, *BATCHES[2:])
            axes[i][j].set_xticks(ticks, [str(tick) for tick in ticks])
            axes[i][j].minorticks_off()
            axes[i][j].set_ylim(bottom=0)
            axes[i][j].grid(alpha=0.3)
    axes[0][0].legend()
    threads = torch.get_num_threads()
    figure.suptitle(
        f"{model} encoder, forward and backward, float32, 60 % hidden, {threads} threads"
    )
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="atto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("scaling.png"))
    options = parser.parse_args()
    sizes = [(side, SIDES_BATCH) for side in SIDES] + [(BATCHES_SIDE, batch) for batch in BATCHES]
    points = []
    for side, batch in sizes:
        points += measure(options.model, side, batch, options.rounds)
        print(f"{side} px, batch {batch}: done", file=sys.stderr, flush=True)
    print_table(points)
    draw(points, options.model, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
