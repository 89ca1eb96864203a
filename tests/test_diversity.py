"""Whether channels have collapsed: the measure against its definition, activations against timm."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from fcmae import FCMAE
from fcmae.cli import main
from fcmae.commands.diversity import DiversityConfig
from fcmae.data.evaluation import EvalDataset, each_batch, held_out
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.sources import key_hash
from fcmae.inspect.channel_maps import SHOWN, channel_maps, find_block
from fcmae.inspect.diversity import block_diversity, channel_diversity, diversity
from fcmae.inspect.watch import HoldoutWatcher
from sparse import SparseConvNeXtV2
from sparse.block import SparseBlock
from sparse.errors import InputError, RunError
from tests.test_engines import FAST_ENGINES, make_mask, random_encoder
from tests.test_features import ENCODERS, SMALL, resolved, timm_twin

BLOCKS = [f"stages.{stage}.blocks.{block}" for stage, block in ((0, 0), (1, 0), (1, 1))]
BLOCKS += ["stages.2.blocks.0", "stages.3.blocks.0"]


def by_hand(x_NC: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean cosine distance of all pairs of nonzero channels; fraction of zero channels."""
    live = [channel for channel in x_NC.astype(np.float64).T if channel.any()]
    distances = [
        (1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)) / 2
        for one, other in itertools.product(live, live)
    ]
    return float(np.mean(distances)), 1 - len(live) / x_NC.shape[1]


def test_an_image_on_which_all_channels_are_zero_is_ignored() -> None:
    assert channel_diversity(torch.zeros(2, 4, 6)).tolist() == [0, 2, 0]


def test_all_pairs_of_channels_against_a_computation_by_hand() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, (3, 10, 6)).astype(np.float32)
    x[0, :, 2] = x[2, :, 0] = x[2, :, 5] = 0
    expected = np.sum([by_hand(image) for image in x], axis=0)
    assert expected[1] == pytest.approx(1 / 6 + 2 / 6)
    found = channel_diversity(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), [*expected, 3], rtol=1e-6)


def test_identical_opposite_and_unrelated_channels() -> None:
    alike = torch.randn(1, 20, 1) * torch.tensor([1.0, 2.0, 1e-3, 50.0])
    assert channel_diversity(alike)[0].item() == pytest.approx(0, abs=1e-6)
    opposite = torch.randn(1, 20, 1) * torch.tensor([1.0, -1.0])
    assert channel_diversity(opposite)[0].item() == pytest.approx(0.5)
    unrelated = torch.eye(8)[None] * torch.arange(1, 9)
    assert channel_diversity(unrelated)[0].item() == pytest.approx((1 - 1 / 8) / 2)


def hidden_of(encoder: SparseConvNeXtV2, images: Tensor) -> dict[str, Tensor]:
    """Inputs of fc2 in timm's blocks: (B, 4C, positions) by block name."""
    model, seen = timm_twin(encoder), {}

    def note(name: str, channels: int) -> Any:
        def look(_: Any, __: Any, out: Tensor) -> None:
            last = out.shape[-1] == channels and out.shape[1] != channels
            seen[name] = (out.movedim(-1, 1) if last else out).flatten(2)

        return look

    for name in block_names(encoder):
        mlp = model.get_submodule(name).mlp
        layer = mlp.grn if hasattr(mlp, "grn") else mlp.act
        layer.register_forward_hook(note(name, mlp.fc1.weight.shape[0]))
    model.forward_features(images)
    return seen


def block_names(encoder: SparseConvNeXtV2) -> list[str]:
    return [name for name, module in encoder.named_modules() if isinstance(module, SparseBlock)]


@pytest.mark.parametrize("variant", ENCODERS)
@torch.no_grad()
def test_hidden_activations_equal_timms(variant: str) -> None:
    encoder = random_encoder("dense", 3, **ENCODERS[variant]).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected, seen = hidden_of(encoder, images), {}
    for name in expected:
        encoder.get_submodule(name).register_forward_pre_hook(
            lambda block, given, name=name: seen.update({name: block.hidden(*given)})
        )
    encoder(images, torch.zeros(2, 2, 3, dtype=torch.bool))
    assert list(seen) == block_names(encoder)
    for name, rows in seen.items():
        wanted = expected[name].transpose(1, 2)
        found = rows.view(wanted.shape)
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


