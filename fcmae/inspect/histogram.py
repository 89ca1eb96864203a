"""A control for frozen features: colours and gradients of an image, in which nothing is learned.

Colours are a histogram, gradients another of their orientations in 4×4 cells. Each is the square
root of shares that sum to 1, so both have unit length and their cosines compare distributions.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fcmae.data.resize import Valid
from fcmae.data.sample import Batch
from sparse.errors import InputError

Floats = npt.NDArray[np.float32]

HSV_BINS = (8, 3, 8)
"""Bins of hue, saturation and value, of images with three channels."""

BINS = 16
"""Bins of each channel of other images."""

CELLS, ORIENTATIONS = 4, 9
"""Cells in a row and in a column, and orientations from 0° to 180° in each."""

SIDE = 128
"""Longer sides are reduced to this, in pixels, which bounds the time."""


def require_skimage() -> None:
    """Raise InputError if scikit-image is not installed."""
    try:
        import skimage.feature  # noqa: F401
    except ImportError as error:
        raise InputError("baseline needs scikit-image: pip install 'fcmae[samples]'") from error


def histograms(batch: Batch) -> Tensor:
    """Features (B, F) of the crops of a batch, as they are before normalisation.

    F is 336 for three channels, else 16 for each channel and 144.
    """
    images = batch.images / 255 if batch.images.dtype == torch.uint8 else batch.images
    valid = torch.ones(images[:, 0].shape, dtype=torch.bool) if batch.valid is None else batch.valid
    images = images.clamp(0, 1).masked_fill(~valid[:, None], 0)
    size = min(images.shape[2], SIDE), min(images.shape[3], SIDE)
    small = F.adaptive_avg_pool2d(images, size).permute(0, 2, 3, 1).numpy()
    counted = F.adaptive_avg_pool2d(valid.float(), size).numpy() > 0.5
    each = zip(small, counted, strict=True)
    return torch.from_numpy(np.stack([np.append(colours(x, v), gradients(x)) for x, v in each]))


def colours(image_HWC: Floats, valid_HW: Valid) -> Floats:
    """Square roots of the shares of the valid pixels in each bin of hue, saturation and value,
    hue changing slowest; or, unless there are three channels, in each bin of each channel."""
    from skimage.color import rgb2hsv

    pixels, channels = image_HWC[valid_HW], image_HWC.shape[-1]
    if channels == 3:
        counts = np.histogramdd(rgb2hsv(pixels), HSV_BINS, [(0, 1)] * 3)[0]
    else:
        counts = np.stack([np.histogram(pixels[:, c], BINS, (0, 1))[0] for c in range(channels)])
    return np.sqrt(counts.ravel() / max(counts.sum(), 1)).astype(np.float32)


def gradients(image_HWC: Floats) -> Floats:
    """Square roots of the shares of gradient in each orientation of each cell, rows of cells first:
    at each pixel of the channel with the largest gradient. Zeros if there is none."""
    from skimage.feature import hog

    height, width = image_HWC.shape[:2]
    return hog(
        image_HWC, ORIENTATIONS, (height // CELLS, width // CELLS), (CELLS, CELLS), "L1-sqrt",
        channel_axis=-1,
    ).astype(np.float32)  # fmt: skip
