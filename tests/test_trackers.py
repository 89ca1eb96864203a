"""Trackers: a failing one never ends a run; one that can't overwrite waits for checkpoints."""

import json
import re
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fcmae.config.pretraining import PretrainConfig
from fcmae.train.pretraining import pretrain
from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers import TRACKERS, Trackers, check_trackers
from fcmae.train.trackers.tensorboard import TensorBoard
from sparse.errors import InputError
from tests.cli import metrics, run, start, wait_for_steps


class Recorder:
    """Records its calls."""

    def __init__(self, overwrites: bool, fails: bool = False) -> None:
        self.overwrites, self.fails = overwrites, fails
        self.calls: list[Any] = []

    def log(self, metrics: Any, step: int) -> None:
        if self.fails:
            raise OSError("no space left")
        self.calls.append((step, dict(metrics)))

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self.calls.append((step, name))

    def flush(self) -> None:
        pass

    def finish(self) -> None:
        self.calls.append("finish")


def test_a_tracker_that_cannot_overwrite_gets_only_steps_covered_by_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, careful = Recorder(True), Recorder(False)
    monkeypatch.setitem(TRACKERS, "live", lambda *_: live)
    monkeypatch.setitem(TRACKERS, "careful", lambda *_: careful)
    trackers = Trackers(RunPaths(tmp_path), 1, ("live", "careful"), {})
    trackers.log({"loss": 1.0}, 1)
    trackers.image("grid", np.zeros((2, 2, 3), np.uint8), 1)
    assert (live.calls, careful.calls) == ([(1, {"loss": 1.0}), (1, "grid")], [])
    trackers.covered()
    assert careful.calls == live.calls
    trackers.log({"loss": 0.5}, 2)  # no checkpoint covers it: a resumed run logs it again
    trackers.finish()
    assert live.calls[2:] == [(2, {"loss": 0.5}), "finish"]
    assert careful.calls[2:] == ["finish"]


def test_a_failing_tracker_is_finished_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Recorder(True, fails=True), Recorder(True)
    monkeypatch.setitem(TRACKERS, "broken", lambda *_: broken)
    monkeypatch.setitem(TRACKERS, "sound", lambda *_: sound)
    trackers = Trackers(RunPaths(tmp_path), 1, ("broken", "sound"), {})
    for step in (1, 2):
        trackers.log({"loss": 1.0}, step)
    assert caplog.text.count("broken stops recording until the run is resumed: no space left") == 1
    assert broken.calls == ["finish"]
    assert sound.calls == [(1, {"loss": 1.0}), (2, {"loss": 1.0})]


@pytest.mark.parametrize("fails", [False, True])
def test_tensorboard_restores_the_exception_hook_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    before = threading.excepthook
    trackers = Trackers(RunPaths(tmp_path), 1, ("tensorboard",), {})
    assert threading.excepthook is not before
    if fails:

        def refuse(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(TensorBoard, "log", refuse)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert threading.excepthook is before


def test_an_unknown_tracker_is_named_before_any_work(tmp_path: Path) -> None:
    config = PretrainConfig(str(tmp_path), str(tmp_path / "run"), trackers=["tensorbord"])
    with pytest.raises(InputError, match="'tensorbord' is unknown: use tensorboard"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


def wandb_records(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) that Weights & Biases keeps for later, in the order of the sessions."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = []
    for file in sorted(folder.rglob("run-*.wandb"), key=lambda file: file.parent.name):
        data, place, parts = file.read_bytes(), 7, b""
        while place < len(data):  # LevelDB's log: blocks of 32 KiB, records may be in parts
            if 2**15 - place % 2**15 < 7:
                place += 2**15 - place % 2**15
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                record = records.Record.FromString(parts)
                parts = b""
                if record.WhichOneof("record_type") == "history":
                    items = {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                    found.append((record.history.step.num, items))
    return found


def mlflow_client(folder: Path) -> tuple[Any, str]:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    return client, json.loads((folder / "trackers.json").read_text())["mlflow"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_repeats_no_step_in_any_tracker(
    how: signal.Signals, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out = tmp_path / "run"
    command = [
        "pretrain", pictures, "--out", out, "--depths", "1", "1", "1", "1", "--dims", "8", "8", "8",
        "8", "--img_size", "64", "--batch_size", "8", "--epochs", "4",
        "--workers", "0", "--log_steps", "1", "--checkpoint_steps", "4", "--trackers",
        "tensorboard", "wandb", "mlflow",
    ]  # fmt: skip
    process = start(*command)
    wait_for_steps(out, 6, process)
    process.send_signal(how)
    process.communicate()
    run(*command)
    expected = dict(metrics(out))
    assert [*expected] == [*range(1, 13)]
    found = [(step, items["loss"]) for step, items in wandb_records(out) if "loss" in items]
    # Its own process writes in blocks: what it holds when both are killed is lost.
    assert found == [*expected.items()][-len(found) :]
    assert len(found) == len(expected) or (how == signal.SIGKILL and len(found) >= 8)
    client, name = mlflow_client(out)
    history = client.get_metric_history(name, "loss")
    assert [(entry.step, entry.value) for entry in history] == [*expected.items()]
    assert client.get_run(name).info.status == "FINISHED"
    assert client.get_run(name).data.params["optim.weight_decay"] == "0.05"
    board = EventAccumulator(str(out / "tb")).Reload()
    curve = {event.step: event.value for event in board.Scalars("loss")}
    assert curve == pytest.approx(expected)


def test_pictures_arrive_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers = Trackers(RunPaths(tmp_path), 1, ("wandb", "mlflow"), {"seed": 1})
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    trackers.image("grid", picture, 3)
    trackers.covered()
    trackers.finish()
    assert not [text for text in caplog.messages if "record this run" in text or "stops" in text]
    assert [step for step, items in wandb_records(tmp_path) if "grid.path" in items] == [3]
    found = [*tmp_path.rglob("grid*.png")]
    assert len(found) == 2
    for file in found:
        with Image.open(file) as image:
            assert np.array_equal(np.array(image.convert("RGB")), picture), file


@pytest.mark.parametrize(
    ("name", "variables", "words"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "not logged in: run `wandb login`"),
        ("mlflow", {}, "pip install 'fcmae[mlflow]'"),
        ("wandb", {"WANDB_MODE": "offline"}, "pip install 'fcmae[wandb]'"),
    ],
)
def test_a_tracker_that_cannot_start_ends_the_run_before_any_work(
    name: str, variables: dict[str, str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if "pip install" in words:
        monkeypatch.setitem(sys.modules, name, None)
    else:
        pytest.importorskip(name)
    with pytest.raises(InputError, match=re.escape(words)):
        check_trackers([name])


def test_one_that_fails_at_the_start_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("no route to host\nand more")

    monkeypatch.setitem(TRACKERS, "far", refuse)
    trackers = Trackers(RunPaths(tmp_path), 1, ("far",), {})
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert caplog.messages == ["far does not record this run: no route to host"]
