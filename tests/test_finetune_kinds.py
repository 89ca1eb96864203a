"""Runs on several labels and on numbers: their files, resume, evaluation and prediction."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from fcmae.commands.evaluate import EvaluateConfig
from fcmae.commands.predict import PredictConfig
from fcmae.commands.report import ReportConfig
from fcmae.inspect.reporting import report
from fcmae.train.checkpoint import list_checkpoints
from finetune.config import FinetuneAugmentConfig, FinetuneConfig
from finetune.evaluate import evaluate
from finetune.predict import predict
from finetune.train import finetune
from sparse.errors import InputError
from tests import test_finetune_run
from tests.conftest import write_classes
from tests.test_finetune_run import STEPS, assert_same_run, final, metrics

KINDS = ("classify", "multilabel", "regress")
COLUMNS = {"classify": ["label"], "multilabel": ["labels"], "regress": ["number", "half"]}


def write_labels(data: Path, out: Path, kind: str, split: bool = True) -> Path:
    """Write a CSV file of the images of `write_classes`: the class, the class and whether its
    number is even, or numbers of which every third `half` is missing."""
    rows = []
    for place, path in enumerate(sorted(data.rglob("*.png"))):
        name = path.relative_to(data)
        label, n = int(path.parent.name[-1]), int(path.stem)
        cells: dict[str, list[Any]] = {
            "classify": [f"c{label}"],
            "multilabel": [f"c{label};even" if n % 2 == 0 else f"c{label}"],
            "regress": [100 + label, "" if place % 3 == 0 else label / 2],
        }
        rows.append([path, *cells[kind], *([name.parts[0]] if split else [])])
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["path", *COLUMNS[kind], *(["split"] if split else [])], *rows])
    return out


def config(labels: Path, out: Path, **changes: Any) -> FinetuneConfig:
    plain = FinetuneAugmentConfig(randaugment="rand-m5-inc1", random_erasing=0.3)
    settings: dict[str, Any] = {"labels": str(labels), "augment": plain}
    return test_finetune_run.config(labels.parent, out, **settings | changes)


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each kind, with its `data` and `labels.csv` beside it; read-only."""
    root = tmp_path_factory.mktemp(request.param)
    labels = write_labels(write_classes(root / "data"), root / "labels.csv", request.param)
    assert finetune(config(labels, root / "run")) == 0
    return root / "run"


def kind_of(run: Path) -> str:
    return json.loads((run / "exported" / "config.json").read_text())["task"]


def expected(run: Path) -> torch.Tensor:
    """Outputs of the exported folder on val, by timm alone."""
    with torch.no_grad():
        return test_finetune_run.by_hand(run, run.parent / "data" / "val")[0]


