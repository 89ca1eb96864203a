"""Batches of crops and masks, each a function of (seed, epoch, index), and their order.

Nothing here keeps a position: what a step reads is known from its number, so that workers and
processes change nothing, and a run goes on where it stopped.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fcmae import rng
from fcmae.data.augment import center_box, crop_box, flips
from fcmae.data.decode import BadImage, Pixels, read_picture
from fcmae.data.files import FileList
from fcmae.mask import grid_of, random_mask
from sparse.errors import InputError, RunError

Key = tuple[int, int]
"""(epoch, index): which sample of the training list, in which epoch."""

_CANDIDATES = 20


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
        images = [_as_float(image) for image in images]
    return Batch(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack([sample.mask for sample in samples])),
        torch.tensor([sample.index for sample in samples]),
        [bad for sample in samples for bad in sample.bad],
    )


def _as_float(image: Pixels) -> npt.NDArray[np.float32]:
    return image / np.float32(255) if image.dtype == np.uint8 else image


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
        max_pixels: int = 179_000_000,
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
        bad = []
        for candidate in self._candidates(index):
            try:
                return Sample(self._crop(epoch, index, candidate), mask, candidate, bad)
            except BadImage as error:
                bad.append((self.files.name(candidate), error.reason))
        name, reason = bad[0]
        raise RunError(
            f"picture {name!r} can't be read ({reason}), nor can {len(bad) - 1} others tried in "
            "its place: check that the data is still there"
        )

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        words = rng.bits(self.seed, rng.REPLACE, 0, index, np.arange(_CANDIDATES))
        yield from (words % np.uint64(len(self.files))).tolist()

    def _crop(self, epoch: int, index: int, candidate: int) -> Pixels:
        picture = read_picture(self.files.path(candidate), self.in_chans, self.max_pixels)
        box = crop_box(
            self.seed, epoch, index, *picture.size, scale=self.crop_scale, ratio=self.crop_ratio
        )
        across, down = flips(self.seed, epoch, index, self.hflip, self.vflip)
        return picture.resized(box, self.img_size, across, down, self.fast_decode)


class HoldoutSet:
    """Centre crops of the held-out files, always with the same masks.

    A mask depends on the file's path alone, not on the other files or on the order. Files that
    can't be read are left out and collected in `bad` as (name, reason).
    """

    def __init__(
        self,
        files: FileList,
        img_size: tuple[int, int],
        in_chans: int = 3,
        mask_ratio: float = 0.6,
        seed: int = 0,
        max_pixels: int = 179_000_000,
    ) -> None:
        self.files = files
        self.img_size = img_size
        self.in_chans = in_chans
        self.mask_ratio = mask_ratio
        self.seed = seed
        self.max_pixels = max_pixels
        self.bad: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the readable pictures in the order of the list; no batch is empty."""
        self.bad = []
        samples = []
        for index in range(len(self.files)):
            try:
                samples.append(self._sample(index))
            except BadImage as error:
                self.bad.append((self.files.name(index), error.reason))
            if len(samples) == batch_size:
                yield collate(samples)
                samples = []
        if samples:
            yield collate(samples)

    def _sample(self, index: int) -> Sample:
        image = _center_crop(self.files, index, self.img_size, self.in_chans, self.max_pixels)
        mask = random_mask(
            self.seed,
            0,
            self.files.path_hash(index),
            grid_of(self.img_size),
            self.mask_ratio,
            stream=rng.HOLDOUT_MASK,
        )
        return Sample(image, mask, index)


def _center_crop(
    files: FileList, index: int, img_size: tuple[int, int], in_chans: int, max_pixels: int
) -> Pixels:
    picture = read_picture(files.path(index), in_chans, max_pixels)
    return picture.resized(center_box(*picture.size, img_size), img_size)


