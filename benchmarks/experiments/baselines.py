"""One recipe, many models: from scratch, and ours after pretraining.

    python -m benchmarks.experiments.baselines --data FOLDER --weights RUN

FOLDER has train, val and optionally test; RUN is a pretraining run, such as that of label_shares.
Each model searches its own learning rate on val with one seed. Speeds are of this process at the
end, all models in turns: a training step without the optimizer, and inference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.experiments.with_torchvision  # noqa: F401  # timm then knows its models
from benchmarks.experiments.folders import label_share, shrink, with_test
from benchmarks.experiments.study import JUDGES, Study, arguments, search

OURS = "convnextv2_atto"
PRETRAINED = "pretrained"
RATES = (2e-3, 8e-3, 3.2e-2)
"""First rates of the search: base_lr, for a batch of 256."""
MODELS = {
    OURS: "ConvNeXt V2 atto", "convnextv2_tiny": "ConvNeXt V2 tiny",
    "convnext_atto": "ConvNeXt V1 atto", "convnext_tiny": "ConvNeXt V1 tiny",
    "resnet50": "ResNet-50", "resnext50_32x4d": "ResNeXt-50", "seresnet50": "SE-ResNet-50",
    "vgg16": "VGG-16", "legacy_xception": "Xception", "inception_v3": "Inception V3",
    "densenet121": "DenseNet-121", "mobilenetv1_100": "MobileNet V1",
    "mobilenetv2_100": "MobileNet V2", "shufflenet_v2_x1_0": "ShuffleNet V2",
    "squeezenet1_1": "SqueezeNet", "efficientnet_b0": "EfficientNet-B0",
    "efficientnetv2_s": "EfficientNetV2-S", "regnety_016": "RegNetY-1.6GF",
    "repvgg_a2": "RepVGG-A2", "vit_small_patch16_224": "ViT-S/16",
    "swin_tiny_patch4_window7_224": "Swin-T", "mixer_s16_224": "MLP-Mixer-S/16",
}  # fmt: skip
"""timm's names, and those of `with_torchvision`, of all models from scratch."""
FOLDED = "repvgg_a2"
"""Its branches become one convolution for inference."""
TORCHVISION = "benchmarks.experiments.with_torchvision"


def main() -> int:
    parser = arguments(__doc__ or "", "baselines", img_size=128, epochs=20, side=256)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--share", type=int, default=30, help="labels, in percent of train")
    rows = [PRETRAINED, *MODELS]
    parser.add_argument("--only", nargs="+", choices=rows, default=rows)
    parser.add_argument("--speed_batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    study = Study(options)
    data = with_test(shrink(options.data, study.out / "pictures", options.side), study.out / "all")
    data = label_share(data, options.share, study.out / f"labels-{options.share}")
    common = ["--img_size", options.img_size, "--precision", options.precision, "--val_epochs", 2]

    def tried(row: str, rate: float) -> dict[str, float]:
        weights = options.weights if row == PRETRAINED else "none"
        model = OURS if row == PRETRAINED else row
        given = [*common, "--model", model, "--weights", weights, "--optim.base_lr", rate]
        given += ["--epochs", options.epochs]
        name = f"runs/{row}-{rate:g}"
        found: dict[str, float] = study.once(
            f"{row}/{rate:g}", lambda: study.finetune(name, data, *given, module=TORCHVISION)
        )
        return found

    def best(row: str) -> dict[str, Any]:
        rate, found = search(study, RATES, partial(tried, row))
        return {"rate": rate, **found}

    found = study.together({row: partial(best, row) for row in options.only})
    speeds = study.once("speeds", lambda: measure(options))
    print("| model | weights M | GMACs | training, images/s | inference | rate | ", end="")
    print("val top-1 % | test top-1 % | rest of train |")
    print(f"|---|{'---:|' * 8}")
    for row, result in found.items():
        about = speeds[OURS if row == PRETRAINED else row]
        name = f"**{MODELS[OURS]}, pretrained**" if row == PRETRAINED else MODELS[row]
        tops = (f"{result[split]:.1f}" for split in JUDGES)
        print(
            f"| {name} | {about['weights']:.1f} | {about['gmacs']:.2f} | {about['training']:.0f} | "
            f"{about['inference']:.0f} | {result['rate']:g} | {' | '.join(tops)} |"
        )
    draw(found, speeds, study.out / "baselines.png")
    return 0


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Millions of weights, billions of multiplications, and images/s of training and inference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sides, found = (options.img_size, options.img_size), dict[str, dict[str, float]]()
    images = torch.randn(options.speed_batch, 3, *sides, device=device)
    labels = torch.zeros(len(images), dtype=torch.long, device=device)
    models, folded = dict[str, nn.Module](), dict[str, nn.Module]()
    for name in MODELS:
        models[name] = create(name, sides).to(device)
        folded[name] = reparameterize_model(models[name]) if name == FOLDED else models[name]
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), counter:
            folded[name].eval()(images[:1])
        millions = sum(p.numel() for p in folded[name].parameters()) / 1e6
        found[name] = {"weights": millions, "gmacs": counter.get_total_flops() / 2e9}

    def train(model: nn.Module) -> None:
        cross_entropy(model.train()(images), labels).backward()

    def infer(model: nn.Module) -> None:
        with torch.no_grad():
            model.eval()(images)

    for kind, step, chosen in (("training", train, models), ("inference", infer, folded)):
        seconds: dict[str, list[float]] = {name: [] for name in MODELS}
        for _ in range(options.rounds + 1):
            for name, model in chosen.items():
                began = time.perf_counter()
                step(model)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
        for name, taken in seconds.items():
            found[name][kind] = len(images) / statistics.median(taken[1:])
    return found


def create(name: str, sides: tuple[int, int]) -> nn.Module:
    """A model for ten classes; those with positions are built for the images' size."""
    try:
        return timm.create_model(name, num_classes=10, img_size=sides)
    except TypeError:
        return timm.create_model(name, num_classes=10)


def draw(found: dict[str, Any], speeds: dict[str, dict[str, float]], out: Path) -> None:
    """Top-1 on the rest of train over images/s of inference."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="images/s, inference", ylabel="top-1 % on the rest of train")
    for row, result in found.items():
        speed, ours = speeds[OURS if row == PRETRAINED else row]["inference"], row == PRETRAINED
        axes.scatter(speed, result["rest"], color="C1" if ours else "C0")
        name = "atto, pretrained" if ours else MODELS[row]
        axes.annotate(name, (speed, result["rest"]), (4, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
