"""Engines against the dense oracle: outputs, input gradients and every weight gradient."""

import pytest
import torch
from torch import Tensor

from sparse import SparseConvNeXtV2, available_engines, get_engine
from sparse.engines.minkowski import why_unavailable
from sparse.errors import InputError

TOLERANCE = 1e-5

needs_minkowski = pytest.mark.skipif(why_unavailable() is not None, reason=f"{why_unavailable()}")
FAST_ENGINES = ["patch", pytest.param("minkowski", marks=needs_minkowski)]

MODELS = {
    "atto": {"model": "atto"},
    "tiny widths": {"model": "tiny", "depths": [1, 1, 1, 1]},
    "V1 blocks": {"model": "atto", "depths": [1, 1, 1, 1], "use_grn": False, "layer_scale": 0.5},
}
MASKS = ["random", "ragged", "last row", "last column", "one image", "everything", "nothing"]


def make_mask(kind: str, batch: int, h: int, w: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rank = torch.rand(batch, h * w, generator=generator).argsort(1).argsort(1)
    mask = (rank >= int(h * w * 0.4)).view(batch, h, w)
    if kind == "ragged":
        mask = torch.rand(batch, h, w, generator=generator) < 0.6
    elif kind == "last row":
        mask[:, -1] = True
    elif kind == "last column":
        mask[:, :, -1] = True
    elif kind == "one image":
        mask[-1] = True
    elif kind == "everything":
        mask[:] = True
    elif kind == "nothing":
        mask[:] = False
    return mask


def random_encoder(engine: str, in_chans: int, **options: object) -> SparseConvNeXtV2:
    """Every parameter random: at its initial zero GRN is the identity."""
    encoder = SparseConvNeXtV2.from_size(engine=engine, in_chans=in_chans, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.1 if parameter.ndim > 1 else 0.5, generator=generator)
    return encoder


def everything(encoder: SparseConvNeXtV2, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    images = images.clone().requires_grad_()
    out = encoder(images, mask)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    assert images.grad is not None
    grads = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return {"output": out.detach(), "images": images.grad, **grads}


def assert_agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        scale = value.abs().max().item()
        difference = (found[name] - value).abs().max().item()
        assert difference <= TOLERANCE * scale, f"{name}: {difference} against {scale}"


@pytest.mark.parametrize("engine", FAST_ENGINES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    ("model", "size", "batch", "in_chans"),
    [
        ("atto", (96, 160), 5, 1),
        ("tiny widths", (96, 160), 1, 4),
        ("tiny widths", (96, 96), 5, 3),
        ("V1 blocks", (96, 160), 2, 3),
    ],
)
def test_agrees_with_dense(engine, kind, model, size, batch, in_chans):
    images = torch.randn(batch, in_chans, *size, generator=torch.Generator().manual_seed(3))
    mask = make_mask(kind, batch, size[0] // 32, size[1] // 32)
    expected = everything(random_encoder("dense", in_chans, **MODELS[model]), images, mask)
    found = everything(random_encoder(engine, in_chans, **MODELS[model]), images, mask)
    assert_agree(found, expected)


@pytest.mark.parametrize("engine", FAST_ENGINES)
@pytest.mark.parametrize("patch_size", [8, 16])
def test_smaller_patches_agree_with_dense(engine, patch_size):
    images = torch.randn(2, 3, 3 * patch_size, 5 * patch_size)
    mask = make_mask("random", 2, 3, 5)
    options = {"patch_size": patch_size, **MODELS["atto"]}
    expected = everything(random_encoder("dense", 3, **options), images, mask)
    assert expected["output"].shape[2:] == (3, 5)
    assert_agree(everything(random_encoder(engine, 3, **options), images, mask), expected)


@pytest.mark.parametrize("engine", FAST_ENGINES)
@pytest.mark.parametrize("model", ["atto", "tiny widths"])
@pytest.mark.parametrize("kind", ["random", "last column"])
def test_agrees_with_dense_at_224(engine, model, kind):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    mask = make_mask(kind, 2, 7, 7)
    expected = everything(random_encoder("dense", 3, **MODELS[model]), images, mask)
    assert_agree(everything(random_encoder(engine, 3, **MODELS[model]), images, mask), expected)


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
def test_hidden_pixels_do_not_leak(engine):
    """Noise in hidden patches changes no bit of the output; hidden pixels get no gradient."""
    encoder = random_encoder(engine, 3, model="atto")
    images = torch.randn(3, 3, 96, 96)
    mask = make_mask("random", 3, 3, 3)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    noisy = torch.where(hidden, 100 * torch.randn_like(images), images).requires_grad_()
    expected = encoder(images, mask)
    found = encoder(noisy, mask)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    assert noisy.grad is not None
    assert noisy.grad.masked_select(hidden.expand_as(noisy)).count_nonzero() == 0
    assert noisy.grad.count_nonzero() > 0
    assert expected.masked_select(mask[:, None].expand_as(expected)).count_nonzero() == 0


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
def test_black_pixels_are_visible(engine):
    """Only the mask decides what is visible: an image of zeros is not empty."""
    encoder = random_encoder(engine, 3, model="atto", depths=[1, 1, 1, 1])
    out = encoder(torch.zeros(1, 3, 64, 64), torch.tensor([[[False, True], [True, True]]]))
    assert out[0, :, 0, 0].abs().min() > 0
    assert out[0, :, 1, 1].abs().max() == 0


@pytest.mark.parametrize("engine", ["dense", *FAST_ENGINES])
def test_everything_hidden_stays_in_the_graph(engine):
    encoder = random_encoder(engine, 3, model="atto")
    out = encoder(torch.randn(2, 3, 64, 96), torch.ones(2, 2, 3, dtype=torch.bool))
    assert out.shape == (2, 320, 2, 3)
    assert out.count_nonzero() == 0
    out.sum().backward()
    for parameter in encoder.parameters():
        assert parameter.grad is not None
        assert parameter.grad.count_nonzero() == 0


@needs_minkowski
def test_minkowski_keeps_torchs_thread_count_and_is_deterministic():
    """MinkowskiEngine sets OpenMP's thread count, and the order of its maps could vary."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        encoder = random_encoder("minkowski", 3, model="atto", depths=[1, 1, 1, 1])
        images, mask = torch.randn(4, 3, 96, 96), make_mask("random", 4, 3, 3)
        first = everything(encoder, images, mask)
        for _ in range(5):
            encoder.zero_grad(set_to_none=True)
            again = everything(encoder, images, mask)
            assert all(torch.equal(again[name], value) for name, value in first.items())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_engine_names():
    assert available_engines()[-2:] == ["patch", "dense"]
    with pytest.raises(InputError, match="did you mean patch"):
        get_engine("pach")
    with pytest.raises(InputError, match="use engine 'patch'"):
        get_engine("minkowski", "cuda")
    assert get_engine("auto", "cuda").name == "patch"
    assert get_engine("auto").name == available_engines()[0]


def test_a_named_engine_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr("sparse.engines.why_unavailable", lambda: "it is not installed")
    with pytest.raises(InputError, match=r"not installed; install it with `python -m sparse\."):
        get_engine("minkowski")
    assert get_engine("auto").name == "patch"


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        ((1, 4, 64, 64), (1, 2, 2), "in_chans=4"),
        ((1, 3, 64, 70), (1, 2, 2), "64×70 is not a multiple of 32: use 64×64"),
        ((1, 3, 64, 64), (1, 2, 3), "True = hidden"),
    ],
)
def test_mismatched_shapes_are_refused(images, mask, message):
    encoder = SparseConvNeXtV2.from_size("atto", depths=[1, 1, 1, 1], engine="dense")
    with pytest.raises(InputError, match=message):
        encoder(torch.zeros(images), torch.zeros(mask, dtype=torch.bool))


@pytest.mark.parametrize("engine", FAST_ENGINES)
def test_a_second_derivative_raises_instead_of_being_wrong(engine):
    """The custom functions have hand-written first derivatives only."""
    encoder = random_encoder(engine, 3, model="atto", depths=[1, 1, 1, 1])
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    out = encoder(images, torch.tensor([[[False, True], [True, False]]] * 2))
    (gradient,) = torch.autograd.grad(out.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_auto_is_resolved_by_the_device_of_the_images():
    """`FCMAE.from_size("atto").cuda()` must work if MinkowskiEngine is installed."""
    encoder = random_encoder("auto", 3, model="atto", depths=[1, 1, 1, 1])
    assert encoder.engine_on(torch.device("cpu")).name == available_engines()[0]
    assert encoder.engine_on(torch.device("cuda")).name == "patch"
    assert encoder.engine_on(torch.device("meta")).name == "patch"
    half = encoder.to(torch.bfloat16)
    assert half.engine_on(torch.device("cpu")).name == "patch"


@pytest.mark.parametrize(("device", "waits"), [("mps", True), ("cpu", True), ("cuda", False)])
def test_only_copies_to_cuda_do_not_wait(device, waits, monkeypatch):
    """Index tables are temporaries: MPS could read them after their memory is reused."""
    asked = []

    def record(tensor, *arguments, non_blocking=False, **_):
        asked.append(non_blocking)
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", record)
    for engine in ("patch", "dense"):
        get_engine(engine, device).sites(make_mask("ragged", 2, 3, 3), torch.device(device))
    assert asked
    assert set(asked) == {not waits}
