"""What every command that reads weights and images does first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fcmae.atomic import check_out_file
from fcmae.config.values import height_width
from fcmae.console import show_logs
from fcmae.data.evaluation import each_batch, report_skipped
from fcmae.data.file_list import find_images, refuse_to_replace
from fcmae.data.labelled import Split
from fcmae.data.sample import Batch
from fcmae.data.statistics import Preprocessing
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import resolve_device
from sparse.errors import RunError
from sparse.sizes import PATCH


class Prepared(Protocol):
    """A model that says how it wants images."""

    @property
    def images(self) -> Preprocessing: ...


Model = TypeVar("Model", bound=Prepared)
Found = TypeVar("Found")


class Setting(NamedTuple, Generic[Model, Found]):
    """What a command works with: the model, the images, where to write, and the device."""

    model: Model
    images: Found
    out: Path | None
    device: torch.device


def set_up(
    config: Any,
    load: Callable[[str, torch.device, tuple[int, int] | None], Model],
    find: Callable[[Model], Found],
    *suffixes: str,
    multiple: int = PATCH,
) -> Setting[Model, Found]:
    """Check where to write, load the model and find the images, in this order.

    Args:
        config: a command's, with `source`, `device` and, where it has them, `out` and `img_size`.
        load: from `config.source`, the device and the image size, if one is asked for, to a model.
        find: finds the images; see `images_of`.
        suffixes: what `config.out` may end in.
        multiple: what the sides of an image size are multiples of.

    Raises:
        InputError: one of them is wrong; nothing was written.
    """
    show_logs()
    out = getattr(config, "out", None)
    path = None if out is None else check_out_file(out, *suffixes)
    size = getattr(config, "img_size", None)
    sides = None if size is None else height_width(size, multiple=multiple)
    device = resolve_device(config.device)
    model = load(config.source, device, sides)
    found = find(model)
    if path is not None and isinstance(found, Split):
        refuse_to_replace(path, found.source)
    return Setting(model, found, path, device)


def images_of(config: Any) -> Callable[[object], Split]:
    """How to find the images of `config.images`, whatever the model: once."""

    @cache
    def find() -> Split:
        return Split(find_images(config.images, setting="images"))

    return lambda _: find()


def batches(
    setting: Setting[Any, Split],
    config: Any,
    shown: str | None = None,
    report_all: bool = False,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batches of a command that have images, and these normalised on the device.

    Images that can't be read are reported.

    Args:
        setting: the command's.
        config: has `batch_size` and `workers`.
        shown: what stands beside a progress bar, on terminals; None shows none.
        report_all: every unreadable image is reported, as it is met; else the first 20 at the end.

    Raises:
        RunError: no image could be read, or a process that reads them died.
    """
    split = setting.images
    workers = resolve_workers(config.workers, setting.device)
    bad: list[tuple[str, str]] = []
    count = 0
    for batch, images in each_batch(
        split, setting.model.images, setting.device, config.batch_size, workers, shown=shown
    ):
        bad += batch.bad
        if report_all:
            report_skipped(batch.bad, len(batch.bad))
        if len(batch):
            count += len(batch)
            yield batch, images
    if not report_all:
        report_skipped(bad)
    if not count:
        raise RunError(f"none of the {len(split.source)} images can be read{_example(bad)}")


def _example(bad: list[tuple[str, str]]) -> str:
    return f" ({': '.join(bad[0])})" if bad else ""
