"""Probing during pretraining: it gives the results of `fcmae probe` and changes nothing."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fcmae import FCMAE
from fcmae.cli import main
from fcmae.commands.probe import ProbeConfig
from fcmae.config.pretraining import EpochProbeConfig, PretrainConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.data.evaluation import EvalDataset, each_batch
from fcmae.data.labelled import find_labelled
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.probing import labelled_features, measure, probe
from fcmae.inspect.watch import NEIGHBOURS, ProbeWatcher
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.pretraining import pretrain
from fcmae.train.processes import World
from fcmae.train.task import Interrupted
from tests.cli import TINY, metrics, weights
from tests.conftest import write_pictures
from tests.test_features import CPU, pretrain_config, resolved

KEYS = ("probe_knn5", "probe_knn20", "probe_linear")


def config(pictures: Path, out: Path, classes: Path | None, **changes: Any) -> PretrainConfig:
    """Nine steps; probed after six and at the end."""
    probing = EpochProbeConfig(None if classes is None else str(classes), epochs=2)
    settings: dict[str, Any] = {"epochs": 3, "drop_path": 0.3, "log_steps": 1}
    return pretrain_config(pictures, out, probe=probing, **settings | changes)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes unrelated to the images, so that results lie between 0 and 100 %; read-only."""
    root = tmp_path_factory.mktemp("classes")
    for seed, name in enumerate(("a", "b", "c")):
        write_pictures(root / "train" / name, 12, seed, size=64)
        write_pictures(root / "val" / name, 10, seed + 10, size=64)
    return root


@pytest.fixture(scope="module")
def run(pictures: Path, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was probed; read-only."""
    out = tmp_path_factory.mktemp("runs") / "probed"
    assert pretrain(config(pictures, out, classes)) == 0
    return out


def test_the_last_results_equal_those_of_the_command(run: Path, classes: Path) -> None:
    found = {key: metrics(run, key) for key in KEYS}
    assert all([step for step, _ in values] == [6, 9] for values in found.values())
    result = probe(ProbeConfig(str(run), str(classes), workers=0, batch_size=5), show=False)
    assert (result["img_size"], result["val"]) == ([64, 96], 30)
    for key, values in found.items():
        assert 0 < values[-1][1] < 80
        assert values[-1][1] == pytest.approx(result[key.removeprefix("probe_")]["top1"])


def test_the_weights_equal_those_of_a_run_that_is_not_probed(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert pretrain(config(pictures, out, None)) == 0
    assert metrics(out) == metrics(run)
    assert metrics(out, "probe_linear") == []
    assert weights(out) == weights(run)
    for file in ("model.safetensors", "optimizer.safetensors"):
        newest = [list_checkpoints(folder / "checkpoints")[0] / file for folder in (out, run)]
        assert newest[0].read_bytes() == newest[1].read_bytes()


def test_a_run_stopped_during_a_probe_probes_again(
    run: Path, pictures: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, out = EvalDataset.__getitem__, tmp_path / "run"

    def stop(dataset: EvalDataset, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, index)

    monkeypatch.setattr(EvalDataset, "__getitem__", stop)
    assert pretrain(config(pictures, out, classes)) == 143
    assert (len(metrics(out)), metrics(out, "probe_linear")) == (6, [])
    monkeypatch.undo()
    assert pretrain(config(pictures, out, classes)) == 0
    for key in ("loss", *KEYS):
        assert metrics(out, key) == metrics(run, key)
    assert weights(out) == weights(run)


def test_features_are_computed_without_drop_path(classes: Path) -> None:
    """The model returns to training mode, and the random streams are unchanged."""
    torch.manual_seed(0)
    model = FCMAE.from_size(
        "atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], engine="patch", drop_path=0.9
    ).train()
    data, mean, std = find_labelled(str(classes), 0.0), [0.5] * 3, [0.25] * 3
    watcher = ProbeWatcher(data, resolved((64, 64), mean, std, precision="bf16"), 1, MAX_PIXELS)
    before = torch.get_rng_state()
    found = watcher(model, 1, lambda: False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.encoder.training
    images = Preprocessing((64, 64), tuple(mean), tuple(std))
    features = labelled_features(
        model.encoder.eval(), data, lambda split: each_batch(EvalDataset(split, images), CPU, 24, 0)
    )
    expected = {f"probe_{name}": v["top1"] for name, v in measure(features, NEIGHBOURS).items()}
    assert found == expected
    assert tuple(found) == KEYS


def test_a_stop_is_handled_between_batches(classes: Path) -> None:
    asked = iter([False, True])
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], engine="patch")
    data = find_labelled(str(classes), 0.0)
    watcher = ProbeWatcher(data, resolved((64, 64), [0.5] * 3, [0.25] * 3), 1, MAX_PIXELS)
    with pytest.raises(Interrupted):
        watcher(model.train(), 1, lambda: next(asked))
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probe.data", "nowhere"], "probe.data 'nowhere' does not exist"),
        (["--probe.data", "{pictures}"], "train' is not a folder"),
        (["--probe.data", "{classes}", "--probe.val_fraction", "0.2"], "leave val_fraction at 0"),
        (["--probe.data", "{classes}", "--probe.epochs", "0"], "probe.epochs 0 must be at least 1"),
    ],
)
def test_wrong_probes_are_refused_before_anything_is_written(
    pictures: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    given = [argument.format(pictures=pictures, classes=classes) for argument in arguments]
    assert main(["pretrain", "--data", str(pictures), "--out", str(out), *TINY, *given]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_processes_compare_their_probe_data_before_anything_is_written(
    pictures: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With different lists, one process would wait for the features of another."""
    compared: list[dict[str, Any]] = []

    def record(_: World, facts: dict[str, Any]) -> None:
        compared.append(facts)
        raise ZeroDivisionError

    monkeypatch.setattr(World, "check_same", record)
    given = config(pictures, tmp_path / "run", classes)
    image = classes / "val" / "a" / "0000.png"
    with pytest.raises(ZeroDivisionError):
        pretrain(given)
    image.rename(image.with_name("moved.png"))
    with pytest.raises(ZeroDivisionError):
        pretrain(given)
    image.with_name("moved.png").rename(image)
    before, after = compared
    assert [key for key in before if before[key] != after[key]] == [
        "names of images (list 3) with the SHA-256"
    ]
    assert before["probe.epochs"] == 2
    assert not (tmp_path / "run").exists()
