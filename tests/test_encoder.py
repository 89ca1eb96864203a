"""The encoder against timm, GRN against its formula, stochastic depth against its expectation."""

import pytest
import timm
import torch
from torch.autograd import gradcheck

from sparse import SparseConvNeXtV2
from sparse.convert import to_timm
from sparse.engines.base import ImageRows
from sparse.layers import _GeluGRNLinear, drop_images
from sparse.sizes import SIZES
from tests.test_engines import FAST_ENGINES, random_encoder


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
@pytest.mark.parametrize("model", ["atto", "tiny"])
def test_nothing_hidden_equals_timm(engine, model):
    """Both ways round: our weights in timm's model give our features."""
    torch.manual_seed(0)
    encoder = random_encoder(engine, 3, model=model)
    reference = timm.create_model(f"convnextv2_{model}", num_classes=0)
    reference.load_state_dict(to_timm(encoder.state_dict()))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = reference.forward_features(images)
        found = encoder(images, torch.zeros(2, 2, 3, dtype=torch.bool))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_numbers_of_parameters(name):
    """Millions, with timm's classifier of 1000 classes and final norm, as the paper counts."""
    published = {"atto": 3.7, "femto": 5.2, "pico": 9.1, "nano": 15.6, "tiny": 28.6, "base": 88.7,
                 "large": 198, "huge": 660}  # fmt: skip
    with torch.device("meta"):
        encoder = SparseConvNeXtV2.from_size(name, engine="dense")
    dim = encoder.dims[-1]
    millions = (sum(p.numel() for p in encoder.parameters()) + 2 * dim + 1001 * dim) / 1e6
    assert millions == pytest.approx(published[name], rel=0.01)


def grn_by_the_formula(h, weight, bias):
    """Equations 1-3 of the paper for one image (n, C), with plain differentiable operations."""
    a = torch.nn.functional.gelu(h)
    norm = torch.linalg.vector_norm(a, dim=0)
    return weight * (a * (norm / (norm.mean() + 1e-6))) + bias + a


@pytest.mark.parametrize("counts", [(5, 5), (3, 7), (0, 10)])
def test_gelu_grn_linear_is_the_formula_image_by_image(counts):
    torch.manual_seed(0)
    shapes = [(10, 6), (6,), (6,), (3, 6), (3,)]
    h, *parameters = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    weight, bias, w, b = parameters
    images = ImageRows(torch.tensor(counts), torch.device("cpu"))
    found = _GeluGRNLinear.apply(h, *parameters, images, None)
    normed = torch.cat([grn_by_the_formula(p, weight, bias) for p in h.split(counts)])
    expected = torch.nn.functional.linear(normed, w, b)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for got, want in zip(
        torch.autograd.grad(found, (h, *parameters), upstream),
        torch.autograd.grad(expected, (h, *parameters), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("visible", [None, torch.tensor([[1.0], [1], [0], [1]] * 2).double()])
def test_gelu_grn_linear_gradcheck(visible):
    torch.manual_seed(0)
    shapes = [(8, 4), (4,), (4,), (3, 4), (3,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    images = ImageRows(torch.tensor([4, 4]), torch.device("cpu"))
    assert gradcheck(lambda *args: _GeluGRNLinear.apply(*args, images, visible), inputs)


def test_gradient_at_a_channel_of_zeros_is_finite():
    h = torch.randn(6, 3)
    h[:, 1] = 0
    h.requires_grad_()
    images = ImageRows(torch.tensor([6]), torch.device("cpu"))
    grn = torch.ones(3), torch.zeros(3)
    _GeluGRNLinear.apply(h, *grn, torch.eye(3), torch.zeros(3), images, None).sum().backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (2, 4, 1, 5)])
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(counts):
    torch.manual_seed(0)
    images = ImageRows(torch.tensor(counts), torch.device("cpu"))
    ones = torch.ones(12, 2)
    kept = torch.zeros(4)
    for _ in range(500):
        dropped = drop_images(ones, 0.25, images)
        per_image = [part.unique() for part in dropped.split(counts)]
        assert all(len(values) == 1 for values in per_image)
        kept += torch.stack(per_image).flatten()
    assert (kept / 500 - 1).abs().max() < 0.1  # 4 standard deviations


def test_drop_path_rises_with_depth_and_rests_in_evaluation():
    encoder = random_encoder("dense", 3, model="atto", drop_path=0.3)
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 2, 2, dtype=torch.bool)
    encoder.eval()
    assert torch.equal(encoder(images, mask), encoder(images, mask))
    encoder.train()
    assert not torch.equal(encoder(images, mask), encoder(images, mask))
