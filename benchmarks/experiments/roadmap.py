"""The steps from ResNet to ConvNeXt: size, arithmetic and speed beside the published top-1.

    python -m benchmarks.experiments.roadmap [--size 50|200] [--img_size 224] [--batch_size 4]

GMACs are those of one image of 224×224. Speeds are of this process: a training step without the
optimizer, and inference; medians of rounds in which all steps take turns.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fcmae.inspect.steps import time_in_turns
from finetune.roadmap import Design, Roadmap, designs

PUBLISHED = {
    50: (
        (78.82, 79.36, 79.51, 78.28, 80.50, 80.64, 79.92, 80.57, 80.62, 81.27, 81.41, 81.47, 81.97),
        (4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.15, 4.15, 4.15, 4.15, 4.46, 4.49),
    ),
    200: (
        (81.14, 81.33, 81.59, 80.54, 81.85, 82.64, 82.04, 82.30, 82.19, 82.71, 83.17, 83.35, 83.60),
        (15.01, 14.52, 14.38, 7.23, 16.76, 15.68, 14.63, *(14.81,) * 5, 15.35),
    ),
}
"""Top-1 in percent on ImageNet-1K, and GFLOPs, of each step: arXiv 2201.03545, Tables 10 and 11."""


def gmacs(design: Design) -> float:
    """Billions of multiplications and additions for an image of 224×224."""
    with torch.device("meta"):
        model, image = Roadmap(design).eval(), torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops() / 2e9


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, choices=PUBLISHED, default=50)
    parser.add_argument("--img_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="0 measures no speed")
    options = parser.parse_args()
    road = designs(list(PUBLISHED).index(options.size))
    speeds = measure(road, options) if options.rounds else {}
    table = Table("step", "GMACs", "published", "weights M", "training, images/s", "inference")
    table.add_column("published top-1 %")
    for (name, design), top1, published in zip(road.items(), *PUBLISHED[options.size], strict=True):
        with torch.device("meta"):
            weights = sum(p.numel() for p in Roadmap(design).parameters())
        rates = [f"{options.batch_size / seconds:.1f}" for seconds in speeds.get(name, ())]
        table.add_row(
            name, f"{gmacs(design):.2f}", f"{published:.2f}", f"{weights / 1e6:.1f}",
            *(rates or ("–", "–")), f"{top1:.2f}",
        )  # fmt: skip
    Console(soft_wrap=True, highlight=False).print(table)
    return 0


def measure(road: dict[str, Design], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of a training step and of inference, of each step of the road."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides = (options.img_size, options.img_size)
    images = torch.randn(options.batch_size, 3, *sides, device=device)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)
    models = {name: Roadmap(design).to(device) for name, design in road.items()}

    def train(model: Roadmap) -> None:
        cross_entropy(model.train()(images), labels).backward()

    @torch.no_grad()
    def infer(model: Roadmap) -> None:
        model.eval()(images)

    found = [
        time_in_turns(
            {name: partial(run, model) for name, model in models.items()}, options.rounds, device
        )
        for run in (train, infer)
    ]
    return {name: (found[0][name], found[1][name]) for name in road}


if __name__ == "__main__":
    raise SystemExit(main())
