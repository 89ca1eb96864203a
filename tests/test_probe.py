"""Evaluation of frozen features: against NumPy and SciPy, and the command."""

import json
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from fcmae.cli import main
from fcmae.commands.probe import ProbeConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.inspect import probing
from fcmae.inspect.probing import PENALTIES, Labelled, fit_linear, knn, linear_probe, probe, wilson
from fcmae.weights.load import load_backbone, random_backbone
from finetune.train import finetune
from sparse import SparseConvNeXtV2
from sparse.encoder import init_fan_in
from sparse.errors import InputError, RunError
from tests.conftest import write_classes, write_pictures
from tests.test_features import CPU, SMALL, features_of, finetune_config

Array = npt.NDArray[Any]


def knn_by_hand(train: Array, labels: Array, val: Array, k: int, classes: int) -> list[int]:
    guesses = []
    for feature in val:
        lengths = np.linalg.norm(train, axis=1) * np.linalg.norm(feature)
        cosines = train @ feature / lengths
        votes = np.zeros(classes)
        for near in np.argsort(-cosines)[:k]:
            votes[labels[near]] += np.exp(cosines[near] / 0.07)
        guesses.append(int(votes.argmax()))
    return guesses


def blobs(n: int, classes: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, 5) around a centre for each class; classes in turn, always the same centres."""
    middles = np.random.default_rng(99).normal(0, 2, (classes, 5))
    labels = np.arange(n) % classes
    noise = np.random.default_rng(seed).normal(0, spread, (n, 5))
    return torch.from_numpy(middles[labels] + noise).float(), torch.from_numpy(labels)


def labelled(spread: float, n: int = 80, chosen: int = 20) -> Labelled:
    train, val = blobs(n, 4, spread), blobs(40, 4, spread, seed=1)
    return Labelled(*train, *val, 4, torch.isin(torch.arange(n), torch.arange(chosen) * 3))


def test_neighbours_against_a_computation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (val, _) = blobs(60, 6, 3), blobs(50, 6, 3, seed=1)
    ks = (20, 1, 5, 60, 500)
    expected = [knn_by_hand(train.numpy(), labels.numpy(), val.numpy(), k, 6) for k in ks]
    assert len({*map(tuple, expected)}) > 2
    assert [guess.tolist() for guess in knn(train, labels, val, ks, 6)] == expected
    monkeypatch.setattr("fcmae.inspect.probing._AT_ONCE", 200)
    assert [guess.tolist() for guess in knn(train, labels, val, ks, 6)] == expected


def fit_by_hand(x: Array, labels: Array, classes: int, penalty: float) -> tuple[Array, Array]:
    optimize = pytest.importorskip("scipy.optimize")
    x, wanted = x.astype(np.float64), np.eye(classes)[labels]

    def objective(flat: Array) -> tuple[float, Array]:
        weight, bias = flat[classes:].reshape(-1, classes), flat[:classes]
        logits = x @ weight + bias
        logits -= logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(log_p) - wanted) / len(x)
        value = -(wanted * log_p).sum() / len(x) + penalty / 2 * (weight**2).sum()
        return value, np.concatenate([error.sum(0), (x.T @ error + penalty * weight).ravel()])

    start = np.zeros(classes * (1 + x.shape[1]))
    options = {"maxiter": 10_000, "ftol": 0, "gtol": 1e-10}
    flat = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return flat[classes:].reshape(-1, classes), flat[:classes]


@pytest.mark.parametrize(("penalty", "at_once"), [(1.0, 1 << 24), (0.1, 29), (0.01, 3)])
def test_linear_fit_against_scipy(
    penalty: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all logits at once, and those of seven images and of one at a time."""
    monkeypatch.setattr(probing, "_AT_ONCE", at_once)
    x, labels = blobs(100, 4, 3)
    weight, bias = fit_by_hand(x.numpy(), labels.numpy(), 4, penalty)
    elsewhere = fit_linear(x, labels, 4, 10 * penalty)
    kept = [tensor.clone() for tensor in elsewhere]
    for start in (None, elsewhere):
        found = fit_linear(x, labels, 4, penalty, start)
        np.testing.assert_allclose(found[0].numpy(), weight, atol=2e-3)
        np.testing.assert_allclose(found[1].numpy(), bias, atol=2e-3)
        assert not found[0].requires_grad
    assert all(map(torch.equal, elsewhere, kept))


@pytest.mark.parametrize("spread", [1.5, 4, 10])
def test_the_penalty_is_the_one_with_the_lowest_loss_by_hand(spread: float) -> None:
    data = labelled(spread)
    train = data.train.double().numpy()
    mean, std = train.mean(0), train.std(0)
    train, val = (train - mean) / std, (data.val.double().numpy() - mean) / std
    labels, held = data.train_labels.numpy(), data.held.numpy()
    losses = {}
    for penalty in PENALTIES:
        weight, bias = fit_by_hand(train[~held], labels[~held], 4, penalty)
        logits = torch.from_numpy(train[held] @ weight + bias)
        losses[penalty] = float(F.cross_entropy(logits, data.train_labels[held]))
    best = min(losses, key=losses.__getitem__)
    weight, bias = fit_by_hand(train, labels, 4, best)
    guess, penalty = linear_probe(data)
    assert penalty == best
    assert guess.tolist() == (val @ weight + bias).argmax(1).tolist()


