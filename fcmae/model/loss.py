"""The reconstruction target and loss (arXiv 2301.00808, section 3; He et al., MAE, section 3).

Patches of P pixels a side are on a (B, C·P², h, w) map whose channel axis is in the order (row,
column, channel) and innermost in memory, like the decoder's predictions.
"""

from torch import Tensor

from sparse.sizes import PATCH

TARGET_EPS = 1e-6


def patchify(images_BCHW: Tensor, p: int = PATCH) -> Tensor:
    """(B, C, P·h, P·w) pixels → (B, P·P·C, h, w)."""
    b, c, height, width = images_BCHW.shape
    h, w = height // p, width // p
    blocks = images_BCHW.reshape(b, c, h, p, w, p)
    patches_BHWP = blocks.permute(0, 2, 4, 3, 5, 1).reshape(b, h, w, p * p * c)
    return patches_BHWP.permute(0, 3, 1, 2)


def unpatchify(patches_BPHW: Tensor, p: int = PATCH) -> Tensor:
    """(B, P·P·C, h, w) → (B, C, P·h, P·w); the inverse of `patchify`."""
    b, _, h, w = patches_BPHW.shape
    blocks = patches_BPHW.reshape(b, p, p, -1, h, w)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(b, -1, h * p, w * p)


def patch_statistics(target_BPHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch over its pixels and channels, each (B, 1, h, w).

    The variance is unbiased, with 1e-6 added, as in the official code.
    """
    variance, mean = target_BPHW.var(1, keepdim=True), target_BPHW.mean(1, keepdim=True)
    return mean, (variance + TARGET_EPS).sqrt()


def reconstruction_loss(
    pred_BPHW: Tensor, images_BCHW: Tensor, mask_BHW: Tensor, norm_pix: bool
) -> Tensor:
    """Mean squared error over the pixels of the hidden patches, in float32.

    With `norm_pix` each patch of the target is normalised by its own mean and deviation, so that
    predicting each patch's mean gives a loss of 1.
    """
    target = patchify(images_BCHW.float(), images_BCHW.shape[2] // pred_BPHW.shape[2])
    if norm_pix:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    error_BHW = (pred_BPHW.float() - target).square().mean(1)
    return (error_BHW * mask_BHW).sum() / mask_BHW.sum().clamp_min(1)


def to_pixels(pred_BPHW: Tensor, images_BCHW: Tensor, norm_pix: bool) -> Tensor:
    """Predicted patches → images (B, C, H, W) in the units of `images_BCHW`.

    With `norm_pix` each patch gets its own mean and deviation back.
    """
    pred, p = pred_BPHW.float(), images_BCHW.shape[2] // pred_BPHW.shape[2]
    if norm_pix:
        mean, deviation = patch_statistics(patchify(images_BCHW.float(), p))
        pred = pred * deviation + mean
    return unpatchify(pred, p)
