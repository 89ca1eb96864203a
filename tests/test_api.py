"""The Python functions: the same runs as the command line's, from keyword arguments."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fcmae
from fcmae.api import Run, make_config
from fcmae.config.pretraining import PretrainConfig
from sparse.errors import InputError
from tests import cli
from tests.conftest import write_classes

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "img_size": 64}
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "workers": 0, "log_steps": 1}


def test_dots_are_nested_dicts_or_underscores(tmp_path: Path) -> None:
    base = {"data": tmp_path, "out": tmp_path / "run"}
    nested = make_config(PretrainConfig, {**base, "optim": {"base_lr": 3e-3, "betas": (0.9, 0.99)}})
    flat = make_config(
        PretrainConfig, {**base, "optim__base_lr": 3e-3, "optim__betas": [0.9, 0.99]}
    )
    assert nested == flat
    assert (nested.data, nested.optim.base_lr, nested.optim.betas) == (
        str(tmp_path), 3e-3, [0.9, 0.99]
    )  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 7\noptim:\n  base_lr: 1.0e-3\n")
    read = make_config(PretrainConfig, {**base, "config": file, "optim": {"base_lr": 2e-3}})
    assert (read.epochs, read.optim.base_lr) == (7, 2e-3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"out": "x"}, "missing data"),
        ({"data": "x", "out": "y", "epoch": 3}, "unknown setting 'epoch'; did you mean epochs"),
        ({"data": "x", "out": "y", "optim": {"lr": 3}}, "unknown setting 'optim.lr'"),
        ({"data": "x", "out": "y", "epochs": "many"}, "epochs"),
        ({"data": "nowhere", "out": "y"}, "data 'nowhere' does not exist"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fcmae.pretrain(**settings)


def test_from_photos_to_predictions(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    run = fcmae.pretrain(data=data / "train", out=tmp_path / "run", **SMALL, **SHORT)
    assert isinstance(run, Run)
    assert run.finished
    cli.run(
        "pretrain", data / "train", "--out", tmp_path / "same", "--depths", "1", "1", "1", "1",
        "--dims", "8", "8", "8", "8", "--img_size", "64", "--epochs", "2", "--batch_size", "8",
        "--workers", "0", "--log_steps", "1",
    )  # fmt: skip
    losses = [(line["step"], line["loss"]) for line in run.metrics if "loss" in line]
    assert losses == cli.metrics(tmp_path / "same")
    (line,) = run.figure("loss").axes[0].lines
    assert list(line.get_ydata()) == [loss for _, loss in losses]
    with pytest.raises(InputError, match="no step has 'los'; did you mean loss"):
        run.figure("los")
    tuned = fcmae.finetune(data=data, weights=run, out=tmp_path / "tuned", img_size=64, **SHORT)
    photos = sorted((data / "val").rglob("*.png"))
    backbone, model = fcmae.load(run), fcmae.load(tuned)
    assert (backbone.task, backbone.names) == (None, ())
    assert (model.task, len(model.names)) == ("classify", 3)
    features = backbone(photos)
    assert [feature.shape for feature in features] == [(8,)] * len(photos)
    out = tmp_path / "predicted.csv"
    cli.run("predict", tuned.path, "--images", data / "val", "--out", out, "--top", "1")
    _, *rows = out.read_text().splitlines()
    for logits, row in zip(model(photos), rows, strict=True):
        score, place = torch.softmax(logits, 0).max(0)
        assert row.split(",")[1:] == [model.names[int(place)], f"{float(score):.6f}"]


def test_an_unreadable_image_is_named(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    run = fcmae.pretrain(data=pictures, out=tmp_path / "run", **SMALL, **{**SHORT, "epochs": 1})
    with pytest.raises(InputError, match=r"x\.png' can't be read"):
        fcmae.load(run)([tmp_path / "x.png"])