def test_auto_takes_the_kind_of_the_layout(run: Path) -> None:
    state = json.loads((list_checkpoints(run / "checkpoints")[0] / "state.json").read_text())
    assert state["settings"]["task"] == kind_of(run)
    assert state["asked"]["task"] == "auto"
    assert state["asked"]["labels"] == str(run.parent / "labels.csv")
    model: Any = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True)
    names = {"classify": ["c0", "c1", "c2"], "multilabel": ["c0", "c1", "c2", "even"]}
    assert model.pretrained_cfg["label_names"] == names.get(kind_of(run), ["number", "half"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_run_equals_one_never_stopped(run: Path, tmp_path: Path, step: int) -> None:
    """Also without the CSV file, whose labels the run has stored."""
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")[: STEPS - step]:
        shutil.rmtree(checkpoint)
    labels = run.parent / "labels.csv"
    hidden = labels.rename(run.parent / "hidden")
    try:
        assert finetune(config(labels, tmp_path / "run", task="auto")) == 0
    finally:
        hidden.rename(labels)
    assert_same_run(run, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_and_bf16_learn_the_same(run: Path, tmp_path: Path) -> None:
    labels, augment = run.parent / "labels.csv", FinetuneAugmentConfig()
    one, two = tmp_path / "one", tmp_path / "two"
    assert finetune(config(labels, one, drop_path=0.0, augment=augment)) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "fcmae", "finetune", "--config", str(one / "config.yaml"), "--out", str(two)]
    done = subprocess.run([sys.executable, *launch, *command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line == pytest.approx(other, rel=1e-3)
    changes = {"precision": "bf16", "drop_path": 0.0, "augment": augment}
    assert finetune(config(labels, tmp_path / "low", **changes)) == 0
    losses = [
        [line["loss"] for line in metrics(out) if "loss" in line] for out in (one, tmp_path / "low")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_evaluate_measures_what_training_measured(run: Path, tmp_path: Path) -> None:
    """The best weights on val: the run knows its CSV file; a file given as data says the same."""
    labels, kind = run.parent / "labels.csv", kind_of(run)
    state = json.loads((list_checkpoints(run / "checkpoints")[0] / "state.json").read_text())
    out = tmp_path / "scores.png"
    result = evaluate(
        EvaluateConfig(str(run), str(run.parent), workers=0, out=str(out)), show=False
    )
    assert out.read_bytes().startswith(b"\x89PNG")
    for given in ({"data": str(labels)}, {"data": "nowhere", "labels": str(labels)}):
        again = evaluate(EvaluateConfig(str(run / "exported"), workers=0, **given), show=False)
        assert {**again, "weights": ""} == {**result, "weights": ""}
    assert (result["n"], result["split"], result["task"]) == (12, "val", kind)
    best = state["best"]
    for key in {"classify": ["top1", "top5"], "multilabel": ["map", "f1"]}.get(kind, []):
        assert result[key] == pytest.approx(best[key], rel=1e-5), key
    if kind == "regress":
        assert result["values"] == {"number": 12, "half": 8}
        assert result["mae"]["half"] == pytest.approx(best["mae/half"], rel=1e-5)
        assert sum(result["r2"].values()) / 2 == pytest.approx(best["r2"], rel=1e-5)


def test_predictions_are_those_of_timm(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    predict(PredictConfig(str(run), str(run.parent / "data" / "val"), str(out), workers=0))
    with out.open(newline="") as file:
        heads, *rows = csv.reader(file)
    stored = json.loads((run / "exported" / "config.json").read_text())
    outputs, kind = expected(run), kind_of(run)
    assert len(rows) == 12
    if kind == "classify":
        assert heads[:3] == ["path", "label", "score"]
        wanted = outputs.softmax(1).sort(1, descending=True).values
        found = [row[2::2] for row in rows]
    else:
        assert heads == ["path", *stored["label_names"]]
        wanted = outputs.sigmoid()
        if kind == "regress":
            spread = stored["task_state"]
            wanted = outputs * torch.tensor(spread["std"]) + torch.tensor(spread["mean"])
        found = [row[1:] for row in rows]
    np.testing.assert_allclose(np.array(found, np.float64), wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_the_page_shows_scores_and_predictions(run: Path, tmp_path: Path) -> None:
    html = report(ReportConfig(str(run), out=str(tmp_path / "page.html"))).read_text()
    for name in ("predictions", "scores", "worst"):
        assert f"<figcaption>run, {name}</figcaption>" in html
        assert (run / "figures" / f"{name}.png").is_file()


def test_weights_of_another_kind_are_refused(run: Path, tmp_path: Path) -> None:
    """A CSV file without the columns, and a folder of classes."""
    kind = kind_of(run)
    other = KINDS[KINDS.index(kind) - 1]
    labels = write_labels(run.parent / "data", tmp_path / "other.csv", other)
    column = {"classify": "label", "multilabel": "labels", "regress": "number"}[kind]
    with pytest.raises(InputError, match=f"has no column '{column}'"):
        evaluate(EvaluateConfig(str(run), str(labels), workers=0))
    if kind != "classify":
        message = f"has no labels for {kind}: expected a CSV file"
        with pytest.raises(InputError, match=message):
            evaluate(EvaluateConfig(str(run), str(run.parent / "data"), workers=0))


def test_held_out_rows_stay_held_out(tmp_path: Path) -> None:
    """Even after the CSV file has got other rows."""
    data = write_classes(tmp_path / "data")
    labels = write_labels(data, tmp_path / "labels.csv", "multilabel", split=False)
    assert finetune(config(labels, tmp_path / "run", val_fraction=0.25, epochs=1)) == 0
    whole = evaluate(EvaluateConfig(str(tmp_path / "run"), str(labels), workers=0), show=False)
    assert (whole["n"], whole["held_out"], whole["split"]) == (9, True, ".")
    labels.write_text("\n".join(labels.read_text().splitlines()[:4]))
    after = evaluate(EvaluateConfig(str(tmp_path / "run"), str(labels), workers=0), show=False)
    assert after == whole
    other = write_labels(data, tmp_path / "other.csv", "multilabel", split=False)
    found = evaluate(EvaluateConfig(str(tmp_path / "run"), str(other), workers=0), show=False)
    assert (found["n"], found["held_out"]) == (36, False)


def test_missing_images_are_listed(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    labels = write_labels(data, tmp_path / "labels.csv", "regress")
    (data / "train" / "class 1" / "3.png").unlink()
    assert finetune(config(labels, tmp_path / "run", epochs=1)) == 0
    (line,) = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "data/train/class 1/3.png"
    for path in [*(data / "val").rglob("*.png")]:
        path.unlink()
    with pytest.raises(InputError, match=r"13 of 36 images of .* are missing"):
        finetune(config(labels, tmp_path / "other"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("path,label,age\n1.png,a,3\n", {}, r"several kinds of label: choose --task classify \("),
        ("path,note\n1.png,good\n", {}, r"no kind of label: choose --task classify \("),
        ("path,labels\n1.png,a\n", {"task": "paint"}, "task 'paint' is unknown: use auto or"),
        ("path,age,split\n1.png,a,val\n", {"task": "regress"}, "no row of split 'train'"),
        ("path,age\n1.png,a\n", {"task": "multilabel", "val_fraction": 0.2}, "no column 'labels'"),
    ],
)
def test_unclear_labels_are_refused(
    tmp_path: Path, text: str, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        finetune(config(tmp_path / "labels.csv", tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_damaged_labels_of_a_run_are_reported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")[:1]:
        shutil.rmtree(checkpoint)
    stored = tmp_path / "run" / "labels-train.npy"
    given = config(run.parent / "labels.csv", tmp_path / "run")
    np.save(stored, np.load(stored)[:-1])
    with pytest.raises(InputError, match="are not of this run: restore them"):
        finetune(given)
    stored.write_bytes(b"none")
    with pytest.raises(InputError, match=r"labels .* are damaged \("):
        finetune(given)


def test_numbers_are_learned(tmp_path: Path) -> None:
    """The colour of a square is its number: a few epochs must beat the mean."""
    labels = write_labels(write_classes(tmp_path / "data"), tmp_path / "labels.csv", "regress")
    changes: dict[str, Any] = {"augment": FinetuneAugmentConfig(), "epochs": 12, "val_epochs": 12}
    assert finetune(config(labels, tmp_path / "run", **changes)) == 0
    assert metrics(tmp_path / "run")[-1]["ema_r2"] > 0.2
    assert final(tmp_path / "run").keys() == {"model", "optimizer", "ema", "best"}
