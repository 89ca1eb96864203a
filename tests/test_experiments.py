"""Foundations of the experiments: labelled folders, steps done once, concurrent runs."""

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

from benchmarks.experiments import ablations, finetune_recipe, label_shares
from benchmarks.experiments.folders import label_share, shrink, tenth, with_test
from benchmarks.experiments.judge import across, compare
from benchmarks.experiments.study import Study, arguments
from fcmae.config.parsing import parse
from fcmae.config.pretraining import PretrainConfig
from finetune.config import FinetuneConfig


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


def test_copies_are_shrunk_but_never_enlarged(labelled, tmp_path):
    out = shrink(labelled, tmp_path / "small", 10)
    for name, size in (("5", (15, 10)), ("0", (8, 6))):
        with Image.open(out / f"train/cat/{name}.png.jpg") as picture:
            assert picture.size == size
    assert len(names(out)) == 100


def test_images_that_differ_only_in_their_suffix_are_both_copied(tmp_path):
    for ending in ("png", "jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}")
    assert names(shrink(tmp_path, tmp_path / "small", 8)) == ["a.jpg", "a.png.jpg"]


def test_label_shares_hold_for_every_class_and_are_nested(labelled, tmp_path):
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


def test_a_tenth_trains_and_the_rest_evaluates(labelled, tmp_path):
    out = tenth(labelled / "train", tmp_path / "tenth")
    train, val = set(names(out / "train")), set(names(out / "val"))
    assert (len(train), len(val)) == (8, 72)
    assert train.isdisjoint(val)


def test_a_finished_step_is_not_repeated_by_another_process(tmp_path):
    assert study(tmp_path).once("a", lambda: {"top1": 3.0}) == {"top1": 3.0}
    assert study(tmp_path).once("a", lambda: pytest.fail("done before")) == {"top1": 3.0}


def test_results_of_other_settings_are_refused(tmp_path):
    given = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    parse = arguments("", "", img_size=96, epochs=40, side=192).parse_args
    Study(parse([*given, "--precision", "bf16"])).once("a", lambda: 1.0)
    assert Study(parse([*given, "--precision", "bf16", "--jobs", "2"])).results["a"] == 1.0
    with pytest.raises(SystemExit, match="results of --precision bf16, not fp32: give --precision"):
        Study(parse(given))
    longer = parse([*given, "--precision", "bf16", "--epochs", "80"])
    with pytest.raises(SystemExit, match="--epochs 40, not 80"):
        Study(longer)
    assert Study(longer, named=["epochs"]).results["a"] == 1.0


@pytest.mark.parametrize(
    ("config", "options"),
    [
        *(pytest.param(PretrainConfig, given, id=name) for name, given in ablations.RUNS.items()),
        *(
            pytest.param(FinetuneConfig, given, id=name)
            for name, given in finetune_recipe.CHANGES.items()
        ),
    ],
)
def test_every_variant_changes_an_option(config, options):
    given = ["--data", "photos", "--out", "run"]
    assert (parse(config, [*given, *map(str, options)], "") != parse(config, given, "")) == bool(
        options
    )


def test_nested_steps_never_exceed_the_number_of_concurrent_runs(tmp_path, monkeypatch):
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


def test_after_a_failure_no_further_run_starts(tmp_path, monkeypatch):
    begun = []

    def run(command, **options):
        begun.append(command)
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", run)
    one = study(tmp_path, jobs=1)
    with pytest.raises((subprocess.CalledProcessError, RuntimeError)):
        one.together({n: partial(one.probe, tmp_path, tmp_path) for n in range(5)})
    assert len(begun) == 1


def test_the_search_continues_while_the_best_rate_is_the_last(tmp_path, monkeypatch):
    """Top-1 peaks at a rate of 6.4e-2 and at the second of four lengths. The test results are those
    of the seeds, and the first seed runs once at a length beyond."""
    asked = []

    def finetune(name, data, *options):
        given = dict(zip(options[::2], options[1::2], strict=True))
        rate, epochs, seed = (given[k] for k in ("--optim.base_lr", "--epochs", "--seed"))
        asked.append((rate, epochs, seed))
        return {
            "val": 50 - abs(np.log2(rate / 6.4e-2)) + min(epochs, 150) / 100,
            "test": 40.0 + seed,
        }

    one = study(tmp_path)
    monkeypatch.setattr(one, "finetune", finetune)
    monkeypatch.setattr(label_shares, "EPOCHS", {10: (60, 150, 300, 600)})
    monkeypatch.setattr(label_shares, "BEYOND", {10: 1200})
    found = label_shares._side(one, "10/scratch", 10, tmp_path, [])
    assert (found["rate"], found["epochs"]) == (6.4e-2, 150)
    assert found["test"] == [40, 41, 42]
    assert sorted(rate for rate, epochs, _ in asked if epochs == 60) == [
        8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 1.28e-1
    ]  # fmt: skip
    assert sorted(epochs for _, epochs, _ in asked)[5:] == [150, 150, 150, 300, 1200]
    assert asked[-1] == (6.4e-2, 1200, 0)
    assert {epochs: tops["val"] for epochs, tops in found["lengths"].items()} == {
        60: 50.6, 150: 51.5, 300: 51.5, 1200: 51.5
    }  # fmt: skip


