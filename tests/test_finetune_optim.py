"""Layer-wise rates and weight decay, against numbers computed by hand."""

from collections import defaultdict

import pytest
import timm
import torch
from torch import nn

from fcmae.train.optimizer import make_optimizer, parameter_groups
from finetune.config import FinetuneOptimConfig
from finetune.optim import convnext_layer, layer_depths

BASE = (3, 3, 27, 3)


def tiny_convnext() -> nn.Module:
    model: nn.Module = timm.create_model(
        "convnextv2_atto", num_classes=3, depths=(1, 1, 2, 1), dims=(8, 8, 8, 8)
    )
    return model


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("stem.0.weight", 0),
        ("stages.0.blocks.2.conv_dw.weight", 1),
        ("stages.1.downsample.1.weight", 2),
        ("stages.1.blocks.0.norm.bias", 2),
        ("stages.2.downsample.0.weight", 3),
        ("stages.2.blocks.2.mlp.fc1.weight", 3),
        ("stages.2.blocks.3.mlp.fc1.weight", 4),
        ("stages.2.blocks.26.mlp.grn.weight", 11),
        ("stages.3.downsample.1.weight", 12),
        ("stages.3.blocks.2.mlp.fc2.bias", 12),
        ("head.norm.weight", 13),
        ("head.fc.weight", 13),
    ],
)
def test_base_makes_twelve_groups(name: str, layer: int) -> None:
    assert convnext_layer(name, BASE, 3) == layer


def test_single_makes_each_block_a_layer_with_the_downsampling_before_it() -> None:
    """Depths 1, 1, 2, 1: the blocks are layers 1 to 5, followed by the head."""
    rates = {}
    model = tiny_convnext()
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, 0.05, 0.5, layer_depths(model, "single")):
        rates.update({names[parameter]: group["lr_scale"] for parameter in group["params"]})
    assert rates.keys() == set(names.values())
    assert rates["head.fc.weight"] == rates["head.norm.bias"] == 1.0
    assert rates["stages.3.blocks.0.mlp.fc1.weight"] == rates["stages.3.downsample.1.bias"] == 0.5
    assert rates["stages.2.blocks.1.conv_dw.weight"] == 0.25
    assert rates["stages.2.blocks.0.conv_dw.weight"] == rates["stages.2.downsample.0.bias"] == 0.125
    assert rates["stages.1.blocks.0.norm.weight"] == 0.0625
    assert rates["stages.0.blocks.0.conv_dw.bias"] == rates["stem.0.weight"] == 0.03125


def test_group_for_custom_depths() -> None:
    depths = layer_depths(tiny_convnext(), "group")
    assert depths["head.fc.bias"] == 0
    assert depths["stages.2.blocks.0.norm.bias"] == depths["stages.2.blocks.1.norm.bias"] == 2
    assert depths["stem.1.weight"] == 5


def test_biases_norms_and_grn_are_not_decayed() -> None:
    model = tiny_convnext()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = defaultdict(set)
    for group in parameter_groups(model, 0.3, 0.9, layer_depths(model, "single")):
        for parameter in group["params"]:
            decays[group["weight_decay"]].add(names[parameter])
    assert decays.keys() == {0.0, 0.3}
    assert all(
        name.endswith(("conv_dw.weight", "fc1.weight", "fc2.weight", "fc.weight", "0.weight"))
        or "downsample.1.weight" in name
        for name in decays[0.3]
    )
    assert all(
        name.endswith("bias") or "norm" in name or "grn" in name or ".1.weight" in name
        or "downsample.0" in name
        for name in decays[0.0]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_mambaout", "convnext_atto"])
def test_any_timm_model_is_covered(name: str) -> None:
    model = timm.create_model(name, num_classes=3)
    groups = parameter_groups(model, 0.05, 0.7, layer_depths(model, "single"))
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    scales = [group["lr_scale"] for group in groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    if name == "test_vit":
        spared = {p for group in groups if not group["weight_decay"] for p in group["params"]}
        assert model.pos_embed in spared


def test_a_layer_decay_of_one_makes_two_groups() -> None:
    groups = parameter_groups(tiny_convnext(), 0.05, 1.0, layer_depths(tiny_convnext(), "single"))
    assert [group["lr_scale"] for group in groups] == [1.0, 1.0]


def test_frozen_parameters_are_excluded() -> None:
    model = tiny_convnext().requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)
    optimizer = make_optimizer(
        model, FinetuneOptimConfig(layer_decay=0.75), layer_depths(model, "single")
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.get_submodule("head").parameters()}
    assert isinstance(optimizer, torch.optim.AdamW)
