"""Label curves and forecasts: against laws that are known, and the command; its controls."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.experiments import forecasts
from fcmae.cli import main
from fcmae.data.sample import Batch
from fcmae.inspect.histogram import BINS, SIDE, colours, gradients, histograms
from fcmae.inspect.label_curve import (
    Curve,
    fit,
    label_curve,
    order_of,
    print_curves,
    sizes_of,
    summary,
)
from fcmae.inspect.probing import CONTROLS, advice, probe
from sparse.errors import InputError
from tests.conftest import write_classes
from tests.test_probe import config, labelled, write_weights

SIZES = [10, 20, 50, 100, 200, 500, 1000]


def drawn(rng: np.random.Generator, b: float, c: float, images: int, sizes: list[int]) -> Curve:
    """Five sets of each size and one of all, each measured on `images` images."""
    true = b * np.array(sizes, float) ** -c
    errors = rng.binomial(images, true, (5, len(sizes))) / images
    errors[1:, -1] = np.nan
    return Curve(sizes, errors)


def test_a_law_without_noise_is_recovered() -> None:
    errors = np.tile(0.9 * np.array(SIZES, float) ** -0.3, (5, 1))
    law = fit(Curve(SIZES, errors))
    assert law is not None
    assert law.law == pytest.approx([np.log(0.9), 0.3])
    assert law.forecast(4000)[0] == pytest.approx(100 * (1 - 0.9 * 4000**-0.3))


@pytest.mark.parametrize(("b", "c"), [(0.9, 0.05), (1.5, 0.3), (1.0, 0.5)])
def test_intervals_hold_the_exponent_and_the_next_measurement(b: float, c: float) -> None:
    rng = np.random.default_rng(0)
    inside, widths = [], []
    for _ in range(200):
        law = fit(drawn(rng, b, c, 400, SIZES))
        assert law is not None
        z = (law.law[1] - c) / np.sqrt(law.covariance[1, 1])
        _, low, high = law.forecast(2000)
        measured = 100 * (1 - rng.binomial(400, b * 2000**-c) / 400)
        inside.append((abs(z) < 1.645, low <= measured <= high))
        widths.append(high - low)
    exponent, forecast = np.mean(inside, 0)
    assert exponent > 0.85
    assert forecast > 0.85
    assert np.median(widths) < 12


def test_an_interval_that_is_too_wide_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    errors = np.array([[0.9, 0.2, 0.7], [0.3, 0.8, np.nan]])
    found = summary(Curve([10, 20, 50], errors))
    assert [entry["certain"] for entry in found["forecast"]] == [False, False]
    assert [entry["labels"] for entry in found["forecast"]] == [100, 200]
    print_curves({"chance": 10.0, "one": found}, {"one": "first", "two": "second"})
    table = capsys.readouterr().out
    assert table.count("can't tell") == 2
    assert "40.0 (" in table
    assert "second" not in table


def test_no_error_at_all_is_forecast_to_stay() -> None:
    (forecast, _) = summary(Curve(SIZES, np.zeros((3, 7))))["forecast"]
    assert forecast["top1"] > 99.5
    assert forecast["high"] == 100


def test_two_sizes_give_no_forecast() -> None:
    found = summary(Curve([2, 4], np.array([[0.5, 0.25], [0.25, np.nan]])))
    assert (found["fit"], found["forecast"]) == (None, [])
    first, last = found["points"]
    assert (first["labels"], first["draws"], last["draws"]) == (2, 2, 1)
    assert (first["top1"], last["top1"]) == (62.5, 75)
    half = 1.644854 * 100 * np.std([0.5, 0.25], ddof=1)
    assert (first["low"], first["high"]) == pytest.approx((62.5 - half, 62.5 + half))
    assert last["low"] == pytest.approx(75 - half)


def test_sizes() -> None:
    assert sizes_of(3068, 10) == [10, 20, 50, 100, 200, 500, 1000, 2000, 3068]
    assert sizes_of(1000, 10) == [10, 20, 50, 100, 200, 500, 1000]
    assert sizes_of(6, 3) == [3, 6]
    with pytest.raises(InputError, match=r"at least two labels per class.*5 images of 3 classes"):
        sizes_of(5, 3)


def test_draws_are_stratified_and_repeatable() -> None:
    counts = np.array([300, 100, 40, 3])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), counts))
    orders = [order_of(labels, draw) for draw in range(3)]
    for order in orders:
        assert sorted(order) == list(range(443))
        assert sorted(labels[order[:4]]) == [0, 1, 2, 3]
        for length in (20, 100, 250, 443):
            found = np.bincount(labels[order[:length]], minlength=4)
            assert np.all(np.abs(found - length * counts / 443) <= np.maximum(1, 4 * counts / 443))
    assert np.array_equal(orders[0], order_of(labels, 0))
    for other in (orders[1], orders[2], order_of(labels, 0, seed=1)):
        assert not np.array_equal(orders[0], other)


def test_each_set_is_measured_once_and_holds_out_a_fourth_of_what_it_can() -> None:
    labels, seen = np.arange(40) % 4, []

    def error_of(chosen: Any, held: Any) -> float:
        seen.append((len(chosen), held.tolist()))
        assert {*labels[np.delete(chosen, held)]} == {0, 1, 2, 3}
        return 1 / len(chosen)

    curve = label_curve(labels, 4, error_of, 0.01, draws=2)
    assert curve.sizes == [4, 8, 20, 40]
    assert seen[:3] == [(4, []), (8, [4]), (20, [4, 8, 12, 16])]
    assert seen[3:] == seen[:3]
    np.testing.assert_allclose(
        curve.errors, [[1 / 4, 1 / 8, 1 / 20, 0.01], [1 / 4, 1 / 8, 1 / 20, np.nan]]
    )
    with pytest.raises(InputError, match="1 of 5 classes have none that can be read"):
        label_curve(labels, 5, error_of, 0.01)


def test_the_bins_of_a_red_image_and_of_a_vertical_edge() -> None:
    red = np.zeros((32, 32, 3), np.float32)
    red[..., 0] = 1
    found = colours(red, np.ones((32, 32), bool)).reshape(8, 3, 8)
    assert found[0, 2, 7] == 1  # hue 0°, the largest saturation and value
    assert np.count_nonzero(found) == 1
    assert not gradients(red).any()
    # The difference of the neighbours is 1 in columns 15 and 16, in the second and third cells.
    edge = np.zeros((32, 32, 1), np.float32)
    edge[:, 16:] = 1
    cells = gradients(edge).reshape(4, 4, 9)
    expected = np.zeros((4, 4, 9))
    expected[:, 1:3, 0] = np.sqrt(1 / 8)
    np.testing.assert_allclose(cells, expected, atol=1e-4)
    shares = colours(edge, np.ones((32, 32), bool)) ** 2
    assert shares[[0, BINS - 1]] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_histograms_of_any_channels_see_bytes_and_floats_alike(channels: int) -> None:
    pixels = torch.randint(0, 256, (3, channels, 64, 96), dtype=torch.uint8)
    found = histograms(Batch(pixels, torch.arange(3)))
    assert found.shape == (3, 336 if channels == 3 else 16 * channels + 144)
    torch.testing.assert_close(histograms(Batch(pixels / 255, torch.arange(3))), found)
    torch.testing.assert_close(found.square().sum(1), torch.full((3,), 2.0))


def test_pixels_that_do_not_count_have_no_colour() -> None:
    pixels, valid = torch.full((1, 3, 32, 32), 0.5), torch.ones(1, 32, 32, dtype=torch.bool)
    plain = histograms(Batch(pixels, torch.arange(1), valid=valid))
    assert torch.equal(plain, histograms(Batch(pixels, torch.arange(1))))
    valid[:, :, :16], pixels[:, :, :, :16] = False, float("nan")
    found = histograms(Batch(pixels, torch.arange(1), valid=valid))
    assert torch.equal(found[:, :192], plain[:, :192])
    none = histograms(Batch(pixels, torch.arange(1), valid=torch.zeros_like(valid)))
    assert not none.any()


def test_large_crops_are_reduced_first() -> None:
    small = torch.rand(1, 3, SIDE, SIDE)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    found, expected = (histograms(Batch(x, torch.arange(1))) for x in (large, small))
    torch.testing.assert_close(found, expected)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights; read-only."""
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 3)