def test_well_separated_classes_are_all_recognised() -> None:
    data = labelled(0.1)
    assert torch.equal(linear_probe(data)[0], data.val_labels)


def test_a_constant_channel_has_no_effect() -> None:
    data = labelled(3)
    train, val = (torch.cat([part, torch.full((len(part), 1), 7.0)], 1) for part in data[::2][:2])
    guess, penalty = linear_probe(data._replace(train=train, val=val + torch.eye(6)[5]))
    expected = linear_probe(data)
    assert (guess.tolist(), penalty) == (expected[0].tolist(), expected[1])


def test_one_image_per_class_uses_the_middle_penalty() -> None:
    guess, penalty = linear_probe(labelled(0.1, n=4, chosen=0))
    assert penalty == 0.01
    assert guess.tolist() == labelled(0.1).val_labels.tolist()


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(10, 100, 5.52, 17.44), (0, 10, 0, 27.75), (10, 10, 72.25, 100), (1, 2, 9.45, 90.55)],
)
def test_the_interval_solves_its_equation(hits: int, n: int, low: float, high: float) -> None:
    """The proportions p with (p - hits/n)² = z² p (1 - p) / n."""
    square = NormalDist().inv_cdf(0.975) ** 2 / n
    roots = sorted(np.roots([1 + square, -2 * hits / n - square, (hits / n) ** 2]).real * 100)
    assert wilson(hits, n) == pytest.approx(roots, abs=1e-4)
    assert wilson(hits, n) == pytest.approx((low, high), abs=0.005)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights; read-only."""
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors", 3)


def write_weights(path: Path, in_chans: int) -> Path:
    torch.manual_seed(1)
    encoder = SparseConvNeXtV2(SMALL["depths"], SMALL["dims"], in_chans, engine="dense")
    init_fan_in(encoder)
    save_file(encoder.state_dict(), path)
    return path


def config(source: Path, data: Path, **changes: Any) -> ProbeConfig:
    settings: dict[str, Any] = {"img_size": 32, "workers": 0, "device": "cpu"}
    return ProbeConfig(str(source), str(data), **settings | changes)


def test_one_json_object_with_all_results(
    source: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = write_pictures(tmp_path / "unlabeled", 3) / "copy.bmp"
    with Image.open(classes / "val" / "class 1" / "2.png") as picture:
        picture.save(copy)
    result = probe(
        config(source, classes, json=True, baseline=True, near_duplicates=str(copy.parent))
    )
    out, err = capsys.readouterr()
    assert json.loads(out) == result
    numbers = {"train": 24, "val": 12, "classes": 3, "unreadable": 0, "img_size": [32, 32]}
    assert result.items() >= {**numbers, "weights": str(source)}.items()
    assert result["near_duplicates"] == [{"path": "copy.bmp", "of": "class 1/2.png", "bits": 0}]
    assert "copy.bmp is like val/class 1/2.png" in err
    assert "1 of 4 images" in err
    given = load_backbone(str(source), CPU, (32, 32))
    for backbone, found in ((given, result), (random_backbone(given), result["random"])):
        features = [
            features_of(backbone, Split(find_images(str(classes / split))), 8, 0).values.numpy()
            for split in ("train", "val")
        ]
        labels, truth = np.repeat([0, 1, 2], 8), np.repeat([0, 1, 2], 4)
        for k in (5, 20):
            guess = np.array(knn_by_hand(features[0], labels, features[1], k, 3))
            hits = int((guess == truth).sum())
            low, high = wilson(hits, 12)
            expected = {"top1": 100 * hits / 12, "low": max(low, 0), "high": min(high, 100)}
            assert found[f"knn{k}"] == pytest.approx(expected)
        assert found["linear"].keys() == {"top1", "low", "high", "penalty"}
        assert 0 <= found["linear"]["low"] <= found["linear"]["top1"] <= found["linear"]["high"]
    assert result["knn5"] != result["random"]["knn5"]


def test_a_table_and_other_numbers_of_neighbours(
    source: Path, classes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = probe(config(source, classes, neighbours=[3], baseline=True))
    table = capsys.readouterr().out
    assert "24 training and 12 validation images, 3 classes" in table
    assert [name for name in result if name.startswith("knn")] == ["knn3"]
    for name in ("knn3", "linear"):
        for entry in (result, result["random"]):
            assert f"{entry[name]['top1']:.1f}" in table


def test_unreadable_images_are_skipped_and_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_classes(tmp_path / "data", val=6)
    bad = [data / "train" / "class 0" / "1.png", data / "val" / "class 1" / "0.png"]
    for path in bad:
        path.write_bytes(b"none")
    found = probe(config(source, data), show=False)
    assert (found["train"], found["val"], found["unreadable"]) == (23, 17, 2)
    err = capsys.readouterr().err
    assert all(path.relative_to(data).as_posix() in err for path in bad)
    for path in bad:
        path.unlink()
    assert probe(config(source, data), show=False) == {**found, "unreadable": 0}


def test_one_folder_is_split(source: Path, classes: Path) -> None:
    found = probe(config(source, classes / "train", val_fraction=0.25), show=False)
    assert (found["train"], found["val"]) == (18, 6)


def test_other_numbers_of_channels(source: Path, classes: Path, tmp_path: Path) -> None:
    grey = write_weights(tmp_path / "1.safetensors", 1)
    assert probe(config(grey, classes), show=False)["val"] == 12
    five = write_weights(tmp_path / "5.safetensors", 5)
    with pytest.raises(
        RunError, match=r"none of the 24 images.*at most 4 channels can be read, not 5"
    ):
        probe(config(five, classes), show=False)
    assert main(["probe", str(five), "--data", str(classes), "--workers", "0"]) == 1


def test_hundreds_of_classes_some_with_a_single_image(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(300):
        for split, count in (("train", 1 + label % 2), ("val", 1)):
            folder = tmp_path / split / f"{label:03d}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((32, 32, 3), label % 7 * 36, np.uint8)
                pixels[:16] = rng.integers(0, 256, 3)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    found = probe(config(source, tmp_path), show=False)
    assert (found["train"], found["val"], found["classes"]) == (450, 300, 300)
    assert 0 <= found["linear"]["low"] < found["linear"]["high"] < 50


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled folders, each with a different mistake; read-only."""
    root = tmp_path_factory.mktemp("data")
    picture = write_pictures(root / "one", 1, size=32) / "0000.png"
    for name in (
        "single/train/a", "single/val/a", "empty/train/a", "empty/val/a", "more/train/a",
        "more/train/b", "more/val/b", "more/val/cat", "novel/a", "novel/b", "noval/train/a",
    ):  # fmt: skip
        (root / name).mkdir(parents=True)
        shutil.copy(picture, root / name)
    (root / "empty" / "train" / "b").mkdir()
    return root


