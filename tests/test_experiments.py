"""What the experiments stand on: folders of labels, steps done once, runs side by side."""

import argparse
import json
import subprocess
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.experiments import label_shares
from benchmarks.experiments.study import Study, across, label_share, shrink, tenth, with_test


def study(tmp_path, jobs=2):
    return Study(argparse.Namespace(out=tmp_path / "out", jobs=jobs, compile=False))


@pytest.fixture
def labelled(tmp_path):
    for split, count in (("train", 40), ("val", 10)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = (30, 20) if index else (8, 6)
                Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index}.png")
    return tmp_path / "data"


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_copies_are_shrunk_never_grown(labelled, tmp_path):
    out = shrink(labelled, tmp_path / "small", 10)
    for name, size in (("5", (15, 10)), ("0", (8, 6))):
        with Image.open(out / f"train/cat/{name}.jpg") as picture:
            assert picture.size == size
    assert len(names(out)) == 100


def test_shares_of_labels_hold_for_every_class_and_lie_within_each_other(labelled, tmp_path):
    shares = {n: label_share(labelled, n, tmp_path / str(n)) for n in (10, 30, 100)}
    found = {n: set(names(folder / "train")) for n, folder in shares.items()}
    assert {n: len(files) for n, files in found.items()} == {10: 8, 30: 24, 100: 80}
    assert sum(name.startswith("cat") for name in found[30]) == 12
    assert found[10] < found[30] < found[100]
    assert names(shares[10] / "val") == names(labelled / "val")
    rest = set(names(shares[30] / "rest"))
    assert rest.isdisjoint(found[30])
    assert rest | found[30] == found[100]


def test_a_test_split_is_half_of_val_where_there_is_none(labelled, tmp_path):
    out = with_test(labelled, tmp_path / "all")
    val, test = set(names(out / "val")), set(names(out / "test"))
    assert val.isdisjoint(test)
    assert val | test == set(names(labelled / "val"))
    assert len(test) == 10
    assert with_test(out, tmp_path / "again") == out


def test_a_tenth_trains_and_the_rest_judges(labelled, tmp_path):
    out = tenth(labelled / "train", tmp_path / "tenth")
    train, val = set(names(out / "train")), set(names(out / "val"))
    assert (len(train), len(val)) == (8, 72)
    assert train.isdisjoint(val)


def test_a_step_is_done_once_and_outlives_the_process(tmp_path):
    assert study(tmp_path).once("a", lambda: {"top1": 3.0}) == {"top1": 3.0}
    assert study(tmp_path).once("a", lambda: pytest.fail("done before")) == {"top1": 3.0}


def test_no_more_runs_at_a_time_than_asked_for_however_steps_nest(tmp_path, monkeypatch):
    running, most, lock = [], [], threading.Lock()
    pause = threading.Event()

    def run(command, **options):
        with lock:
            running.append(command)
            most.append(len(running))
        pause.wait(0.02)
        with lock:
            running.remove(command)
        return SimpleNamespace(stdout=json.dumps({"knn5": options["env"]["OMP_NUM_THREADS"]}))

    monkeypatch.setattr(subprocess, "run", run)
    one = study(tmp_path)
    inner = {n: partial(one.probe, tmp_path, tmp_path) for n in range(3)}
    found = one.together({name: partial(one.together, inner) for name in ("a", "b")})
    assert max(most) == 2
    assert [*found] == ["a", "b"]
    assert [*found["a"]] == [0, 1, 2]


def test_after_a_failure_nothing_more_is_begun(tmp_path, monkeypatch):
    begun = []

    def run(command, **options):
        begun.append(command)
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", run)
    one = study(tmp_path, jobs=1)
    with pytest.raises((subprocess.CalledProcessError, RuntimeError)):
        one.together({n: partial(one.probe, tmp_path, tmp_path) for n in range(5)})
    assert len(begun) == 1


def test_the_search_goes_on_while_the_best_rate_is_the_last(tmp_path, monkeypatch):
    """Top-1 peaks at 6.4e-2 and, of the two lengths, at the longer; test is of the seeds."""
    asked = []

    def finetune(name, data, *options):
        given = dict(zip(options[::2], options[1::2], strict=True))
        rate, epochs, seed = (given[k] for k in ("--optim.base_lr", "--epochs", "--seed"))
        asked.append((rate, epochs, seed))
        return {"val": 50 - abs(np.log2(rate / 6.4e-2)) + epochs / 100, "test": 40.0 + seed}

    one = study(tmp_path)
    monkeypatch.setattr(one, "finetune", finetune)
    found = label_shares._side(one, "10/scratch", (60, 150), tmp_path, [])
    assert (found["rate"], found["epochs"]) == (6.4e-2, 150)
    assert found["test"] == [40, 41, 42]
    assert sorted(rate for rate, epochs, _ in asked if epochs == 60) == [
        8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1
    ]  # fmt: skip
    assert len(asked) == 5 + 3


def test_top1_over_all_folds_is_one_for_features_that_are_the_label():
    labels = torch.arange(200) % 2
    values = torch.nn.functional.one_hot(labels, 4).float()
    folds = torch.arange(200) // 2 % 10
    assert across(values, labels, 2, folds) == {"knn20": 100.0, "linear": 100.0}