def test_the_command(source: Path, classes: Path, tmp_path: Path) -> None:
    given = config(source, classes, baseline=True, curve=True, out=str(tmp_path / "curve.png"))
    found = probe(given, show=False)
    assert {"top1", "low", "high"} < found["histogram"]["linear"].keys()
    assert found["histogram"].keys() == found["random"].keys()
    assert found["histogram"]["knn5"]["top1"] > 60  # classes differ in colour
    assert found["curve"].keys() == {"chance", "pretrained", "random", "histogram"}
    assert found["curve"]["chance"] == pytest.approx(100 / 3)
    for kind, scores in (("pretrained", found), ("random", found["random"])):
        points = found["curve"][kind]["points"]
        assert [point["labels"] for point in points] == [3, 6, 15, 24]
        assert points[-1]["top1"] == pytest.approx(scores["linear"]["top1"])
        assert [point["draws"] for point in points] == [5, 5, 5, 1]
        assert [entry["labels"] for entry in found["curve"][kind]["forecast"]] == [48, 96]
    with Image.open(tmp_path / "curve.png") as figure:
        assert figure.size == (1050, 600)
    again = probe(config(source, classes, curve=True), show=False)
    assert again["curve"]["pretrained"] == found["curve"]["pretrained"]
    assert again["curve"].keys() == {"chance", "pretrained"}
    assert "advice" not in again


