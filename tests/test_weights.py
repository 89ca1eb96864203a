"""Reading weights from every kind of source, and writing the folder that timm loads."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.models import adapt_input_conv
from torch import Tensor

from fcmae.atomic import atomic_write
from fcmae.commands.convert import ConvertConfig
from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import save_checkpoint
from fcmae.weights.export import convert, export_folder
from fcmae.weights.load import adapt_in_chans, find_weights, load_weights, read_preprocessing
from sparse import SparseConvNeXtV2
from sparse.convert import to_minkowski, to_timm
from sparse.errors import InputError
from sparse.layouts import OFFICIAL, Architecture, encoder_shapes

SMALL = Architecture((1, 1, 1, 1), (6, 8, 10, 12))
ATTO = Architecture((2, 2, 6, 2), (40, 80, 160, 320))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
State = dict[str, Tensor]


def random_encoder(architecture: Architecture = SMALL, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in encoder_shapes(architecture).items()
    }


def write_checkpoint(run: Path, step: int, state: State, settings: dict[str, Any]) -> Path:
    model = {f"encoder.{name}": tensor for name, tensor in state.items()}
    return save_checkpoint(
        run / "checkpoints", step, {"model": model}, {"settings": settings}, keep=9
    )


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_gives_its_newest_intact_checkpoint(tmp_path: Path) -> None:
    states = [random_encoder(seed=seed) for seed in range(3)]
    for step, state in zip((5, 90, 100), states, strict=True):
        write_checkpoint(tmp_path, step, state, {})
    state, architecture, origin, _ = load_weights(tmp_path)
    assert_same(state, states[2])
    assert architecture == SMALL
    assert "step-00000100" in origin

    newest = tmp_path / "checkpoints/step-00000100/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    assert_same(load_weights(tmp_path).state, states[1])

    (tmp_path / "checkpoints/step-00000090/manifest.json").unlink()
    assert_same(load_weights(str(tmp_path)).state, states[0])

    (tmp_path / "checkpoints/step-00000005/model.safetensors").unlink()
    with pytest.raises(InputError, match="all checkpoints are damaged"):
        load_weights(tmp_path)


def test_folders_and_files(tmp_path: Path) -> None:
    state = random_encoder()
    checkpoint = write_checkpoint(tmp_path / "run", 1, state, {})
    assert find_weights(checkpoint) == checkpoint / "model.safetensors"
    assert_same(load_weights(checkpoint).state, state)
    assert_same(load_weights(checkpoint / "model.safetensors").state, state)
    folder = export_folder(
        state, SMALL, tmp_path / "done" / "exported", Preprocessing((64, 96), MEAN, STD)
    )
    assert_same(load_weights(folder).state, state)
    assert load_weights(folder.parent).origin == str(folder / "model.safetensors")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema", None])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_pickled_checkpoints_as_training_scripts_write_them(
    tmp_path: Path, key: str | None, suffix: str
) -> None:
    state = random_encoder()
    official = {OFFICIAL.name(name): OFFICIAL.pack(name, t) for name, t in state.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in official.items()}
    args = argparse.Namespace(lr=1e-3, model="convnextv2_atto", decay=[0.9, None])
    file = tmp_path / f"weights{suffix}"
    whole = wrapped if key is None else {key: wrapped, "epoch": 3, "args": args, "scaler": {}}
    torch.save(whole, file, _use_new_zipfile_serialization=suffix == ".pth")
    found = load_weights(file)
    assert_same(found.state, state)
    assert found.architecture == SMALL
    assert (f"key '{key}'" in found.origin) == (key is not None)


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    plain, averaged = random_encoder(seed=1), random_encoder(seed=2)
    torch.save({"model": plain, "model_ema": averaged}, tmp_path / "w.pth")
    assert_same(load_weights(tmp_path / "w.pth").state, averaged)
    torch.save({"model": plain, "model_ema": None}, tmp_path / "w.pth")
    assert_same(load_weights(tmp_path / "w.pth").state, plain)


def test_a_timm_file_with_a_classifier(tmp_path: Path) -> None:
    model = timm.create_model("convnextv2_atto", num_classes=5)
    torch.save({"state_dict": model.state_dict(), "arch": "convnextv2_atto"}, tmp_path / "w.pth")
    found = load_weights(tmp_path / "w.pth")
    assert found.architecture == ATTO
    assert "without its classifier" in found.origin


class Malicious:
    """Unpickling runs a command that leaves a file behind."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.witness}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    witness, file = tmp_path / "witness", tmp_path / "w.pth"
    torch.save(
        {"model": random_encoder(), "args": Malicious(witness)},
        file,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r"w\.pth: (refused|damaged)") as caught:
        load_weights(file)
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    if zipped:
        assert "posix.system" in str(caught.value)
        assert "save its state dict alone" in str(caught.value)


