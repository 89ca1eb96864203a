"""Labelled pictures side by side, and those to measure on: centre crops, each once."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.data.augment import center_box
from fcmae.data.batch import as_float, normalise
from fcmae.data.decode import BadImage, Pixels, read_picture
from fcmae.data.files import FileList
from fcmae.data.labelled import Labels
from fcmae.data.loader import lost_workers, make_loader

SHOWN = 20
"""Most pictures that are told one by one."""

_log = logging.getLogger(__name__)


@dataclass
class LabelledSample:
    """An image (C, H, W), or None where it can't be read; its class, its file, and bad files."""

    image: Pixels | None
    label: int
    index: int
    bad: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class LabelledBatch:
    """Samples side by side, those without image left out.

    images (B, C, H, W), uint8 in [0, 255] or float32 in [0, 1]; labels and indices (B,) int64.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> "LabelledBatch":
        """Return the batch in page-locked memory, from where copies to a GPU need not wait."""
        return LabelledBatch(
            self.images.pin_memory(), self.labels.pin_memory(), self.indices.pin_memory(), self.bad
        )


def collate_labelled(samples: Sequence[LabelledSample]) -> LabelledBatch:
    """Join samples; 8-bit images become float where deeper ones stand beside them."""
    good = [(s.image, s.label, s.index) for s in samples if s.image is not None]
    images = [image for image, _, _ in good]
    if len({image.dtype for image in images}) > 1:
        images = [as_float(image) for image in images]
    return LabelledBatch(
        torch.from_numpy(np.stack(images)) if images else torch.empty(0, dtype=torch.uint8),
        torch.tensor([label for _, label, _ in good], dtype=torch.int64),
        torch.tensor([index for _, _, index in good], dtype=torch.int64),
        [bad for sample in samples for bad in sample.bad],
    )


class EvalDataset(Dataset[LabelledSample]):
    """Centre crops of files, by index. `labels` is None where classes are not known (-1 then)."""

    def __init__(
        self,
        files: FileList,
        labels: Labels | None,
        img_size: tuple[int, int],
        in_chans: int,
        crop_pct: float,
        interpolation: str,
        max_pixels: int,
        prefix: str = "",
    ) -> None:
        self.files, self.labels = files, labels
        self.img_size, self.in_chans = img_size, in_chans
        self.crop_pct, self.interpolation = crop_pct, interpolation
        self.max_pixels = max_pixels
        self.prefix = prefix

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> LabelledSample:
        """Return the sample, without an image where the file can't be read."""
        label = -1 if self.labels is None else int(self.labels[index])
        try:
            picture = read_picture(self.files.path(index), self.in_chans, self.max_pixels)
            box = center_box(*picture.size, self.img_size, self.crop_pct)
            image = picture.resized(box, self.img_size, interpolation=self.interpolation)
        except BadImage as error:
            return LabelledSample(
                None, label, index, [(self.prefix + self.files.name(index), error.reason)]
            )
        return LabelledSample(image, label, index)


def tell_left_out(bad: Sequence[tuple[str, str]]) -> None:
    """Log the (name, reason) of pictures that can't be read, the first `SHOWN` of them."""
    for name, reason in bad[:SHOWN]:
        _log.warning("left out, since it can't be read: %s: %s", name, reason)
    if len(bad) > SHOWN:
        _log.warning("and %d more", len(bad) - SHOWN)


def batches_of(n: int, batch_size: int, rank: int = 0, size: int = 1) -> list[list[int]]:
    """Return the batches of one process, each sample on one process once.

    All processes get the same number of batches; the last ones may be smaller, or empty.
    """
    own = range(rank, n, size)
    count = math.ceil(math.ceil(n / size) / batch_size)
    return [list(own[start * batch_size : (start + 1) * batch_size]) for start in range(count)]


def each_batch(
    dataset: EvalDataset,
    batches: Sequence[list[int]],
    workers: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterator[tuple[LabelledBatch, Tensor]]:
    """Yield batches with their images (B, C, H, W) normalised on the device, channels last.

    Files that can't be read are left out, and named in the batches' `bad`; a batch may be empty.

    Raises:
        RunError: a process that reads pictures died.
    """
    pin = device.type == "cuda"
    with lost_workers():
        for batch in make_loader(dataset, batches, workers, pin, collate_labelled):
            if not len(batch):
                yield batch, torch.empty(0, len(mean), *dataset.img_size, device=device)
                continue
            images = normalise(batch.images, mean, std, device)
            yield batch, images.contiguous(memory_format=torch.channels_last)
