"""`fcmae pretrain` with ordinary convolutions, for the paper's comparison; takes the same options.

Only the image's hidden patches are greyed out: visible content leaks into hidden positions and
back, and the mask's edges blur with every layer. The decoder puts its mask token at hidden patches,
as usual.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fcmae.config.parsing import parse
from fcmae.config.pretraining import PretrainConfig
from fcmae.train.pretraining import pretrain
from sparse.engines.dense import DenseSites
from sparse.sizes import PATCH, SIDES


class _ShownAsGrey(DenseSites):
    """All sites of the first stage, with the images' hidden patches set to zero (the mean)."""

    def __init__(self, mask_BHW: Tensor, side: int, device: torch.device) -> None:
        super().__init__(torch.zeros_like(mask_BHW), side, device)
        self._visible_B1HW = (~mask_BHW)[:, None].to(device, torch.float32)

    def stem(self, images_BCHW: Tensor, weight_OI44: Tensor, bias_O: Tensor) -> Tensor:
        shown = F.interpolate(self._visible_B1HW, scale_factor=PATCH, mode="nearest")
        return super().stem(images_BCHW * shown, weight_OI44, bias_O)


class Unmasked:
    """An engine that skips nothing."""

    name = "dense"

    def sites(self, mask_BHW: Tensor, device: torch.device) -> Sequence[DenseSites]:
        first = _ShownAsGrey(mask_BHW, SIDES[0], device)
        nothing = torch.zeros_like(mask_BHW)
        return [first, *(DenseSites(nothing, side, device) for side in SIDES[1:])]


def main() -> int:
    config = parse(PretrainConfig, sys.argv[1:], "")
    assert config is not None
    with mock.patch("sparse.encoder.get_engine", return_value=Unmasked()):
        return pretrain(config)


if __name__ == "__main__":
    raise SystemExit(main())