def test_tables_and_figures_are_rebuilt_from_results_alone(labelled, tmp_path, monkeypatch, capsys):
    """A copy of results.json is enough: nothing is trained, and no weights are needed."""
    out = tmp_path / "out"
    out.mkdir()
    found = {
        "pretrain-8": {key: [[4, 30.0], [8, 40.0]] for key in label_shares.FROZEN},
        "probe/8": {"random": {name: {"top1": 20.0} for name in ("knn5", "knn20", "linear")}},
    }
    for side, top in (("scratch", 40.0), ("pretrain-8", 50.0)):
        for rate, epochs, seed in [
            *((rate, 60, 0) for rate in label_shares.RATES),
            *((1.6e-2, 150, seed) for seed in label_shares.SEEDS),
        ]:
            tops = top + seed - abs(np.log2(rate / 1.6e-2)) + epochs / 60
            name = f"10/{side}/rate-{rate:g}-epochs-{epochs}-seed-{seed}"
            found[name] = dict.fromkeys(("val", "test", "rest"), tops)
    (out / "results.json").write_text(json.dumps(found))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("nothing is to be run"))
    argv = ["_", "--data", str(labelled), "--out", str(out), "--epochs", "8", "--shares", "10"]
    monkeypatch.setattr("sys.argv", argv)
    assert label_shares.main() == 0
    scores, lengths = (
        table.splitlines()[-4:] for table in capsys.readouterr().out.split("\n\n")[::2]
    )
    assert scores[-2].count("53.5 ± 1.0 (+10.0)") == 3
    assert scores[-1].count("43.5 ± 1.0") == 3
    assert lengths == [
        "| 10 % | pretrained | 60 | 51.0 | 51.0 | 51.0 |",
        "| 10 % | pretrained | 150 | 52.5 | 52.5 | 52.5 |",
        "| 10 % | scratch | 60 | 41.0 | 41.0 | 41.0 |",
        "| 10 % | scratch | 150 | 42.5 | 42.5 | 42.5 |",
    ]
    assert {path.name for path in out.glob("*.png")} == {"label_shares.png", "frozen_features.png"}


def test_pretraining_runs_are_judged_by_fine_tuning_and_features(labelled, tmp_path, monkeypatch):
    """Fine-tuning trains on a tenth and is evaluated on the rest; features are those of all."""
    asked = {}

    def pretrain(self, name, data, *options, module):
        asked[name] = (module, options)
        run = self.out / name
        run.mkdir()
        held = {"epoch": 2, "holdout_loss": 0.5, "diversity/stages.0.blocks.0": 0.4}
        steps = [{"step": 10 * n, "images_per_s": 100.0 + n} for n in range(3)]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, (*steps, held))))
        return run

    def finetune(self, name, data, *options):
        learnt = options[options.index("--weights") + 1] != "none"
        return {"val": 10.0 * len(names(data / "train")) + learnt}

    def embed(self, source, data, *options):
        paths = names(data)
        return torch.tensor([[1.0, 0] if p.startswith("cat") else [0, 1.0] for p in paths]), paths

    for fake in (pretrain, finetune, embed):
        monkeypatch.setattr(Study, fake.__name__, fake)
    options = arguments("", "", img_size=32, epochs=2, side=20).parse_args(
        ["--data", str(labelled / "train"), "--out", str(tmp_path / "out")]
    )
    runs = {"a": [], "b": ["--mask_ratio", 0.3]}
    found = compare(Study(options), options, runs, lambda name: f"module_{name}")
    assert asked["b"][0] == "module_b"
    assert asked["b"][1][-2:] == ("--mask_ratio", 0.3)
    assert [*found] == ["no pretraining", "a", "b"]
    assert found["no pretraining"] == {"tuned": 80.0}
    assert found["a"] == {
        "tuned": 81.0, "knn20": 100.0, "linear": 100.0, "holdout_loss": 0.5,
        "diversity": {"diversity/stages.0.blocks.0": 0.4}, "images_per_s": 101.0,
    }  # fmt: skip


def test_top1_over_all_folds_is_one_for_features_that_are_the_label():
    labels = torch.arange(200) % 2
    values = torch.nn.functional.one_hot(labels, 4).float()
    folds = torch.arange(200) // 2 % 10
    assert across(values, labels, 2, folds) == {"knn20": 100.0, "linear": 100.0}


@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "squeezenet1_1"])
def test_models_of_torchvision_are_built_by_timm(name: str) -> None:
    from benchmarks.experiments import with_torchvision  # noqa: F401
    from finetune.model import Start, build_model, classifier_names

    model, arguments = build_model(Start(name, {}), 5, 3, (64, 64))
    assert arguments == {}
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    (last,) = classifier_names(model)
    assert 5 in tuple(model.state_dict()[f"{last}.weight"].shape)
