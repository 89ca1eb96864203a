"""State dict conversion between our layout, timm's, the official dense and the Minkowski layout.

The expected kernels are computed here element by element, never by another reshape.
"""

import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from fcmae import FCMAE
from sparse import SparseConvNeXtV2
from sparse.convert import canonical, encoder_part, from_minkowski, to_minkowski, to_timm
from sparse.errors import InputError
from sparse.layouts import MINKOWSKI, OFFICIAL, Architecture, encoder_shapes, infer_architecture
from sparse.sizes import SIZES

TINY = Architecture((1, 2, 1, 1), (6, 8, 10, 12), in_chans=4)
State = dict[str, Tensor]


def random_encoder(architecture: Architecture, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in encoder_shapes(architecture).items()
    }


def random_decoder(architecture: Architecture, width: int = 5, depth: int = 2) -> State:
    """A decoder in our names, written out by hand."""
    pixels = architecture.in_chans * 32 * 32
    shapes: dict[str, tuple[int, ...]] = {
        "decoder.proj.weight": (width, architecture.dims[3], 1, 1),
        "decoder.proj.bias": (width,),
        "decoder.mask_token": (1, width, 1, 1),
        "decoder.pred.weight": (pixels, width, 1, 1),
        "decoder.pred.bias": (pixels,),
    }
    for block in range(depth):
        at = f"decoder.blocks.{block}"
        shapes |= {
            f"{at}.conv_dw.weight": (width, 1, 7, 7),
            f"{at}.conv_dw.bias": (width,),
            f"{at}.norm.weight": (width,),
            f"{at}.norm.bias": (width,),
            f"{at}.mlp.fc1.weight": (4 * width, width),
            f"{at}.mlp.fc1.bias": (4 * width,),
            f"{at}.mlp.grn.weight": (4 * width,),
            f"{at}.mlp.grn.bias": (4 * width,),
            f"{at}.mlp.fc2.weight": (width, 4 * width),
            f"{at}.mlp.fc2.bias": (width,),
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def with_prefix(encoder: State) -> State:
    return {f"encoder.{name}": tensor for name, tensor in encoder.items()}


def assert_same(found: State, expected: State) -> None:
    """Equal names in equal order, equal shapes and equal bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name
        assert found[name].is_contiguous(), name


def test_encoder_shapes_are_those_of_the_encoder() -> None:
    for architecture in (
        TINY,
        Architecture((1, 1, 1, 1), (4, 5, 6, 7), 1, use_grn=False, layer_scale=1e-6),
    ):
        encoder = SparseConvNeXtV2(
            architecture.depths,
            architecture.dims,
            architecture.in_chans,
            engine="patch",
            use_grn=architecture.use_grn,
            layer_scale=architecture.layer_scale,
        )
        shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        assert encoder_shapes(architecture) == shapes
        assert infer_architecture(encoder.state_dict()) == architecture


@pytest.mark.parametrize("name", SIZES)
def test_to_timm_gives_timms_names_and_shapes_for_every_size(name: str) -> None:
    size = SIZES[name]
    architecture = Architecture(size.depths, size.dims)
    ours = {
        key: torch.empty(shape, device="meta")
        for key, shape in encoder_shapes(architecture).items()
    }
    with torch.device("meta"):
        model = timm.create_model(f"convnextv2_{name}", num_classes=0)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in to_timm(ours).items()} == expected
    assert infer_architecture(model.state_dict()) == architecture


def test_to_timm_drops_the_decoder_and_adds_an_identity_norm() -> None:
    encoder = random_encoder(TINY)
    found = to_timm(with_prefix(encoder) | random_decoder(TINY))
    assert_same(
        found, encoder | {"head.norm.weight": torch.ones(12), "head.norm.bias": torch.zeros(12)}
    )
    assert_same(to_timm(encoder), found)
    assert_same(to_timm(found), found)


@pytest.mark.parametrize(("width", "ndim"), [(40, 4), (48, 4), (64, 4), (80, 4), (96, 2), (41, 2)])
def test_to_timm_makes_the_mlp_4d_by_stem_width(width: int, ndim: int) -> None:
    encoder = random_encoder(Architecture((1, 1, 1, 1), (width, 6, 7, 8)))
    found = to_timm(encoder)
    for name, tensor in found.items():
        if re.search(r"fc[12]\.weight", name):
            assert tensor.ndim == ndim
            assert torch.equal(tensor.flatten(1), encoder[name])
    assert_same(canonical(found), encoder)


def test_canonical_reads_a_timm_model_with_its_classifier() -> None:
    model = timm.create_model("convnextv2_atto", num_classes=7)
    state = model.state_dict()
    found = canonical(state)
    assert not any(name.startswith("head.") for name in found)
    encoder = SparseConvNeXtV2.from_size("atto", engine="patch")
    encoder.load_state_dict(found)
    assert torch.equal(found["stages.2.blocks.5.conv_dw.weight"],
                       state["stages.2.blocks.5.conv_dw.weight"])  # fmt: skip


def minkowski_by_hand(encoder: State) -> State:
    """The Minkowski layout of an encoder in our names, every kernel filled element by element."""
    theirs: State = {}
    for name, tensor in encoder.items():
        if match := re.fullmatch(r"stem\.([01])\.(weight|bias)", name):
            theirs[f"downsample_layers.0.{match[1]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"stages\.(\d)\.downsample\.0\.(weight|bias)", name):
            theirs[f"downsample_layers.{match[1]}.0.ln.{match[2]}"] = tensor
        elif match := re.fullmatch(r"stages\.(\d)\.downsample\.1\.bias", name):
            theirs[f"downsample_layers.{match[1]}.1.bias"] = tensor[None]
        elif match := re.fullmatch(r"stages\.(\d)\.downsample\.1\.weight", name):
            out, width = tensor.shape[:2]
            kernel = torch.empty(4, width, out)
            for row in range(2):
                for column in range(2):
                    kernel[row + 2 * column] = tensor[:, :, row, column].T
            theirs[f"downsample_layers.{match[1]}.1.kernel"] = kernel
        else:
            match = re.fullmatch(r"stages\.(\d)\.blocks\.(\d+)\.(.+)", name)
            assert match
            theirs |= block_by_hand(f"stages.{match[1]}.{match[2]}", match[3], tensor)
    return theirs


def block_by_hand(at: str, part: str, tensor: Tensor) -> State:
    if part == "conv_dw.weight":
        kernel = torch.empty(49, len(tensor))
        for row in range(7):
            for column in range(7):
                kernel[row + 7 * column] = tensor[:, 0, row, column]
        return {f"{at}.dwconv.kernel": kernel}
    names = {
        "conv_dw.bias": "dwconv.bias",
        "norm.weight": "norm.ln.weight",
        "norm.bias": "norm.ln.bias",
        "mlp.fc1.weight": "pwconv1.linear.weight",
        "mlp.fc1.bias": "pwconv1.linear.bias",
        "mlp.grn.weight": "grn.gamma",
        "mlp.grn.bias": "grn.beta",
        "mlp.fc2.weight": "pwconv2.linear.weight",
        "mlp.fc2.bias": "pwconv2.linear.bias",
        "gamma": "gamma",
    }
    is_row = part in ("conv_dw.bias", "mlp.grn.weight", "mlp.grn.bias")
    return {f"{at}.{names[part]}": tensor[None] if is_row else tensor}


@pytest.mark.parametrize(
    "architecture",
    [
        TINY,
        Architecture((2, 2, 6, 2), (40, 80, 160, 320)),
        Architecture((1, 1, 12, 1), (3, 3, 4, 5), 1, use_grn=False, layer_scale=1e-6),
    ],
)
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_minkowski_both_ways_against_the_layout_by_hand(
    architecture: Architecture, prefix: str
) -> None:
    encoder = random_encoder(architecture)
    ours = {prefix + name: tensor for name, tensor in encoder.items()}
    theirs = {prefix + name: tensor for name, tensor in minkowski_by_hand(encoder).items()}
    assert_same(to_minkowski(ours), theirs)
    assert_same(from_minkowski(theirs), ours)
    assert infer_architecture(theirs) == architecture
    assert_same(canonical(theirs), encoder)


def test_minkowski_keeps_the_decoder_as_the_official_script_names_it() -> None:
    decoder = random_decoder(TINY)
    ours = with_prefix(random_encoder(TINY)) | decoder
    theirs = to_minkowski(ours)
    assert {name for name in theirs if not name.startswith("encoder.")} == {
        "proj.weight", "proj.bias", "mask_token", "pred.weight", "pred.bias",
        *(f"decoder.{k}.{part}" for k in range(2) for part in (
            "dwconv.weight", "dwconv.bias", "norm.weight", "norm.bias", "pwconv1.weight",
            "pwconv1.bias", "grn.gamma", "grn.beta", "pwconv2.weight", "pwconv2.bias")),
    }  # fmt: skip
    assert torch.equal(
        theirs["decoder.1.dwconv.weight"], decoder["decoder.blocks.1.conv_dw.weight"]
    )
    assert theirs["decoder.1.grn.beta"].shape == (1, 1, 1, 20)
    assert_same(from_minkowski(theirs), ours)
    assert_same(canonical(theirs), random_encoder(TINY) | decoder)
    assert_same(to_minkowski(from_minkowski(theirs)), theirs)


def test_a_complete_fcmae_survives_the_minkowski_layout() -> None:
    model = FCMAE.from_size("atto", [1, 1, 2, 1], [4, 6, 8, 10], engine="patch", decoder_dim=16)
    for tensor in model.state_dict().values():
        tensor.normal_()
    state = model.state_dict()
    theirs = to_minkowski(state)
    assert theirs["pred.weight"].shape == (3072, 16, 1, 1)
    assert_same(from_minkowski(theirs), state)
    assert_same(with_prefix(encoder_part(canonical(theirs))),
                {name: state[name] for name in state if name.startswith("encoder.")})  # fmt: skip


def test_key_order_and_dtype_are_kept() -> None:
    ours = {name: tensor.half() for name, tensor in reversed(random_encoder(TINY).items())}
    assert_same(from_minkowski(to_minkowski(ours)), ours)
    assert all(tensor.dtype == torch.float16 for tensor in to_timm(ours).values())


def official_dense(encoder: State) -> State:
    return {OFFICIAL.name(name): OFFICIAL.pack(name, tensor) for name, tensor in encoder.items()}


def test_official_dense_names_are_those_that_timm_reads() -> None:
    """timm's own remapping of official releases is the independent reference."""
    encoder = random_encoder(Architecture((2, 2, 6, 2), (40, 80, 160, 320)))
    official = official_dense(encoder)
    assert official["stages.2.5.grn.gamma"].shape == (1, 1, 1, 640)
    model = timm.create_model("convnextv2_atto", num_classes=0)
    read = timm.models.convnext.checkpoint_filter_fn(official, model)
    missing, unexpected = model.load_state_dict(read, strict=False)
    assert (sorted(missing), unexpected) == (["head.norm.bias", "head.norm.weight"], [])
    assert_same(encoder_part(canonical(model.state_dict())), encoder)
    assert_same(canonical(official), encoder)
    assert_same(canonical(official), encoder)


def test_the_head_of_an_official_fine_tuned_release_is_dropped() -> None:
    encoder = random_encoder(TINY)
    head = {"norm.weight": torch.ones(12), "norm.bias": torch.zeros(12),
            "head.weight": torch.ones(3, 12), "head.bias": torch.zeros(3)}  # fmt: skip
    assert_same(canonical(official_dense(encoder) | head), encoder)


def test_converted_minkowski_weights_give_the_same_outputs() -> None:
    encoder = random_encoder(TINY)
    scaled = {name: tensor * 0.1 for name, tensor in encoder.items()}
    one = SparseConvNeXtV2(TINY.depths, TINY.dims, 4, engine="patch")
    two = SparseConvNeXtV2(TINY.depths, TINY.dims, 4, engine="patch")
    one.load_state_dict(scaled)
    two.load_state_dict(from_minkowski(to_minkowski(scaled)))
    images, mask = torch.randn(2, 4, 64, 96), torch.rand(2, 2, 3) < 0.5
    assert torch.equal(one(images, mask), two(images, mask))


def changed(state: State, changes: dict[str, Any]) -> State:
    return {k: v for k, v in (state | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages.1.blocks.1.norm.bias": None}, ["1 missing (stages.1.blocks.1.norm.bias)"]),
        ({"extra.weight": torch.ones(1)}, ["1 unexpected (extra.weight)"]),
        ({"encoder.extra": torch.ones(1)}, ["expected encoder.stages.0.blocks.0", "found 67"]),
        ({"stages.1.blocks.7.conv_dw.bias": torch.ones(8)}, ["missing", "unexpected", "blocks.7"]),
        ({"stages.4.blocks.0.conv_dw.bias": torch.ones(8)}, ["1 unexpected", "stages.4"]),
        ({"stem.0.bias": torch.ones(7)}, ["1 of the wrong shape", "bias is (7,), not (6,)"]),
        ({"stem.0.weight": None}, ["expected", "stem.0.weight"]),
        ({"stages.2.blocks.0.mlp.grn.bias": None}, ["1 missing (stages.2.blocks.0.mlp.grn.bias)"]),
        ({"stages.2.blocks.0.gamma": torch.ones(10)}, ["4 missing", "stages.0.blocks.0.gamma"]),
        ({"decoder.mask_token": torch.ones(1, 5, 1, 1)}, ["decoder.proj.bias"]),
        ({"decoder.proj.bias": torch.ones(5)}, ["missing", "decoder.proj.weight"]),
        ({"decoder.proj.bias": torch.ones(0)}, ["decoder.proj.bias has shape (0,)"]),
        ({"stages.1.blocks.0.conv_dw.bias": torch.ones(0)}, ["conv_dw.bias has shape (0,)"]),
        ({"stem.0.weight": torch.ones(6, 0, 4, 4)}, ["stem.0.weight has shape (6, 0, 4, 4)"]),
    ],
)  # fmt: skip
def test_a_mismatch_names_both_sides(changes: dict[str, Any], words: list[str]) -> None:
    state = changed(random_encoder(TINY), changes)
    for function in (canonical, to_minkowski, to_timm):
        with pytest.raises(InputError) as caught:
            function(state)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message


def test_minkowski_mismatches_use_minkowski_names() -> None:
    state = minkowski_by_hand(random_encoder(TINY))
    state["stages.0.0.dwconv.kernel"] = torch.ones(9, 6)
    del state["downsample_layers.3.1.kernel"]
    with pytest.raises(InputError) as caught:
        from_minkowski(state)
    assert "1 missing (downsample_layers.3.1.kernel)" in str(caught.value)
    assert "stages.0.0.dwconv.kernel is (9, 6), not (49, 6)" in str(caught.value)


def test_another_layout_is_named() -> None:
    encoder = random_encoder(TINY)
    with pytest.raises(InputError, match=r"in timm layout .* expected Minkowski"):
        from_minkowski(encoder)
    with pytest.raises(InputError, match=r"in Minkowski layout .* expected timm"):
        to_minkowski(minkowski_by_hand(encoder))
    with pytest.raises(InputError, match=r"expected stem\.0\.weight, .* found layer1"):
        canonical({"layer1.weight": torch.ones(1)})
    with pytest.raises(InputError, match="found nothing"):
        canonical({})


def test_inputs_are_not_changed() -> None:
    state = with_prefix(random_encoder(TINY)) | random_decoder(TINY)
    before = {name: tensor.clone() for name, tensor in state.items()}
    to_timm(state)
    to_minkowski(state)
    canonical(state)
    assert_same(state, before)


def test_minkowski_names_of_one_block() -> None:
    assert MINKOWSKI.name("stages.3.downsample.1.weight") == "downsample_layers.3.1.kernel"
    assert MINKOWSKI.name("stages.3.blocks.11.mlp.fc2.bias") == "stages.3.11.pwconv2.linear.bias"
    assert MINKOWSKI.name("stem.1.weight") == "downsample_layers.0.1.weight"
