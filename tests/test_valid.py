"""Pixels without a value in pretraining: masks, targets, loss, gradients, whole runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fcmae import FCMAE
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.evaluation import EvalDataset, each_batch, held_out
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset
from fcmae.data.sample import collate, normalise
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.reconstructing import LIGHT, reconstruct_batch
from fcmae.model.loss import patch_statistics, patchify, reconstruction_loss, to_pixels
from fcmae.model.mask import keep_count, pixels_of, random_mask, usable_patches
from sparse import available_engines
from tests.cli import TINY, kill_all, reaped, run, start, wait_for_steps, weights
from tests.test_rasters import write_map

SMALL: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "decoder_dim": 16}


def ragged(seed: int = 0, size: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (4, 3, size, size), masks and which pixels count: all, half, few, none."""
    random = np.random.default_rng(seed)
    valid = np.ones((4, size, size), np.bool_)
    valid[1] = np.add.outer(np.arange(size), np.arange(size)) > size
    valid[2, 40:] = valid[2, :, 20:] = False
    valid[3] = False
    grid = size // 32, size // 32
    masks = []
    for n, pixels in enumerate(valid):
        usable = usable_patches(pixels, 32, 0.5)
        pixels &= pixels_of(usable, 32)
        masks.append(random_mask(0, 0, n, grid, 0.6, usable=usable))
    images = torch.from_numpy(random.normal(size=(4, 3, size, size)).astype(np.float32))
    return images, torch.from_numpy(np.stack(masks)), torch.from_numpy(valid)


def test_of_the_patches_with_values_a_share_stays_visible():
    valid = np.zeros((224, 224), np.bool_)
    valid[:100] = True
    usable = usable_patches(valid, 32, 0.5)
    assert usable.tolist() == [[True] * 7] * 3 + [[False] * 7] * 4  # 3.1 rows of patches
    assert usable_patches(valid, 32, 0.0).sum() == 28
    assert usable_patches(valid, 32, 1.0).sum() == 21
    for index in range(20):
        mask = random_mask(0, 1, index, (7, 7), 0.6, usable=usable)
        assert (~mask).sum() == keep_count(21, 0.6) == 8
        assert mask[~usable].all()
        every = random_mask(0, 1, index, (7, 7), 0.6, usable=np.ones((7, 7), np.bool_))
        assert np.array_equal(every, random_mask(0, 1, index, (7, 7), 0.6))


def test_the_loss_is_the_mean_over_what_counts_by_hand():
    images, masks, valid = ragged()
    pred = torch.randn(4, 3072, 4, 4, generator=torch.Generator().manual_seed(1))
    per_image = []
    for n in range(4):
        errors = []
        for y, x in masks[n].nonzero().tolist():
            rows, columns = slice(32 * y, 32 * y + 32), slice(32 * x, 32 * x + 32)
            counts = valid[n, rows, columns].flatten()
            if not counts.any():
                continue
            patch = images[n, :, rows, columns].permute(1, 2, 0).reshape(1024, 3)[counts]
            target = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
            guess = pred[n, :, y, x].reshape(1024, 3)[counts]
            errors.append((guess - target).square().mean())
        per_image.append(torch.stack(errors).mean() if errors else torch.zeros(()))
    loss = reconstruction_loss(pred, images, masks, True, valid)
    assert torch.allclose(loss, torch.stack(per_image).mean(), rtol=1e-5)
    assert per_image[3] == 0
    halves = [
        reconstruction_loss(pred[p], images[p], masks[p], True, valid[p])
        for p in (slice(0, 2), slice(2, 4))
    ]
    assert torch.allclose(loss, torch.stack(halves).mean(), rtol=1e-6)


