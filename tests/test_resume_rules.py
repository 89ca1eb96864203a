"""Where a run starts: what it resumes from, goes back to or refuses."""

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import asdict
from pathlib import Path

import pytest
from safetensors.torch import save_file

from fcmae.config.files import to_yaml
from fcmae.config.pretraining import DecoderConfig, PretrainConfig
from fcmae.train import machine as resources
from fcmae.train.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from fcmae.train.pretraining import build_model, pretrain
from fcmae.train.run_folder import _cut_metrics
from sparse.errors import InputError, RunError
from tests.cli import metrics, weights

SETTINGS = {
    "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "img_size": 64, "batch_size": 8, "epochs": 3,
    "workers": 0, "engine": "patch", "log_steps": 1, "checkpoint_steps": 3, "device": "cpu",
    "decoder": DecoderConfig(dim=16),
}  # fmt: skip
STEPS = 9  # 24 images in batches of 8, three epochs


def config(data: Path, out: Path, **changes: object) -> PretrainConfig:
    return PretrainConfig(data=str(data), out=str(out), **{**SETTINGS, **changes})


def saved(out: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(list_checkpoints(out / "checkpoints"))]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """A finished run that kept all checkpoints; read-only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert pretrain(config(pictures, out, keep_checkpoints=10)) == 0
    assert saved(out) == [3, 6, 9]
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_going_back_discards_later_checkpoints(whole, copy, pictures):
    """A named checkpoint is used although later ones exist, and those are not used again."""
    named = str(copy / "checkpoints" / "step-00000003")
    given = config(pictures, copy, resume=named, checkpoint_steps=2, keep_checkpoints=2)
    assert pretrain(given) == 0
    assert saved(copy) == [8, 9]
    assert metrics(copy) == metrics(whole)
    assert weights(copy) == weights(whole)


def test_the_same_command_resumes_and_does_not_go_back_again(
    whole, copy, pictures, tmp_path, caplog
):
    """Neither in the run's own folder nor in a new one, even if the named checkpoint is gone."""
    named = whole / "checkpoints" / "step-00000003"
    new = config(pictures, tmp_path / "new", resume=str(named), keep_checkpoints=10)
    assert pretrain(new) == 0
    assert saved(tmp_path / "new") == [6, 9]
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "step-00000009")
    caplog.clear()
    assert pretrain(new) == 0
    assert "resuming from step 6" in caplog.text
    assert metrics(tmp_path / "new") == [entry for entry in metrics(whole) if entry[0] > 3]
    assert weights(tmp_path / "new") == weights(whole)
    with pytest.raises(InputError, match="already holds another run"):
        pretrain(config(pictures, copy, resume=str(named)))


def test_a_resumed_run_does_not_need_its_initial_weights(pictures, tmp_path):
    encoder = build_model(config(pictures, tmp_path)).encoder
    save_file(encoder.state_dict(), tmp_path / "start.safetensors")
    given = config(pictures, tmp_path / "run", init_from=str(tmp_path / "start.safetensors"))
    assert pretrain(given) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    (tmp_path / "start.safetensors").unlink()
    before = weights(tmp_path / "run")
    assert pretrain(given) == 0
    assert weights(tmp_path / "run") == before


