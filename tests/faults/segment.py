"""Faults of runs that learn masks or objects: those of pretraining, and labels that are broken."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import write_masks
from tests.faults.campaign import Generator, Row
from tests.faults.disk import damaged
from tests.faults.processes import (
    Command,
    finish,
    instances,
    killed,
    not_finite,
    segment,
    signalled,
    undisturbed,
    worker_lost,
)


def checkpoints() -> Path:
    """Those of a whole run: weights, optimizer, average and best weights."""
    return undisturbed(train=segment)[0] / "checkpoints"


def broken(
    number: int,
    random: Generator,
    folder: Path,
    train: Command = segment,
    masks: str = "masks",
) -> str:
    """300 images, 6 of them broken and 6 with a broken mask: all named, the same weights twice."""
    data = folder / "data"
    write_masks(data / "train", masks, 300)
    write_masks(data / "val", masks, 4)
    chosen = [int(index) for index in random.choice(np.arange(32, 300), 12, replace=False)]
    for place, index in enumerate(chosen):
        image, mask = (data / "train" / kind / f"{index}.{end}" for kind, end in
                       (("images", "jpg"), (masks, "png")))  # fmt: skip
        file = image if place % 2 else mask
        match place % 6:
            case 0:
                file.write_bytes(b"")
            case 1 | 2:
                file.write_bytes(file.read_bytes()[:-100])
            case 3 | 5:
                file.write_bytes(b"none")
            case 4:
                Image.new("L", (7, 7)).save(file)
    names = sorted(f"train/images/{index}.jpg" for index in chosen)
    states = []
    for run, workers in (("a", 2), ("b", 0)):
        out = folder / run
        options = ["--data", data, "--epochs", 1, "--checkpoint_steps", 100]
        finish(train(out, *options, "--workers", workers))
        lines = map(json.loads, (out / "bad_images.jsonl").read_text().splitlines())
        found = sorted(line["path"] for line in lines)
        assert found == names, found
        states.append((out / "exported" / "task" / "model.safetensors").read_bytes())
    assert states[0] == states[1], "different replacements"
    return f"{len(chosen)} of 300 found, twice"


ROWS = (
    Row("segment-kill", "as `kill`, of a run that learns masks", 30,
        partial(killed, train=segment)),
    Row("segment-signal", "as `signal`, of a run that learns masks", 20,
        partial(signalled, train=segment)),
    Row("segment-damage", "as `damage`, of the checkpoints of a run that learns masks: weights, "
        "optimizer, average and best weights", 100, partial(damaged, source=checkpoints), short=0),
    Row("segment-nonfinite", "as `nonfinite`, of a run that learns masks", 10,
        partial(not_finite, train=segment)),
    Row("segment-worker", "as `worker`, of a run that learns masks", 10,
        partial(worker_lost, train=segment)),
    Row("segment-broken", "300 images, 6 broken and 6 with a broken mask: exactly these are named, "
        "every run uses the same replacements", 3, broken),
    Row("objects-kill", "as `kill`, of a run that learns objects with masks", 20,
        partial(killed, train=instances)),
    Row("objects-signal", "as `signal`, of a run that learns objects with masks", 20,
        partial(signalled, train=instances)),
    Row("objects-broken", "300 images, 6 broken and 6 with a broken label image: as in "
        "`segment-broken`", 3, partial(broken, train=instances, masks="instances")),
)  # fmt: skip
