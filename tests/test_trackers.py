"""Trackers: a failing one never ends a run; one that can't overwrite waits for checkpoints."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcmae.config.pretraining import PretrainConfig
from fcmae.train.pretraining import pretrain
from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers import TRACKERS, TensorBoardTracker, Trackers
from sparse.errors import InputError


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
    trackers = Trackers(RunPaths(tmp_path), 1, ("live", "careful"))
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
    trackers = Trackers(RunPaths(tmp_path), 1, ("broken", "sound"))
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
    trackers = Trackers(RunPaths(tmp_path), 1, ("tensorboard",))
    assert threading.excepthook is not before
    if fails:

        def refuse(*_: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(TensorBoardTracker, "log", refuse)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert threading.excepthook is before


def test_an_unknown_tracker_is_named_before_any_work(tmp_path: Path) -> None:
    config = PretrainConfig(str(tmp_path), str(tmp_path / "run"), trackers=["tensorbord"])
    with pytest.raises(InputError, match="'tensorbord' is unknown: use tensorboard"):
        pretrain(config)
    assert not (tmp_path / "run").exists()
