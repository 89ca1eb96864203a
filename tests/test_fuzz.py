"""Hypothesis tests of the readers of foreign files: manifest, state, weights."""

import hashlib
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fcmae.config.fields import asked_settings
from fcmae.config.pretraining import PretrainConfig
from fcmae.train.checkpoint import damage, load_checkpoint, save_checkpoint
from fcmae.train.resume import find_start
from fcmae.weights.load import load_weights
from sparse import SparseConvNeXtV2
from sparse.convert import from_minkowski, to_minkowski, to_timm
from sparse.errors import InputError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["model.safetensors", "state.json", "..", "/etc/passwd", "../x", "", "a/b"])
ENTRIES = JSON | st.fixed_dictionaries({"size": JSON, "sha256": JSON})
MANIFESTS = JSON | st.fixed_dictionaries({"files": st.dictionaries(NAMES, ENTRIES)})
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def checkpoint(tmp_path):
    config = PretrainConfig("data", str(tmp_path / "run"))
    state = {
        "command": "pretrain", "epoch": 0, "epoch_end_due": False, "asked": asked_settings(config),
        "settings": {"mean": [0.0], "std": [1.0]}, "processes": 1, "threads": 1, "images": {},
    }  # fmt: skip
    model = {"weight": torch.zeros(3)}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    return save_checkpoint(tmp_path / "run" / "checkpoints", 1, {"model": model}, state, keep=2)


@QUICK
@given(content=MANIFESTS.map(json.dumps).map(str.encode) | st.binary(max_size=40))
def test_any_manifest_is_intact_or_damaged(checkpoint, content):
    original = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest = checkpoint / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(content)
    try:
        reason = damage(checkpoint)
        with suppress(ValueError):
            assert reason is not None or json.loads(content) == original
    finally:
        manifest.write_bytes(whole)


def test_an_unchanged_state_is_used(checkpoint):
    config = PretrainConfig("data", str(checkpoint.parent.parent))
    assert find_start(config, "pretrain").state["step"] == 1


@QUICK
@given(data=st.data())
def test_any_state_is_used_or_refused(checkpoint, data):
    """A state edited by hand, with the right hash in the manifest."""
    state, manifest = checkpoint / "state.json", checkpoint / "manifest.json"
    whole = state.read_bytes(), manifest.read_bytes()
    keys = json.loads(whole[0])
    changed = data.draw(JSON) if data.draw(st.integers(0, 9)) == 0 else dict(keys)
    if isinstance(changed, dict):
        for key in data.draw(st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True)):
            if data.draw(st.booleans()):
                changed.pop(key, None)
            else:
                changed[key] = data.draw(JSON)
    text = json.dumps(changed).encode()
    state.write_bytes(text)
    listed = json.loads(whole[1])
    listed["files"]["state.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest.write_text(json.dumps(listed))
    config = PretrainConfig("data", str(checkpoint.parent.parent))
    try:
        with suppress(InputError):
            assert isinstance(find_start(config, "pretrain").state["step"], int)
        with suppress(InputError):
            load_checkpoint(checkpoint)
    finally:
        state.write_bytes(whole[0])
        manifest.write_bytes(whole[1])


def small_state() -> dict[str, torch.Tensor]:
    encoder = SparseConvNeXtV2((1, 1, 1, 1), (4, 8, 8, 8), engine="dense")
    return {name: tensor.detach() for name, tensor in encoder.state_dict().items()}


@QUICK
@given(data=st.data())
def test_the_converter_converts_or_refuses(data):
    """Tensors dropped, renamed, reshaped, in either layout."""
    state = small_state()
    if data.draw(st.booleans()):
        state = to_minkowski(state)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        change = data.draw(st.sampled_from(["drop", "rename", "reshape", "scalar", "integer"]))
        tensor = state.pop(name)
        if change == "rename":
            state[data.draw(st.text(max_size=12))] = tensor
        elif change == "reshape":
            state[name] = torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=5)))
        elif change == "scalar":
            state[name] = torch.tensor(1.0)
        elif change == "integer":
            state[name] = tensor.long()
        if not state:
            break
    for convert in (to_timm, from_minkowski, to_minkowski):
        with suppress(InputError):
            convert(dict(state))


@QUICK
@given(data=st.data())
def test_damaged_weights_are_read_or_refused(tmp_path, data):
    file = tmp_path / "weights.safetensors"
    save_file(small_state(), file)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        place = data.draw(st.integers(0, min(len(content) - 1, 4000)))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with suppress(InputError):
        load_weights(str(file))
