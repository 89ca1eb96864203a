"""Blocks that fine-tuning replaces by its own, against timm's."""

import copy

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch.autograd import gradcheck
from torch.nn import functional as F

from finetune.blocks import DepthwiseConv2d, FusedBlock, speed_up
from sparse.ops.depthwise import depthwise


def random_model(name, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # the initial GRN and layer scale would hide mistakes
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(memory_format=torch.channels_last)


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "options", "compiled", "fused"),
    [
        ("convnextv2_atto", {}, False, 12),
        ("convnextv2_atto", {}, True, 0),
        ("convnextv2_atto", {"ls_init_value": 0.5}, False, 12),
        ("convnextv2_tiny", {"depths": (1, 1, 2, 1)}, False, 5),
        ("convnext_atto", {}, False, 0),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (50, 50)])
def test_outputs_and_gradients_equal_timms(name, options, compiled, fused, size):
    expected = random_model(name, **options)
    found = copy.deepcopy(expected)
    speed_up(found, compiled)
    assert count(found, FusedBlock) == fused
    assert count(found, DepthwiseConv2d) == count(expected, ConvNeXtBlock)
    assert list(found.state_dict()) == list(expected.state_dict())
    images = torch.randn(3, 3, *size)
    results = []
    for model in (expected, copy.deepcopy(found)):
        out = model(images)
        out.square().mean().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


def test_bfloat16_is_as_accurate_as_in_timm():
    exact = random_model("convnextv2_atto")
    fused = copy.deepcopy(exact)
    speed_up(fused)
    images = torch.randn(4, 3, 64, 64)
    want = exact(images)
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = exact(images), fused(images)
    assert (ours - want).norm() < 1.5 * (theirs - want).norm()


def test_stochastic_depth_draws_the_same_as_in_timm():
    expected = random_model("convnextv2_atto", drop_path_rate=0.5)
    found = copy.deepcopy(expected)
    speed_up(found)
    images = torch.randn(4, 3, 64, 64)
    results = []
    for model in (expected, found):
        torch.manual_seed(3)
        results.append(model.train()(images))
    torch.testing.assert_close(*results)


def test_other_models_and_layers_are_unchanged():
    model = timm.create_model("resnet18")
    before = [type(module) for module in model.modules()]
    speed_up(model)
    assert [type(module) for module in model.modules()] == before
    odd = timm.create_model("convnextv2_atto", output_stride=8, conv_bias=True)
    odd.stages[0].blocks[0].norm.eps = 1e-3
    speed_up(odd)
    dilated = [b.conv_dw for s in odd.stages for b in s.blocks if b.conv_dw.dilation != (1, 1)]
    assert dilated
    assert all(type(conv) is torch.nn.Conv2d for conv in dilated)
    assert not isinstance(odd.stages[0].blocks[0], FusedBlock)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 1, 3), (3, 1, 8, 8)])
def test_depthwise_gradcheck(kernel, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1], 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x, weight, bias, padding=kernel // 2, groups=shape[1])
    torch.testing.assert_close(depthwise(x, weight, bias), expected)
    assert gradcheck(depthwise, (x, weight, bias))


def test_depthwise_casts_under_autocast():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight = torch.randn(4, 1, 7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = depthwise(x, weight, torch.zeros(4))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)
