"""FCMAE: target and loss by hand, shapes, masks, gradients."""

import pytest
import torch

from fcmae import FCMAE
from fcmae.config.pretraining import PretrainConfig
from fcmae.model.loss import (
    patch_statistics,
    patchify,
    reconstruction_loss,
    to_pixels,
    unpatchify,
)
from fcmae.model.mask import random_masks
from fcmae.train.pretraining import build_model
from sparse.errors import InputError

SMALL = {"depths": [1, 1, 1, 1], "engine": "patch", "decoder_dim": 32}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_patchify_orders_by_row_column_channel(channels):
    images = torch.randn(2, channels, 64, 96)
    patches = patchify(images)
    assert patches.shape == (2, channels * 1024, 2, 3)
    row, column, channel = 5, 7, channels - 1
    position = (row * 32 + column) * channels + channel
    assert patches[1, position, 1, 2] == images[1, channel, 32 + row, 64 + column]
    assert torch.equal(unpatchify(patches), images)


def test_loss_is_the_mean_over_hidden_patches_of_normalised_errors():
    torch.manual_seed(0)
    images, pred = torch.randn(2, 3, 64, 64), torch.randn(2, 3072, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]], [[True, True], [False, True]]])
    losses = []
    for b, y, x in mask.nonzero().tolist():
        patch = images[b, :, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].permute(1, 2, 0).flatten()
        target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6) ** 0.5
        losses.append((pred[b, :, y, x] - target).square().mean())
    found = reconstruction_loss(pred, images, mask, norm_pix=True)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_predicting_the_mean_has_a_loss_of_one():
    images = torch.randn(2, 3, 64, 64)
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    loss = reconstruction_loss(torch.zeros(2, 3072, 2, 2), images, mask, norm_pix=True)
    assert loss.item() == pytest.approx(1, abs=1e-3)  # 3071/3072: the variance is unbiased


def test_pixels_are_recovered_from_normalised_patches():
    images = torch.rand(2, 3, 64, 64)
    patches = patchify(images)
    mean, deviation = patch_statistics(patches)
    perfect = (patches - mean) / deviation
    torch.testing.assert_close(to_pixels(perfect, images, norm_pix=True), images)
    torch.testing.assert_close(to_pixels(patches, images, norm_pix=False), images)


@pytest.mark.parametrize(("height", "width", "channels"), [(64, 96, 1), (96, 64, 4)])
def test_forward_gives_loss_prediction_and_mask(height, width, channels):
    model = FCMAE.from_size("atto", in_chans=channels, **SMALL)
    images = torch.randn(2, channels, height, width)
    out = model(images, generator=torch.Generator().manual_seed(1))
    grid = (height // 32, width // 32)
    assert out.pred.shape == (2, channels * 1024, *grid)
    assert out.mask.shape == (2, *grid)
    assert (~out.mask).flatten(1).sum(1).tolist() == [2, 2]  # int(6 · 0.4)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = model(images, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.mask, out.mask)
    given = model(images, mask=out.mask)
    assert torch.equal(given.loss, out.loss)


def test_19_of_49_patches_are_visible_at_224():
    model = FCMAE.from_size("atto", **SMALL)
    mask = random_masks(3, (7, 7), model.mask_ratio)
    assert (~mask).flatten(1).sum(1).tolist() == [19, 19, 19]
    assert not torch.equal(mask[0], mask[1])


def test_a_ratio_that_leaves_nothing_visible_is_refused():
    model = FCMAE.from_size("atto", mask_ratio=0.6, **SMALL)
    with pytest.raises(InputError, match="mask_ratio"):
        model(torch.zeros(1, 3, 32, 64))


def test_all_hidden_trains_without_nan():
    model = FCMAE.from_size("atto", **SMALL)
    out = model(torch.randn(2, 3, 64, 64), torch.ones(2, 2, 2, dtype=torch.bool))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_mask_token_stands_where_patches_are_hidden():
    """With an identity projection, the decoder's input equals the token at hidden positions."""
    model = FCMAE.from_size("atto", **{**SMALL, "decoder_dim": 320, "decoder_depth": 0})
    with torch.no_grad():
        model.decoder.proj.weight.copy_(torch.eye(320)[:, :, None, None])
        model.decoder.mask_token.fill_(3.0)
        model.decoder.pred.weight.fill_(0)
        model.decoder.pred.weight[:320, :, 0, 0] = torch.eye(320)
    features = torch.randn(1, 320, 1, 2)
    out = model.decoder(features, torch.tensor([[[True, False]]]))
    assert torch.equal(out[0, :320, 0, 0], torch.full((320,), 3.0))
    assert torch.equal(out[0, :320, 0, 1], features[0, :, 0, 1])


def test_official_widths():
    """The decoder of the paper: width 512, one block, 32·32·3 outputs."""
    with torch.device("meta"):
        decoder = FCMAE.from_size("tiny", engine="patch").decoder
    shapes = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    assert shapes["proj.weight"] == (512, 768, 1, 1)
    assert shapes["mask_token"] == (1, 512, 1, 1)
    assert shapes["pred.weight"] == (3072, 512, 1, 1)
    assert {name.split(".")[1] for name in shapes if name.startswith("blocks")} == {"0"}


@pytest.mark.parametrize("init", ["fan_in", "paper"])
def test_initial_weights(init):
    """fan_in keeps the signal's variance through the encoder; the paper uses 0.02 everywhere."""
    model = build_model(PretrainConfig(data="-", out="-", init=init, engine="patch"))
    fan_ins = {
        "encoder.stem.0": 48, "encoder.stages.2.downsample.1": 320,
        "encoder.stages.3.blocks.0.conv_dw": 49, "encoder.stages.3.blocks.1.mlp.fc2": 1280,
    }  # fmt: skip
    for name, fan_in in fan_ins.items():
        layer = model.get_submodule(name)
        deviation = fan_in**-0.5 if init == "fan_in" else 0.02
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05), name
        assert not layer.bias.any(), name
    for name in ("decoder.proj", "decoder.blocks.0.mlp.fc1", "decoder.pred"):
        weight = model.get_submodule(name).weight
        assert weight.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize("patch_size", [8, 16])
def test_smaller_patches_are_predicted_and_put_back(patch_size: int) -> None:
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], engine="patch", patch_size=patch_size)
    images = torch.randn(2, 3, 3 * patch_size, 4 * patch_size)
    out = model(images)
    assert (out.pred.shape, out.mask.shape) == ((2, 3 * patch_size**2, 3, 4), (2, 3, 4))
    assert torch.equal(to_pixels(patchify(images, patch_size), images, False), images)
    assert model(images, out.mask).loss == reconstruction_loss(out.pred, images, out.mask, True)
