"""The paper's ablations in small: one seed, a fixed budget, judged by frozen features.

    python -m benchmarks.experiments.ablations --data FOLDER

FOLDER has train/CLASS and val/CLASS. Held-out losses compare only where the target and the share of
hidden patches are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.experiments.study import Study, arguments, logged, plot, shrink
from fcmae.config import PretrainConfig
from fcmae.options import parse
from fcmae.pretrain import pretrain
from sparse.engines.dense import DenseSites
from sparse.sizes import PATCH, STRIDES

UNMASKED = "unmasked convolutions"
RUNS: dict[str, list[object]] = {
    "the defaults": [],
    "30 % hidden": ["--mask_ratio", 0.3],
    "80 % hidden": ["--mask_ratio", 0.8],
    UNMASKED: [],
    "no GRN": ["--use_grn", "false"],
    "ConvNeXt V1 blocks": ["--use_grn", "false", "--layer_scale", 1e-6],
    "decoder of 4 blocks": ["--decoder.depth", 4],
    "pixels as they are": ["--norm_pix_loss", "false"],
}


class _ShownAsGrey(DenseSites):
    """All sites of the first stage, the images' hidden patches zeroed (their mean)."""

    def __init__(self, mask_BHW: Tensor, side: int, device: torch.device) -> None:
        super().__init__(torch.zeros_like(mask_BHW), side, device)
        self._visible_B1HW = (~mask_BHW)[:, None].to(device, torch.float32)

    def stem(self, images_BCHW: Tensor, weight_OI44: Tensor, bias_O: Tensor) -> Tensor:
        shown = F.interpolate(self._visible_B1HW, scale_factor=PATCH, mode="nearest")
        return super().stem(images_BCHW * shown, weight_OI44, bias_O)


class Unmasked:
    """Ordinary convolutions over the picture with its hidden patches greyed out.

    What is visible leaks into hidden places and back, and with every layer the mask's edges fade;
    the decoder puts its mask token where patches are hidden, as ever.
    """

    name = "dense"

    def sites(self, mask_BHW: Tensor, device: torch.device) -> Sequence[DenseSites]:
        first = _ShownAsGrey(mask_BHW, PATCH // STRIDES[0], device)
        nothing = torch.zeros_like(mask_BHW)
        return [first, *(DenseSites(nothing, PATCH // stride, device) for stride in STRIDES[1:])]


def main() -> int:
    parser = arguments(__doc__ or "", "ablations")
    parser.add_argument("--img_size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--side", type=int, default=192, help="shorter side of the copies read")
    options = parser.parse_args()
    study = Study(options.out, options.jobs)
    data = shrink(options.data, study.out / "pictures", options.side)
    results = {}
    for name, changes in RUNS.items():
        run = study.out / name.replace(" ", "-").replace("%", "percent")
        given = [
            "--data", data / "train", "--out", run, "--img_size", options.img_size,
            "--epochs", options.epochs, "--precision", options.precision, "--engine", "patch",
            *changes,
        ]  # fmt: skip
        results[name] = study.once(name, lambda: _measured(study, name, run, data, given))  # noqa: B023
    _show(study, results)
    return 0


def _measured(
    study: Study, name: str, run: Path, data: Path, given: list[object]
) -> dict[str, Any]:
    config = parse(PretrainConfig, [str(word) for word in given], "")
    assert config is not None
    if name == UNMASKED:
        with mock.patch("fcmae.pretrain.get_engine", return_value=Unmasked()):
            code = pretrain(config)
    else:
        code = pretrain(config)
    if code:
        raise SystemExit(code)
    found = study.probe(run, data)
    last = (logged(run, "holdout_loss") or [{"holdout_loss": float("nan")}])[-1]
    spread = {key: value for key, value in last.items() if key.startswith("diversity/")}
    return {
        "holdout_loss": last["holdout_loss"],
        "diversity": spread,
        **{key: found[key]["top1"] for key in ("knn5", "knn20", "linear")},
    }


def _show(study: Study, results: dict[str, dict[str, Any]]) -> None:
    print("| | kNN 5 | kNN 20 | linear | held-out loss | diversity, mean and least |")
    print("|---|---:|---:|---:|---:|---:|")
    lines = []
    for name, found in results.items():
        spread = [*found["diversity"].values()] or [float("nan")]
        print(
            f"| {name} | {found['knn5']:.1f} | {found['knn20']:.1f} | {found['linear']:.1f} | "
            f"{found['holdout_loss']:.3f} | {sum(spread) / len(spread):.3f}, {min(spread):.3f} |"
        )
        if name in ("the defaults", "no GRN", "ConvNeXt V1 blocks", UNMASKED):
            lines.append((name, range(1, len(spread) + 1), spread, None))
    plot(lines, ("block", "mean cosine distance of channels"), study.out / "diversity.png")


if __name__ == "__main__":
    raise SystemExit(main())
