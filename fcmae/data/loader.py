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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from fcmae.data.image import BadImage, FewValid, OpenedImage
from fcmae.data.labelled import Split
from fcmae.data.order import Key
from fcmae.data.remote import RemoteError
from fcmae.data.resize import Pixels
from fcmae.data.sample import Sample, collate
from fcmae.data.statistics import Preprocessing
from fcmae.data.windows import Place, overlap, window_box
from fcmae.model.mask import grid_of, pixels_of, random_mask, usable_patches
from sparse.engines.base import Layout
from sparse.errors import RunError

DRAWS = 32
"""Crops that are drawn for a sample until one has enough pixels with a value; then any will do."""

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
        opened = self.images.read(self.split.source, place, self.config.max_pixels)
        return self.cut(opened, self.geometry(epoch, index, opened.size), place)

    def cut(
        self, opened: OpenedImage, cut: Geometry, place: int, least_valid: float = 0.0
    ) -> Sample:
        """Cut a sample from the opened image at `place`.

        Raises:
            BadImage: it can't be read.
            FewValid: a smaller share of its pixels than `least_valid` counts.
        """
        images, size = self.images, self.images.img_size
        pixels, valid = opened.resized(
            cut.box, cut.shape or size, cut.flip_h, cut.flip_v, self.config.augment.fast_decode,
            images.interpolation, least_valid,
        )  # fmt: skip
        if cut.shape is not None:
            pixels = padded(pixels, size, images.mean)
            if valid is not None:
                room = [(0, whole - part) for whole, part in zip(size, cut.shape, strict=True)]
                valid = np.pad(valid, room, constant_values=True)
        target = self.split.target(place, cut, size)
        return Sample(pixels, place, valid=valid, target=target, geometry=cut)

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


@dataclass
class PretrainDataset(CropDataset):
    """Random crops with masks, by (epoch, index).

    A patch is visible, or a target, if enough of its pixels count. A crop with few such patches, or
    that overlaps a window held out, is drawn again.

    Args:
        split, images, config: see `CropDataset`.
        taken: the windows held out of images, by their keys.
    """

    config: PretrainConfig
    taken: Mapping[bytes, Sequence[Place]] = field(default_factory=dict)

    def crop(self, epoch: int, index: int, place: int) -> Sample:
        config, images = self.config, self.images
        p, seed, ratio = config.patch_size, config.seed, config.mask_ratio
        grid, parts = grid_of(images.img_size, p), config.window is not None
        whole = images.read(self.split.source, place, config.max_pixels, parts)
        for attempt in range(DRAWS + 1):
            drawn = int(rng.bits(seed, rng.REDRAW, epoch, index, attempt)[0]) if attempt else index
            if (opened := self._window(whole, epoch, drawn, place)) is None:
                continue
            last = attempt == DRAWS
            try:
                cut = self.geometry(epoch, drawn, opened.size)
                sample = self.cut(opened, cut, place, 0 if last else config.min_valid)
            except FewValid:
                continue
            if sample.valid is None:
                return replace(sample, mask=random_mask(seed, epoch, index, grid, ratio))
            usable = usable_patches(sample.valid, p, config.min_valid)
            if usable.any() and (last or usable.mean() >= config.min_valid):
                sample.valid &= pixels_of(usable, p)
                mask = random_mask(seed, epoch, index, grid, ratio, usable=usable)
                return replace(sample, mask=mask)
        raise BadImage(
            f"none of {DRAWS} crops has enough pixels with a value: lower --min_valid "
            f"{config.min_valid}, or remove the image"
        )

    def _window(self, whole: OpenedImage, epoch: int, drawn: int, place: int) -> OpenedImage | None:
        """A random window of an image; None if it overlaps one held out."""
        side = self.config.window
        if side is None:
            return whole
        x, y = rng.uniform(self.config.seed, rng.WINDOW, epoch, drawn, np.arange(2)).tolist()
        box = window_box(whole.size, side, (x, y))
        taken = self.taken.get(self.split.source.key(place), ()) if self.taken else ()
        if any(overlap(box, window_box(whole.size, side, other)) for other in taken):
            return None
        return whole.window(box)


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