def test_a_table_of_the_curve(
    source: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--img_size", "32", "--workers", "0", "--curve"]
    assert main(["probe", str(source), "--data", str(classes), *arguments, "--json"]) == 0
    curve = json.loads(capsys.readouterr().out)["curve"]["pretrained"]
    assert main(["probe", str(source), "--data", str(classes), *arguments]) == 0
    table = capsys.readouterr().out
    assert "chance 33.3" in table
    for point in curve["points"]:
        assert f"{point['top1']:.1f} ({point['low']:.1f}–{point['high']:.1f})" in table


def test_a_network_that_does_not_beat_a_control_is_reported() -> None:
    def result(random: float, histogram: float) -> dict[str, Any]:
        controls = {"random": random, "histogram": histogram}
        scores = {kind: {"linear": {"top1": top1}} for kind, top1 in controls.items()}
        return {"linear": {"top1": 60.0, "low": 55.0, "high": 65.0}, **scores}

    assert advice(result(54.9, 20.0)) == []
    (sentence, to_try) = advice(result(54.9, 66.0))
    assert "does not beat histograms" in sentence
    assert "between 55.0 and 65.0 %, theirs 66.0 %" in sentence
    assert "more epochs" in to_try
    assert len(advice(result(55.0, 60.0))) == 3


def one_line(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> str:
    given = ["--img_size", "32", "--workers", "0", *map(str, arguments)]
    assert main(["probe", *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("fcmae probe: error: ")
    return line


def test_wrong_input_is_reported_in_one_line(
    source: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_classes(tmp_path / "few", train=1)
    one = write_classes(tmp_path / "one", classes=1)
    same = write_classes(tmp_path / "same")
    for path in same.rglob("*.png"):
        shutil.copy(classes / "val" / "class 0" / "0.png", path)
    state = {name: tensor * 1e30 for name, tensor in load_file(source).items()}
    save_file(state, tmp_path / "huge.safetensors")
    taken = shutil.copytree(classes, tmp_path / "taken") / "val" / "class 0" / "0.png"
    for arguments, message in (
        ([source, "--data", few, "--curve"], "3 images of 3 classes are fewer: label 6 or more"),
        ([source, "--data", one, "--curve"], "has one class, 'class 0'"),
        ([source, "--data", same, "--curve"], "of all 24 training images are the same"),
        ([tmp_path / "huge.safetensors", "--data", classes, "--curve"], "for 24 of 24 images"),
        ([source, "--data", classes, "--out", "x.png"], "is a figure of the curve: add --curve"),
        ([source, "--data", classes, "--curve", "--out", "x.gif"], "ending in .png or .svg"),
        ([source, "--data", taken.parents[2], "--curve", "--out", taken], "is one of the images"),
    ):
        assert message in one_line(arguments, capsys)


def test_a_baseline_without_scikit_image_names_what_to_install(
    source: Path, classes: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    line = one_line([source, "--data", classes, "--baseline"], capsys)
    assert "pip install 'fcmae[samples]'" in line


@pytest.mark.slow
def test_the_experiment_resumes_from_its_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {kind: labelled(3, n=200)._asdict() for kind in CONTROLS}
    torch.save(features, tmp_path / "blobs.pt")
    options = ["--data", "blobs", "--out", str(tmp_path), "--draws", "2"]
    monkeypatch.setattr(sys, "argv", ["forecasts", *options])
    forecasts.main()
    table = capsys.readouterr().out
    assert "| blobs, histogram | 4 | 2 |" in table
    assert "| all | 2 | 8 |" in table
    (tmp_path / "blobs.pt").unlink()
    forecasts.main()
    assert capsys.readouterr().out == table
