"""Runs that are killed, stopped, resumed elsewhere or split up equal an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse.engines.minkowski import why_unavailable
from tests.cli import TINY, environment, metrics, run, start, wait_for_steps, weights
from tests.conftest import write_pictures

needs_minkowski = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")
EPOCHS = ["--epochs", "16"]
STEPS = 48  # 24 images in batches of 8


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    run("pretrain", "--data", pictures, "--out", out, *TINY, *EPOCHS)
    return out


def kill(process: subprocess.Popen[str], number: int) -> str:
    os.kill(process.pid, number)
    return process.communicate(timeout=60)[1]


def test_the_run_folder(undisturbed, pictures):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "train.log", "tb", "checkpoints", "exported"} <= names
    assert [step for step, _ in metrics(undisturbed)] == list(range(1, STEPS + 1))
    losses = [loss for _, loss in metrics(undisturbed)]
    assert sum(losses[-5:]) < sum(losses[:5])
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert kept == ["step-00000045", f"step-{STEPS:08d}"]
    files = {path.name for path in (undisturbed / "checkpoints" / kept[-1]).iterdir()}
    assert files == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
    }  # fmt: skip
    state = json.loads((undisturbed / "checkpoints" / kept[-1] / "state.json").read_text())
    assert (state["step"], state["epoch"], state["settings"]["engine"]) == (STEPS, 16, "patch")
    assert not (undisturbed / "bad_images.jsonl").exists()
    assert "config.yaml" in names
    assert f"data: {pictures}" in (undisturbed / "config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_twice_in_one_epoch_and_resumed(undisturbed, pictures, tmp_path, workers):
    """Bit-equal weights and the same losses, whatever the number of workers."""
    command = ["pretrain", "--data", pictures, "--out", tmp_path / "run", *TINY, *EPOCHS,
               "--workers", workers]  # fmt: skip
    for steps in (7, 13):
        process = start(*command)
        wait_for_steps(tmp_path / "run", steps, process)
        kill(process, signal.SIGKILL)
    run(*command)
    assert weights(tmp_path / "run") == weights(undisturbed)
    assert metrics(tmp_path / "run") == metrics(undisturbed)
    assert metrics(tmp_path / "run", "grad_norm") == metrics(undisturbed, "grad_norm")


@pytest.mark.slow
@needs_minkowski
def test_minkowski_resumes_bit_equal_and_learns_what_patch_learns(undisturbed, pictures, tmp_path):
    command = ["pretrain", "--data", pictures, *TINY, *EPOCHS, "--engine", "minkowski"]
    run(*command, "--out", tmp_path / "whole")
    process = start(*command, "--out", tmp_path / "killed")
    wait_for_steps(tmp_path / "killed", 12, process)
    kill(process, signal.SIGKILL)
    run(*command, "--out", tmp_path / "killed")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    for (_, mine), (_, patch) in zip(
        metrics(tmp_path / "whole"), metrics(undisturbed), strict=True
    ):
        assert mine == pytest.approx(patch, abs=1e-4)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_stopped_by_a_signal_saves_and_resumes(undisturbed, pictures, tmp_path, number, code):
    command = ["pretrain", "--data", pictures, "--out", tmp_path, *TINY, *EPOCHS,
               "--checkpoint_steps", 1000]  # fmt: skip
    process = start(*command)
    wait_for_steps(tmp_path, 5, process)
    log = kill(process, number)
    assert process.returncode == code
    assert "the same command resumes there" in " ".join(log.split())
    done = metrics(tmp_path)[-1][0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    run(*command)
    assert weights(tmp_path) == weights(undisturbed)
    assert metrics(tmp_path) == metrics(undisturbed)


def test_finished_run_repeated_does_nothing(undisturbed, pictures):
    before = weights(undisturbed)
    again = run("pretrain", "--data", pictures, "--out", undisturbed, *TINY, *EPOCHS)
    assert "finished" in again.stderr
    assert weights(undisturbed) == before
    assert len(metrics(undisturbed)) == STEPS


@pytest.mark.slow
def test_accumulation_and_two_processes_see_the_same_and_learn_the_same(
    undisturbed, pictures, tmp_path
):
    """The same samples and masks; the order of sums differs, so within float tolerance."""
    command = ["pretrain", "--data", pictures, *TINY, *EPOCHS]
    run(*command, "--out", tmp_path / "parts", "--accumulate", 2)
    launched = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=2",
         "--master_port=29711", "-m", "fcmae",
         *map(str, [*command, "--out", tmp_path / "two"])],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-3000:]
    expected = load_file(undisturbed / "exported" / "model.safetensors")
    for name in ("parts", "two"):
        for (_, loss), (_, alone) in zip(
            metrics(tmp_path / name), metrics(undisturbed), strict=True
        ):
            assert loss == pytest.approx(alone, rel=1e-4)
        found = load_file(tmp_path / name / "exported" / "model.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-2, atol=2e-4)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_or_refused(undisturbed, pictures, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"
    model = bytearray((newest / "model.safetensors").read_bytes())
    model[-1] ^= 64
    (newest / "model.safetensors").write_bytes(model)
    command = ["pretrain", "--data", pictures, *TINY, *EPOCHS]
    refused = run(*command, "--out", tmp_path / "new", "--resume", newest, code=2)
    assert "can't be used: model.safetensors" in refused.stderr
    assert not (tmp_path / "new").exists()
    again = run(*command, "--out", tmp_path / "run")
    assert "is damaged and was skipped" in " ".join(again.stderr.split())
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.slow
def test_added_and_removed_files_are_handled(undisturbed, pictures, tmp_path):
    """New files are ignored with a message, removed ones count as unreadable."""
    data = write_pictures(tmp_path / "data", 24)
    command = ["pretrain", "--data", data, "--out", tmp_path / "run", *TINY, *EPOCHS,
               "--max_bad", 0.2]  # fmt: skip
    process = start(*command)
    wait_for_steps(tmp_path / "run", 12, process)
    kill(process, signal.SIGTERM)
    write_pictures(tmp_path / "data" / "more", 3)
    again = run(*command)
    assert "3 files added since the run began are ignored" in " ".join(again.stderr.split())
    assert weights(tmp_path / "run") == weights(undisturbed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--mask_ratio", 0.5], "mask_ratio is 0.5 but the run in"),
        (["--optim.base_lr", 0.5], "optim.base_lr is 0.5"),
        (["--seed", 1], "seed is 1 but"),
        (["--resume", "never"], "already holds a run"),
    ],
)
def test_another_run_in_the_folder_is_refused(undisturbed, pictures, change, message):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    done = run(
        "pretrain", "--data", pictures, "--out", undisturbed, *TINY, *EPOCHS, *change, code=2
    )
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 + done.stderr.count("engine") + done.stderr.count("found")
    assert {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")} == before


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_refused(pictures, tmp_path):
    command = ["pretrain", "--data", pictures, "--out", tmp_path, *TINY, "--epochs", 500]
    process = start(*command)
    wait_for_steps(tmp_path, 2, process)
    second = run(*command, code=2)
    assert f"is being written by process {process.pid} on" in second.stderr
    kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_runtime_settings_may_change(undisturbed, pictures, tmp_path):
    command = ["pretrain", "--data", pictures, "--out", tmp_path, *TINY, *EPOCHS]
    process = start(*command)
    wait_for_steps(tmp_path, 10, process)
    kill(process, signal.SIGKILL)
    run(*command, "--engine", "dense", "--workers", 1, "--keep_checkpoints", 3,
        "--checkpoint_minutes", 0)  # fmt: skip
    for (_, loss), (_, alone) in zip(metrics(tmp_path), metrics(undisturbed), strict=True):
        assert loss == pytest.approx(alone, rel=1e-4)
