"""Frozen features: against timm, from every kind of source, in any number of processes."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fcmae.cli import main
from fcmae.commands.embed import EmbedConfig
from fcmae.config.pretraining import AugmentConfig, DecoderConfig, PretrainConfig
from fcmae.data.evaluation import EvalDataset, each_batch
from fcmae.data.file_list import FileList, find_images
from fcmae.data.labelled import Split
from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.inspect.embedding import Features, embed, extract, pooled
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.plan import Plan
from fcmae.train.pretraining import pretrain
from fcmae.train.processes import ALONE, World
from fcmae.train.task import Resolved
from fcmae.weights.export import timm_variant
from fcmae.weights.load import Backbone, load_backbone, random_backbone
from finetune.config import FinetuneConfig
from finetune.train import finetune
from sparse import SparseConvNeXtV2
from sparse.convert import to_timm
from sparse.errors import InputError, RunError
from sparse.layouts import infer_architecture
from tests.conftest import write_pictures
from tests.test_engines import FAST_ENGINES, random_encoder

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"model": "atto", "depths": [1, 2, 1, 1], "dims": [8, 16, 24, 32]}
ENCODERS: dict[str, dict[str, Any]] = {
    "V2": SMALL,
    "V1": {**SMALL, "use_grn": False, "layer_scale": 0.5},
    "atto widths": {"model": "atto", "depths": [1, 1, 1, 1]},
}


def timm_twin(encoder: SparseConvNeXtV2) -> Any:
    """The same weights in timm's dense model."""
    state = encoder.state_dict()
    name, arguments = timm_variant(infer_architecture(state))
    model = timm.create_model(name, in_chans=encoder.in_chans, num_classes=0, **arguments)
    model.load_state_dict(to_timm(state))
    return model.eval()


def assert_close(found: Any, expected: Any) -> None:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", ENCODERS)
@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
@torch.no_grad()
def test_features_equal_timms(variant: str, engine: str, size: tuple[int, int]) -> None:
    encoder = random_encoder(engine, 3, **ENCODERS[variant])
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = timm_twin(encoder).forward_features(images).mean((2, 3))
    found = pooled(encoder.train().eval(), images)
    assert found.shape == (3, encoder.dims[-1])
    assert found.dtype == torch.float32
    assert_close(found, expected)
    assert encoder.engine == engine


def pretrain_config(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    settings: dict[str, Any] = {
        "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "img_size": [64, 96], "epochs": 1,
        "batch_size": 8, "decoder": DecoderConfig(dim=16), "workers": 0, "engine": "patch",
        "device": "cpu",
        "augment": AugmentConfig(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.25]),
    }  # fmt: skip
    return PretrainConfig(data=str(data), out=str(out), **settings | changes)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of pretraining; read-only."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert pretrain(pretrain_config(pictures, out)) == 0
    return out


