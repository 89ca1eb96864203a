"""Samples, batches, and their transfer to the device.

Every data set returns `Sample`s and every loader `Batch`es; a kind of training fills the fields it
needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fcmae.data.augment import Geometry
from fcmae.data.resize import Pixels, Valid, as_float
from sparse.devices import to_device
from sparse.engines.base import Layout


@dataclass
class Sample:
    """One image of a batch to be.

    Attributes:
        image: (C, H, W), uint8 in [0, 255] or float32 in [0, 1]; None if it can't be read.
        index: position of the image that was read.
        mask: (h, w) bool, one entry per patch, True = hidden.
        valid: (H, W) bool, True where a pixel counts; None if all do.
        target: the label: a class, an array, or objects (`ObjectLabels.cut`).
        geometry: how the crop was cut, to transform masks, boxes and predictions.
        bad: (name, reason) of the images that could not be read for this sample.
    """

    image: Pixels | None
    index: int
    mask: npt.NDArray[np.bool_] | None = None
    valid: Valid | None = None
    target: Any = None
    geometry: Geometry | None = None
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Batch:
    """Stacked samples; those without an image are skipped.

    Attributes:
        images: (B, C, H, W), uint8 in [0, 255] or float32 in [0, 1].
        indices: (B,) int64, positions of the images that were read.
        masks: (B, h, w) bool, True = hidden.
        valid: (B, H, W) bool, True where a pixel counts.
        targets: (B, …), the labels; of objects a dictionary: theirs end to end, and `counts` (B,),
            how many each image has; see `each_target`.
        sites: the layout of the encoder's sites for `masks`, if it is made ahead.
        geometry: how each crop was cut.
        bad: (name, reason) of images that could not be read.
        missing: (name, reason) of the first sample without an image; empty if all have one.
    """

    images: Tensor
    indices: Tensor
    masks: Tensor | None = None
    valid: Tensor | None = None
    targets: Any = None
    sites: Layout | None = None
    geometry: list[Geometry | None] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.indices)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        """Return the batch with each of its tensors moved, as into memory of another kind."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        parts: dict[str, Any] = {name: move(tensor) for name, tensor in tensors.items()}
        parts["targets"] = map_tensors(self.targets, move)
        if self.sites is not None:
            parts["sites"] = replace(self.sites, tables=move(self.sites.tables))
        return replace(self, **parts)

    def targets_on(self, device: torch.device) -> Any:
        """Return the targets with their tensors on a device."""
        return map_tensors(self.targets, lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self.moved(Tensor.pin_memory)


def collate(
    samples: Sequence[Sample],
    lay_out: Callable[[Tensor], Layout] | None = None,
    share: bool = False,
) -> Batch:
    """Stack samples; 8-bit images become float if the batch has deeper ones.

    Args:
        samples: those without an image are skipped.
        lay_out: makes the layout of the sites of the masks, if any.
        share: stack in memory that processes share. torch itself would share it in a thread of the
            worker: without space there, the batch is dropped and the training process waits for it
            forever.
    """
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in good if sample.image is not None]
    if len({image.dtype for image in images}) > 1:
        images = [as_float(image) for image in images]
    masks = _joined([sample.mask for sample in good])
    batch = Batch(
        torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8),
        torch.tensor([sample.index for sample in good], dtype=torch.int64),
        masks,
        _valid(good),
        _joined([sample.target for sample in good]),
        sites=None if lay_out is None or masks is None else lay_out(masks),
        geometry=[sample.geometry for sample in good],
        bad=[bad for sample in samples for bad in sample.bad],
        missing=next((sample.bad for sample in samples if sample.image is None), []),
    )
    return batch.moved(Tensor.share_memory_) if share else batch


def _valid(samples: Sequence[Sample]) -> Tensor | None:
    """Which pixels of each sample count; None if all do."""
    if all(sample.valid is None for sample in samples):
        return None
    every = np.ones(next(s.valid.shape for s in samples if s.valid is not None), np.bool_)
    return torch.from_numpy(np.stack([every if s.valid is None else s.valid for s in samples]))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a tensor, or a dictionary's tensors, changed; all else as it is."""
    if isinstance(value, dict):
        return {name: map_tensors(part, change) for name, part in value.items()}
    return change(value) if isinstance(value, Tensor) else value


def _joined(values: Sequence[Any]) -> Any:
    """Stacked values, or those of dictionaries end to end; None if there are none.

    End to end, since a worker opens a file for each tensor that it sends.
    """
    if not values or values[0] is None:
        return None
    if isinstance(values[0], dict):
        joined: dict[str, Any] = {"counts": torch.tensor([len(value["boxes"]) for value in values])}
        for name, first in values[0].items():
            parts = [value[name] for value in values]
            if isinstance(first, list):
                joined[name] = [item for part in parts for item in part]
            else:
                joined[name] = torch.from_numpy(np.concatenate(parts))
        return joined
    return torch.from_numpy(np.stack([np.asarray(value) for value in values]))


def each_target(targets: Any) -> Sequence[Any]:
    """Return the label of each image: the rows of a tensor, or a dictionary of its objects."""
    if isinstance(targets, Tensor):
        return list(targets)
    counts = targets["counts"].tolist()
    ends = np.cumsum(counts).tolist()
    return [
        {
            name: value[n : n + 1] if name == "size" else value[end - count : end]
            for name, value in targets.items()
            if name != "counts"
        }
        for n, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def normalise(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    valid: Tensor | None = None,
) -> Tensor:
    """Return (images / 255 - mean) / std as float32 on the device; float images are not divided.

    Where pixels are not `valid` (B, H, W), the result is 0, the mean. The bytes are copied to the
    device, asynchronously if the batch is pinned.
    """
    units = 255.0 if images.dtype == torch.uint8 else 1.0
    scaled = to_device(images, device).to(torch.float32, copy=True)
    factor, shift = _constants(tuple(mean), tuple(std), units, scaled.device)
    scaled = scaled.mul_(factor).sub_(shift)
    return scaled if valid is None else scaled.masked_fill_(~to_device(valid, device)[:, None], 0)


@lru_cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], units: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What `normalise` multiplies by and subtracts, (1, C, 1, 1): copied to the device once."""
    mean_1C11, std_1C11 = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
    return 1 / (units * std_1C11), mean_1C11 / std_1C11
