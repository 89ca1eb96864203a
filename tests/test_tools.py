"""doctor and its forecasts, bench, reconstruct, and a model for every shipped config."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fcmae import FCMAE
from fcmae.commands.bench import BenchConfig
from fcmae.commands.doctor import DoctorConfig
from fcmae.commands.reconstruct import ReconstructConfig
from fcmae.config.parsing import parse
from fcmae.config.pretraining import DecoderConfig, PretrainConfig
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.benchmark import bench
from fcmae.inspect.diagnosis import doctor
from fcmae.inspect.memory import Live, forecast
from fcmae.inspect.parity import parity
from fcmae.inspect.reconstructing import MEANS, grid, reconstruct, reconstruct_batch
from fcmae.inspect.steps import WHOLE, example, macs, peak_memory, visible_share
from fcmae.train.pretraining import pretrain
from finetune.config import FinetuneConfig
from finetune.model import V2, timm_name
from sparse import available_engines
from sparse.errors import InputError
from sparse.sizes import resolve_size
from tests.conftest import write_pictures
from tests.test_rasters import write_map

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = PretrainConfig(
        data=str(pictures), out=str(out), depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], img_size=96,
        epochs=1, batch_size=8, decoder=DecoderConfig(dim=16), workers=0,
    )  # fmt: skip
    assert pretrain(config) == 0
    return out


def test_reconstruct_draws_a_row_per_image(run, pictures, tmp_path):
    out = tmp_path / "deep" / "picture.png"
    loss = reconstruct(ReconstructConfig(str(run), str(pictures), str(out), count=3))
    assert 0.5 < loss < 1.5
    with Image.open(out) as picture:
        assert picture.size == (4 * 100 - 4, 18 + 3 * 100 - 4)
        pixels = np.asarray(picture).astype(int)
    masked = pixels[18:114, 100:196]
    hidden = (masked == 128).all(2) | (masked == 127).all(2)
    assert hidden.sum() == 6 * 32 * 32  # 3 of 9 patches are visible
    original, means, drawn = pixels[18:114, :96], pixels[18:114, 200:296], pixels[18:114, 300:396]
    for column in (means, drawn):
        assert np.array_equal(original[~hidden], column[~hidden])
    again = tmp_path / "again.png"
    reconstruct(ReconstructConfig(str(run), str(pictures), str(again), count=3))
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "nowhere"}, "nowhere"),
        ({"out": "picture.jpg"}, "must be a file ending in .png"),
        ({"images": "nowhere"}, "nowhere"),
    ],
)
def test_reconstruct_refuses(run, pictures, tmp_path, change, message):
    config = {"run": str(run), "images": str(pictures), "out": str(tmp_path / "p.png"), **change}
    with pytest.raises(InputError, match=message):
        reconstruct(ReconstructConfig(**config))


def test_an_input_image_is_not_overwritten(run, tmp_path):
    data = write_pictures(tmp_path / "data", 2)
    before = (data / "0001.png").read_bytes()
    with pytest.raises(InputError, match="is one of the images: give another file"):
        reconstruct(ReconstructConfig(str(run), str(data), str(data / "0001.png")))
    assert (data / "0001.png").read_bytes() == before


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.03), (0.0, 1500.0), (-3.0, 3.0)])
def test_dim_and_wide_images_are_stretched(low, high):
    """Display of 16-bit images, which use little of their range, and of unusual floats."""
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], engine="dense", decoder_dim=8)
    images = torch.linspace(low, high, 3 * 64 * 64).view(1, 3, 64, 64)
    mask = torch.tensor([[[True, False], [True, False]]])
    columns, _ = reconstruct_batch(
        model, images, mask, Preprocessing((64, 64), (0.0,) * 3, (1.0,) * 3)
    )
    unit = (images - low) / (high - low)
    torch.testing.assert_close(
        columns["original"], ((unit - 0.01) / 0.98).clamp(0, 1), rtol=0, atol=1e-3
    )


def test_a_perfect_prediction_is_the_image(monkeypatch):
    """Normalised patches are converted back to pixel values."""
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], engine="dense", decoder_dim=8)
    images = torch.rand(2, 3, 64, 64)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    scale, shift = torch.tensor(std).view(1, 3, 1, 1), torch.tensor(mean).view(1, 3, 1, 1)
    normalised = (images - shift) / scale

    def perfect(features, mask):
        from fcmae.model.loss import patch_statistics, patchify

        patches = patchify(normalised)
        middle, deviation = patch_statistics(patches)
        return (patches - middle) / deviation

    monkeypatch.setattr(model.decoder, "forward", perfect)
    mask = torch.tensor([[[True, False], [False, True]]] * 2)
    columns, loss = reconstruct_batch(
        model, normalised, mask, Preprocessing((64, 64), tuple(mean), tuple(std))
    )
    assert list(columns) == ["original", "masked", MEANS, "reconstruction"]
    assert loss == pytest.approx(0, abs=1e-6)
    original, masked, means, reconstruction = columns.values()
    for column in (original, reconstruction):
        torch.testing.assert_close(column, images)
    # One mean for all channels of a normalised patch.
    middle = normalised[:, :, :32, :32].mean(dim=(1, 2, 3)).view(2, 1, 1, 1) * scale + shift
    torch.testing.assert_close(means[:, :, :32, :32], middle.clamp(0, 1).expand(2, 3, 32, 32))
    torch.testing.assert_close(means[:, :, :32, 32:], images[:, :, :32, 32:])
    assert (masked[:, :, :32, :32] == 0.5).all()
    assert torch.equal(masked[:, :, :32, 32:], original[:, :, :32, 32:])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_shown(channels):
    """Columns of 64 pixels are drawn twice as large to fit their headings."""

    def columns(images):
        return dict.fromkeys("abcd", images)

    assert grid(columns(torch.rand(2, channels, 32, 64))).shape == (18 + 2 * 68 - 4, 4 * 132 - 4, 3)
    assert grid(columns(torch.rand(1, channels, 64, 96))).shape == (18 + 64, 4 * 100 - 4, 3)


def test_grey_images_stay_grey_and_plain_pixels_need_no_means():
    """With ImageNet's mean and deviation a patch's one mean would be orange."""
    grey = torch.rand(1, 1, 64, 64).expand(1, 3, 64, 64)
    both = torch.cat([grey, torch.rand(1, 3, 64, 64)])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    how = Preprocessing((64, 64), mean, std)
    images = (both - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    mask = torch.tensor([[[True, False], [False, True]]] * 2)
    model = FCMAE.from_size("atto", depths=[1, 1, 1, 1], engine="dense", decoder_dim=8)
    columns, _ = reconstruct_batch(model, images, mask, how)
    for column in columns.values():
        spread = column.amax(1) - column.amin(1)
        assert spread[0].max() < 1e-6
        assert spread[1].max() > 0.05
    model.norm_pix_loss = False
    columns, _ = reconstruct_batch(model, images, mask, how)
    assert list(columns) == ["original", "masked", "reconstruction"]


def test_doctor_finds_that_the_engines_agree_and_what_fits(capsys):
    assert doctor(DoctorConfig(models=["atto"], img_size=96)) == 0
    shown = capsys.readouterr().out
    assert "DISAGREES" not in shown
    assert all(engine in shown for engine in available_engines())
    needs = forecast("atto", 96, torch.device("cpu"), "fp32")
    found = re.findall(r"in all, batch (8|32|128)\D+(\d+)", shown)
    assert found == [(f"{b}", f"{needs.total(b) / 1e6:.0f}") for b in (8, 32, 128)]


def test_doctor_looks_at_images(tmp_path, capsys):
    write_pictures(tmp_path / "a", 5, size=70)
    write_map(tmp_path / "a" / "map.tif", np.full((3, 70, 70), 9, np.uint8))
    config = DoctorConfig(models=["atto"], img_size=96, data=str(tmp_path / "a"))
    assert doctor(config) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "6 images a sample of images: 5 PNG, 3 bands of 8 bits; 1 GTiff, 3 bands of" in said
    assert re.search(
        r"70×70 to 70×86 pixels, .* each one worker reads about .* atto trains on about ", said
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": ["ato"]}, "did you mean"),
        ({"img_size": 32}, "single patch"),
        ({"device": "cuda:7"}, "not one of"),
    ],
)
def test_doctor_refuses(change, message, capsys):
    with pytest.raises(InputError, match=message):
        doctor(DoctorConfig(**change))
    assert capsys.readouterr().out == ""


def test_the_forecast_counts_what_a_backward_pass_needs():
    """Against the tensors that autograd really saves, and for parameters, against an optimizer."""
    needs = forecast("atto", 96, torch.device("cpu"), "fp32")
    model = FCMAE.from_size("atto", engine="patch")
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    images, mask = example(BenchConfig(batch_size=4, img_size=96), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images, mask).loss
    activations = needs.total(4) - needs.total(0) + needs.fixed
    assert sum(saved.values()) + images.nbytes < activations < 1.4 * sum(saved.values())
    loss.backward()
    optimizer.step()
    averages = [
        state[f"exp_avg{kind}"] for state in optimizer.state.values() for kind in ("", "_sq")
    ]
    grads = [p.grad for p in model.parameters()]
    kept = sum(tensor.nbytes for tensor in [*model.parameters(), *grads, *averages])
    assert needs.total(0) - needs.fixed == kept


def test_live_counts_storages_once_and_until_they_are_freed():
    with Live([]) as live:
        first = torch.ones(100)
        view = first.view(10, 10)[2:]
        del first
        second = torch.ones(50)
        del view
        third = torch.ones(120)
    assert live.peak == 4 * (50 + 120)
    assert len(second) + len(third) == 170


@pytest.mark.slow
@pytest.mark.parametrize(("model", "batches"), [("atto", (8, 32)), ("tiny", (8, 24))])
def test_the_forecast_is_within_a_fifth_of_what_was_measured(model, batches):
    needs = forecast(model, 224, torch.device("cpu"), "fp32")
    for batch in batches:
        peak = peak_memory(f"patch{WHOLE}", model, BenchConfig(batch_size=batch))
        if peak is None:
            pytest.skip("only Linux tells")
        images = 4 * batch * 3 * 224**2
        measured = 2**20 * peak + 3 * needs.weights + images  # what was there before the step
        assert 0.8 < needs.total(batch) / measured < 1.2


def test_doctor_notices_an_engine_that_disagrees(monkeypatch):
    from sparse.ops.windows import Windows

    right = Windows.correlation
    monkeypatch.setattr(Windows, "correlation", lambda *a: 1.001 * right(*a))
    images, mask = torch.randn(2, 3, 64, 64), torch.tensor([[[True, False], [False, True]]] * 2)
    assert parity("patch", images, mask) > 5e-4


@pytest.mark.slow
def test_bench_prints_one_json_object(capsys):
    result = bench(BenchConfig(json=True, batch_size=2, img_size=64, rounds=1))
    assert json.loads(capsys.readouterr().out) == result
    rows = result["models"]["atto"]
    others = {"timm, unmasked", "patch, bf16", "patch, whole step"}
    assert set(rows) == {*available_engines(), *others}
    assert rows["dense"]["times_dense"] == 1
    ratio = rows["patch"]["images_per_s"] / rows["dense"]["images_per_s"]
    assert result["ratios"]["atto"]["patch ÷ dense"] == ratio
    for row in rows.values():
        assert row["images_per_s"] > 0
        assert row["peak_mb"] > 0
    assert result["settings"]["visible_share"] == visible_share(BenchConfig(img_size=64)) == 0.25


@pytest.mark.parametrize(("model", "published"), [("atto", 0.55e9), ("tiny", 4.47e9)])
def test_macs_equal_the_published_ones(model, published):
    assert macs(model, (224, 224)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=str)
def test_every_config_builds_its_model(path, tmp_path):
    text = path.read_text() + "\ndata: photos\nout: run\n"
    (tmp_path / "c.yaml").write_text(text)
    with torch.device("meta"):
        if path.parent.name == "pretrain":
            config = parse(PretrainConfig, ["--config", str(tmp_path / "c.yaml")], "")
            size = resolve_size(config.model, config.depths, config.dims)
            model = FCMAE.from_size(
                config.model, config.depths, config.dims, in_chans=config.in_chans, engine="patch",
                decoder_dim=config.decoder.dim, decoder_depth=config.decoder.depth,
            )  # fmt: skip
            assert model.encoder.dims == size.dims
        else:
            tuned = parse(FinetuneConfig, ["--config", str(tmp_path / "c.yaml")], "")
            name = timm_name(tuned.model or "atto")
            net = timm.create_model(name, drop_path_rate=tuned.drop_path)
            if name.startswith(V2):  # test_recipes.py checks those of the first paper
                assert net.num_features == resolve_size(name).dims[-1]
