"""Weights, multiplications and speed of the papers' detectors, and of other backbones.

    .venv/bin/python -m benchmarks.detectors [--side 320] [--rounds 5]

Weights with COCO's 80 classes. GMACs are those of one image of 1280×800 with 1,000 proposals and
100 objects, as in arXiv 2201.03545, Table 3, counted by torch in one forward pass. Speeds are of
images of SIDE × SIDE pixels in this process: a training step without the optimizer, two images with
ten objects each, and inference, one image; medians of rounds in which all models take turns.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from finetune.detector import WIDEST, Detector, Pyramid

CLASSES = 80
SWIN: dict[str, Any] = {"strict_img_size": False}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Mask R-CNN, ResNet-50": ("resnet50", "mask", {}),
    "Mask R-CNN, Swin-T": ("swin_tiny_patch4_window7_224", "mask", SWIN),
    "Mask R-CNN, ConvNeXt-T": ("convnext_tiny", "mask", {}),
    "Mask R-CNN, ConvNeXt V2-T": ("convnextv2_tiny", "mask", {}),
    "Cascade Mask R-CNN, ResNet-50": ("resnet50", "cascade", {}),
    "Cascade Mask R-CNN, Swin-T": ("swin_tiny_patch4_window7_224", "cascade", SWIN),
    "Cascade Mask R-CNN, ConvNeXt-T": ("convnext_tiny", "cascade", {}),
    "Cascade Mask R-CNN, ConvNeXt V2-T": ("convnextv2_tiny", "cascade", {}),
    "Mask R-CNN, atto, pyramid of 80": ("convnextv2_atto", "mask", {"width": 80}),
}


def build(name: str, head: str, args: dict[str, Any]) -> Detector:
    """A detector of COCO's classes with the papers' widths, if not given."""
    width = args.get("width", WIDEST)
    given = {key: value for key, value in args.items() if key != "width"}
    model = Detector(Pyramid(name, given, 3, width), CLASSES, head, True, 32)
    model.heads.score_thresh, model.heads.detections_per_img = 0.0, 100
    return model


def multiplications(model: Detector) -> float:
    """Billions of multiplications and additions of an image of 1280×800."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(torch.randn(1, 3, 800, 1280))
    return counter.get_total_flops() / 2e9


def timed(model: Detector, side: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Functions that return images per second: of training, and of inference."""
    images = torch.randn(2, 3, side, side)
    corners = torch.rand(10, 2) * side / 2
    boxes = torch.cat([corners, corners + side / 4], 1)
    masks = torch.zeros(10, side, side, dtype=torch.uint8)
    target = {"boxes": boxes, "labels": torch.arange(1, 11), "masks": masks}

    def seconds(step: Callable[[], Any], count: int) -> float:
        began = time.perf_counter()
        step()
        return count / (time.perf_counter() - began)

    def trained() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(images, [target, target])
        loss.backward()
        return loss

    def train() -> float:
        model.train()
        return seconds(trained, 2)

    @torch.no_grad()
    def infer() -> float:
        model.eval()
        return seconds(lambda: model(images[:1]), 1)

    return train, infer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--side", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    models = {label: build(*parts) for label, parts in MODELS.items()}
    clocks = {label: timed(model, options.side) for label, model in models.items()}
    speeds: dict[str, list[list[float]]] = {label: [[], []] for label in models}
    for round_number in range(options.rounds + 1):
        for label, functions in clocks.items():
            for found, function in zip(speeds[label], functions, strict=True):
                value = function()
                if round_number:  # the first is a warm-up
                    found.append(value)
    table = Table("", "weights M", "GMACs", "training images/s", "inference images/s")
    for label, model in models.items():
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        medians = [f"{statistics.median(found):.2f}" for found in speeds[label]]
        table.add_row(label, f"{weights:.0f}", f"{multiplications(model):.0f}", *medians)
    console = Console(highlight=False, width=110)
    console.print(table)
    console.print(
        f"{options.side}×{options.side}, {options.rounds} rounds, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}, timm {timm.__version__}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
