"""Batches of crops and masks, each a function of (seed, epoch, index), and their order.

Nothing stores a position: the number of a step determines what it reads, so the numbers of workers
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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae import rng
from fcmae.config.pretraining import PretrainConfig
from fcmae.config.training import TrainingConfig
from fcmae.data.augment import Geometry, random_geometry
from fcmae.data.decode import BadImage, read_image
from fcmae.data.labelled import Split
from fcmae.data.order import Key
from fcmae.data.remote import RemoteError
from fcmae.data.resize import Pixels
from fcmae.data.sample import Sample, collate
from fcmae.data.statistics import Preprocessing
from fcmae.model.mask import grid_of, random_mask
from sparse.engines.base import Layout
from sparse.errors import RunError

_CANDIDATES = 20


@dataclass
class CropDataset(Dataset[Sample]):
    """Random crops of training images, by (epoch, index).

    Args:
        split: the training images, with labels or without.
        images: size and interpolation of the crops, and their channels.
        config: `seed`, `augment` and `max_pixels`: images with more pixels count as unreadable.
    """

    split: Split
    images: Preprocessing
    config: TrainingConfig

    def __len__(self) -> int:
        return len(self.split.source)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample; an image that can't be read is replaced, the same way in every run.

        The sample has no image if neither the image nor any of 20 replacements can be read.
        """
        bad: list[tuple[str, str]] = []
        for place in _candidates(key[1], len(self), self.config.seed):
            try:
                return replace(self.crop(*key, place), bad=bad)
            except BadImage as error:
                bad.append((self.split.name(place), str(error)))
        return Sample(None, key[1], bad=bad)

    def crop(self, epoch: int, index: int, place: int) -> Sample:
        """Cut a sample from the image at `place`, which is `index` unless that image is replaced.

        Raises:
            BadImage: it can't be read.
        """
        split, images, config = self.split, self.images, self.config
        opened = read_image(split.source.open(place), len(images.mean), config.max_pixels)
        cut = self.geometry(epoch, index, opened.size)
        size, fast = images.img_size, config.augment.fast_decode
        pixels = opened.resized(
            cut.box, cut.shape or size, cut.flip_h, cut.flip_v, fast, images.interpolation
        )
        if cut.shape is not None:
            pixels = padded(pixels, size, images.mean)
        return Sample(pixels, place, target=split.target(place, cut, size), geometry=cut)

    def geometry(self, epoch: int, index: int, size: tuple[int, int]) -> Geometry:
        """Draw the crop of an image of (width, height) pixels."""
        return random_geometry(self.config.seed, epoch, index, size, self.config.augment)


def padded(image_CHW: Pixels, size: tuple[int, int], mean: Sequence[float]) -> Pixels:
    """Return an image of (H, W) pixels, the mean beyond the given ones at the right and bottom."""
    unit = 255 if image_CHW.dtype == np.uint8 else 1
    fill = np.array(mean) * unit
    fill = (fill.round() if unit == 255 else fill).astype(image_CHW.dtype)
    canvas = np.broadcast_to(fill[:, None, None], (len(fill), *size)).copy()
    canvas[:, : image_CHW.shape[1], : image_CHW.shape[2]] = image_CHW
    return canvas


class PretrainDataset(CropDataset):
    """Random crops with masks, by (epoch, index)."""

    config: PretrainConfig

    def crop(self, epoch: int, index: int, place: int) -> Sample:
        sample = super().crop(epoch, index, place)
        grid, ratio = grid_of(self.images.img_size, self.config.patch_size), self.config.mask_ratio
        return replace(sample, mask=random_mask(self.config.seed, epoch, index, grid, ratio))


def _candidates(index: int, n: int, seed: int) -> Iterator[int]:
    yield index
    words = rng.bits(seed, rng.REPLACE, 0, index, np.arange(_CANDIDATES))
    yield from (words % np.uint64(n)).tolist()


def make_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    pin_memory: bool = False,
    lay_out: Callable[[Tensor], Layout] | None = None,
) -> DataLoader[Any]:
    """Return an iterable of one `Batch` of samples for each of `batches`.

    Workers are forked if the system supports it, so they share the source. The loader has its own
    generator and leaves torch's global stream unchanged. `lay_out` is that of `collate`.
    """
    fork = workers > 0 and hasattr(os, "fork")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, lay_out=lay_out, share=workers > 0),
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if workers else None,
        multiprocessing_context="fork" if fork else None,
        generator=torch.Generator(),
    )


@contextmanager
def lost_workers(then: str = "") -> Iterator[None]:
    """Turn any error of torch about a worker that died, ran out of memory or could not read a
    remote file into RunError.

    torch notices a death; a worker that dies while sending raises inside multiprocessing instead.
    `then` ends the message.
    """
    try:
        yield
    except RemoteError as error:  # torch puts a worker's traceback in front of its message
        what = str(error).strip().rpartition(f"{RemoteError.__name__}: ")[2]
        raise RunError(f"{what}{then}") from error
    except RunError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        named = re.search(r"DataLoader worker \(pid.*|unable to allocate shared mem.*", str(error))
        if isinstance(error, RuntimeError) and named:
            what = named[0].strip(" .")
        elif frame.f_globals.get("__name__", "").startswith("multiprocessing."):
            what = f"{type(error).__name__} while it sent images"
        else:
            raise
        raise RunError(
            f"a worker failed ({what}), out of memory or space in /dev/shm: use fewer --workers (0 "
            f"reads in the main process) or enlarge /dev/shm (docker run --shm-size 8g){then}"
        ) from error


def _init_worker(_: int) -> None:
    """Leave signals to the main process.

    A terminal or a batch scheduler signals all processes of a group; the main process saves first
    and then ends its workers, so they react to SIGTERM from their parent only.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.excepthook = _quiet_hook
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _quiet_hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Suppress the traceback of a worker whose parent exited while it was sending."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
