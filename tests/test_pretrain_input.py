"""Mistakes in the input of pretraining: one line, exit 2, nothing written."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from fcmae.config.pretraining import AugmentConfig, PretrainConfig
from fcmae.config.training import OptimConfig
from fcmae.train.pretraining import pretrain
from fcmae.train.processes import World
from sparse import available_engines
from sparse.errors import InputError, RunError
from tests.cli import metrics
from tests.conftest import write_pictures

SMALL = {
    "depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "img_size": 64, "batch_size": 8, "epochs": 1,
    "workers": 0, "engine": "patch", "log_steps": 1,
}  # fmt: skip


def config(data, out, **changes):
    return PretrainConfig(data=str(data), out=str(out), **{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio 0"),
        ({"mask_ratio": 1.0}, "mask_ratio 1"),
        ({"mask_ratio": 0.9}, "try"),
        ({"model": "atoo", "depths": None, "dims": None}, "did you mean atto"),
        ({"depths": [1, 2]}, "four positive integers"),
        ({"batch_size": 9, "accumulate": 2}, "nearest are 8 and 10"),
        ({"device": "cuda:7"}, "CUDA devices; use cpu"),
        ({"device": "gpu"}, "use auto, cpu, cuda"),
        ({"device": "meta"}, "use auto, cpu, cuda"),
        ({"device": "cuda:x"}, "use auto, cpu, cuda"),
        ({"init_from": "nowhere.pth"}, "nowhere.pth"),
        ({"resume": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings(pictures, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        pretrain(config(pictures, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("img_size", [100, 0, [64, 70], [64]])
def test_sizes_that_are_not_multiples_of_32(img_size):
    with pytest.raises(InputError, match="img_size"):
        config("data", "out", img_size=img_size)


def test_data_that_is_missing_or_empty(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        pretrain(config(tmp_path / "nowhere", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        pretrain(config(tmp_path / "empty", tmp_path / "run"))


def test_an_out_folder_that_is_not_a_run(pictures, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds 'a.txt', which is not a run"):
        pretrain(config(pictures, tmp_path / "letters"))
    with pytest.raises(InputError, match="is a file"):
        pretrain(config(pictures, tmp_path / "letters" / "a.txt"))


def test_unreadable_images_are_skipped_and_named(tmp_path):
    data = write_pictures(tmp_path / "data", 39)
    (data / "broken.png").write_bytes(b"\x89PNG nothing")
    assert pretrain(config(data, tmp_path / "run")) == 0
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["broken.png"]
    assert json.loads(lines[0])["reason"]


def test_too_many_unreadable_images_stop_the_run(tmp_path):
    data = write_pictures(tmp_path / "data", 20)
    for i in range(4):
        (data / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"of 24 images could not be read, more than max_bad = 5%"):
        pretrain(config(data, tmp_path / "run"))


def test_a_folder_smaller_than_the_batch_cycles(tmp_path, caplog):
    data = write_pictures(tmp_path / "data", 3)
    assert pretrain(config(data, tmp_path / "run", epochs=2)) == 0
    assert [step for step, _ in metrics(tmp_path / "run")] == [1, 2]
    assert "3 images are fewer than batch_size 8" in caplog.text


@pytest.mark.parametrize(("save", "log"), [(1, 1), (1, 50), (3, 50)])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(
    pictures, tmp_path, save, log
):
    """Even if nothing is due to be logged or saved at that step."""
    wild = config(
        pictures, tmp_path, epochs=40, checkpoint_steps=save, log_steps=log,
        optim=OptimConfig(base_lr=1e30),
    )  # fmt: skip
    with pytest.raises(RunError, match="not finite at step") as error:
        pretrain(wild)
    step = int(str(error.value).split("at step ")[1].split()[0])
    good = (step - 1) // save * save
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
    assert max(saved, default=None) == (f"step-{good:08d}" if good else None)
    assert all(map(math.isfinite, (loss for _, loss in metrics(tmp_path))))


def test_held_out_images_give_a_loss_and_figures(tmp_path):
    data = write_pictures(tmp_path / "data", 500, size=40)
    run = config(data, tmp_path / "run", batch_size=250, epochs=2, picture_epochs=2, holdout=8)
    assert pretrain(run) == 0
    held = metrics(tmp_path / "run", "holdout_loss")
    assert [step for step, _ in held] == [4]  # 492 images: 2 steps an epoch; the second epoch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    assert {"loss", "lr", "holdout_loss", "images_per_s"} <= set(events.Tags()["scalars"])
    picture = events.Images("reconstructions")[0]
    assert (picture.step, picture.width, picture.height) == (4, 4 * 132 - 4, 18 + 8 * 132 - 4)


@pytest.mark.parametrize(("chans", "mode"), [(1, "L"), (4, "RGBA")])
def test_other_channels_and_rectangles(tmp_path, chans, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 4), dtype=np.uint8)
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.fromarray(np.roll(pixels, i, 0)).convert(mode).save(tmp_path / "data" / f"{i}.png")
    run = config(tmp_path / "data", tmp_path / "run", in_chans=chans, img_size=[64, 96],
                 batch_size=4)  # fmt: skip
    run.augment.mean = run.augment.std = "data"
    assert pretrain(run) == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'exported'}", pretrained=True)
    assert loaded.pretrained_cfg["input_size"] == [chans, 64, 96]
    assert loaded.forward_features(torch.zeros(1, chans, 64, 96)).shape == (1, 32, 2, 3)


def test_init_from_a_timm_file(pictures, tmp_path):
    """The encoder starts from given weights; three channels are adapted to one."""
    source = timm.create_model("convnextv2_atto", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    run = config(pictures, tmp_path / "run", depths=None, dims=None, in_chans=1, img_size=64,
                 init_from=str(tmp_path / "w.pth"), optim=OptimConfig(base_lr=1e-12))  # fmt: skip
    assert pretrain(run) == 0
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'exported'}", pretrained=True)
    stem = source.stem[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(loaded.stem[0].weight, stem, atol=1e-6, rtol=1e-5)
    block = "stages.2.blocks.3.mlp.fc1.weight"
    torch.testing.assert_close(loaded.state_dict()[block], source.state_dict()[block])
    with pytest.raises(InputError, match="init_from"):
        pretrain(config(pictures, tmp_path / "other", init_from=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("engine", ["dense", "patch", "minkowski"])
def test_bf16_autocast_keeps_float32_weights(pictures, tmp_path, engine):
    if engine not in available_engines():
        pytest.skip("MinkowskiEngine is not installed")
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        assert pretrain(config(pictures, out, engine=engine, precision=precision)) == 0
        losses[precision] = [loss for _, loss in metrics(out)]
        saved = load_file(max((out / "checkpoints").iterdir()) / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.01)
    assert losses["bf16"] != losses["fp32"]


def test_fast_decode_changes_pixels_slightly(tmp_path):
    """On images much larger than the crop; the loss changes slightly too."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((600, 600), Image.Resampling.BICUBIC)
        (tmp_path / "data").mkdir(exist_ok=True)
        image.save(tmp_path / "data" / f"{i}.jpg")
    losses = []
    for fast in (False, True):
        run = config(tmp_path / "data", tmp_path / str(fast))
        run.augment.fast_decode = fast
        assert pretrain(run) == 0
        losses.append(metrics(tmp_path / str(fast))[0][1])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("able", [True, False])
