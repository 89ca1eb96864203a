"""Converted kernels against MinkowskiEngine's own convolutions."""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse.convert import from_minkowski, to_minkowski
from sparse.engines.minkowski import load_minkowski, why_unavailable
from sparse.layouts import Architecture, encoder_shapes

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    # MinkowskiEngine 0.5.4 instantiates its autograd function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

ARCHITECTURE = Architecture((1, 1, 1, 1), (3, 5, 4, 6))


@pytest.fixture
def engine() -> ModuleType:
    return load_minkowski()


@pytest.fixture
def ours() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in encoder_shapes(ARCHITECTURE).items()
    }


def sites(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(coordinates of the visible sites (image, row, column), visible (B, 1, H, W))."""
    visible = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(1)) < 0.4
    visible[0, :, -2:] = False
    visible[1, :, :, -2:] = False
    return visible[:, 0].nonzero().int().contiguous(), visible


def compare(found: object, expected_BCHW: Tensor) -> None:
    """Compare a sparse tensor with the dense result at its own sites, by their coordinates."""
    coordinates = found.C.long()  # type: ignore[attr-defined]
    stride = found.tensor_stride  # type: ignore[attr-defined]
    image, row, column = coordinates.unbind(1)
    expected_NC = expected_BCHW[image, :, row // stride[0], column // stride[1]]
    torch.testing.assert_close(
        found.F.detach(),  # type: ignore[attr-defined]
        expected_NC,
        rtol=1e-5,
        atol=1e-5,
    )


def run(engine: ModuleType, layer: torch.nn.Module, coordinates: Tensor, x_BCHW: Tensor) -> object:
    threads = torch.get_num_threads()
    image, row, column = coordinates.long().unbind(1)
    try:
        return layer(engine.SparseTensor(x_BCHW[image, :, row, column], coordinates))
    finally:
        torch.set_num_threads(threads)  # each coordinate manager sets its own


def test_depthwise_kernel_means_the_same_to_minkowski_engine(
    engine: ModuleType, ours: dict[str, Tensor]
) -> None:
    theirs = to_minkowski(ours)
    layer = engine.MinkowskiChannelwiseConvolution(3, kernel_size=7, bias=True, dimension=2)
    layer.load_state_dict(
        {"kernel": theirs["stages.0.0.dwconv.kernel"], "bias": theirs["stages.0.0.dwconv.bias"]}
    )
    coordinates, visible = sites(9, 12)
    x_BCHW = torch.randn(2, 3, 9, 12) * visible
    at = "stages.0.blocks.0.conv_dw"
    expected = F.conv2d(x_BCHW, ours[f"{at}.weight"], ours[f"{at}.bias"], padding=3, groups=3)
    compare(run(engine, layer, coordinates, x_BCHW), expected)


def test_strided_kernel_means_the_same_to_minkowski_engine(
    engine: ModuleType, ours: dict[str, Tensor]
) -> None:
    theirs = to_minkowski(ours)
    layer = engine.MinkowskiConvolution(3, 5, kernel_size=2, stride=2, bias=True, dimension=2)
    layer.load_state_dict({k: theirs[f"downsample_layers.1.1.{k}"] for k in ("kernel", "bias")})
    coordinates, visible = sites(8, 12)
    x_BCHW = torch.randn(2, 3, 8, 12) * visible
    at = "stages.1.downsample.1"
    expected = F.conv2d(x_BCHW, ours[f"{at}.weight"], ours[f"{at}.bias"], stride=2)
    compare(run(engine, layer, coordinates, x_BCHW), expected)


def test_layers_of_minkowski_engine_fill_a_state_dict_that_converts(
    engine: ModuleType, ours: dict[str, Tensor]
) -> None:
    """Shapes as MinkowskiEngine's own modules have them, biases with their leading 1 included."""
    theirs = to_minkowski(ours)
    dims = ARCHITECTURE.dims
    layers = {
        f"stages.{i}.0.dwconv": engine.MinkowskiChannelwiseConvolution(
            dims[i], kernel_size=7, bias=True, dimension=2
        )
        for i in range(4)
    } | {
        f"downsample_layers.{i}.1": engine.MinkowskiConvolution(
            dims[i - 1], dims[i], kernel_size=2, stride=2, bias=True, dimension=2
        )
        for i in range(1, 4)
    }
    for at, layer in layers.items():
        for name, tensor in layer.state_dict().items():
            assert theirs[f"{at}.{name}"].shape == tensor.shape
            theirs[f"{at}.{name}"] = tensor
    again = to_minkowski(from_minkowski(theirs))
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.items())
