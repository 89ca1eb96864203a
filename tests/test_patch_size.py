"""Patches of 8 and 16 pixels, from pretraining to a fine-tuned model."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fcmae.weights.export import create_model
from fcmae.weights.load import adapt_patch_size, load_backbone
from sparse import SparseConvNeXtV2
from sparse.convert import to_timm
from sparse.errors import InputError
from tests.cli import TINY, metrics, run, weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[8, 16])
def pretrained(request, tmp_path_factory, pictures) -> tuple[int, Path]:
    """The size of the patches and a finished run on crops of 64 pixels; read-only."""
    out = tmp_path_factory.mktemp("small") / "run"
    run("pretrain", pictures, "--out", out, *TINY, "--epochs", 2, "--patch_size", request.param)
    return request.param, out


def test_a_run_shows_how_many_patches_it_has(pretrained):
    patch, out = pretrained
    count = (64 // patch) ** 2
    assert f"{int(count * 0.4)} of {count} patches are visible" in (out / "train.log").read_text()
    assert metrics(out)[-1][1] < metrics(out)[0][1]


def test_engines_give_the_same_losses(pretrained, pictures, tmp_path):
    patch, out = pretrained
    common = [*TINY, "--epochs", 2, "--patch_size", patch, "--engine", "dense"]
    run("pretrain", pictures, "--out", tmp_path / "dense", *common)
    np.testing.assert_allclose(
        [loss for _, loss in metrics(tmp_path / "dense")], [loss for _, loss in metrics(out)], 1e-4
    )


@pytest.mark.parametrize("patch", [8, 16])
@torch.no_grad()
def test_timms_model_computes_what_the_encoder_does(patch):
    """With a stem of stride 2, without the layer that timm adds."""
    encoder = SparseConvNeXtV2((1, 1, 2, 1), (8, 16, 24, 32), engine="patch", patch_size=patch)
    for parameter in encoder.parameters():
        parameter.normal_(0, 0.2)
    images = torch.randn(2, 3, 3 * patch, 2 * patch)
    expected = encoder(images, torch.zeros(2, 3, 2, dtype=torch.bool))
    sizes = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "patch_size": patch // 8}
    model = create_model("convnextv2_tiny", num_classes=0, **sizes).eval()
    missing, unexpected = model.load_state_dict(to_timm(encoder.state_dict()), strict=False)
    assert all(name.startswith("head.") for name in missing)
    assert unexpected == []
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_exported_weights_load_in_timm_and_here(pretrained, pictures, tmp_path):
    patch, out = pretrained
    config = json.loads((out / "exported" / "config.json").read_text())
    assert config["model_args"]["patch_size"] == patch // 8
    backbone = load_backbone(str(out / "exported"), CPU)
    assert backbone.encoder.patch_size == patch
    if patch == 8:
        model = timm.create_model(f"local-dir:{out / 'exported'}", pretrained=True)
        assert model.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 32, 8, 8)
    run("reconstruct", out, "--images", pictures, "--out", tmp_path / "picture.png")
    run("diversity", out, "--images", pictures, "--maps", tmp_path / "maps.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@pytest.mark.slow
def test_fine_tuning_predicting_and_exporting(pretrained, classes, tmp_path):
    _, out = pretrained
    common = ["--epochs", 1, "--batch_size", 8, "--workers", 0, "--img_size", 32]
    run("finetune", classes, "--weights", out, "--out", tmp_path / "run", *common)
    assert weights(tmp_path / "run") != b""
    said = run("evaluate", tmp_path / "run", "--data", classes, "--json").stdout
    assert json.loads(said)["n"] == 12
    run("predict", tmp_path / "run", "--images", classes, "--out", tmp_path / "p.csv")
    run("export", tmp_path / "run", "--to", "pt2", "--out", tmp_path / "model.pt2")
    done = run("export", tmp_path / "run", "--to", "transformers", "--out", tmp_path / "t", code=2)
    assert "patch_size" in done.stderr


def test_masks_and_boxes_need_patches_of_32(pretrained):
    from finetune.backbone import start_on_features
    from finetune.model import find_model

    patch, out = pretrained
    start = find_model(None, str(out), 3)
    with pytest.raises(InputError, match=f"--patch_size {patch}: UPerNet needs strides of 4 to 32"):
        start_on_features(start, 3, 0.0, lambda *_: None, "UPerNet")


@pytest.mark.parametrize(("patch", "times"), [(16, 2), (8, 4)])
def test_a_stem_of_large_patches_sees_enlarged_images(patch, times):
    stem, images = torch.randn(5, 3, 4, 4), torch.randn(2, 3, 16, 8)
    enlarged = images.repeat_interleave(times, 2).repeat_interleave(times, 3)
    found = F.conv2d(images, adapt_patch_size(stem, patch), stride=patch // 8)
    torch.testing.assert_close(found, F.conv2d(enlarged, stem, stride=4), rtol=1e-4, atol=1e-4)
    small = torch.randn(5, 3, patch // 8, patch // 8)
    means = F.avg_pool2d(enlarged, times)
    again = F.conv2d(enlarged, adapt_patch_size(small, 32), stride=4)
    torch.testing.assert_close(
        again, F.conv2d(means, small, stride=patch // 8), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(adapt_patch_size(stem, 32), stem)


def test_weights_of_other_patches_start_a_run(pretrained, pictures, tmp_path):
    _, out = pretrained
    common = [*TINY, "--epochs", 1]
    run("pretrain", pictures, "--out", tmp_path / "run", *common, "--init_from", out / "exported")
    encoder = load_backbone(str(tmp_path / "run"), CPU).encoder
    assert encoder.patch_size == 32
    assert isinstance(encoder.stem[0], nn.Conv2d)
    assert encoder.stem[0].weight.shape[2:] == (4, 4)


def test_other_sizes_are_refused(pictures, tmp_path):
    for size, words in ((12, "patch_size 12 must be one of 32, 16 and 8"), (4, "at least 8")):
        done = run("pretrain", pictures, "--out", tmp_path, *TINY, "--patch_size", size, code=2)
        assert words in done.stderr
