"""Batches of crops and masks, each a function of (seed, epoch, index), and their order.

Nothing here keeps a position: what a step reads is known from its number, so that workers and
processes change nothing, and a run goes on where it stopped.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fcmae import rng
from fcmae.config.values import MAX_PIXELS
from fcmae.data.augment import crop_box, flips
from fcmae.data.batch import Batch, Sample, collate, normalise
from fcmae.data.decode import BadImage, Pixels, read_picture
from fcmae.data.files import FileList
from fcmae.data.holdout import HoldoutSet, measure_mean_std, warn_if_far_off
from fcmae.data.order import Key, StepSampler, check_parts, epoch_order, steps_per_epoch
from fcmae.model.mask import grid_of, random_mask
from sparse.errors import RunError

__all__ = [
    "Batch",
    "HoldoutSet",
    "PretrainDataset",
    "Sample",
    "StepSampler",
    "check_parts",
    "collate",
    "epoch_order",
    "lost_workers",
    "make_loader",
    "measure_mean_std",
    "normalise",
    "steps_per_epoch",
    "warn_if_far_off",
]

_CANDIDATES = 20


class PretrainDataset(Dataset[Sample]):
    """Random crops of the training files, with masks, by (epoch, index)."""

    def __init__(
        self,
        files: FileList,
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
        self.files = files
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
        return len(self.files)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample; a file that can't be read is replaced, the same one in every run.

        Raises:
            RunError: neither the file nor any of its 20 replacements could be read.
        """
        epoch, index = key
        mask = random_mask(self.seed, epoch, index, grid_of(self.img_size), self.mask_ratio)
        image, read, bad = read_or_replace(
            self.files, index, self.seed, lambda candidate: self._crop(epoch, index, candidate)
        )
        return Sample(image, mask, read, bad)

    def _crop(self, epoch: int, index: int, candidate: int) -> Pixels:
        picture = read_picture(self.files.path(candidate), self.in_chans, self.max_pixels)
        box = crop_box(
            self.seed, epoch, index, *picture.size, scale=self.crop_scale, ratio=self.crop_ratio
        )
        across, down = flips(self.seed, epoch, index, self.hflip, self.vflip)
        return picture.resized(box, self.img_size, across, down, self.fast_decode)


def read_or_replace(
    files: FileList, index: int, seed: int, read: Callable[[int], Pixels]
) -> tuple[Pixels, int, list[tuple[str, str]]]:
    """Read a file, or another in its place where it is bad: the same one in every run.

    Args:
        read: from the position of a file to its pixels; raises BadImage.

    Returns:
        The pixels, the position of the file that was read, and (name, reason) of the bad ones.

    Raises:
        RunError: neither the file nor any of its 20 replacements could be read.
    """
    bad: list[tuple[str, str]] = []
    for candidate in _candidates(index, len(files), seed):
        try:
            return read(candidate), candidate, bad
        except BadImage as error:
            bad.append((files.name(candidate), error.reason))
    name, reason = bad[0]
    others = len({other for other, _ in bad}) - 1
    more = f", nor can {others} others tried in its place" if others else ""
    raise RunError(
        f"picture {name!r} can't be read ({reason}){more}: check that the pictures are still there "
        "and of this kind"
    )


def _candidates(index: int, n: int, seed: int) -> Iterator[int]:
    yield index
    words = rng.bits(seed, rng.REPLACE, 0, index, np.arange(_CANDIDATES))
    yield from (words % np.uint64(n)).tolist()


def make_loader(
    dataset: Dataset[Any],
    batches: Iterable[list[Any]],
    workers: int,
    pin_memory: bool = False,
    join: Callable[[list[Any]], Any] = collate,
) -> DataLoader[Any]:
    """Return an iterable of what `join` makes of the samples of each of `batches`.

    Workers are forked where the system can, so that they share the file list. The loader has a
    generator of its own: torch's global stream is left alone.
    """
    fork = workers > 0 and hasattr(os, "fork")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_Shared(join) if workers else join,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if workers else None,
        multiprocessing_context="fork" if fork else None,
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
    )


@contextmanager
def lost_workers(then: str = "") -> Iterator[None]:
    """Turn what torch raises, at whatever line, for a worker that died or has no room: RunError.

    `then` ends its message. An error of ours from a worker comes with its traceback in the message:
    only the message is kept.
    """
    try:
        yield
    except RunError as error:
        raise RunError(str(error).rpartition("RunError: ")[2].strip()) from error
    except (RuntimeError, ConnectionError, EOFError) as error:
        what = _lost(error)
        if what is None:
            raise
        raise RunError(
            f"a process that reads pictures failed ({what}), for want of memory or "
            "of room in /dev/shm: give the same command with fewer --workers (0 reads in the "
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
    return f"{type(error).__name__} while it sent pictures" if inside else None


class _Shared:
    """Joins samples into memory that the training process shares.

    Left to torch, that happens in a thread of the worker, and where there is no room the batch is
    dropped and the training process waits for it forever.
    """

    def __init__(self, join: Callable[[list[Any]], Any]) -> None:
        self.join = join

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.join(samples)
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                value.share_memory_()
        return batch


def _init_worker(_: int) -> None:
    """Leave signals to the main process.

    A terminal and a batch scheduler signal all processes of a group; the main process saves first
    and then ends its workers, so they heed SIGTERM from their parent alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.excepthook = _quiet_hook
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _quiet_hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Leave out the traceback of a worker whose parent went away while it was sending."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