@pytest.mark.parametrize("kind", ["random", "ragged"])
@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
@torch.no_grad()
def test_hidden_activations_are_those_that_the_block_uses(engine: str, kind: str) -> None:
    """Also under a mask: fc2 of them, added to the block's input, is its output."""
    encoder = random_encoder(engine, 3, **SMALL).eval()
    checked = []

    def check(block: SparseBlock, given: Any, out: Tensor) -> None:
        visible = 1.0 if given[1].visible_N1 is None else given[1].visible_N1
        expected = given[0] + block.mlp.fc2(block.hidden(*given)) * visible
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
        checked.append(block)

    for name in block_names(encoder):
        encoder.get_submodule(name).register_forward_hook(check)
    encoder(torch.randn(3, 3, 96, 64), make_mask(kind, 3, 3, 2))
    assert len(checked) == 5


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
def test_blocks_against_a_computation_by_hand(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over images, however they are batched; the encoder does not change."""
    encoder = random_encoder(engine, 3, drop_path=0.5, **SMALL).train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = {
            name: np.mean([by_hand(image.T.numpy()) for image in maps], axis=0)
            for name, maps in hidden_of(encoder, images).items()
        }

    def watched(x_BNC: Tensor) -> Tensor:
        assert not x_BNC.requires_grad
        return channel_diversity(x_BNC)

    monkeypatch.setattr("fcmae.inspect.diversity.channel_diversity", watched)
    found, count = block_diversity(encoder, [images[:3], images[3:]])
    assert count == 4
    assert list(found) == list(expected) == BLOCKS
    for name, (value, zero) in expected.items():
        assert found[name] == pytest.approx({"diversity": value, "zero": zero}, rel=1e-4), name
    assert encoder.training
    assert not any(module._forward_pre_hooks for module in encoder.modules())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_held_out_images_give_loss_and_diversity(pictures: Path) -> None:
    torch.manual_seed(0)
    model = FCMAE.from_size(
        "atto", depths=[1, 2, 1, 1], dims=[8, 16, 24, 32], engine="patch", drop_path=0.5,
        decoder_dim=16,
    ).train()  # fmt: skip
    mean, std = [0.5] * 3, [0.25] * 3
    held, preparation = find_images(str(pictures)).select(range(5)), resolved((64, 64), mean, std)
    batches = [
        held_out(held, batch, images, 0.6, 0)
        for batch, images in each_batch(
            EvalDataset(Split(held), preparation.images), torch.device("cpu"), 3, workers=0
        )
    ]
    watcher = HoldoutWatcher(batches, preparation, 1, None)
    found = watcher(model, 1, lambda: False)
    assert model.training
    assert model.encoder.training
    with torch.no_grad():
        model.eval()
        losses = [(float(model(*batch).loss), len(batch[0])) for batch in batches]
    expected = {"holdout_loss": sum(loss * count for loss, count in losses) / 5}
    for name, block in block_diversity(model.encoder, [batch[0] for batch in batches])[0].items():
        expected[f"diversity/{name}"] = block["diversity"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert list(found) == ["holdout_loss", *(f"diversity/{name}" for name in BLOCKS)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two weight files: all parameters random, and an untrained encoder of another depth."""
    folder = tmp_path_factory.mktemp("weights")
    encoders = {
        "random": random_encoder("dense", 3, **SMALL),
        "fresh": SparseConvNeXtV2((1, 1, 1, 1), (8, 16, 24, 32), engine="dense"),
    }
    for name, encoder in encoders.items():
        save_file(encoder.state_dict(), folder / f"{name}.safetensors")
    return [str(folder / f"{name}.safetensors") for name in encoders]


def config(source: str | list[str], images: Path, **changes: Any) -> DiversityConfig:
    settings: dict[str, Any] = {"img_size": 64, "workers": 0, "batch_size": 10}
    return DiversityConfig(source, str(images), **settings | changes)


def test_one_json_object_with_all_blocks(
    sources: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = diversity(config(sources[0], pictures, json=True))
    assert json.loads(capsys.readouterr().out) == result
    entry = result[sources[0]]
    assert entry["images"] == 24
    assert list(entry["blocks"]) == BLOCKS
    assert all(0 < block["diversity"] < 1 for block in entry["blocks"].values())
    mean = np.mean([block["diversity"] for block in entry["blocks"].values()])
    assert entry["mean"] == pytest.approx(mean)
    other = diversity(config(sources[0], pictures, batch_size=24, workers=1), show=False)
    for name, block in other[sources[0]]["blocks"].items():
        assert block == pytest.approx(entry["blocks"][name], rel=1e-5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_two_sources_side_by_side(
    sources: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, kind: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "new" / f"plot.{kind}"
    result = diversity(config(sources, pictures, count=5, out=str(out)))
    assert list(result) == sources
    assert [entry["images"] for entry in result.values()] == [5, 5]
    table = capsys.readouterr().out
    for entry in result.values():
        assert f"{entry['mean']:.3f}" in table
        for block in entry["blocks"].values():
            assert f"{block['diversity']:.3f}" in table
    if kind == "png":
        with Image.open(out) as picture:
            picture.load()
            assert picture.size == (1050, 525)
    else:
        assert b"<svg" in out.read_bytes()


def test_images_are_chosen_by_a_hash_of_their_paths(
    sources: list[str], pictures: Path, tmp_path: Path
) -> None:
    files = find_images(str(pictures))
    chosen = sorted(sorted(range(24), key=lambda index: key_hash(files, index))[:7])
    lines = [f"{os.fsdecode(files.path(index))}\n" for index in chosen]
    (tmp_path / "list.txt").write_text("".join(lines))
    found = diversity(config(sources[0], pictures, count=7), show=False)
    assert found == diversity(config(sources[0], tmp_path / "list.txt"), show=False)


def test_unreadable_images_are_skipped_and_named(
    sources: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"none")
    with pytest.raises(RunError, match="none of the 1 images"):
        diversity(config(sources[0], tmp_path))
    for name in ("0000.png", "0001.png"):
        (tmp_path / name).write_bytes((pictures / name).read_bytes())
    result = diversity(config(sources[0], tmp_path, json=True))
    assert result[sources[0]]["images"] == 2
    assert "skipped, since it can't be read: bad.png" in capsys.readouterr().err


def test_wrong_input_is_refused(
    sources: list[str], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["diversity", sources[0], "--images", str(pictures), "--workers", "0"]
    for change, message in (
        (["--out", "plot.jpg"], "out 'plot.jpg' must be a file ending in .png or .svg"),
        (["--count", "0"], "count 0 must be at least 1"),
        (["--img_size", "100"], "img_size 100 must be a multiple of 32"),
        (["--images", "nowhere"], "images 'nowhere' does not exist: give a folder"),
    ):
        assert main([*command, *change]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
    with pytest.raises(InputError, match="nowhere: no such file"):
        diversity(config([sources[0], "nowhere"], pictures))


def test_no_image_of_the_folder_is_overwritten(sources: list[str], pictures: Path) -> None:
    """Not even one that is not measured."""
    for image in pictures.iterdir():
        with pytest.raises(InputError, match="is one of the images"):
            diversity(config(sources[0], pictures, count=1, out=str(image)))


@pytest.mark.parametrize("variant", ENCODERS)
@torch.no_grad()
def test_maps_are_timms_activations(variant: str) -> None:
    encoder = random_encoder("dense", 3, **ENCODERS[variant]).eval()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    name, block = find_block(encoder, None)
    assert name == [n for n in block_names(encoder) if n.startswith("stages.2.")][-1]
    expected = hidden_of(encoder, images)[name]
    found = channel_maps(encoder, images, block)
    assert found.shape == (2, SHOWN, 4, 6)
    for shown, channel in ((0, 0), (SHOWN - 1, expected.shape[1] - 1)):
        wanted = expected[:, channel].view(2, 4, 6)
        assert (found[:, shown] - wanted).abs().max() <= 1e-5 * expected.abs().max()


def test_maps_are_drawn(sources: list[str], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "maps.png"
    diversity(config(sources, pictures, count=5, maps=str(out)), show=False)
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (1125, 1080, 3)  # three rows of an image and two squares
    assert len(np.unique(pixels[:, 700:].reshape(-1, 3), axis=0)) > 100
    for change, words in (
        ({"maps": str(tmp_path / "maps.jpg")}, "must be a file ending in .png"),
        ({"maps": str(out), "block": "stages.2.blocks.7"}, "is not one of stages.0.blocks.0 … "),
    ):
        with pytest.raises(InputError, match=words):
            diversity(config(sources, pictures, **change), show=False)
