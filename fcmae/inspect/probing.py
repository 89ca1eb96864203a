"""`fcmae probe`: what frozen features are worth on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fcmae.commands.probe import ProbeConfig
from fcmae.data.duplicates import report_duplicates
from fcmae.data.evaluation import report_skipped
from fcmae.data.labelled import LabelledData, check_known, find_labelled
from fcmae.inspect.probes import labelled_features, measure
from fcmae.inspect.prologue import set_up
from fcmae.train.checkpoint import STATE
from fcmae.train.machine import resolve_workers
from fcmae.train.processes import World
from fcmae.weights.load import Backbone, load_backbone, random_backbone
from fcmae.weights.read import CONFIG_FILE, read_json
from sparse.errors import InputError


def probe(config: ProbeConfig, show: bool = True) -> dict[str, Any]:
    """Measure frozen features, and print a table, or with `config.json` one JSON object.

    Args:
        config: what was asked.
        show: False prints nothing.

    Returns:
        For each of `knn5`, `knn20` (or other `neighbours`) and `linear`: `top1` in percent and its
        95 % interval, `low` to `high`; of `linear` also its `penalty`. `random`, the same for
        random weights, with `baseline`. The numbers of images, `train` and `val`, of `classes`
        and of `unreadable` ones; `weights`, `img_size`; `near_duplicates`, where asked for, each
        with `path`, `of` and `bits`.

    Raises:
        InputError: the weights or the data are wrong.
        RunError: no image could be read.
    """
    setting = set_up(config, load_backbone, lambda backbone: _find_labelled(config, backbone))
    backbone, data = setting.model, setting.images
    world = World(0, 1, setting.device)
    alike = {}
    if config.near_duplicates is not None:  # first, since a wrong folder ends the command
        found = report_duplicates(config.near_duplicates, data, config.workers, world)
        alike["near_duplicates"] = [entry._asdict() for entry in found]
    result = _measured(backbone, data, config)
    if config.baseline:
        result["random"] = _measured(random_backbone(backbone), data, config)
    result |= alike
    if show and config.json:
        print(json.dumps(result))
    elif show:
        _print_table(result)
    return result


def _find_labelled(config: ProbeConfig, backbone: Backbone) -> LabelledData:
    data = find_labelled(config.data, config.val_fraction, exclude=config.source)
    if backbone.file is not None and not config.other_classes:
        _check_classes(config, backbone.file, data)
    return data


def _measured(backbone: Backbone, data: LabelledData, config: ProbeConfig) -> dict[str, Any]:
    workers = resolve_workers(config.workers, backbone.device)
    features, bad = labelled_features(backbone, data, config.batch_size, workers, shown=True)
    report_skipped(bad)
    return {
        **measure(features, config.neighbours, backbone.device, shown=True),
        "train": len(features.train),
        "val": len(features.val),
        "classes": features.classes,
        "unreadable": len(bad),
        "weights": backbone.origin,
        "img_size": list(backbone.images.img_size),
    }


def _check_classes(config: ProbeConfig, file: Path, data: LabelledData) -> None:
    """Refuse weights that were fine-tuned for other classes, which is most likely a mistake.

    Raises:
        InputError: the config or checkpoint beside the weight file names other classes.
    """
    state = read_json(file.with_name(STATE)).get("settings", {})
    names = read_json(file.with_name(CONFIG_FILE)).get("label_names", state.get("label_names"))
    if not isinstance(names, list):
        return
    try:
        check_known(Path(config.data), data.names, names, "the fine-tuned model")
    except InputError as error:
        raise InputError(
            f"{error}; to probe its features on other classes, --other_classes"
        ) from error


def _print_table(result: dict[str, Any]) -> None:
    out = Console(highlight=False)
    out.print(result["weights"], markup=False, soft_wrap=True)
    out.print(
        f"{result['train']} images to learn from, {result['val']} to measure on, "
        f"{result['classes']} classes"
    )
    table = Table()
    for name in ("probe", "top-1 %", "95 %"):
        table.add_column(name, justify="left" if name == "probe" else "right")
    if "random" in result:
        table.add_column("random weights", justify="right")
    for name, entry in result.items():
        if not isinstance(entry, dict) or "top1" not in entry:
            continue
        row = [name, f"{entry['top1']:.1f}", f"{entry['low']:.1f} to {entry['high']:.1f}"]
        if "random" in result:
            row.append(f"{result['random'][name]['top1']:.1f}")
        table.add_row(*row)
    out.print(table, markup=False)
