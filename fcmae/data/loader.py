"""Batches of crops and masks, each a function of (seed, epoch, index), and their order.

Nothing here keeps a position: what a step reads is known from its number, so the numbers of workers
and processes change nothing, and a run resumes where it stopped.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import Geometry, crop_box, flips
from fcmae.data.bad import BadImage
from fcmae.data.decode import read_image
from fcmae.data.order import Key
from fcmae.data.sample import Batch, Sample, collate
from fcmae.data.sources import Source
from fcmae.model.mask import grid_of, random_mask
from sparse.errors import RunError

_CANDIDATES = 20


class PretrainDataset(Dataset[Sample]):
    """Random crops of the training images, with masks, by (epoch, index).

    Args:
        source: the training images.
        img_size: (height, width) of the crops, multiples of 32.
        in_chans: channels of the crops.
        mask_ratio: share of the patches that a mask hides.
        crop_scale: the smallest and largest area of a crop, as a share of the image's.
        crop_ratio: the smallest and largest ratio of a crop's width to its height.
        hflip: mirror half of the crops left-right.
        vflip: mirror half of the crops top-bottom.
        seed: what crops, flips, masks and replacements depend on, with epoch and index.
        max_pixels: images with more pixels count as unreadable.
        fast_decode: decode large JPEGs at a fraction of their size; see `OpenedImage.resized`.
    """

    def __init__(
        self,
        source: Source,
        img_size: tuple[int, int],
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        crop_scale: Sequence[float] = (0.2, 1.0),
        crop_ratio: Sequence[float] = (0.75, 1.3333),
        hflip: bool = True,
        vflip: bool = False,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        fast_decode: bool = False,
    ) -> None:
        self.source = source
        self.img_size = img_size
        self.in_chans = in_chans
        self.mask_ratio = mask_ratio
        self.crop_scale = (crop_scale[0], crop_scale[1])
        self.crop_ratio = (crop_ratio[0], crop_ratio[1])
        self.hflip = hflip
        self.vflip = vflip
        self.seed = seed
        self.max_pixels = max_pixels
        self.fast_decode = fast_decode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample; an image that can't be read is replaced, the same way in every run."""
        epoch, index = key
        return read_or_replace(
            self.source, index, self.seed, lambda candidate: self._crop(epoch, index, candidate)
        )

    def _crop(self, epoch: int, index: int, candidate: int) -> Sample:
        opened = read_image(self.source.open(candidate), self.in_chans, self.max_pixels)
        box = crop_box(
            self.seed, epoch, index, *opened.size, scale=self.crop_scale, ratio=self.crop_ratio
        )
        across, down = flips(self.seed, epoch, index, self.hflip, self.vflip)
        image = opened.resized(box, self.img_size, across, down, self.fast_decode)
        mask = random_mask(self.seed, epoch, index, grid_of(self.img_size), self.mask_ratio)
        return Sample(image, candidate, mask, geometry=Geometry(opened.size, box, across, down))


def read_or_replace(source: Source, index: int, seed: int, read: Callable[[int], Sample]) -> Sample:
    """Read an image, or another in its place where it is bad: the same one in every run.

    Args:
        source: the images to choose from.
        index: the position of the image.
        seed: what the replacements depend on, with `index`.
        read: from the position of an image to its sample; raises BadImage.

    Returns:
        The sample, with (name, reason) of the bad images; without an image where neither the image
        nor any of its 20 replacements could be read.
    """
    bad: list[tuple[str, str]] = []
    for candidate in _candidates(index, len(source), seed):
        try:
            return replace(read(candidate), bad=bad)
        except BadImage as error:
            bad.append((source.name(candidate), error.reason))
    return Sample(None, index, bad=bad)


def _candidates(index: int, n: int, seed: int) -> Iterator[int]:
    yield index
    words = rng.bits(seed, rng.REPLACE, 0, index, np.arange(_CANDIDATES))
    yield from (words % np.uint64(n)).tolist()


def make_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """Return an iterable of `Batch`es: of the samples of each of `batches`.

    Workers are forked where the system can, so they share the source. The loader has a generator
    of its own: torch's global stream is left alone.
    """
    fork = workers > 0 and hasattr(os, "fork")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate_shared if workers else collate,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if workers else None,
        multiprocessing_context="fork" if fork else None,
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
    )


@contextmanager
def lost_workers(then: str = "") -> Iterator[None]:
    """Turn what torch raises, at whatever line, for a worker that died or has no room: RunError.

    `then` ends its message.
    """
    try:
        yield
    except RunError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        what = _lost(error)
        if what is None:
            raise
        raise RunError(
            f"a process that reads images failed ({what}), out of memory or of "
            "room in /dev/shm: give the same command with fewer --workers (0 reads in the "
            f"process itself) or enlarge /dev/shm (docker run --shm-size 8g){then}"
        ) from error


def _lost(error: Exception) -> str | None:
    """Say what happened to a worker, or None where the error is about something else.

    torch notices a death; what it was just then sending breaks off inside multiprocessing.
    """
    if isinstance(error, RuntimeError):
        found = re.search(
            r"DataLoader worker \(pid.*|unable to allocate shared memory.*", str(error)
        )
        return found[0].strip(" .") if found else None
    *_, last = traceback.walk_tb(error.__traceback__)
    inside = last[0].f_globals.get("__name__", "").startswith("multiprocessing.")
    return f"{type(error).__name__} while it sent images" if inside else None


def _collate_shared(samples: list[Sample]) -> Batch:
    """Join samples in memory that the training process shares.

    Left to torch, that happens in a thread of the worker, and where there is no room the batch is
    dropped and the training process waits for it forever.
    """
    batch = collate(samples)
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            value.share_memory_()
    return batch


def _init_worker(_: int) -> None:
    """Leave signals to the main process.

    A terminal and a batch scheduler signal all processes of a group; the main process saves first
    and then ends its workers, so they react to SIGTERM from their parent only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.excepthook = _quiet_hook
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _quiet_hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Suppress the traceback of a worker whose parent went away while it was sending."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
