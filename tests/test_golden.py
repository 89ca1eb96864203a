"""A short loss trajectory kept in git: a refactor gives the same numbers.

A change of numerics (initial weights, order, crops, masks, optimizer) must be stated and needs new
losses: `python -m tests.test_golden`.
"""

import json
import tempfile
from pathlib import Path
from typing import Literal

import pytest

from fcmae.config.pretraining import AugmentConfig, DecoderConfig, PretrainConfig
from fcmae.config.training import OptimConfig
from fcmae.train.pretraining import pretrain
from finetune.train import finetune
from sparse.engines.minkowski import why_unavailable
from tests.cli import metrics
from tests.conftest import write_classes, write_masks, write_pictures
from tests.test_detect import trajectory as detect_trajectory
from tests.test_finetune_kinds import KINDS, config, write_labels
from tests.test_segment import trajectory as segment_trajectory

GOLDEN = Path(__file__).with_name("golden_losses.json")


def trajectory(engine: str, init: Literal["fan_in", "paper"], folder: Path) -> list[float]:
    data = write_pictures(folder / "pictures", 24)
    config = PretrainConfig(
        data=str(data), out=str(folder / "run"), depths=[1, 1, 2, 1], dims=[8, 16, 24, 32],
        img_size=[64, 96], epochs=8, batch_size=8, decoder=DecoderConfig(dim=16),
        init=init, optim=OptimConfig(base_lr=0.3), augment=AugmentConfig(vflip=True), drop_path=0.1,
        engine=engine, workers=0, log_steps=1,
    )  # fmt: skip
    assert pretrain(config) == 0
    return [loss for _, loss in metrics(folder / "run")]


@pytest.mark.parametrize("init", ["fan_in", "paper"])
@pytest.mark.parametrize("engine", ["dense", "patch", "minkowski"])
def test_losses_equal_the_golden_ones(engine, init, tmp_path):
    if engine == "minkowski" and why_unavailable() is not None:
        pytest.skip(str(why_unavailable()))
    golden = json.loads(GOLDEN.read_text())[init]
    assert sum(golden[-6:]) < sum(golden[:6])
    assert trajectory(engine, init, tmp_path) == pytest.approx(golden, rel=2e-4)


def kind_trajectory(kind: str, folder: Path) -> list[float]:
    """Losses of fine-tuning on one kind of label, with weights for rare classes."""
    labels = write_labels(write_classes(folder / "data"), folder / "labels.csv", kind)
    weights = "none" if kind == "regress" else "balanced"
    given = config(labels, folder / "run", epochs=4, class_weights=weights, checkpoint_steps=None)
    assert finetune(given) == 0
    return [loss for _, loss in metrics(folder / "run")]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_each_kind_equal_the_golden_ones(kind, tmp_path):
    golden = json.loads(GOLDEN.read_text())[kind]
    assert len(golden) == 12
    assert kind_trajectory(kind, tmp_path) == pytest.approx(golden, rel=2e-4)


def write_golden() -> None:
    losses: dict[str, list[float]] = {}
    for init in ("fan_in", "paper"):
        with tempfile.TemporaryDirectory() as folder:
            losses[init] = trajectory("dense", init, Path(folder))
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            losses[kind] = kind_trajectory(kind, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            write_masks(Path(folder) / "discs" / split, "masks")
        losses["segment"] = segment_trajectory(Path(folder) / "discs")
    for kind in ("detect", "instances"):
        with tempfile.TemporaryDirectory() as folder:
            losses[kind] = detect_trajectory(kind, Path(folder))
    GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
