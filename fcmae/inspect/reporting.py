"""`fcmae report`: runs as one static page that opens from disk, with no network and no script."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from fcmae import __version__
from fcmae.atomic import check_out_file, out_file
from fcmae.commands.report import ReportConfig
from fcmae.console import show_logs
from fcmae.inspect import figures
from fcmae.train.run_data import RunData, read_runs

SHOWN = 50
"""Most lines of a table of files."""

MEAN = (1.0, "each patch's mean")

CURVES = (
    ("loss", "pretraining loss", MEAN, "pretrain"),
    ("holdout_loss", "held-out loss", MEAN, "pretrain"),
    ("probe_linear", "linear probe, top-1 %", None, None),
    ("probe_knn20", "20 nearest neighbours, top-1 %", None, None),
    ("probe_knn5", "5 nearest neighbours, top-1 %", None, None),
    ("loss", "fine-tuning loss", None, "finetune"),
    ("val_loss", "validation loss", None, None),
    ("val_top1", "validation top-1 %", None, None),
    ("ema_top1", "validation top-1 %, averaged weights", None, None),
    ("lr", "learning rate", None, None),
    ("grad_norm", "gradient norm", None, None),
    ("images_per_s", "images/s", None, None),
)
"""Metric, title, a level with its meaning, and the command that the curve is of (None: any)."""

_log = logging.getLogger(__name__)


class Figure(NamedTuple):
    """A picture in the page: its title, what it says in words, and its content as a data URI."""

    title: str
    alt: str
    uri: str


def report(config: ReportConfig) -> Path:
    """Write a page on one run or on several side by side, and return it.

    Raises:
        InputError: a folder that is no run, or an `out` that is no .html file.
        RunError: the page could not be written.
    """
    show_logs()
    folders = [config.runs] if isinstance(config.runs, str) else config.runs
    runs = read_runs(folders)
    out = check_out_file(
        runs[0].paths.root / "report.html" if config.out is None else config.out, ".html"
    )
    page = render(runs)
    with out_file(out) as path:
        path.write_text(page, encoding="utf-8", errors="backslashreplace")
    _log.info(
        "%s: %d run%s, %.1f MB",
        out,
        len(runs),
        "" if len(runs) == 1 else "s",
        out.stat().st_size / 1e6,
    )
    return out


def render(runs: list[RunData]) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("fcmae.inspect"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        version=__version__,
        runs=runs,
        summary=_summary(runs),
        curves=_curves(runs),
        diversity=_diversity(runs),
        pictures=[(run, _pictures(run)) for run in runs],
        settings=_settings(runs),
        shown=SHOWN,
    )


def _summary(runs: list[RunData]) -> dict[str, list[str]]:
    """Rows of the first table: what, and for each run a cell."""
    rows: dict[str, list[str]] = {}

    def add(name: str, cells: list[str]) -> None:
        if any(cells):
            rows[name] = cells

    add("command", [run.command for run in runs])
    add("model", [_model(run) for run in runs])
    add("state", ["finished" if run.finished else "not finished" for run in runs])
    add("steps", [str(run.metrics[-1]["step"]) if run.metrics else "none" for run in runs])
    add("epochs asked", [str(run.config.get("epochs", "")) for run in runs])
    for key, title, _, command in CURVES:
        if key in ("lr", "grad_norm"):
            continue
        series = [
            [value for _, value in run.series(key)] if command in (None, run.command) else []
            for run in runs
        ]
        if key == "images_per_s":
            add(f"{title}, median", [f"{np.median(s):.0f}" if s else "" for s in series])
            continue
        add(f"{title}, last", [f"{values[-1]:.4g}" if values else "" for values in series])
        if key.endswith("top1"):
            add(f"{title}, best", [f"{max(values):.4g}" if values else "" for values in series])
    for key in ("engine", "precision"):
        add(key, [str(run.state.get("settings", {}).get(key, "")) for run in runs])
    add("threads", [str(run.state.get("threads", "")) for run in runs])
    add("torch", [str(run.state.get("versions", {}).get("torch", "")) for run in runs])
    add("unreadable files", [str(len(run.bad)) for run in runs])
    add("updates not applied", [str(len(run.nonfinite) or "") for run in runs])
    return rows


def _model(run: RunData) -> str:
    own = [f"{key} {run.config[key]}" for key in ("depths", "dims") if run.config.get(key)]
    return ", ".join(own) or str(run.config.get("model") or "that of the weights")


def _curves(runs: list[RunData]) -> list[Figure]:
    found = []
    for key, title, level, command in CURVES:
        lines = [
            (run.name, run.series(key) if command in (None, run.command) else []) for run in runs
        ]
        if not any(points for _, points in lines):
            continue
        svg = figures.curves(lines, title, level)
        ends = ", ".join(f"{name}: {points[-1][1]:.4g}" for name, points in lines if points)
        found.append(_svg_figure(title, f"{title} over steps; at the end {ends}", svg))
    return found


def _diversity(runs: list[RunData]) -> Figure | None:
    if not any(run.keys("diversity/") for run in runs):
        return None
    title = "diversity of features"
    found = [
        (
            run.name,
            {
                key.removeprefix("diversity/"): run.series(key)[-1][1]
                for key in run.keys("diversity/")
            },
        )
        for run in runs
    ]
    svg = figures.svg(figures.diversity(found))
    return _svg_figure(title, f"{title}, a point for each block", svg)


def _pictures(run: RunData) -> list[Figure]:
    """The first and the last reconstructions."""
    pictures = run.pictures()
    chosen = pictures[-1:] if len(pictures) < 2 else [pictures[-1], pictures[0]]
    return [
        Figure(
            f"after step {step}",
            f"original, masked, reconstructed and pasted pictures of {run.name} after step {step}",
            _jpeg(picture),
        )
        for step, picture in chosen
    ]


def _settings(runs: list[RunData]) -> list[tuple[str, list[str], bool]]:
    """(key, a cell for each run, whether they differ), those that differ first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        cells = [str(run.config.get(key, "–")) for run in runs]
        rows.append((key, cells, len(set(cells)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _svg_figure(title: str, alt: str, svg: str) -> Figure:
    return Figure(title, alt, _uri("image/svg+xml", svg.encode()))


def _jpeg(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.convert("RGB").save(content, "JPEG", quality=88)
    return _uri("image/jpeg", content.getvalue())


def _uri(kind: str, content: bytes) -> Any:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
