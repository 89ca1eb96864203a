"""`fcmae report`: runs as one static page that opens from disk, without network or scripts."""

import base64
import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fcmae import __version__
from fcmae.atomic import check_out_file, out_file
from fcmae.commands.report import ReportConfig
from fcmae.config.files import read_yaml
from fcmae.config.values import flatten
from fcmae.console import show_logs
from fcmae.inspect import figures
from fcmae.inspect.figures import Point
from fcmae.train.checkpoint import STATE, list_checkpoints
from fcmae.train.run_folder import read_lines
from fcmae.train.run_paths import RunPaths
from fcmae.weights.read import read_json
from sparse.errors import InputError

Figure = dict[str, str]

TAG = "reconstructions"

SHOWN = 50
"""Largest number of lines in a table of files."""

MEAN = (1.0, "each patch's mean")

CURVES: list[tuple[str, str, str | None, list[str]]] = [
    ("loss", "pretraining loss", "pretrain", ["last"]),
    ("holdout_loss", "held-out loss", "pretrain", ["last"]),
    ("probe_linear", "linear probe, top-1 %", None, ["last"]),
    ("probe_knn20", "20 nearest neighbours, top-1 %", None, ["last"]),
    ("probe_knn5", "5 nearest neighbours, top-1 %", None, ["last"]),
    ("loss", "fine-tuning loss", "finetune", ["last"]),
    ("val_loss", "validation loss", None, ["last"]),
    ("val_top1", "validation top-1 %", None, ["last", "best"]),
    ("ema_top1", "validation top-1 %, averaged weights", None, ["last", "best"]),
    ("val_map", "validation mAP %", None, ["last", "best"]),
    ("ema_map", "validation mAP %, averaged weights", None, ["last", "best"]),
    ("val_miou", "validation mean IoU %", None, ["last", "best"]),
    ("ema_miou", "validation mean IoU %, averaged weights", None, ["last", "best"]),
    ("val_ap", "validation AP %", None, ["last", "best"]),
    ("ema_ap", "validation AP %, averaged weights", None, ["last", "best"]),
    ("val_r2", "validation R²", None, ["last", "best"]),
    ("ema_r2", "validation R², averaged weights", None, ["last", "best"]),
    ("lr", "learning rate", None, []),
    ("grad_norm", "gradient norm", None, []),
    ("images_per_s", "images/s", None, ["median"]),
]
"""Metric, title, command whose runs have the curve (None: any), and statistics in the summary."""

STATISTICS: dict[str, Callable[[list[float]], str]] = {
    "last": lambda values: f"{values[-1]:.4g}",
    "best": lambda values: f"{max(values):.4g}",
    "median": lambda values: f"{np.median(values):.0f}",
}

_log = logging.getLogger(__name__)


class RunData:
    """What the folder of a run holds.

    Args:
        folder: of a run of pretraining or fine-tuning.
        name: the folder's name, with parents if several runs share it.

    Attributes:
        paths: of its files.
        config: what was asked for, by dotted key.
        state: of the newest checkpoint; {} if there is none.
        metrics: the objects of metrics.jsonl.
        bad, nonfinite: those of bad_images.jsonl and nonfinite.jsonl.
        command, model, status, steps: cells of the summary.

    Raises:
        InputError: the folder is not a run.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.paths = name, RunPaths(folder)
        if not self.paths.config.is_file():
            rule = "it has no config.yaml; give an --out folder"
            raise InputError(f"{str(folder)!r} is not a run: {rule}")
        self.config = flatten(read_yaml(self.paths.config))
        newest = next(iter(list_checkpoints(self.paths.checkpoints)), folder)
        self.state = read_json(newest / STATE)
        self.metrics = read_lines(self.paths.metrics)
        self.bad = read_lines(self.paths.bad_images)
        self.nonfinite = read_lines(self.paths.nonfinite)

        kind = "finetune" if "weights" in self.config else "pretrain"
        self.command = self.state.get("command") or kind
        own = [f"{key} {self.config[key]}" for key in ("depths", "dims") if self.config.get(key)]
        self.model = ", ".join(own) or self.config.get("model") or "that of the weights"
        exported = (self.paths.exported / "config.json").is_file()
        self.status = "finished" if exported else "not finished"
        self.steps = str(self.metrics[-1]["step"]) if self.metrics else "none"

    def series(self, key: str) -> list[Point]:
        """(step, value) of the lines in which `key` is a number."""
        return [
            (line["step"], float(line[key]))
            for line in self.metrics
            if isinstance(line.get("step"), int) and isinstance(line.get(key), int | float)
        ]

    def last(self, prefix: str) -> dict[str, float]:
        """The last number of each metric named `prefix…`, by the rest of its name."""
        return {
            key.removeprefix(prefix): value
            for line in self.metrics
            for key, value in line.items()
            if key.startswith(prefix) and isinstance(value, int | float)
        }

    def reconstructions(self) -> list[tuple[int, Image.Image]]:
        """(step, figure) of the reconstructions in TensorBoard's files, oldest first."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not self.paths.tensorboard.is_dir():
            return []
        events = EventAccumulator(str(self.paths.tensorboard), {"images": 0, "scalars": 1})
        events.Reload()
        if TAG not in events.Tags()["images"]:
            return []
        shown = {event.step: event.encoded_image_string for event in events.Images(TAG)}
        return [(step, Image.open(io.BytesIO(content))) for step, content in sorted(shown.items())]

    def figures(self) -> list[tuple[str, Image.Image]]:
        """(name, figure) of the plots of validation images."""
        files = sorted(self.paths.figures.glob("*.png"))
        return [(file.stem, Image.open(file)) for file in files]


