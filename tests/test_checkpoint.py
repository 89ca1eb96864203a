"""Checkpoints: complete or absent, verified, pruned only after a good one."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from fcmae.train.checkpoint import (
    _describe,
    damage,
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    load_optimizer_tensors,
    newest_checkpoint,
    newest_good,
    optimizer_tensors,
    save_checkpoint,
)
from fcmae.train.optimizer import check_gate
from sparse.errors import InputError


def example(value: float = 1.0) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {"model": {"a": torch.full((3,), value)}, "optimizer": {"a/step": torch.tensor(value)}},
        {
            "epoch": 1,
            "epoch_end_due": False,
            "threads": 1,
            "asked": {},
            "settings": {},
            "images": {},
        },
    )


def test_a_saved_checkpoint_loads_unchanged(tmp_path):
    path = save_checkpoint(tmp_path, 12, *example(), keep=2)
    assert path.name == "step-00000012"
    back = load_checkpoint(path)
    assert torch.equal(back.tensors("model")["a"], torch.ones(3))
    assert back.tensors("optimizer")["a/step"].shape == ()
    assert back.state == {"format": 2, "step": 12, **example()[1]}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000012"]


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, *example(step), keep=2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["4", "3"]


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, *example(step), keep=2)
    (tmp_path / "step-00000002" / "state.json").write_text("{")
    save_checkpoint(tmp_path, 3, *example(3), keep=2)
    assert newest_good(tmp_path) == tmp_path / "step-00000003"
    assert damage(tmp_path / "step-00000001") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_every_flipped_byte_is_detected(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, *example(), keep=2)
    whole = (path / name).read_bytes()
    for position in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[position] ^= 1
        (path / name).write_bytes(broken)
        assert damage(path) == f"{name} does not have the SHA-256 that it was written with"
    (path / name).write_bytes(whole[:-1])
    assert damage(path) == f"{name} has {len(whole) - 1} bytes instead of {len(whole)}"
    (path / name).unlink()
    assert damage(path) == f"{name}: No such file or directory"


def test_a_broken_manifest_counts_as_damage(tmp_path):
    path = save_checkpoint(tmp_path, 1, *example(), keep=2)
    for text in ("", "[]", '{"files": {}}', '{"files": {"model.safetensors": 3}}', "\x00"):
        (path / "manifest.json").write_text(text)
        assert damage(path) is not None
    listed = {"size": 0, "sha256": ""}
    files = {"model.safetensors": listed, "state.json": listed, "../outside": listed}
    (path / "manifest.json").write_text(json.dumps({"files": files}))
    (path / "model.safetensors").write_bytes(b"")
    (path / "state.json").write_bytes(b"")
    assert damage(path) is not None


def test_the_automatic_choice_skips_damage_and_logs_it(tmp_path, caplog):
    save_checkpoint(tmp_path, 1, *example(), keep=3)
    newest = save_checkpoint(tmp_path, 2, *example(), keep=3)
    (newest / "model.safetensors").write_bytes(b"short")
    assert newest_good(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002 is damaged and was skipped" in caplog.text
    with pytest.raises(InputError, match="can't be used: model"):
        load_checkpoint(newest)
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert newest_good(tmp_path) is None


def test_a_failing_save_keeps_the_previous_checkpoint_and_no_partial_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, *example(), keep=2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fcmae.train.checkpoint.sync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, *example(), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert damage(tmp_path / "step-00000001") is None


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = save_checkpoint(tmp_path, 1, *example(1), keep=2)
    (path / "model.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 1, *example(2), keep=2)
    assert load_checkpoint(path).tensors("model")["a"][0] == 2


def test_leftovers_of_a_crash_are_removed(tmp_path):
    (tmp_path / ".partial-step-00000001-9").mkdir()
    (tmp_path / ".discarded-step-00000001-9").mkdir()
    save_checkpoint(tmp_path, 2, *example(), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_optimizer_state_is_matched_by_name():
    torch.manual_seed(0)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    first = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    reordered = list(other.parameters())[::-1]
    second = torch.optim.AdamW(reordered, lr=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    first.step()
    saved = {k: v.clone() for k, v in optimizer_tensors(first, model).items()}
    assert sorted(saved) == [
        f"{name}/{key}" for name in ("bias", "weight") for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    other.load_state_dict(model.state_dict())
    load_optimizer_tensors(second, other, saved)
    for model_, optimizer in ((model, first), (other, second)):
        optimizer.zero_grad()
        model_(torch.full((1, 3), 2.0)).sum().backward()
        optimizer.step()
    assert torch.equal(model.weight, other.weight)
    with pytest.raises(InputError, match="another model"):
        load_optimizer_tensors(second, other, {f"x{key}": value for key, value in saved.items()})


def test_another_architecture_names_both_sides():
    with pytest.raises(InputError, match=r"weight is \(2, 4\) there and \(2, 3\) in this model"):
        load_model_tensors(nn.Linear(3, 2), nn.Linear(4, 2).state_dict())


def test_a_resume_verifies_each_file_once_and_holds_no_tensors(tmp_path, monkeypatch):
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step, *example(step), keep=2)
    read = []
    monkeypatch.setattr(
        "fcmae.train.checkpoint._describe",
        lambda file, real=_describe: (read.append(file), real(file))[1],
    )
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.tensors("model")["a"][0] == 2
    assert sorted(read) == [
        path / name for name in sorted(("model.safetensors", "optimizer.safetensors", "state.json"))
    ]
    assert vars(newest).keys() == {"path", "state"}
    assert newest.tensors("ema") == {}


def test_an_optimizer_without_the_gate_is_refused():
    """It would apply an update with a non-finite loss."""
    model = nn.Linear(2, 2)
    check_gate(torch.optim.AdamW(model.parameters(), fused=True))
    check_gate(torch.optim.SGD(model.parameters(), fused=True))
    for optimizer in (torch.optim.AdamW(model.parameters()), torch.optim.Rprop(model.parameters())):
        with pytest.raises(InputError, match="ignores found_inf"):
            check_gate(optimizer)
