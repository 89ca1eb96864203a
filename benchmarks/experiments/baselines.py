"""Other models from scratch with the same fine-tuning recipe, and ours after pretraining.

    python -m benchmarks.experiments.baselines --data FOLDER --weights RUN

FOLDER has train, val and test; RUN is a run of pretraining, such as that of label_shares.
"""

from __future__ import annotations

from pathlib import Path

import timm

from benchmarks.experiments.study import Study, arguments, shrink

MODELS = ("atto", "convnext_atto", "resnet50", "swin_tiny_patch4_window7_224")


def main() -> int:
    parser = arguments(__doc__ or "", "baselines")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=(4e-3, 1.6e-2))
    parser.add_argument("--side", type=int, default=256, help="shorter side of the copies read")
    options = parser.parse_args()
    study = Study(options)
    data = shrink(options.data, study.out / "pictures", options.side)
    common = [
        "--img_size", options.img_size, "--epochs", options.epochs, "--val_epochs", 5,
        "--precision", options.precision,
    ]  # fmt: skip
    print("| model | weights M | images/s | rate | val top-1 % | test top-1 % |")
    print("|---|---:|---:|---:|---:|---:|")
    for model, weights in [*((model, None) for model in MODELS), ("atto", options.weights)]:
        name = f"{model}-{'pretrained' if weights else 'scratch'}"
        tried = {}
        for rate in options.rates:
            given = ["--model", model, "--weights", weights or "none", "--optim.base_lr", rate]
            tried[rate] = study.once(
                f"{name}/{rate:g}",
                lambda: study.finetune(f"runs/{name}-{rate:g}", data, *common, *given),  # noqa: B023
            )
        rate = max(tried, key=lambda rate: tried[rate]["val"])
        full = f"convnextv2_{model}" if model == "atto" else model
        size = sum(p.numel() for p in timm.create_model(full, num_classes=10).parameters()) / 1e6
        found = tried[rate]
        print(
            f"| {name} | {size:.1f} | {found['images_per_s']:.0f} | {rate:g} | "
            f"{found['val']:.1f} | {found['test']:.1f} |", flush=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
