"""Images and masks side by side, and their way to the device."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fcmae.data.decode import Pixels
from sparse.devices import to_device


@dataclass
class Sample:
    """One image with its mask, and the bad files that were met on the way to it."""

    image: Pixels
    mask: npt.NDArray[np.bool_]
    index: int
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Batch:
    """Samples side by side.

    images (B, C, H, W), uint8 in [0, 255] or float32 in [0, 1]; masks (B, h, w) bool, True =
    hidden; indices (B,) int64, the files that were read; bad, the (name, reason) of files that
    could not be and were replaced.
    """

    images: Tensor
    masks: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where copies to a GPU need not wait."""
        return Batch(
            self.images.pin_memory(), self.masks.pin_memory(), self.indices.pin_memory(), self.bad
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples; 8-bit images become float where deeper ones stand beside them."""
    images = [sample.image for sample in samples]
    if len({image.dtype for image in images}) > 1:
        images = [as_float(image) for image in images]
    return Batch(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack([sample.mask for sample in samples])),
        torch.tensor([sample.index for sample in samples]),
        [bad for sample in samples for bad in sample.bad],
    )


def as_float(image: Pixels) -> npt.NDArray[np.float32]:
    """Return pixels in units of [0, 1]: uint8 divided by 255, float32 as it is."""
    values = image.astype(np.float32, copy=False)
    return values / np.float32(255) if image.dtype == np.uint8 else values


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> Tensor:
    """Return (images / 255 - mean) / std as float32 on the device; float images are not divided.

    The copy to the device is of the bytes, and does not wait where the batch is pinned.
    """
    units = 255.0 if images.dtype == torch.uint8 else 1.0
    scaled = to_device(images, device).to(torch.float32, copy=True)
    std_C = torch.tensor(std, dtype=torch.float32, device=scaled.device)
    mean_C = torch.tensor(mean, dtype=torch.float32, device=scaled.device)
    scaled.mul_((1 / (units * std_C)).view(1, -1, 1, 1))
    return scaled.sub_((mean_C / std_C).view(1, -1, 1, 1))
