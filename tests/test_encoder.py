"""The encoder against timm, GRN against its formula, stochastic depth against its expectation."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch.autograd import gradcheck

from sparse import SparseConvNeXtV2
from sparse.block import SparseMlp, drop_images
from sparse.convert import to_timm
from sparse.ops.depthwise import depthwise
from sparse.ops.grn_mlp import grn_mlp
from sparse.rows import ImageRows
from sparse.sizes import SIZES
from tests.test_engines import FAST_ENGINES, random_encoder


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
@pytest.mark.parametrize("model", ["atto", "tiny"])
def test_nothing_hidden_equals_timm(engine, model):
    """Our weights in timm's model give our features."""
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


def mlp_by_the_formula(x, norm, mlp):
    """LayerNorm and equations 1-3 of the paper for one image (n, C), in plain operations."""
    a = torch.nn.functional.gelu(mlp.fc1(norm(x)))
    size = torch.linalg.vector_norm(a, dim=0)
    grn = mlp.grn.weight * (a * (size / (size.mean() + 1e-6))) + mlp.grn.bias + a
    return mlp.fc2(grn)


def random_mlp(dim):
    torch.manual_seed(0)
    norm, mlp = torch.nn.LayerNorm(dim, eps=1e-6), SparseMlp(dim, use_grn=True)
    parameters = [*norm.parameters(), *mlp.parameters()]
    for parameter in parameters:
        torch.nn.init.normal_(parameter)
    return norm.double(), mlp.double(), parameters


def sites_of(counts, visible=None):
    return SimpleNamespace(
        images=ImageRows.of(torch.tensor(counts), torch.device("cpu")), visible_N1=visible
    )


def apply_mlp(x, norm, mlp, sites, recompute=False):
    return grn_mlp(x, norm, mlp, sites.images, sites.visible_N1, recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("piece", [1, 2**22])
@pytest.mark.parametrize("counts", [(5, 5), (2, 2, 2, 2, 2), (3, 7), (0, 10)])
def test_grn_mlp_equals_the_formula_image_by_image(counts, piece, recompute, monkeypatch):
    monkeypatch.setattr("sparse.rows.PIECE", piece)
    norm, mlp, parameters = random_mlp(3)
    x = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    found = apply_mlp(x, norm, mlp, sites_of(counts), recompute)
    expected = torch.cat([mlp_by_the_formula(part, norm, mlp) for part in x.split(counts)])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for got, want in zip(
        torch.autograd.grad(found, (x, *parameters), upstream),
        torch.autograd.grad(expected, (x, *parameters), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("piece", [1, 2**22])
@pytest.mark.parametrize("visible", [None, torch.tensor([[1.0], [1], [0], [1]] * 2).double()])
def test_grn_mlp_gradcheck(visible, piece, monkeypatch):
    monkeypatch.setattr("sparse.rows.PIECE", piece)
    norm, mlp, parameters = random_mlp(2)
    x = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    sites = sites_of((4, 4), visible)
    assert gradcheck(lambda x, *_: apply_mlp(x, norm, mlp, sites), (x, *parameters))


def test_gradient_at_a_channel_of_zeros_is_finite():
    norm, mlp, _ = random_mlp(3)
    with torch.no_grad():
        mlp.fc1.weight[1], mlp.fc1.bias[1] = 0, 0
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    apply_mlp(x, norm, mlp, sites_of((6,))).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_recomputing_changes_no_bit():
    images, mask = torch.randn(4, 3, 96, 96), torch.rand(4, 3, 3) < 0.6
    results = []
    for recompute in (False, True):
        encoder = random_encoder("patch", 3, model="atto", recompute=recompute)
        encoder(images, mask).square().sum().backward()
        results.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("counts", [(3, 3, 3, 3), (2, 4, 1, 5)])
def test_stochastic_depth_drops_whole_images_and_keeps_the_mean(counts):
    torch.manual_seed(0)
    images = ImageRows.of(torch.tensor(counts), torch.device("cpu"))
    ones = torch.ones(12, 2)
    kept = torch.zeros(4)
    for _ in range(500):
        dropped = drop_images(ones, 0.25, images)
        per_image = [part.unique() for part in dropped.split(counts)]
        assert all(len(values) == 1 for values in per_image)
        kept += torch.stack(per_image).flatten()
    assert (kept / 500 - 1).abs().max() < 0.1  # 4 standard deviations


def test_drop_path_rises_with_depth_and_is_off_in_evaluation():
    encoder = random_encoder("dense", 3, model="atto", drop_path=0.3)
    rates = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    images, mask = torch.randn(2, 3, 64, 64), torch.zeros(2, 2, 2, dtype=torch.bool)
    encoder.eval()
    assert torch.equal(encoder(images, mask), encoder(images, mask))
    encoder.train()
    assert not torch.equal(encoder(images, mask), encoder(images, mask))


def test_a_second_derivative_of_grn_mlp_and_depthwise_raises():
    norm, mlp, _ = random_mlp(3)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(2, 3, 5, 5, requires_grad=True)
    for inputs, out in (
        (x, apply_mlp(x, norm, mlp, sites_of((6,)))),
        (maps, depthwise(maps, torch.randn(3, 1, 3, 3), torch.zeros(3))),
    ):
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_bfloat16_weight_gradients_do_not_lose_long_sums(monkeypatch):
    """512 images, one at a time, whose gradients all point the same way."""
    monkeypatch.setattr("sparse.rows.PIECE", 1)
    norm, mlp, parameters = random_mlp(4)
    norm, mlp = norm.float(), mlp.float()
    x = torch.randn(1, 8, 4).repeat(512, 1, 1).flatten(0, 1)
    sites = sites_of((8,) * 512)
    exact = torch.autograd.grad(apply_mlp(x, norm, mlp, sites).sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_mlp(x, norm, mlp, sites)
    found = torch.autograd.grad(out.sum(), parameters)
    for got, want in zip(found, exact, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()