def test_where_all_counts_the_loss_is_as_without():
    images, masks, _ = ragged()
    masks[:] = masks[:1]
    pred, valid = torch.randn(4, 3072, 4, 4), torch.ones(4, 128, 128, dtype=torch.bool)
    for norm_pix in (False, True):
        plain = reconstruction_loss(pred, images, masks, norm_pix)
        assert torch.allclose(reconstruction_loss(pred, images, masks, norm_pix, valid), plain)
        drawn = to_pixels(pred, images, norm_pix)
        assert torch.allclose(to_pixels(pred, images, norm_pix, valid), drawn, atol=1e-5)
    target = patchify(images)
    for one, other in zip(
        patch_statistics(target), patch_statistics(target, torch.ones_like(target)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_what_is_stored_in_pixels_that_do_not_count_changes_nothing(garbage):
    images, masks, valid = ragged()
    model, results = FCMAE.from_size("atto", engine="patch", **SMALL), []
    for value in (0.0, garbage):
        given = images.masked_fill(~valid[:, None], value).requires_grad_()
        model.zero_grad()
        out = model(given, masks, valid=valid)
        out.loss.backward()
        assert given.grad is not None
        assert not given.grad.masked_select(~valid[:, None]).any()
        assert given.grad.masked_select(valid[:, None]).any()
        results.append([out.loss, out.pred, given.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert torch.isfinite(results[0][0])


@pytest.mark.parametrize("engine", available_engines())
@pytest.mark.parametrize("patch_size", [32, 16])
def test_engines_agree_on_batches_with_different_numbers_of_patches(engine, patch_size):
    images, masks, valid = ragged()
    masks = masks if patch_size == 32 else masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    results = []
    for name in ("dense", engine):
        torch.manual_seed(0)
        model = FCMAE.from_size("atto", engine=name, patch_size=patch_size, **SMALL)
        given = images.clone().requires_grad_()
        out = model(given, masks, valid=valid)
        out.loss.backward()
        results.append([out.loss, out.pred, given.grad, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1, one.abs().max())


def test_a_batch_says_what_counts_only_if_a_sample_does(tmp_path):
    random = np.random.default_rng(0)
    for n in range(3):
        pixels = random.integers(1, 256, (3, 96, 96), np.uint8)
        mask = np.ones((96, 96), np.bool_)
        mask[: 30 * n] = False
        write_map(tmp_path / f"{n}.tif", pixels, mask if n else None)
    config = PretrainConfig(str(tmp_path), "", img_size=64, mask_ratio=0.5)
    images = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    dataset = PretrainDataset(Split(find_images(str(tmp_path))), images, config)
    samples = [dataset[0, n] for n in range(3)]
    assert samples[0].valid is None
    assert collate(samples[:1]).valid is None
    batch = collate(samples)
    assert batch.valid is not None
    assert batch.valid[0].all()
    assert not batch.valid[2].all()
    filled = normalise(batch.images, images.mean, images.std, "cpu", batch.valid)
    assert not filled.masked_select(~batch.valid[:, None]).any()


def test_crops_with_few_values_are_drawn_again(tmp_path):
    pixels = np.full((3, 300, 300), 200, np.uint8)
    mask = np.zeros((300, 300), np.bool_)
    mask[200:, 200:] = True
    write_map(tmp_path / "a.tif", pixels, mask)
    write_map(tmp_path / "b.tif", pixels, np.zeros((300, 300), np.bool_))
    config = PretrainConfig(str(tmp_path), "", img_size=64, window=64)
    images = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    dataset = PretrainDataset(Split(find_images(str(tmp_path))), images, config)
    shares = [sample.valid.mean() for sample in (dataset[epoch, 0] for epoch in range(12))
              if sample.valid is not None]  # fmt: skip
    assert min(shares) >= 0.25
    assert np.mean(shares) > 0.4  # of a window drawn once, 0.11
    replaced = dataset[0, 1]
    assert replaced.index == 0
    ((name, reason),) = replaced.bad
    assert name == "b.tif"
    assert reason.startswith("none of 32 crops has enough pixels with a value: lower --min_valid")


def test_of_any_share_a_crop_without_a_value_is_drawn_again(tmp_path):
    mask = np.zeros((300, 300), np.bool_)
    mask[200:, 200:] = True
    write_map(tmp_path / "a.tif", np.full((3, 300, 300), 200, np.uint8), mask)
    config = PretrainConfig(str(tmp_path), "", img_size=64, window=64, min_valid=0)
    images = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3)
    dataset = PretrainDataset(Split(find_images(str(tmp_path))), images, config)
    found = [dataset[epoch, 0] for epoch in range(12)]
    assert not any(sample.bad for sample in found)
    assert all(sample.valid is None or sample.valid.any() for sample in found)


def test_held_out_images_without_a_value_do_not_count(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, (3, 64, 64), np.uint8)
    for n in range(3):
        write_map(tmp_path / f"{n}.tif", pixels, np.full((64, 64), n != 1))
    split = Split(find_images(str(tmp_path)))
    images = Preprocessing((64, 64), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    ((batch, normal),) = each_batch(EvalDataset(split, images), torch.device("cpu"), 3, 0)
    kept, masks, valid = held_out(split.source, batch, normal, 0.6, 0)
    assert torch.equal(kept, normal[[0, 2]])
    assert (len(masks), len(valid)) == (2, 2)
    assert valid.all()


def test_pixels_without_a_value_are_drawn_as_such():
    images, masks, valid = ragged()
    model = FCMAE.from_size("atto", engine="patch", **SMALL)
    how = Preprocessing((128, 128), (0.5,) * 3, (0.25,) * 3)
    columns, loss = reconstruct_batch(model, images, masks, how, valid)
    for column in columns.values():
        void = column.masked_select(~valid[:, None])
        assert torch.allclose(void, torch.full_like(void, LIGHT))
    seen = valid & ~masks.repeat_interleave(32, 1).repeat_interleave(32, 2)
    pixels = columns["reconstruction"].masked_select(seen[:, None])
    assert torch.equal(pixels, columns["original"].masked_select(seen[:, None]))
    assert loss > 0


def write_garbage(folder: Path, garbage: int) -> Path:
    folder.mkdir()
    for n in range(12):
        random = np.random.default_rng(n)
        pixels = random.integers(1, 256, (3, 80, 96), np.uint8)
        mask = np.ones((80, 96), np.bool_)
        mask[:, : 4 * n] = False
        pixels[:, ~mask] = garbage
        write_map(folder / f"{n:02}.tif", pixels, mask)
    return folder


@pytest.mark.slow
def test_runs_do_not_depend_on_garbage_and_resume(tmp_path):
    """Nor on processes that read; a killed run equals one that was never stopped."""
    options = [*TINY, "--epochs", 8, "--augment.mean", "data", "--augment.std", "data"]
    clean, dirty = (write_garbage(tmp_path / str(value), value) for value in (0, 211))
    run("pretrain", "--data", clean, "--out", tmp_path / "run", *options)
    command = ["pretrain", "--data", dirty, "--out", tmp_path / "killed", *options]
    with reaped():
        process = start(*command)
        wait_for_steps(tmp_path / "killed", 6, process)
        kill_all(process)
    run(*command, "--workers", 2)
    assert weights(tmp_path / "run") == weights(tmp_path / "killed")