def test_an_argparse_namespace_does_not_allow_other_objects(tmp_path: Path) -> None:
    witness, file = tmp_path / "witness", tmp_path / "w.pth"
    torch.save({"args": argparse.Namespace(inner=Malicious(witness))}, file)
    with pytest.raises(InputError, match="refused"):
        load_weights(file)
    assert not witness.exists()


def test_damaged_files_give_one_clear_line(tmp_path: Path) -> None:
    state = random_encoder()
    torch.save(state, tmp_path / "zip.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe.safetensors")
    for file in list(tmp_path.iterdir()):
        content = file.read_bytes()
        for cut in (0, 1, 10, 300, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:cut])
            with pytest.raises(InputError, match=file.name) as caught:
                load_weights(file)
            assert "\n" not in str(caught.value)
    for content in (b"hello world", b"<html>", bytes(range(256)), b"\x80\x02}q\x00."):
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"w\.pth"):
            load_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}}, "expected tensors by name"),
        ({"epoch": 3}, "found epoch"),
        (3, "holds a int"),
        ({"layer1.weight": torch.ones(1)}, "not a ConvNeXt V2"),
        (random_encoder() | {"stem.0.bias": torch.full((6,), torch.nan)}, "NaN or infinity in"),
    ],
)
def test_pickles_without_our_weights(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"w\.pth") as caught:
        load_weights(tmp_path / "w.pth")
    assert words in str(caught.value)


def test_sources_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_weights(tmp_path / "nothing")
    with pytest.raises(InputError, match="no weights: expected a run"):
        load_weights(tmp_path)
    (tmp_path / "w.jpg").touch()
    with pytest.raises(InputError, match=r"not a weight file: use \.safetensors"):
        load_weights(tmp_path / "w.jpg")


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 7])
def test_adapt_in_chans_follows_timms_rule(in_chans: int) -> None:
    weight = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(adapt_in_chans(weight, in_chans), adapt_input_conv(in_chans, weight))


def test_adapt_in_chans_from_other_than_three() -> None:
    weight = torch.randn(5, 4, 4, 4)
    two = adapt_in_chans(weight, 2)
    assert torch.equal(two, weight[:, :2] * 2)
    assert torch.equal(adapt_in_chans(weight, 1), weight.sum(1, keepdim=True))
    grey = torch.randn(5, 1, 4, 4)
    assert torch.equal(adapt_in_chans(grey, 2), grey.expand(5, 2, 4, 4) / 2)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        (ATTO, "convnextv2_atto"),
        (Architecture(*ATTO.__dict__.values()), "convnextv2_atto"),
        (Architecture((2, 2, 6, 2), (40, 80, 160, 320), in_chans=4), "convnextv2_atto"),
        (Architecture((1, 1, 1, 1), (6, 8, 10, 12), in_chans=1), "convnextv2_tiny"),
        (Architecture((1, 2, 1, 1), (48, 16, 8, 8)), "convnextv2_femto"),
        (Architecture((1, 1, 1, 1), (64, 8, 8, 8), 2, False, 1e-6), "convnextv2_pico"),
        (Architecture((1, 1, 1, 1), (8, 8, 8, 8), 3, False, 1e-6), "convnextv2_tiny"),
    ],
)
def test_the_folder_loads_in_timm_both_ways_and_computes_the_same(
    tmp_path: Path, architecture: Architecture, name: str
) -> None:
    state = random_encoder(architecture)
    channels = architecture.in_chans
    mean = [0.1 * (channel + 1) for channel in range(channels)]
    preprocessing = Preprocessing((64, 96), tuple(mean), (0.5,) * channels)
    export_folder(state, architecture, tmp_path, preprocessing)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name
    assert config["num_features"] == architecture.dims[3]

    local = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    by_path = timm.create_model(
        name,
        num_classes=0,
        in_chans=channels,
        checkpoint_path=tmp_path / "model.safetensors",
        **config.get("model_args", {}),
    )
    expected = to_timm(state)
    assert_same(local.state_dict(), expected)
    assert_same(by_path.state_dict(), expected)

    data = resolve_model_data_config(local)
    assert tuple(data["input_size"]) == (channels, 64, 96)
    assert (list(data["mean"]), list(data["std"])) == (mean, [0.5] * channels)
    assert data["interpolation"] == "bicubic"

    encoder = SparseConvNeXtV2(
        architecture.depths,
        architecture.dims,
        channels,
        engine="patch",
        use_grn=architecture.use_grn,
        layer_scale=architecture.layer_scale,
    )
    encoder.load_state_dict(state)
    images = torch.randn(2, channels, 64, 96)
    features = encoder(images, torch.zeros(2, 2, 3, dtype=torch.bool))
    found = local.eval().forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)


def test_timm_can_add_a_classifier_to_the_folder(tmp_path: Path) -> None:
    export_folder(random_encoder(), SMALL, tmp_path, Preprocessing((64, 64), MEAN, STD))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(model.state_dict()["stem.0.bias"], random_encoder()["stem.0.bias"])


