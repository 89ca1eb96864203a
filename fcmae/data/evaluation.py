"""Images to measure on: centre crops, each once."""

import logging
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fcmae.config.values import MAX_PIXELS
from fcmae.console import tracked
from fcmae.data.augment import Geometry, center_box
from fcmae.data.bad import BadImage
from fcmae.data.decode import read_image
from fcmae.data.labelled import Split
from fcmae.data.loader import lost_workers, make_loader
from fcmae.data.sample import Batch, Sample, normalise
from fcmae.data.statistics import Preprocessing
from fcmae.train.processes import ALONE, World

SHOWN = 20
"""Most images that are reported one by one."""

_log = logging.getLogger(__name__)


class EvalDataset(Dataset[Sample]):
    """Centre crops, by index.

    Args:
        split: the images, with labels or without.
        images: size and interpolation of the crops, and the part of an image that they take.
        max_pixels: images with more pixels count as unreadable.
    """

    def __init__(self, split: Split, images: Preprocessing, max_pixels: int = MAX_PIXELS) -> None:
        self.split, self.images, self.max_pixels = split, images, max_pixels

    def __len__(self) -> int:
        return len(self.split.source)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample, without an image where it can't be read."""
        split, images = self.split, self.images
        target = None if split.labels is None else int(split.labels[index])
        try:
            opened = read_image(split.source.open(index), len(images.mean), self.max_pixels)
            box = center_box(*opened.size, images.img_size, images.crop_pct)
            image = opened.resized(box, images.img_size, interpolation=images.interpolation)
        except BadImage as error:
            name = split.prefix + split.source.name(index)
            return Sample(None, index, target=target, bad=[(name, error.reason)])
        return Sample(image, index, target=target, geometry=Geometry(opened.size, box))


def report_skipped(bad: Sequence[tuple[str, str]], most: int = SHOWN) -> None:
    """Log the (name, reason) of images that can't be read, the first `most` of them."""
    for name, reason in bad[:most]:
        _log.warning("skipped, since it can't be read: %s: %s", name, reason)
    if len(bad) > most:
        _log.warning("and %d more", len(bad) - most)


def batches_of(n: int, batch_size: int, rank: int = 0, size: int = 1) -> list[list[int]]:
    """Return the batches of one process, each sample on one process once.

    All processes get the same number of batches; the last ones may be smaller, or empty.
    """
    own = range(rank, n, size)
    count = math.ceil(math.ceil(n / size) / batch_size)
    return [list(own[start * batch_size : (start + 1) * batch_size]) for start in range(count)]


def each_batch(
    split: Split,
    images: Preprocessing,
    device: torch.device,
    batch_size: int,
    workers: int,
    world: World = ALONE,
    max_pixels: int = MAX_PIXELS,
    shown: str | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield batches with their images (B, C, H, W) normalised on the device, channels last.

    Images that can't be read are skipped, and named in the batches' `bad`; a batch may be empty.

    Args:
        split: what to read; this process reads its share.
        images: how images are prepared.
        device: where the model is.
        batch_size: images at a time.
        workers: processes that read.
        world: the processes that share the work.
        max_pixels: images with more pixels count as unreadable.
        shown: what stands beside a progress bar, on terminals; None shows none.

    Raises:
        RunError: a process that reads images died.
    """
    dataset = EvalDataset(split, images, max_pixels)
    batches = batches_of(len(dataset), batch_size, world.rank, world.size)
    with lost_workers():
        loaded = make_loader(dataset, batches, workers, device.type == "cuda")
        for batch in tracked(loaded, len(batches), shown):
            if not len(batch):
                yield batch, torch.empty(0, len(images.mean), *images.img_size, device=device)
                continue
            pixels = normalise(batch.images, images.mean, images.std, device)
            yield batch, pixels.contiguous(memory_format=torch.channels_last)
