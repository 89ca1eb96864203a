"""What runs recorded in their folders, read back to be shown."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fcmae.config.files import read_yaml
from fcmae.config.values import flatten
from fcmae.train.checkpoint import STATE, list_checkpoints
from fcmae.train.run_folder import read_lines
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import read_json
from sparse.errors import InputError

Point = tuple[int, float]


@dataclass(frozen=True)
class RunData:
    """A run of pretraining or fine-tuning.

    Attributes:
        paths: where its files are.
        name: the folder's name, made longer where several runs share it.
        config: what was asked, by dotted key.
        state: that of the newest checkpoint; {} where there is none.
        metrics: the objects of metrics.jsonl.
        bad, nonfinite: those of bad_images.jsonl and nonfinite.jsonl.
    """

    name: str
    paths: RunPaths
    config: dict[str, Any]
    state: dict[str, Any]
    metrics: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    nonfinite: list[dict[str, Any]]

    @property
    def command(self) -> str:
        return self.state.get("command") or ("finetune" if "weights" in self.config else "pretrain")

    @property
    def finished(self) -> bool:
        return (self.paths.exported / "config.json").is_file()

    def series(self, key: str) -> list[Point]:
        """(step, value) of the lines that have `key` as a number."""
        found = ((line.get("step"), line.get(key)) for line in self.metrics)
        return [
            (step, float(value))
            for step, value in found
            if isinstance(step, int) and isinstance(value, int | float)
        ]

    def keys(self, prefix: str) -> list[str]:
        """Names of metrics that begin with `prefix`, in the order in which they came."""
        names = dict.fromkeys(key for line in self.metrics for key in line)
        return [name for name in names if name.startswith(prefix)]

    def pictures(self, tag: str = "reconstructions") -> list[tuple[int, Image.Image]]:
        """(step, picture) of what TensorBoard was given under `tag`, oldest first."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not self.paths.tensorboard.is_dir():
            return []
        events = EventAccumulator(str(self.paths.tensorboard), {"images": 0, "scalars": 1})
        events.Reload()
        if tag not in events.Tags()["images"]:
            return []
        shown = {event.step: event.encoded_image_string for event in events.Images(tag)}
        return [(step, Image.open(io.BytesIO(content))) for step, content in sorted(shown.items())]


def read_runs(folders: list[str]) -> list[RunData]:
    """Read run folders.

    Raises:
        InputError: a folder that is no run, or was given twice.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError(f"runs {', '.join(folders)}: one is given twice")
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read_run(path: Path, name: str) -> RunData:
    paths = RunPaths(path)
    if not paths.config.is_file():
        raise InputError(
            f"{str(path)!r} is not a run: it has no config.yaml; give the --out folder of "
            "`fcmae pretrain` or `fcmae finetune`"
        )
    newest = next(iter(list_checkpoints(paths.checkpoints)), None)
    return RunData(
        name,
        paths,
        flatten(read_yaml(paths.config)),
        {} if newest is None else read_json(newest / STATE),
        read_lines(paths.metrics),
        read_lines(paths.bad_images),
        read_lines(paths.nonfinite),
    )


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names
