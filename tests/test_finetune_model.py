"""Building models from weights, and refused input."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from fcmae.data.statistics import Preprocessing
from fcmae.weights.export import export_folder
from finetune.config import FinetuneConfig
from finetune.model import (
    Start,
    build_model,
    find_model,
    freeze_backbone,
    init_convnext,
    load_state,
    scale_classifier,
    set_training,
    timm_name,
)
from finetune.train import head_scale
from sparse import SparseConvNeXtV2
from sparse.errors import InputError
from sparse.layouts import infer_architecture

FEMTO = [2, 2, 6, 2], [48, 96, 192, 384]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def random_encoder(in_chans: int = 3, **size: list[int]) -> SparseConvNeXtV2:
    torch.manual_seed(0)
    depths, dims = size.get("depths", [1, 1, 1, 1]), size.get("dims", [8, 12, 16, 20])
    encoder = SparseConvNeXtV2(depths, dims, in_chans, engine="dense")
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.2)
    return encoder.eval()


def exported(encoder: SparseConvNeXtV2, folder: Path) -> str:
    state = encoder.state_dict()
    mean, std = MEAN[: encoder.in_chans], STD[: encoder.in_chans]
    export_folder(state, infer_architecture(state), folder, Preprocessing((64, 64), mean, std))
    return str(folder)


def test_names_of_models() -> None:
    assert timm_name("atto") == timm_name("convnextv2_atto") == "convnextv2_atto"
    assert timm_name("resnet50") == "resnet50"


@pytest.mark.parametrize("names", [("head.norm", "head.fc"), ("norm", "head")])
def test_a_trained_final_norm_is_loaded_too(tmp_path: Path, names: tuple[str, str]) -> None:
    """As when fine-tuning from 22K to 1K; in timm's and in the official names."""
    state = random_encoder(**dict(zip(("depths", "dims"), FEMTO, strict=True))).state_dict()
    norm = {"weight": torch.rand(384) + 0.5, "bias": torch.randn(384)}
    state |= {f"{names[0]}.{kind}": tensor for kind, tensor in norm.items()}
    state |= {f"{names[1]}.weight": torch.randn(9, 384), f"{names[1]}.bias": torch.randn(9)}
    torch.save(state, tmp_path / "w.pth")
    model, _ = build_model(find_model(None, str(tmp_path / "w.pth"), 3), 4, 3, (64, 64))
    assert all(torch.equal(model.state_dict()[f"head.norm.{k}"], t) for k, t in norm.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet5O", "did you mean resnet50"),
        ("ato", "did you mean atto"),
        ("resnet50.a1_in1k", "published weights .* use resnet50"),
        ("local-dir:/somewhere", "is unknown"),
    ],
)
def test_unknown_models_are_refused(model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(model, "none", 3)


def test_pretrained_weights_are_loaded_into_the_dense_model(tmp_path: Path) -> None:
    encoder = random_encoder()
    start = find_model(None, exported(encoder, tmp_path / "out"), 3)
    assert start.images is not None
    assert (start.images.mean, start.images.std) == (MEAN, STD)
    model, args = build_model(start, 5, 3, (64, 96), drop_path=0.1)
    assert args == {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]}
    images = torch.randn(2, 3, 64, 96)
    wanted = encoder(images, torch.zeros(2, 2, 3, dtype=torch.bool))
    features = timm_model(model).forward_features(images)
    assert (features - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert model(images).shape == (2, 5)


def timm_model(model: nn.Module) -> "timm.models.ConvNeXt":
    assert isinstance(model, timm.models.ConvNeXt)
    return model


def test_weights_of_another_size_or_channel_count_are_refused(tmp_path: Path) -> None:
    free = exported(random_encoder(), tmp_path / "free")
    with pytest.raises(InputError, match=r"are of convnextv2_tiny, depths .* model is 'resnet18'"):
        find_model("resnet18", free, 3)
    with pytest.raises(InputError, match=r"are of convnextv2_tiny, depths .* model is 'atto'"):
        find_model("atto", free, 3)
    atto = exported(random_encoder(depths=[2, 2, 6, 2], dims=[40, 80, 160, 320]), tmp_path / "atto")
    assert find_model("atto", atto, 3).args == {}
    with pytest.raises(InputError, match="are of convnextv2_atto, model is 'femto'"):
        find_model("femto", atto, 3)
    with pytest.raises(InputError, match="are for 3 channels, in_chans is 1: give --in_chans 3"):
        find_model(None, atto, 1)


def test_loading_is_strict_except_for_the_classifier() -> None:
    model: Any = timm.create_model("test_resnet", num_classes=3)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    fresh = model.get_classifier().weight.detach().clone()
    load_state(model, state, "there")
    assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])
    assert torch.equal(model.get_classifier().weight, fresh)
    wrong = state | {"conv1.0.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"there: conv1.0.weight is \(1,\) there and \(16, 3"):
        load_state(model, wrong, "there")
    del wrong["conv1.0.weight"]
    with pytest.raises(InputError, match="is nothing there and"):
        load_state(model, wrong, "there")
    with pytest.raises(InputError, match=r"more is .* there and nothing in this model"):
        load_state(model, state | {"more": torch.zeros(1)}, "there")


@pytest.mark.parametrize(
    ("name", "size", "kept"),
    [("test_vit", (64, 64), {"img_size": (64, 64)}), ("test_resnet", (64, 96), {})],
)
def test_image_size_is_passed_to_models_with_a_fixed_one(
    name: str, size: tuple[int, int], kept: dict[str, object]
) -> None:
    model, args = build_model(Start(name, {}), 3, 1, size, drop_path=0.1)
    assert args == kept
    assert model(torch.zeros(2, 1, *size)).shape == (2, 3)


def test_a_model_that_has_no_drop_path_is_built_without_it() -> None:
    model, args = build_model(Start("dla46_c", {}), 3, 3, (64, 64), drop_path=0.1)
    assert args == {}
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("size", [(16, 16), (64, 20)])
def test_images_too_small_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"does not suit convnextv2_atto .* made for \[224, 224\]"):
        build_model(Start("convnextv2_atto", {}), 3, 3, size)


def test_a_frozen_backbone_trains_the_head_with_its_norm() -> None:
    model, _ = build_model(Start("convnextv2_atto", {"depths": (1, 1, 1, 1)}), 3, 3, (32, 32), 0.5)
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"}
    set_training(model)
    assert model.get_submodule("head").training
    assert not any(part.training for part in model.get_submodule("stages").modules())


def test_scaling_the_classifier() -> None:
    model: Any = timm.create_model("test_vit", num_classes=3)
    before = model.head.weight.detach().clone()
    scale_classifier(model, 0.001)
    torch.testing.assert_close(model.head.weight.detach(), before * 0.001)


def test_fan_in_keeps_the_variance_and_the_model_keeps_its_classifier() -> None:
    """In a ConvNeXt from scratch every layer's standard deviation is 1/√fan_in; other models keep
    their own weights."""
    torch.manual_seed(0)
    net: Any = timm.create_model("convnextv2_atto", num_classes=10)
    head = net.get_classifier().weight.clone()
    init_convnext(net)
    for name, fan_in in {
        "stem.0": 48, "stages.2.downsample.1": 320, "stages.3.blocks.0.conv_dw": 49,
        "stages.3.blocks.1.mlp.fc1": 320, "stages.3.blocks.1.mlp.fc2": 1280,
    }.items():  # fmt: skip
        weight = net.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05), name
    assert torch.equal(net.get_classifier().weight, head)
    other = timm.create_model("resnet10t", num_classes=10)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    init_convnext(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "asked", "scale"), [("none", None, 1.0), ("w", None, 0.001), ("none", 0.5, 0.5)]
)
def test_the_head_starts_small_on_pretrained_weights_only(
    weights: str, asked: float | None, scale: float
) -> None:
    config = FinetuneConfig("data", "out", weights=weights, head_init_scale=asked)
    assert head_scale(config) == scale
