"""Complete runs on toy data: their files, interruption at any point, and evaluation."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fcmae.commands.evaluate import EvaluateConfig
from fcmae.commands.predict import PredictConfig
from fcmae.data.evaluation import EvalDataset
from fcmae.data.file_list import FileList
from fcmae.data.labelled import Split, find_classes, labels_of
from fcmae.data.sample import collate
from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.processes import ALONE
from finetune.config import FinetuneAugmentConfig, FinetuneConfig, FinetuneOptimConfig
from finetune.evaluate import evaluate
from finetune.model import find_model
from finetune.predict import predict
from finetune.tasks.classify import Classify, ClassMeasurement
from finetune.train import EMA_AHEAD, Finetuning, finetune, make_ema, resolve_val_epochs
from sparse.errors import InputError
from tests.conftest import write_classes, write_pictures

STEPS = 6
"""Two epochs of three steps."""


def config(data: Path, out: Path, **changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "model": "test_convnext", "img_size": 32, "epochs": 2, "batch_size": 8, "ema_decay": 0.5,
        "workers": 0, "log_steps": 1, "checkpoint_steps": 1, "keep_checkpoints": 10,
        "optim": FinetuneOptimConfig(base_lr=0.03, layer_decay=0.8),
        "augment": FinetuneAugmentConfig(
            randaugment="rand-m5-inc1", mixup=0.2, cutmix=0.2, random_erasing=0.3
        ),
        "device": "cpu",
    }  # fmt: skip
    return FinetuneConfig(data=str(data), out=str(out), **settings | changes)


@pytest.fixture(scope="module")
def run(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; read-only."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert finetune(config(classes, out)) == 0
    return out


def metrics(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key != "images_per_s"} for line in lines]


def final(out: Path) -> dict[str, dict[str, Tensor]]:
    newest = list_checkpoints(out / "checkpoints")[0]
    return {file.stem: load_file(file) for file in newest.glob("*.safetensors")}


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    tensors, wanted = final(other), final(one)
    assert tensors.keys() == wanted.keys() == {"model", "optimizer", "ema", "best"}
    for file, content in wanted.items():
        assert content.keys() == tensors[file].keys()
        assert all(torch.equal(content[name], tensors[file][name]) for name in content), file
    for name in ("model.safetensors", "config.json"):
        written = (one / "exported" / name).read_bytes()
        assert written == (other / "exported" / name).read_bytes()


def test_a_run_writes_all_its_files(run: Path) -> None:
    ends = [line for line in metrics(run) if "val_top1" in line]
    assert [line["step"] for line in ends] == [3, 6]
    figures = {f"{name}_{key}" for name in ("val", "ema") for key in ("top1", "top5", "loss")}
    assert all(figures < line.keys() for line in ends)
    assert all(line["ema_top5"] == 100 for line in ends)
    best = max(ends, key=lambda line: (line["ema_top1"], -line["ema_loss"]))
    state = json.loads((list_checkpoints(run / "checkpoints")[0] / "state.json").read_text())
    assert state["best"]["step"] == best["step"]
    assert state["best"]["top1"] == best["ema_top1"]
    assert state["settings"]["label_names"] == ["class 0", "class 1", "class 2"]
    for folder in ("best", "exported"):
        kept = load_file(run / folder / "model.safetensors")
        assert all(torch.equal(kept[name], tensor) for name, tensor in final(run)["best"].items())


def test_the_exported_folder_loads_in_timm_both_ways(run: Path) -> None:
    folder = run / "exported"
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.num_classes == 3
    assert model.pretrained_cfg["label_names"] == ["class 0", "class 1", "class 2"]
    assert model.pretrained_cfg["input_size"] == [3, 32, 32]
    other = timm.create_model(
        "test_convnext", num_classes=3, checkpoint_path=str(folder / "model.safetensors")
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), other.eval()(images))


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (3, 0), (4, 0), (4, 2)])
def test_a_resumed_run_equals_one_never_stopped(
    run: Path, classes: Path, tmp_path: Path, step: int, workers: int
) -> None:
    """Later checkpoints and later best weights are removed: the run must reproduce all of them."""
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")[: STEPS - step]:
        shutil.rmtree(checkpoint)
    assert finetune(config(classes, tmp_path / "run", workers=workers)) == 0
    assert_same_run(run, tmp_path / "run")


def test_a_killed_and_resumed_run_equals_one_never_stopped(
    run: Path, classes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from finetune.train import Finetuning, finetune\n"
        "from tests.test_finetune_run import config\n"
        "update = Finetuning.after_step\n"
        "def after_step(self, step):\n"
        "    update(self, step)\n"
        "    if step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Finetuning.after_step = after_step\n"
        f"finetune(config(Path({str(classes)!r}), Path({str(out)!r}), checkpoint_steps=2))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert list_checkpoints(out / "checkpoints")[0].name == "step-00000004"
    assert finetune(config(classes, out)) == 0
    assert_same_run(run, out)


def test_a_run_stopped_during_evaluation_evaluates_again(
    run: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = EvalDataset.__getitem__

    def stop(dataset: EvalDataset, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(dataset, index)

    monkeypatch.setattr(EvalDataset, "__getitem__", stop)
    assert finetune(config(classes, tmp_path / "run")) == 143
    assert not any("val_top1" in line for line in metrics(tmp_path / "run"))
    monkeypatch.undo()
    assert finetune(config(classes, tmp_path / "run")) == 0
    assert_same_run(run, tmp_path / "run")


def test_best_weights_are_those_of_the_checkpoint(
    run: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming from before the first epoch's end discards later best weights immediately."""
    shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints")[: STEPS - 2]:
        shutil.rmtree(checkpoint)
    monkeypatch.setattr("fcmae.train.loop.Loop.run", lambda loop, *_: loop.step)
    assert finetune(config(classes, tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "best").exists()


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one(classes: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    changes: dict[str, Any] = {"augment": FinetuneAugmentConfig(randaugment="rand-m5")}
    assert finetune(config(classes, one, drop_path=0.0, **changes)) == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "fcmae", "finetune", "--config", str(one / "config.yaml"), "--out", str(two)]
    done = subprocess.run([sys.executable, *launch, *command], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    weights, others = final(one)["ema"], final(two)["ema"]
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_repeated_does_nothing(run: Path, classes: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    assert finetune(config(classes, tmp_path / "run")) == 0
    assert_same_run(run, tmp_path / "run")


def test_a_model_with_a_fixed_image_size_resumes_and_loads(classes: Path, tmp_path: Path) -> None:
    changes = {"model": "test_vit", "img_size": [32, 48], "epochs": 1}
    assert finetune(config(classes, tmp_path / "run", **changes)) == 0
    shutil.rmtree(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    before = (tmp_path / "run" / "exported" / "model.safetensors").read_bytes()
    assert finetune(config(classes, tmp_path / "run", **changes)) == 0
    assert (tmp_path / "run" / "exported" / "model.safetensors").read_bytes() == before
    source = EvaluateConfig(str(tmp_path / "run"), str(classes), workers=0)
    logged = [line["ema_top1"] for line in metrics(tmp_path / "run") if "ema_top1" in line]
    assert evaluate(source, show=False)["top1"] == pytest.approx(logged[0])
    source.img_size = 64
    with pytest.raises(InputError, match="pos_embed is"):
        evaluate(source, show=False)
    weights = str(tmp_path / "run" / "exported")
    with pytest.raises(InputError, match="give weights of the same --model"):
        finetune(config(classes, tmp_path / "other", weights=weights, model=None))


def test_another_setting_is_refused(run: Path, classes: Path) -> None:
    with pytest.raises(InputError, match=r"drop_path is 0.3 but the run .* has 0.1"):
        finetune(config(classes, run, drop_path=0.3))


def test_a_frozen_backbone_does_not_change(classes: Path, tmp_path: Path) -> None:
    finetune(config(classes, tmp_path / "run", freeze="backbone", model="test_resnet", epochs=1))
    first = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    last = final(tmp_path / "run")["model"]
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_unreadable_images_are_replaced_skipped_and_named(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data", train=8, val=4)
    (data / "train" / "class 0" / "0.png").write_bytes(b"none")
    (data / "val" / "class 1" / "0.png").write_bytes(b"none")
    finetune(config(data, tmp_path / "run", epochs=1, max_bad=0.1))
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    names = sorted(json.loads(line)["path"] for line in lines)
    assert names == ["train/class 0/0.png", "val/class 1/0.png"]
    run, scores = str(tmp_path / "run"), str(tmp_path / "scores.png")
    result = evaluate(EvaluateConfig(run, str(data), out=scores, workers=0), show=False)
    assert (result["n"], result["unreadable"]) == (11, 1)
    predict(PredictConfig(run, str(data / "val"), str(tmp_path / "found.csv"), workers=0))
    for name, bad in (("scores", "val/class 1/0.png"), ("found", "class 1/0.png")):
        (line,) = (tmp_path / f"{name}.bad_images.jsonl").read_text().splitlines()
        assert json.loads(line)["path"] == bad
    assert result["skipped"] == [json.loads(line) for line in lines if "val/" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nonsense"}, "model 'nonsense' is unknown"),
        ({"head": "upernet"}, "head upernet is not for task classify: use auto"),
        ({"weights": "nowhere"}, "nowhere: no such file or folder"),
        ({"batch_size": 7}, "makes parts of 7 images"),
        ({"batch_size": 6, "accumulate": 4}, "not divisible by processes 1 x accumulate 4"),
        ({"img_size": 8, "model": "atto"}, r"img_size \[8, 8\] does not suit"),
        ({"val_fraction": 0.5}, "leave val_fraction at 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    classes: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        finetune(config(classes, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("warmup_epochs", "learns"), [(None, True), (1.6, False)], ids=["default", "a tenth"]
)
def test_a_short_run_learns_by_default(
    tmp_path: Path, warmup_epochs: float | None, learns: bool
) -> None:
    """16 steps from scratch on 24 images that can only be memorised. With 10 % of warm-up all
    features collapse, and the loss ends at ln 3, that of uniform predictions."""
    for seed, name in enumerate("abc"):
        for split, count in (("train", 8), ("val", 1)):
            write_pictures(tmp_path / "data" / split / name, count, seed)
    run = tmp_path / "run"
    settings = FinetuneConfig(
        str(tmp_path / "data"), str(run), img_size=32, epochs=16, val_epochs=16, workers=0,
        optim=FinetuneOptimConfig(warmup_epochs=warmup_epochs), log_steps=1, device="cpu",
        precision="fp32",
    )  # fmt: skip
    assert finetune(settings) == 0
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    last = sum(losses[-4:]) / 4
    assert last < 0.8 if learns else last > 1.0


@pytest.mark.parametrize(
    ("tops", "warned"),
    [([10, 40, 10], "after 2 of 3 epochs"), ([10, 60, 10], "after 3 of 3"), ([10, 60, 60], None)],
)
def test_a_model_at_chance_is_reported_once(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, tops: list[float], warned: str | None,
) -> None:  # fmt: skip
    """For three classes of four images each, chance is 33.3 %, and one standard error above it is
    46.9 %. The result of the first of three epochs is too early to judge by."""
    scores = iter(tops)

    def compute(measurement: ClassMeasurement) -> dict[str, float]:
        measurement.confusion = np.eye(3, dtype=np.int64)
        return {"top1": next(scores), "top5": 100.0, "loss": 1.0}

    monkeypatch.setattr(ClassMeasurement, "compute", compute)
    optim = FinetuneOptimConfig(base_lr=0.02)
    given = config(classes, tmp_path / "run", epochs=3, optim=optim, ema_decay=None)
    assert finetune(given) == 0
    said = [record.getMessage() for record in caplog.records]
    lines = [line for line in said if "always answering" in line]
    assert len(lines) == (warned is not None)
    for line in lines:
        assert str(warned) in line
        assert "33.3 %" in line
        assert "--optim.base_lr 0.005" in line


def test_averaged_weights_by_hand() -> None:
    """Decay is 2/11 after the first update, 3/12 after the second, and 0.25 at most here."""
    model = torch.nn.BatchNorm1d(1)
    assert model.num_batches_tracked is not None
    ema = make_ema(model, 0.25)
    with torch.no_grad():
        model.weight.fill_(12.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model, 1 + EMA_AHEAD)
    assert ema.module.state_dict()["weight"].item() == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert ema.module.state_dict()["num_batches_tracked"].item() == 7
    before = ema.module.state_dict()["weight"].item()
    ema.update(model, 50 + EMA_AHEAD)
    assert ema.module.state_dict()["weight"].item() == pytest.approx(before * 0.25 + 12 * 0.75)


def by_hand(run: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Scores and true classes of a split, from the exported folder, by timm alone."""
    model = timm.create_model(f"local-dir:{run / 'exported'}", pretrained=True).eval()
    files, names = find_classes(folder)
    images = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    data = EvalDataset(Split(files, "", labels_of(files, names)), images)
    batch = collate([data[index] for index in range(len(data))])
    assert batch.targets is not None
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        return model((batch.images / 255 - mean) / std), batch.targets


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_against_a_computation_by_hand(
    run: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    scores, labels = by_hand(run, classes / "val")
    found = scores.argmax(1)
    out = tmp_path / "confusion.csv"
    wanted = EvaluateConfig(
        str(run), str(classes), batch_size=5, workers=workers, json=True, out=str(out)
    )
    result = evaluate(wanted)
    assert json.loads(capsys.readouterr().out) == result
    assert result["top1"] == pytest.approx(100 * (found == labels).float().mean().item())
    assert (result["top5"], result["top5_of"], result["n"]) == (100, 3, 12)
    with out.open(newline="") as file:
        rows = [*csv.reader(file)][1:]
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for true, guess in zip(labels.tolist(), found.tolist(), strict=True):
        matrix[true, guess] += 1
    assert [[int(value) for value in row[1:]] for row in rows] == matrix.tolist()
    recalls = 100 * matrix.diagonal() / matrix.sum(1)
    assert result["balanced"] == pytest.approx(recalls.mean().item())
    assert [entry["top1"] for entry in result["per_class"].values()] == pytest.approx(
        recalls.tolist()
    )


def test_evaluate_prints_a_table_and_draws(
    run: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "confusion.png"
    evaluate(EvaluateConfig(str(run / "exported"), str(classes / "val"), workers=0, out=str(out)))
    assert "balanced" in capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")


def test_only_the_worst_of_many_classes_are_shown(
    run: Path, classes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.evaluate.MOST_ROWS", 1)
    found = evaluate(EvaluateConfig(str(run), str(classes)))["per_class"]
    worst = min(found, key=lambda name: found[name]["top1"])
    said = capsys.readouterr().out
    assert [name for name in found if f" {name} " in said] == [worst]
    assert f"the lowest 1 of {len(found)}, --json has all" in " ".join(said.split())


def test_evaluate_summary_of_missing_classes() -> None:
    measurement = Classify(("a", "b", "c")).measurement(ALONE, final=True)
    guesses = torch.tensor([0, 0, 0, 1, 0, 0, 2, 2])
    measurement.update(F.one_hot(guesses).float(), torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]))
    measurement.compute()
    result = measurement.result()
    assert result["top1"] == pytest.approx(62.5)
    assert (result["top5"], result["top5_of"]) == (100, 3)
    assert result["balanced"] == pytest.approx((75 + 50) / 2)
    assert result["per_class"] == {"a": {"top1": 75.0, "n": 4}, "c": {"top1": 50.0, "n": 4}}
    assert result["not_measured"] == ["b"]


def test_classes_are_matched_by_name(run: Path, classes: Path, tmp_path: Path) -> None:
    """A data set with some of the classes; one that the model does not know is refused."""
    shutil.copytree(classes / "val" / "class 2", tmp_path / "class 2")
    result = evaluate(EvaluateConfig(str(run), str(tmp_path), workers=0), show=False)
    whole = evaluate(EvaluateConfig(str(run), str(classes), workers=0), show=False)
    assert result["per_class"] == {"class 2": whole["per_class"]["class 2"]}
    shutil.copytree(classes / "val" / "class 2", tmp_path / "class 3")
    with pytest.raises(InputError, match="classes that the model does not have: 'class 3'"):
        evaluate(EvaluateConfig(str(run), str(tmp_path), workers=0))


def test_a_run_with_val_fraction_is_evaluated_on_its_held_out_images(
    classes: Path, tmp_path: Path
) -> None:
    data, out = classes / "train", tmp_path / "run"
    finetune(config(data, out, val_fraction=0.25, epochs=1))
    result = evaluate(EvaluateConfig(str(out), str(data), workers=0), show=False)
    assert result["n"] == 6
    logged = [line["ema_top1"] for line in metrics(out) if "ema_top1" in line]
    assert result["top1"] == pytest.approx(logged[0])


def test_held_out_images_stay_held_out(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """From another folder, for exported weights, and after images were added and removed."""
    data, out = tmp_path / "flat", tmp_path / "run"
    shutil.copytree(classes / "train", data)
    finetune(config(data, out, val_fraction=0.25, epochs=1))
    whole = evaluate(EvaluateConfig(str(out), str(data), workers=0), show=False)
    monkeypatch.chdir(tmp_path)
    for source in ("run", "run/exported", "run/best/model.safetensors"):
        again = evaluate(EvaluateConfig(source, "flat", workers=0), show=False)
        assert {**again, "weights": ""} == {**whole, "weights": ""}
    kept = FileList.load(out / "images-val.npz")
    Path(os.fsdecode(kept.path(0))).unlink()
    for number in range(20):
        shutil.copy(data / "class 1" / "0.png", data / "class 1" / f"new {number}.png")
    after = evaluate(EvaluateConfig("run", "flat", workers=0), show=False)
    assert (after["n"], after["unreadable"]) == (5, 1)
    capsys.readouterr()
    other = evaluate(EvaluateConfig("run", str(classes / "val"), workers=0), show=False)
    assert other["n"] == 12
    assert "warning: all of" in capsys.readouterr().err
    assert "the run held out images of" in caplog.text


def test_classes_that_are_not_measured_are_reported(
    classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A class of one image is trained but never measured: the results name the classes measured."""
    data = tmp_path / "data"
    shutil.copytree(classes / "train", data)
    for picture in [*(data / "class 1").iterdir()][1:]:
        picture.unlink()
    finetune(config(data, tmp_path / "run", val_fraction=0.25, epochs=1))
    assert "not in val, so never measured: 'class 1'" in caplog.text
    capsys.readouterr()
    result = evaluate(EvaluateConfig(str(tmp_path / "run"), str(data), workers=0))
    assert result["not_measured"] == ["class 1"]
    assert [*result["per_class"]] == ["class 0", "class 2"]
    said = " ".join(capsys.readouterr().out.split())
    assert "on the images that it held out" in said
    assert "1 of 3 classes not measured" in said


def test_weights_of_another_image_size_are_reported(
    run: Path, classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finetune(config(classes, tmp_path / "run", model=None, weights=str(run), img_size=64, epochs=1))
    assert "the weights saw images of 32×32: --img_size '[32,32]' gives the same" in caplog.text


def test_a_class_removed_from_val_does_not_end_a_run(classes: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(classes, data)
    finetune(config(data, out))
    for checkpoint in list_checkpoints(out / "checkpoints")[:2]:
        shutil.rmtree(checkpoint)
    for picture in (data / "val" / "class 2").iterdir():
        picture.unlink()
    assert finetune(config(data, out, max_bad=0.5)) == 0
    bad = [json.loads(line)["path"] for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(bad) == [f"val/class 2/{number}.png" for number in range(4)]


def test_a_run_given_as_weights_means_its_best_weights(run: Path) -> None:
    """Also as initial weights, for any model."""
    start = find_model(None, str(run), 3)
    assert start.name == "test_convnext"
    best = load_file(run / "best" / "model.safetensors")
    assert start.state is not None
    assert all(torch.equal(start.state[name], tensor) for name, tensor in best.items())


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("nowhere", "x.csv", "nowhere: no such file or folder; give a run"),
        ("run", "x.txt", "must be a file ending in .png or .csv"),
    ],
)
def test_evaluate_refuses(run: Path, classes: Path, source: str, out: str, message: str) -> None:
    path = str(run) if source == "run" else source
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(path, str(classes), out=out, workers=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet5O"}, "did you mean resnet50"),
        ({"architecture": None}, "must name timm's model as its architecture"),
        ({"model_args": {"depht": 3}}, "model_args {'depht': 3} do not suit test_convnext"),
    ],
)
def test_a_wrong_config_beside_the_weights_is_refused(
    run: Path, classes: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(run / "exported", tmp_path / "w")
    file = tmp_path / "w" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate(EvaluateConfig(str(tmp_path / "w"), str(classes), workers=0))


def test_evaluate_needs_the_weights_of_a_folder_not_its_config(run: Path, classes: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: not a weight file: use \.safetensors"):
        evaluate(EvaluateConfig(str(run / "exported" / "config.json"), str(classes), workers=0))


def test_skipped_updates_leave_running_statistics_unchanged(classes: Path, tmp_path: Path) -> None:
    """One image has huge values: its batches have no effect, on the averaged weights neither."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(classes, data)
    huge = np.full((40, 40, 3), 1e38, np.float32)
    np.save(data / "train" / "class 0" / "huge.npy", huge)
    plain = FinetuneAugmentConfig()
    given = config(
        data, out, model="test_resnet", augment=plain, nonfinite="skip", max_nonfinite=10
    )
    assert finetune(given) == 0
    assert len((out / "nonfinite.jsonl").read_text().splitlines()) >= 2
    assert all(t.isfinite().all() for part in final(out).values() for t in part.values())


def test_batch_norm_needs_two_images_per_batch(classes: Path, tmp_path: Path) -> None:
    given = config(classes, tmp_path / "run", model="test_resnet", batch_size=2, accumulate=2)
    given.augment.mixup = given.augment.cutmix = 0.0
    with pytest.raises(InputError, match="has batch norm, but sees one image at a time"):
        finetune(given)


def test_a_nan_loss_is_the_worst() -> None:
    kind = Classify(("a", "b"))
    scores = [(60.0, math.nan), (50.0, 1.0), (50.0, math.nan), (50.0, 2.0)]
    best_first = sorted(
        scores, key=lambda score: kind.rank({"top1": score[0], "loss": score[1]}), reverse=True
    )
    assert [scores.index(score) for score in best_first] == [0, 1, 3, 2]


def test_predict_writes_the_best_classes(
    run: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(classes / "val", images)
    (images / "class 0" / "00 bad.png").write_bytes(b"none")
    out = tmp_path / "new" / "out.csv"
    predict(PredictConfig(str(run), str(images), str(out), top=2, batch_size=5, workers=0))
    assert "class 0/00 bad.png" in capsys.readouterr().err
    with out.open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows[0] == ["path", "label", "score", "label2", "score2"]
    best = by_hand(run, classes / "val")[0].softmax(1).topk(2)
    assert len(rows) == 13
    for row, values, places in zip(rows[1:], best.values, best.indices, strict=True):
        assert row[0].startswith(f"{images}/class ")
        assert row[1::2] == [f"class {place}" for place in places.tolist()]
        assert [float(value) for value in row[2::2]] == pytest.approx(values.tolist(), abs=1e-5)
    names = sorted(path.name for path in out.parent.iterdir())
    assert names == ["out.bad_images.jsonl", "out.csv"]


def test_predict_from_a_list_of_paths_with_odd_names(
    run: Path, classes: Path, tmp_path: Path
) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff, odd.png"
    Path(os.fsdecode(odd)).write_bytes((classes / "val" / "class 0" / "0.png").read_bytes())
    (tmp_path / "list.txt").write_bytes(odd + b"\n")
    out = tmp_path / "out.csv"
    predict(PredictConfig(str(run), str(tmp_path / "list.txt"), str(out), workers=0))
    assert b'"' + odd + b'",class ' in out.read_bytes()


def test_the_interval_of_evaluations_does_not_change_training(
    classes: Path, tmp_path: Path
) -> None:
    ends = {}
    for name, every in (("each", 1), ("some", 2)):
        assert finetune(config(classes, tmp_path / name, epochs=5, val_epochs=every)) == 0
        ends[name] = {line["step"]: line for line in metrics(tmp_path / name) if "val_top1" in line}
    assert [*ends["each"]] == [3, 6, 9, 12, 15]
    assert [*ends["some"]] == [6, 12, 15]
    assert all(ends["each"][step] == line for step, line in ends["some"].items())


def test_near_duplicates_of_the_validation_images_are_listed(classes: Path, tmp_path: Path) -> None:
    other = tmp_path / "unlabeled"
    other.mkdir()
    with Image.open(classes / "val" / "class 1" / "2.png") as picture:
        picture.resize((80, 96)).save(other / "larger.png")
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "other.png")
    out = tmp_path / "run"
    assert finetune(config(classes, out, epochs=1, near_duplicates=str(other))) == 0
    (line,) = (out / "near_duplicates.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["path"], found["of"]) == ("larger.png", "class 1/2.png")


@pytest.mark.parametrize(
    ("images", "epochs", "val_epochs"),
    [(1, 200, 7), (300, 200, 7), (301, 200, 7), (600, 100, 4), (3000, 20, 1), (10**6, 20, 1)],
)
def test_fewer_images_get_more_epochs(images: int, epochs: int, val_epochs: int) -> None:
    given = FinetuneConfig(data="photos", out="run")
    assert Finetuning.auto_epochs.resolve(given.epochs, images) == epochs
    assert resolve_val_epochs(given, epochs) == val_epochs
    assert resolve_val_epochs(replace(given, val_epochs=2), 3) == 2


@pytest.mark.slow
def test_compiled_steps_train_and_eager_ones_evaluate(classes: Path, tmp_path: Path) -> None:
    """The same numbers as without compilation; torch compiles one graph, none for evaluation."""
    losses = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name in ("eager", "compiled"):
        out = tmp_path / name
        assert finetune(config(classes, out, compile=name == "compiled", drop_path=0.0)) == 0
        losses.append([line["loss"] for line in metrics(out) if "loss" in line])
        assert {"val_top1", "ema_top1"} <= metrics(out)[-1].keys()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_missing_compiler_is_reported(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="needs a C\\+\\+ compiler"):
        finetune(config(classes, tmp_path / "run", compile=True))
    assert not (tmp_path / "run").exists()


def test_an_unsupported_layer_decay_writes_nothing(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, layer_group: str) -> dict[str, int]:
        raise InputError("timm does not say what the layers are")

    monkeypatch.setattr("finetune.tasks.base.layer_depths", refuse)
    given = config(classes, tmp_path / "run", optim=FinetuneOptimConfig(layer_decay=0.5))
    with pytest.raises(InputError, match="does not say what the layers are"):
        finetune(given)
    assert not (tmp_path / "run").exists()


def test_predict_lists_every_image_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 2)
    for number in range(30):
        (images / f"bad {number}.png").write_bytes(b"none")
    out = tmp_path / "labels.csv"
    predict(PredictConfig(str(run), str(images), str(out), batch_size=7, workers=0))
    lines = (tmp_path / "labels.bad_images.jsonl").read_text().splitlines()
    listed = {json.loads(line)["path"] for line in lines}
    assert listed == {f"bad {number}.png" for number in range(30)}