def measure_mean_std(
    files: FileList,
    img_size: tuple[int, int],
    in_chans: int = 3,
    sample: int = 1024,
    seed: int = 0,
    max_pixels: int = 179_000_000,
) -> tuple[list[float], list[float]]:
    """Return each channel's mean and deviation over centre crops, in units of [0, 1].

    At most `sample` files are read, chosen by hash.

    Raises:
        InputError: none of them can be read.
    """
    count, total, squares = 0, np.zeros(in_chans), np.zeros(in_chans)
    order = np.argsort(rng.bits(seed, rng.SAMPLE, 0, np.arange(len(files))), kind="stable")
    reason = "no pictures"
    for index in np.sort(order[:sample]).tolist():
        try:
            image = _center_crop(files, index, img_size, in_chans, max_pixels)
        except BadImage as error:
            reason = f"{files.name(index)!r}: {error.reason}"
            continue
        pixels = _as_float(image).reshape(in_chans, -1).astype(np.float64)
        count += pixels.shape[1]
        total += pixels.sum(axis=1)
        squares += np.square(pixels).sum(axis=1)
    if not count:
        raise InputError(f"mean and std can't be measured, no picture can be read ({reason})")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return how many steps read each of n files at least once."""
    return -(-n // batch_size)


def epoch_order(seed: int, epoch: int, n: int, batch_size: int) -> npt.NDArray[np.int64]:
    """Return the files that an epoch reads, (steps * batch_size,).

    All n in random order; the last batch is filled from the start of the same order, round and
    round where the folder is smaller than the batch.
    """
    return np.resize(rng.permutation(seed, epoch, n), steps_per_epoch(n, batch_size) * batch_size)


class StepSampler(Sampler[list[Key]]):
    """The micro-batches of one process, from `start_step` up to but without `total_steps`.

    A step's global batch is cut into accumulate * world_size equal parts, in order; the a-th
    micro-batch of a process is part a * world_size + rank. So the numbers of processes and of
    micro-batches decide who computes a sample and when, never which samples a step has.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ) -> None:
        parts = world_size * accumulate
        if batch_size % parts:
            raise InputError(
                f"batch_size {batch_size} is not divisible by processes {world_size} x accumulate "
                f"{accumulate}: the nearest are {max(batch_size // parts, 1) * parts} and "
                f"{(batch_size // parts + 1) * parts}"
            )
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.total_steps = total_steps
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate

    def __len__(self) -> int:
        return max(self.total_steps - self.start_step, 0) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        steps = steps_per_epoch(self.n, self.batch_size)
        size = self.batch_size // (self.accumulate * self.world_size)
        current, order = -1, np.empty(0, np.int64)
        for step in range(self.start_step, self.total_steps):
            epoch, within = divmod(step, steps)
            if epoch != current:
                current, order = epoch, epoch_order(self.seed, epoch, self.n, self.batch_size)
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                start = within * self.batch_size + part * size
                yield [(epoch, index) for index in order[start : start + size].tolist()]


def make_loader(
    dataset: PretrainDataset, sampler: StepSampler, workers: int, pin_memory: bool = False
) -> DataLoader[Sample]:
    """Return an iterable of `Batch`, one a micro-batch of the sampler.

    Workers are forked where the system can, so that they share the file list. The loader has a
    generator of its own: torch's global stream is left alone.
    """
    fork = workers > 0 and hasattr(os, "fork")
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker if workers else None,
        multiprocessing_context="fork" if fork else None,
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
    )


def _init_worker(_: int) -> None:
    """Leave signals to the main process, and keep the codecs' chatter off the terminal.

    A terminal and a batch scheduler signal all processes of a group; the main process saves first
    and then ends its workers, so they heed SIGTERM from their parent alone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    # libjpeg writes its warnings to file descriptor 2 without saying which file it read.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.close(silent)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device | str
) -> Tensor:
    """Return (images / 255 - mean) / std as float32 on the device; float images are not divided.

    The copy to the device is of the bytes, and does not wait where the batch is pinned.
    """
    units = 255.0 if images.dtype == torch.uint8 else 1.0
    scaled = images.to(device, non_blocking=True).to(torch.float32, copy=True)
    std_C = torch.tensor(std, dtype=torch.float32, device=scaled.device)
    mean_C = torch.tensor(mean, dtype=torch.float32, device=scaled.device)
    scaled.mul_((1 / (units * std_C)).view(1, -1, 1, 1))
    return scaled.sub_((mean_C / std_C).view(1, -1, 1, 1))