def test_the_bytes_depend_on_the_weights_alone(tmp_path: Path) -> None:
    state = random_encoder()
    backwards = dict(reversed(state.items()))
    for folder, content in (("a", state), ("b", backwards), ("a", backwards)):
        export_folder(content, SMALL, tmp_path / folder, Preprocessing((64, 64), MEAN, STD))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "a/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    script = (
        "import sys; from fcmae.commands.convert import ConvertConfig; "
        "from fcmae.weights.export import convert; "
        "convert(ConvertConfig(sys.argv[1], sys.argv[2]))"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "a", tmp_path / seed],
            check=True,
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"PYTHONHASHSEED": seed},
            timeout=120,
        )
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / seed / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_export_checks_mean_and_std(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one number for each of the 3 input channels"):
        export_folder(
            random_encoder(), SMALL, tmp_path / "out", Preprocessing((64, 64), MEAN[:1], STD)
        )
    with pytest.raises(InputError, match="missing"):
        export_folder({"stem.0.bias": torch.ones(6)} | to_timm(random_encoder()) |
                      {"stages.0.blocks.0.gamma": torch.ones(6)}, SMALL, tmp_path / "out",
                      Preprocessing((64, 64), MEAN, STD))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_converting_a_run_keeps_its_image_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "img_size": [96, 160],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "augment": {"mean": "data", "std": "data"},
    }
    checkpoint = write_checkpoint(tmp_path / "run", 7, random_encoder(), settings)
    out = convert(ConvertConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    assert "step-00000007" in capsys.readouterr().out
    found = read_preprocessing(out / "model.safetensors")
    assert found == read_preprocessing(checkpoint / "model.safetensors")
    assert found is not None
    assert (found.img_size, found.mean, found.std) == (
        (96, 160),
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )


def test_convert_to_minkowski_and_back(tmp_path: Path) -> None:
    state = {f"encoder.{name}": tensor for name, tensor in random_encoder().items()}
    theirs = to_minkowski(state)
    torch.save({"model": theirs, "args": argparse.Namespace(x=1)}, tmp_path / "official.pth")
    out = convert(ConvertConfig(str(tmp_path / "official.pth"), str(tmp_path / "timm")))
    assert_same(load_weights(out).state, random_encoder())
    for name in ("back.pth", "back.safetensors"):
        file = convert(ConvertConfig(str(out), str(tmp_path / name), layout="minkowski"))
        assert_same(load_weights(file).state, random_encoder())
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], theirs)


def test_convert_refuses_to_overwrite_a_run_or_a_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run", 7, random_encoder(), {})
    for out, name in ((tmp_path / "run", "checkpoints"), (checkpoint, r"manifest\.json")):
        with pytest.raises(InputError, match=f"holds '{name}': give a new or empty folder"):
            convert(ConvertConfig(str(tmp_path / "run"), str(out)))
    with pytest.raises(InputError, match="is a file"):
        convert(ConvertConfig(str(tmp_path / "run"), str(checkpoint / "state.json")))
    with pytest.raises(InputError, match=r"state\.json is a file, not a folder"):
        convert(ConvertConfig(str(tmp_path / "run"), str(checkpoint / "state.json" / "out")))
    with pytest.raises(InputError, match=r"must be a file ending in \.pth or \.pt or"):
        convert(ConvertConfig(str(tmp_path / "run"), str(tmp_path / "x"), layout="minkowski"))


def test_convert_refuses_to_replace_another_model(tmp_path: Path) -> None:
    save_file(random_encoder(), tmp_path / "a.safetensors")
    save_file(random_encoder(Architecture(SMALL.depths, SMALL.dims, 1)), tmp_path / "b.safetensors")
    out = tmp_path / "out"
    for _ in range(2):  # the same kind of encoder again is not another model
        convert(ConvertConfig(str(tmp_path / "a.safetensors"), str(out)))
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"another model: convnextv2_tiny.* 0 classes, 3 chan"):
        convert(ConvertConfig(str(tmp_path / "b.safetensors"), str(out)))
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(described | {"num_classes": 4}))
    with pytest.raises(InputError, match=r"another model: convnextv2_tiny, .* 4 classes"):
        convert(ConvertConfig(str(tmp_path / "a.safetensors"), str(out)))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds '1\.jpg': give a new or empty folder"):
        convert(ConvertConfig(str(tmp_path / "a.safetensors"), str(tmp_path / "photos")))
    assert (out / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("channels", "mean"), [(3, MEAN), (1, (0.449,)), (2, (0.449, 0.449))])
def test_convert_weights_without_image_settings(
    tmp_path: Path, channels: int, mean: tuple[float, ...]
) -> None:
    state = random_encoder(Architecture(SMALL.depths, SMALL.dims, channels))
    save_file(state, tmp_path / "w.safetensors")
    out = convert(ConvertConfig(str(tmp_path / "w.safetensors"), str(tmp_path / "out")))
    found = read_preprocessing(out / "model.safetensors")
    assert found is not None
    assert (found.img_size, found.mean) == ((224, 224), mean)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def fail() -> None:
        with atomic_write(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert file.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
