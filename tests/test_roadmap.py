"""The road from ResNet to ConvNeXt: its two ends equal timm's models, its steps the paper's."""

import pytest
import timm
import torch

from benchmarks.experiments.roadmap import PUBLISHED, gmacs
from finetune.roadmap import CHANGES, Block, designs
from tests.test_config import CONFIGS, load

ENDS = {
    "roadmap_resnet": "resnet50",
    "roadmap_separate_downsampling": "convnext_tiny",
    "roadmap200_separate_downsampling": "convnext_base",
}


@pytest.mark.parametrize("name", ENDS)
def test_an_end_of_the_road_is_timms_model_weight_for_weight(name):
    ours, timms = (timm.create_model(model, num_classes=7).eval() for model in (name, ENDS[name]))
    torch.manual_seed(0)
    pairs = list(zip(ours.parameters(), timms.parameters(), strict=True))
    assert [mine.ndim > 1 for mine, _ in pairs] == [theirs.ndim > 1 for _, theirs in pairs]
    zeros = [bool(theirs.any()) for _, theirs in pairs if theirs.ndim == 1]
    assert [bool(mine.any()) for mine, _ in pairs if mine.ndim == 1] == zeros
    pairs += zip(ours.buffers(), timms.buffers(), strict=True)
    with torch.no_grad():
        for mine, theirs in pairs:
            assert mine.numel() == theirs.numel()
            if theirs.is_floating_point():
                theirs.copy_(torch.rand_like(theirs) * 0.2 + 0.01)
                theirs -= 0.11 * (theirs.ndim > 1)  # weights around 0; norms and LayerScale above
            mine.copy_(theirs.reshape_as(mine))
        images = torch.rand(2, 3, 64, 96)
        torch.testing.assert_close(ours(images), timms(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", PUBLISHED)
def test_steps_cost_what_the_paper_says(size):
    """Tables 10 and 11. Table 10 counts ConvNeXt-T's convolutions between stages one step early:
    LayerNorm adds no multiplication of a convolution, and Table 11 has the increase at the end."""
    road = designs(list(PUBLISHED).index(size))
    for (name, design), published in zip(road.items(), PUBLISHED[size][1], strict=True):
        if size == 50 and name in ("layer_norm", "separate_downsampling"):
            published = {"layer_norm": 4.15, "separate_downsampling": 4.46}[name]
        assert gmacs(design) == pytest.approx(published, abs=0.006), name


def test_a_step_changes_one_thing():
    for size in range(2):
        road = list(designs(size).values())
        for one, next_one, change in zip(
            road[:-1], road[1:], list(CHANGES.values())[1:], strict=True
        ):
            differ = {k for k in vars(one) if getattr(one, k) != getattr(next_one, k)}
            assert differ == set(change[size])


def test_each_step_has_a_recipe():
    files = sorted((CONFIGS / "roadmap").glob("*.yaml"))
    assert [load(f"roadmap/{file.name}").model for file in files] == [
        f"roadmap_{n}" for n in CHANGES
    ]
    for file, top1 in zip(files, PUBLISHED[50][0], strict=True):
        assert f"{top1:.2f}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["gelu", "separate_downsampling"])
def test_every_weight_learns_and_stochastic_depth_rises(name):
    model = timm.create_model(f"roadmap_{name}", num_classes=3, drop_path_rate=0.5)
    rates = [part.drop_path.drop_prob for part in model.modules() if isinstance(part, Block)]
    assert rates == pytest.approx([0.5 * n / 17 for n in range(18)])
    model.eval()(torch.rand(2, 3, 64, 64)).square().sum().backward()
    for stage in model.stages:
        for part in stage:
            assert any(p.grad.any() for p in part.parameters())
    assert all(p.grad is not None for p in model.parameters())