@pytest.mark.parametrize(
    ("folder", "arguments", "message"),
    [
        ("single", [], "has one class, 'a'"),
        ("empty", [], "classes without images: 'b'"),
        ("more", [], "has classes that train does not have: 'cat'"),
        ("noval", [], "val' is not a folder"),
        ("one", [], "train' is not a folder"),
        ("one", ["--val_fraction", "0.5"], "has no folders: expected one per class"),
        ("novel", ["--val_fraction", "0.5"], "0.5 holds nothing out: every class has one image"),
        ("novel", ["--val_fraction", "1"], "val_fraction 1"),
        ("nowhere", [], "nowhere' does not exist: give a folder"),
        ("more", ["--neighbours", "[0]"], "neighbours [0] must be at least 1, such as [5,20]"),
        ("more", ["--neighbours", "[]"], "neighbours [] must be at least 1, such as [5,20]"),
        ("more", ["--img_size", "100"], "img_size 100 must be a multiple of 32"),
        ("more", ["--batch_size", "0"], "batch_size 0 must be at least 1"),
        ("more", ["--source", "nowhere"], "source 'nowhere' does not exist: give a run"),
    ],
)
def test_wrong_input_is_reported_in_one_line(
    source: Path, data: Path, capsys: pytest.CaptureFixture[str],
    folder: str, arguments: list[str], message: str,
) -> None:  # fmt: skip
    given = ["--source", str(source), "--data", str(data / folder), *arguments]
    assert main(["probe", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fcmae probe: error: ")
    assert message in line


def test_classes_of_another_fine_tuning_run_are_refused(
    source: Path, classes: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    finetune(finetune_config(classes, run, weights=str(source)))
    shutil.copytree(classes, other)
    for split in ("train", "val"):
        (other / split / "class 0").rename(other / split / "dogs")
    for weights in (run, run / "exported"):
        with pytest.raises(InputError, match=r"does not have: 'dogs'.*--other_classes"):
            probe(config(weights, other))
        assert probe(config(weights, classes), show=False)["val"] == 12
    assert probe(config(run, other, other_classes=True), show=False)["val"] == 12


def test_a_csv_file_may_be_given_as_the_data(source: Path, classes: Path, tmp_path: Path) -> None:
    rows = [f"{path},{path.parent.name},{path.parts[-3]}" for path in sorted(classes.rglob("*.*g"))]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
    found = probe(config(source, tmp_path / "labels.csv"), show=False)
    expected = probe(config(source, classes), show=False)
    for key in ("knn5", "knn20", "train", "val", "classes"):  # other paths, another penalty
        assert found[key] == expected[key]