def without_prefix(file: Path) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): tensor for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "part", ["", "exported", "checkpoints/step-00000003", "exported/model.safetensors"]
)
def test_a_run_stores_its_preprocessing(run: Path, part: str) -> None:
    backbone = load_backbone(str(run / part), CPU)
    assert backbone.images == Preprocessing((64, 96), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    assert not backbone.encoder.training
    kept = without_prefix(run / "checkpoints" / "step-00000003" / "model.safetensors")
    for name, tensor in backbone.encoder.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
    other = load_backbone(str(run / part), CPU, (32, 128))
    assert other.images == Preprocessing((32, 128), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def finetune_config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "img_size": 32, "epochs": 1, "batch_size": 8, "workers": 0, "device": "cpu"
    }  # fmt: skip
    return FinetuneConfig(data=str(data), out=str(out), **settings | changes)


def test_a_fine_tuning_run_gives_its_best_weights(run: Path, classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "fine"
    assert finetune(finetune_config(classes, out, weights=str(run))) == 0
    backbone = load_backbone(str(out), CPU)
    assert backbone.images == Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    name = "stages.3.blocks.0.conv_dw.weight"
    weight = backbone.encoder.state_dict()[name]
    assert torch.equal(weight, load_file(out / "best" / "model.safetensors")[name])
    last = load_file(list_checkpoints(out / "checkpoints")[0] / "model.safetensors")[name]
    assert not torch.equal(weight, last)


def test_weights_alone_use_imagenets_preprocessing(tmp_path: Path) -> None:
    encoder = random_encoder("dense", 5, **SMALL)
    save_file(encoder.state_dict(), tmp_path / "weights.safetensors")
    backbone = load_backbone(str(tmp_path / "weights.safetensors"), CPU)
    assert backbone.images == default_preprocessing(5)
    assert (backbone.encoder.depths, backbone.encoder.dims) == ((1, 2, 1, 1), (8, 16, 24, 32))


@pytest.mark.parametrize(("side", "taken"), [(100, 96), (120, 128), (7, 32)])
def test_odd_sizes_become_multiples_of_32(run: Path, tmp_path: Path, side: int, taken: int) -> None:
    shutil.copytree(run / "exported", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, side, 224]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert load_backbone(str(tmp_path / "copy"), CPU).images.img_size == (taken, 224)


def test_a_model_that_is_not_a_convnext_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such file"):
        load_backbone("nowhere", CPU)
    with pytest.raises(InputError, match="no weights: expected a run"):
        load_backbone(str(tmp_path), CPU)
    save_file({"fc.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors"):
        load_backbone(str(tmp_path / "w.safetensors"), CPU)


def test_random_weights_equal_those_that_pretraining_starts_from() -> None:
    like = backbone_of(random_encoder("patch", 3, model="atto"))
    found, again = random_backbone(like), random_backbone(like)
    assert found.images == like.images
    state = found.encoder.state_dict()
    assert state.keys() == like.encoder.state_dict().keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, again.encoder.state_dict()[name]), name
    for module in found.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.numel() > 5000:
            expected = module.weight[0].numel() ** -0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert not found.encoder.training


def backbone_of(encoder: SparseConvNeXtV2, size: tuple[int, int] = (64, 96)) -> Backbone:
    images = default_preprocessing(encoder.in_chans)
    return Backbone(encoder.eval(), Preprocessing(size, images.mean, images.std), "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine files, of which 0004.png is not an image; read-only."""
    folder = write_pictures(tmp_path_factory.mktemp("nine"), 9, seed=3)
    (folder / "0004.png").write_bytes(b"none")
    return folder


GOOD = [0, 1, 2, 3, 5, 6, 7, 8]


def features_of(
    backbone: Backbone, split: Split, batch_size: int, workers: int, world: World = ALONE
) -> Features:
    batches = each_batch(EvalDataset(split, backbone.images), CPU, batch_size, workers, world)
    return extract(backbone.encoder, batches, world)


@torch.no_grad()
def one_by_one(backbone: Backbone, files: FileList) -> Tensor:
    """timm's features of the files in `GOOD`."""
    model, images = timm_twin(backbone.encoder), backbone.images
    data = EvalDataset(Split(files), images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    crops = [(torch.from_numpy(data[index].image) / 255 - mean) / std for index in GOOD]
    return torch.stack([model.forward_features(crop[None])[0].mean((1, 2)) for crop in crops])


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (64, 0), (4, 2)])
def test_features_of_files_in_order(folder: Path, batch_size: int, workers: int) -> None:
    backbone, files = backbone_of(random_encoder("patch", 3, **SMALL)), find_images(str(folder))
    found = features_of(backbone, Split(files, "val/"), batch_size, workers)
    assert_close(found.values, one_by_one(backbone, files))
    assert found.indices.tolist() == GOOD
    assert [name for name, _ in found.bad] == ["val/0004.png"]


def test_two_processes_share_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, files = backbone_of(random_encoder("patch", 3, **SMALL)), find_images(str(folder))
    one = features_of(backbone, Split(files), 2, 0)
    parts: dict[int, Any] = {}

    def note(world: World, item: Any) -> list[Any]:
        parts[world.rank] = item
        return [item]

    monkeypatch.setattr(World, "gather", note)
    shares = [features_of(backbone, Split(files), 2, 0, World(rank, 2, CPU)) for rank in (0, 1)]
    assert [share.indices.tolist() for share in shares] == [[0, 2, 6, 8], [1, 3, 5, 7]]
    monkeypatch.setattr(World, "gather", lambda *_: [parts[0], parts[1]])
    both = features_of(backbone, Split(files), 2, 0, World(1, 2, CPU))
    assert_close(both.values, one.values)
    assert both.indices.tolist() == one.indices.tolist()
    assert both.bad == one.bad


def test_a_folder_without_readable_images_gives_no_features(folder: Path) -> None:
    files = find_images(str(folder)).select([4])
    found = features_of(backbone_of(random_encoder("patch", 3, **SMALL)), Split(files), 4, 0)
    assert (found.values.shape, len(found.indices), len(found.bad)) == ((0, 32), 0, 1)


def test_one_channel_reads_images_as_grey(folder: Path, tmp_path: Path) -> None:
    for name in ("0000.png", "0001.png"):
        with Image.open(folder / name) as picture:
            picture.convert("L").save(tmp_path / name)
    backbone = backbone_of(random_encoder("patch", 1, **SMALL))
    colour = features_of(backbone, Split(find_images(str(folder)).select([0, 1])), 2, 0)
    grey = features_of(backbone, Split(find_images(str(tmp_path))), 2, 0)
    assert torch.equal(colour.values, grey.values)


def resolved(
    img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], **changes: Any
) -> Resolved:
    """The resolved settings of a run on this CPU without workers."""
    images = Preprocessing(img_size, tuple(mean), tuple(std))
    return Resolved(images, Plan(1, 1, 0.1, 0), **{"part": 7, **changes})


def failing(message: str) -> Any:
    """A loader that raises at its first batch."""

    def fail(_: int) -> Any:
        raise RuntimeError(message)

    return lambda *_, **__: map(fail, [0])


def test_a_dead_worker_is_reported_with_a_fix(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EmbedConfig(str(run), str(folder), str(tmp_path / "features.npz"), workers=2)
    killed = failing("DataLoader worker (pid 1) is killed by signal: Killed. ")
    monkeypatch.setattr("fcmae.data.evaluation.make_loader", killed)
    with pytest.raises(RunError, match=r"\(pid 1\) is killed by signal.*fewer --workers"):
        embed(config)
    monkeypatch.setattr("fcmae.data.evaluation.make_loader", failing("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        embed(config)


def test_embed_writes_features_and_paths(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "images" / "deep")
    odd = os.fsdecode(os.fsencode(tmp_path / "images") + b"/\xff.png")
    shutil.copy(folder / "0000.png", odd)
    out = tmp_path / "new" / "features.npz"
    config = EmbedConfig(str(run), str(tmp_path / "images"), str(out), batch_size=4, workers=0)
    assert embed(config) == out
    assert "skipped, since it can't be read: deep/0004.png" in capsys.readouterr().err
    expected = features_of(load_backbone(str(run), CPU), Split(find_images(config.images)), 64, 0)
    with np.load(out) as file:
        assert set(file) == {"features", "paths"}
        assert file["features"].dtype == np.float32
        assert file["features"].shape == (9, 32)
        assert_close(file["features"], expected.values)
        names = [f"deep/{index:04d}.png" for index in GOOD]
        assert file["paths"].tolist() == [*names, os.path.basename(odd)]
    assert [path.name for path in out.parent.iterdir()] == ["features.npz"]


def test_embed_refuses(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (str(tmp_path / "features.npy"), str(tmp_path)):
        assert main(["embed", str(run), "--images", str(folder), "--out", out]) == 2
        assert f"out {out!r} must be a file ending in .npz" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"none")
    out = str(tmp_path / "features.npz")
    with pytest.raises(RunError, match="none of the 1 images"):
        embed(EmbedConfig(str(run), str(tmp_path), out, workers=0))
    assert not Path(out).exists()
