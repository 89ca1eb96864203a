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


def patch_statistics(
    target_BPHW: Tensor, valid_BPHW: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch over its pixels and channels, each (B, 1, h, w).

    The variance is unbiased, with 1e-6 added, as in the official code. With `valid_BPHW` (0 or 1),
    only pixels that count take part; of none, the mean is 0.
    """
    if valid_BPHW is None:
        variance, mean = target_BPHW.var(1, keepdim=True), target_BPHW.mean(1, keepdim=True)
    else:
        count = valid_BPHW.sum(1, keepdim=True)
        mean = (target_BPHW * valid_BPHW).sum(1, keepdim=True) / count.clamp_min(1)
        squares = ((target_BPHW - mean).square() * valid_BPHW).sum(1, keepdim=True)
        variance = squares / (count - 1).clamp_min(1)
    return mean, (variance + TARGET_EPS).sqrt()


def reconstruction_loss(
    pred_BPHW: Tensor,
    images_BCHW: Tensor,
    mask_BHW: Tensor,
    norm_pix: bool,
    valid_BHW: Tensor | None = None,
) -> Tensor:
    """Mean squared error over the pixels of the hidden patches, in float32.

    With `norm_pix` each patch of the target is normalised by its own mean and deviation, so that
    predicting each patch's mean gives a loss of 1.

    With `valid_BHW`, pixels (B, H, W) that do not count take no part, nor do patches without any
    that do: the loss of an image is the mean over its other hidden patches, and 0 without any; that
    of a batch the mean over its images, so that it is the mean of the losses of equal parts.
    """
    p = images_BCHW.shape[2] // pred_BPHW.shape[2]
    target, valid = patchify(images_BCHW.float(), p), valid_patches(valid_BHW, images_BCHW, p)
    if norm_pix:
        mean, deviation = patch_statistics(target, valid)
        target = (target - mean) / deviation
    error_BPHW = (pred_BPHW.float() - target).square()
    if valid is None:
        return (error_BPHW.mean(1) * mask_BHW).sum() / mask_BHW.sum().clamp_min(1)
    count_BHW = valid.sum(1)
    error_BHW = (error_BPHW * valid).sum(1) / count_BHW.clamp_min(1)
    scored_BHW = mask_BHW & (count_BHW > 0)
    sums_B = (error_BHW * scored_BHW).sum((1, 2))
    return (sums_B / scored_BHW.sum((1, 2)).clamp_min(1)).mean()


def valid_patches(valid_BHW: Tensor | None, images_BCHW: Tensor, p: int) -> Tensor | None:
    """Which values of the patches of images count, (B, P·P·C, h, w) of 0 and 1; None if all do."""
    if valid_BHW is None:
        return None
    return patchify(valid_BHW[:, None].expand(images_BCHW.shape).float(), p)


def to_pixels(
    pred_BPHW: Tensor, images_BCHW: Tensor, norm_pix: bool, valid_BHW: Tensor | None = None
) -> Tensor:
    """Predicted patches → images (B, C, H, W) in the units of `images_BCHW`.

    With `norm_pix` each patch gets its own mean and deviation back, those of the pixels that count.
    """
    pred, p = pred_BPHW.float(), images_BCHW.shape[2] // pred_BPHW.shape[2]
    if norm_pix:
        valid = valid_patches(valid_BHW, images_BCHW, p)
        mean, deviation = patch_statistics(patchify(images_BCHW.float(), p), valid)
        pred = pred * deviation + mean
    return unpatchify(pred, p)