def read_runs(folders: list[str]) -> list[RunData]:
    """Read run folders.

    Raises:
        InputError: a folder is not a run, or is given twice.
    """
    paths = [Path(folder) for folder in folders]
    parts = [path.resolve().parts for path in paths]
    if len({*parts}) < len(parts):
        raise InputError(f"runs {', '.join(folders)}: one is given twice")
    length = 1  # of the shortest suffixes of the paths that differ
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return list(map(RunData, paths, ("/".join(part[-length:]) for part in parts)))


def report(config: ReportConfig) -> Path:
    """Write a page on one run or on several, and return its path.

    Raises:
        InputError: a folder is not a run, or `out` is not an .html file.
        RunError: the page could not be written.
    """
    show_logs()
    runs = read_runs([config.runs] if isinstance(config.runs, str) else config.runs)
    wanted = runs[0].paths.root / "report.html" if config.out is None else config.out
    out = check_out_file(wanted, ".html")
    page = render(runs)
    with out_file(out) as path:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    _log.info("report: %s (%.1f MB)", out, out.stat().st_size / 1e6)
    return out


def render(runs: list[RunData]) -> str:
    """The page as HTML."""
    loader = PackageLoader("fcmae.inspect")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        version=__version__,
        runs=runs,
        scores=_scores(runs),
        curves=_curves(runs),
        diversity=_diversity(runs),
        reconstructions=_reconstructions(runs),
        validation=_validation(runs),
        settings=_settings(runs),
        shown=SHOWN,
    )


def _lines(runs: list[RunData], key: str, command: str | None) -> dict[str, list[Point]]:
    """The points of one of `CURVES` by run; none for runs of another command."""
    return {run.name: run.series(key) if command in (None, run.command) else [] for run in runs}


def _scores(runs: list[RunData]) -> dict[str, list[str]]:
    """Rows of the summary: a statistic of a curve, and a cell for each run."""
    rows = {}
    for key, title, command, kinds in CURVES:
        series = [[y for _, y in points] for points in _lines(runs, key, command).values()]
        for kind in kinds if any(series) else ():
            cells = [STATISTICS[kind](values) if values else "" for values in series]
            rows[f"{title}, {kind}"] = cells
    return rows


def _curves(runs: list[RunData]) -> list[Figure]:
    found = []
    for key, title, command, _ in CURVES:
        lines = _lines(runs, key, command)
        ends = ", ".join(f"{name}: {points[-1][1]:.4g}" for name, points in lines.items() if points)
        if ends:
            svg = figures.curves(lines, title, MEAN if command == "pretrain" else None)
            found.append(_figure(title, f"{title} over steps; at the end {ends}", svg))
    return found


def _diversity(runs: list[RunData]) -> Figure | None:
    lines = {run.name: run.last("diversity/") for run in runs}
    if not any(lines.values()):
        return None
    title, svg = "diversity of features", figures.svg(figures.diversity(lines))
    return _figure(title, f"{title}, a point for each block", svg)


def _reconstructions(runs: list[RunData]) -> list[Figure]:
    """The last and the first reconstructions of each run."""
    found = []
    for run in runs:
        drawn = run.reconstructions()
        for step, image in dict(drawn[-1:] + drawn[:1]).items():
            what = f"original, masked and reconstructed images of {run.name}"
            title = f"{run.name}, after step {step}"
            found.append(_figure(title, f"{what} after step {step}", _jpeg(image)))
    return found


def _validation(runs: list[RunData]) -> list[Figure]:
    """Scores and predictions of the best weights of each run, on validation images."""
    return [
        _figure(f"{run.name}, {name}", f"{name} of {run.name} on validation images", _jpeg(image))
        for run in runs
        for name, image in run.figures()
    ]


def _jpeg(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=88)
    return content.getvalue()


def _settings(runs: list[RunData]) -> list[tuple[str, list[str], bool]]:
    """(key, a cell for each run, whether they differ), differing ones first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    cells = {key: [str(run.config.get(key, "–")) for run in runs] for key in keys}
    rows = [(key, values, len(set(values)) > 1) for key, values in cells.items()]
    return sorted(rows, key=lambda row: not row[2])


def _figure(title: str, alt: str, content: str | bytes) -> Figure:
    """A figure in the page, from SVG text or the bytes of a JPEG file: its title, its alternative
    text, and its content as a data URI."""
    kind, data = ("svg+xml", content.encode()) if isinstance(content, str) else ("jpeg", content)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"title": title, "alt": alt, "uri": uri}