def test_a_cpu_with_fast_bf16_is_pointed_out(pictures, tmp_path, caplog, monkeypatch, able):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able}, raising=False)
    assert pretrain(config(pictures, tmp_path)) == 0
    assert ("--precision bf16 is faster" in caplog.text) == able


def broken_pictures(folder, pictures, count):
    """Float images whose pixels overflow float32 when normalised, among good ones."""
    shutil.copytree(pictures, folder)
    for i in range(count):
        pixels = np.full((80, 80), 3e38, np.float32)
        Image.fromarray(pixels).save(folder / f"huge{i}.tif")
    return folder


def test_a_batch_that_is_not_finite_is_named_and_may_be_skipped(pictures, tmp_path, caplog):
    data = broken_pictures(tmp_path / "data", pictures, 1)
    out = tmp_path / "run"
    settings = config(data, out, epochs=3, checkpoint_steps=1, augment=AugmentConfig(std=[0.1] * 3))
    with pytest.raises(RunError, match="resume with --nonfinite skip"):
        pretrain(settings)
    (first,) = nonfinite(out)
    assert "huge0.tif" in first["paths"]
    assert len(first["paths"]) == 8
    done = first["step"] - 1
    assert [path.name for path in (out / "checkpoints").glob(f"step-{done:08d}")]

    assert pretrain(replace(settings, nonfinite="skip")) == 0
    skipped = [entry["step"] for entry in nonfinite(out)][1:]
    assert len(skipped) >= 3  # once an epoch, and again where it fills a last batch
    assert "update skipped: 3 of at most 10" in caplog.text
    logged = metrics(out)
    assert not {step for step, _ in logged} & set(skipped)
    assert all(math.isfinite(loss) for _, loss in logged)
    state = load_file(out / "exported" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_too_many_skipped_updates_stop_the_run(pictures, tmp_path):
    data = broken_pictures(tmp_path / "data", pictures, 1)
    settings = config(
        data, tmp_path / "run", epochs=9, nonfinite="skip", max_nonfinite=2,
        augment=AugmentConfig(std=[0.1] * 3),
    )  # fmt: skip
    with pytest.raises(RunError, match="max_nonfinite 2 were skipped already"):
        pretrain(settings)
    assert len(nonfinite(tmp_path / "run")) == 3


def nonfinite(out):
    return [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]


def test_holding_everything_out_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("fcmae.train.pretraining.FEWEST_TO_HOLD_OUT", 6)
    data = write_pictures(tmp_path / "data", 8)
    with pytest.raises(InputError, match="holdout 8 leaves none of 8 images to train on: use 32"):
        pretrain(config(data, tmp_path / "run", holdout=8))


def test_processes_that_disagree_do_not_start(pictures, tmp_path, monkeypatch):
    """As if a second process, on another machine, had found other files or had another seed."""
    for name, there, said in (
        ("a number of images (list 1) of", 23, r"has a number of images \(list 1\) of 23 and proc"),
        (
            "names of images (list 1) with the SHA-256",
            "0",
            r"has names of .*SHA-256 '0' and process",
        ),
        ("seed", 1, "^process 1 on far has seed 1 and process 0 on .* 0: all must be given the sa"),
    ):

        def gather(_, item, name=name, there=there):
            host, shared = item
            assert name in shared
            return [(host, shared), ("far", shared | {name: there})]

        monkeypatch.setattr(World, "gather", gather)
        with pytest.raises(InputError, match=said):
            pretrain(config(pictures, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
