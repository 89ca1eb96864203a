"""What commands on weights and images share: checks, loading, batches and output."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcmae.atomic import check_out_file, out_file
from fcmae.config.values import height_width
from fcmae.console import show_logs
from fcmae.data.evaluation import EvalDataset, each_batch, report_skipped
from fcmae.data.file_list import refuse_to_replace
from fcmae.data.find import find_source
from fcmae.data.labelled import Split
from fcmae.data.loader import lost_workers
from fcmae.data.sample import Batch
from fcmae.data.statistics import Preprocessing
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import resolve_device
from fcmae.train.run_paths import BAD_IMAGES
from sparse.errors import RunError

Model = TypeVar("Model")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting(Generic[Model]):
    """The model, device and output file of a command.

    Attributes:
        config: of the command.
        model: the loaded model.
        images: how images are prepared for the model.
        device: where the model is.
        out: the file to write, if any and checked.
        skipped: (name, reason) of images that `batches` could not read.
    """

    config: Any
    model: Model
    images: Preprocessing
    device: torch.device
    out: Path | None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def find_images(self) -> Split:
        """Find the images of `config.images`.

        Raises:
            InputError: there are none, or `out` is one of them.
        """
        split = Split(find_source(self.config.images, setting="images"))
        refuse_to_replace(self.out, split.source)
        return split

    def batches(
        self,
        split: Split,
        shown: str | None = None,
        dataset: EvalDataset | None = None,
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches that have images, with these normalised on the device.

        Images that can't be read are reported at the end.

        Args:
            split: the images.
            shown: the name of a progress bar on terminals; None shows none.
            dataset: of these images; None takes centre crops. Batches of `WholeDataset` have one.

        Raises:
            RunError: no image could be read, or a process that reads them died.
        """
        workers, bad = resolve_workers(self.config.workers, self.device), list[tuple[str, str]]()
        dataset = dataset or EvalDataset(split, self.images)
        size = dataset.batch_size(self.config.batch_size)
        with lost_workers():
            for batch, images in each_batch(dataset, self.device, size, workers, shown=shown):
                bad += batch.bad
                if len(batch):
                    yield batch, images
        self.report(split, bad)

    def report(self, split: Split, bad: Sequence[tuple[str, str]]) -> None:
        """Report and remember the (name, reason) of images that could not be read.

        Raises:
            RunError: these are all.
        """
        self.skipped.extend(bad)
        report_skipped(bad)
        if len(bad) == len(split.source):
            raise RunError(f"none of the {len(bad)} images can be read ({': '.join(bad[0])})")


def set_up(config: Any, source: str, load: Callable[..., Model], *suffixes: str) -> Setting[Model]:
    """Check the output file, then load the model.

    Args:
        config: of a command, with `device` and perhaps `out` and `img_size`.
        source: what to load.
        load: maps `source`, the device and perhaps the image size to a model with the attribute
            `images`.
        suffixes: allowed endings of `config.out`, which is not checked without any.

    Raises:
        InputError: an argument is wrong; nothing was written.
    """
    show_logs()
    out, size = getattr(config, "out", None), getattr(config, "img_size", None)
    path = check_out_file(out, *suffixes) if out is not None and suffixes else None
    sides = [] if size is None else [height_width(size, multiple=1)]
    device = resolve_device(config.device)
    model: Any = load(source, device, *sides)
    return Setting(config, model, model.images, device, path)


def write_skipped(bad: Sequence[tuple[str, str]], out: Path) -> None:
    """List the (path, reason) of images that can't be read, if there are any, as JSON lines: in the
    folder `out`, or beside the file `out`.

    Raises:
        RunError: the list could not be written.
    """
    if not bad:
        return
    file = out / BAD_IMAGES if out.is_dir() else out.with_name(f"{out.stem}.{BAD_IMAGES}")
    with out_file(file) as path:
        lines = [json.dumps({"path": name, "reason": reason}) for name, reason in bad]
        path.write_text("\n".join(lines) + "\n")
    _log.warning("%d images could not be read: see %s", len(bad), file)


def print_result(
    result: dict[str, Any], as_json: bool, show: bool, table: Callable[[dict[str, Any]], None]
) -> None:
    """Print a command's result as one JSON object or with `table`, or not at all."""
    if show and as_json:
        print(json.dumps(result))
    elif show:
        table(result)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None
) -> None:
    """Print a table with words in the first column and numbers in the others.

    Args:
        headings: one for each column.
        rows: a cell for each column; missing cells are empty, and an empty row is a line.
        title: above the table.
    """
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row) if row else table.add_section()
    Console(highlight=False).print(table, markup=False)