def test_paths_are_the_same_from_any_folder(copy, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    assert pretrain(config(Path(pictures.name), copy)) == 0
    monkeypatch.chdir(tmp_path)
    assert pretrain(config(Path(os.path.relpath(pictures, tmp_path)), copy)) == 0


def test_images_that_moved_are_found_through_a_link(copy, pictures, tmp_path):
    rest = r"a link to the images if they moved\), or give another --out"
    with pytest.raises(InputError, match=rf"--data {re.escape(str(pictures))} \({rest}"):
        pretrain(config(pictures.parent, copy))
    link, moved, out = tmp_path / "link", tmp_path / "moved", tmp_path / "linked"
    link.symlink_to(pictures)
    assert pretrain(config(link, out)) == 0
    before = weights(out)
    shutil.rmtree(list_checkpoints(out / "checkpoints")[0])
    shutil.copytree(pictures, moved)
    link.unlink()
    link.symlink_to(moved)
    assert pretrain(config(link, out)) == 0
    assert weights(out) == before


def test_the_fix_repeats_stored_values_null_too(whole, pictures):
    changed = config(pictures, whole)
    changed.optim.clip_grad = 1.0
    with pytest.raises(InputError, match=r"repeat it with --optim\.clip_grad null, or"):
        pretrain(changed)
    changed.optim.clip_grad = None
    changed.augment.crop_scale = [0.5, 1.0]
    with pytest.raises(InputError, match=r"--augment\.crop_scale '\[0\.2,1\.0\]', or"):
        pretrain(changed)


def test_a_setting_newer_than_the_run_had_its_default(copy, pictures):
    """Checkpoints have hashes: the state is rewritten as an older version would have done."""
    newest = list_checkpoints(copy / "checkpoints")[0]
    old = load_checkpoint(newest)
    del old.state["asked"]["drop_path"], old.state["asked"]["optim"]["clip_grad"]
    save_checkpoint(
        copy / "checkpoints",
        STEPS,
        {name: old.tensors(name) for name in ("model", "optimizer")},
        old.state,
        keep=2,
    )
    assert pretrain(config(pictures, copy)) == 0
    with pytest.raises(InputError, match=r"drop_path is 0\.1 but the run in .* has 0\.0"):
        pretrain(config(pictures, copy, drop_path=0.1))


def test_a_finished_run_without_checkpoints_is_untouched(copy, pictures):
    shutil.rmtree(copy / "checkpoints")
    before = metrics(copy)
    with pytest.raises(InputError, match="a finished run whose checkpoints are gone"):
        pretrain(config(pictures, copy))
    assert metrics(copy) == before


def test_the_folder_of_another_tool_is_untouched(pictures, tmp_path):
    (tmp_path / "run" / "tb").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {name: other}\n")
    with pytest.raises(InputError, match=r"holds 'config\.yaml', which is not a run of fcmae"):
        pretrain(config(pictures, tmp_path / "run"))
    assert (tmp_path / "run" / "tb").is_dir()


def test_a_run_that_never_saved_starts_over(whole, pictures, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    given = config(pictures, out)
    (out / "config.yaml").write_text(to_yaml(asdict(given)))
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    assert pretrain(given) == 0
    assert metrics(out) == metrics(whole)


def test_disk_space_counts_existing_checkpoints(copy, pictures, tmp_path, monkeypatch):
    """A disk with room for one checkpoint is too small for a new run, but enough to resume."""
    size = sum(file.stat().st_size for file in (copy / "checkpoints" / "step-00000009").iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage(0, 0, 1.5 * size))
    with pytest.raises(
        InputError, match=r"checkpoints, 2 and one being written, need 0\.00 GB more"
    ):
        pretrain(config(pictures, tmp_path / "new"))
    shutil.rmtree(copy / "checkpoints" / "step-00000009")
    assert pretrain(config(pictures, copy)) == 0
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert pretrain(config(pictures, copy)) == 0  # finished: nothing is written


def test_the_end_of_an_epoch_is_logged_once(tmp_path):
    """The run is stopped before it, resumes past it and is killed before the next save."""
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": 6, "loss": 1, "lr": 1}, {"step": 6, "val_top1": 5}, {"step": 7, "lr": 1}]
    for due, kept in ((False, 2), (True, 1)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        _cut_metrics(file, 6, due)
        assert [*map(json.loads, file.read_text().splitlines())] == lines[:kept]


def test_a_wrong_checkpoint_path_lists_the_existing_checkpoints(whole, pictures, tmp_path):
    for named in ("Auto", str(whole / "checkpoint" / "step-00000003")):
        with pytest.raises(InputError, match=r"give auto, never or one of .*step-00000009, .*03$"):
            pretrain(config(pictures, whole, resume=named))
        with pytest.raises(InputError, match="not a checkpoint: give auto, never or a checkpoint"):
            pretrain(config(pictures, tmp_path / "new", resume=named))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_all_fail_are_listed(tmp_path, workers):
    """If neither an image nor any of its replacements can be read, the run ends immediately."""
    (tmp_path / "photos").mkdir()
    for number in range(9):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(b"not an image")
    with pytest.raises(RunError, match=r"can't be read .*nor can 8 others tried in its place"):
        pretrain(config(tmp_path / "photos", tmp_path / "run", workers=workers))
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["path"] for line in lines) == [f"{n}.jpg" for n in range(9)]
