"""Hugging Face datasets: what is opened, read and noticed; runs equal those on loose files."""

import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from fcmae.commands.shard import ShardConfig
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.dataset_list import DatasetList, open_splits
from fcmae.data.file_list import find_images
from fcmae.data.find import find_source, load_source
from fcmae.data.image import BadImage
from fcmae.data.labelled import Split, find_labelled, labels_of
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sharding import shard
from fcmae.data.sources import NO_LABEL, split_holdout
from fcmae.data.statistics import Preprocessing
from finetune.config import FinetuneConfig
from finetune.labels import find_labels, prefix_of, resolve_task
from finetune.tasks import TASKS
from finetune.tasks.classify import Classify
from sparse.errors import InputError
from tests.cli import TINY, kill_all, metrics, run, start, wait_for_steps, weights
from tests.conftest import write_pictures

TYPES = Features({"image": Image(), "label": ClassLabel(names=["a", "ü b"])})


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """The cache of `datasets`, here and in commands."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("loose")
    write_pictures(root / "a", 7, size=64)
    write_pictures(root / "ü b", 6, seed=1, size=64)
    return root


def rows(folder: Path) -> list[dict[str, Any]]:
    """The images of a folder of two classes, in the order of a list of files."""
    loose = find_images(str(folder))
    names = [os.fsdecode(loose.key(n)) for n in range(len(loose))]
    return [
        {
            "image": {"bytes": (folder / name).read_bytes(), "path": name},
            "label": TYPES["label"].str2int(name.split("/")[0]),
        }
        for name in names
    ]


@pytest.fixture(scope="module")
def table(folder) -> Any:
    return Dataset.from_list(rows(folder), features=TYPES)


@pytest.fixture(scope="module")
def saved(table, tmp_path_factory) -> Path:
    """Splits train and validation, written by `save_to_disk`; the former in two files."""
    place = tmp_path_factory.mktemp("saved") / "photo:s"
    splits = DatasetDict({"train": table, "validation": table.select([12, 0, 3])})
    splits.save_to_disk(place, num_shards={"train": 2, "validation": 1})
    return place


@pytest.fixture(scope="module")
def parquet(table, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("parquet")
    table.to_parquet(place / "train-00000-of-00001.parquet")
    table.select([12, 0, 3]).to_parquet(place / "test-00000-of-00001.parquet")
    return place


def content(source, index) -> bytes:
    opened = source.open(index)
    if isinstance(opened, bytes):
        return Path(os.fsdecode(opened)).read_bytes()
    return opened.read()


def contents(source) -> list[bytes]:
    return [content(source, n) for n in range(len(source))]


def names(source) -> list[str]:
    return [source.name(n) for n in range(len(source))]


def write(place: Path, columns: dict[str, list[Any]], types: dict[str, Any]) -> str:
    Dataset.from_dict(columns, features=Features(types)).save_to_disk(place)
    return f"hf:{place}"


def one(value: Any) -> list[dict[str, Any]]:
    return [{"bytes": value, "path": None}]


def test_parquet_has_the_images_of_the_files_under_their_names(folder, parquet):
    loose, found = find_images(str(folder)), find_source(f"hf:{parquet}")
    assert isinstance(found, DatasetList)
    assert names(found) == names(loose)
    assert contents(found) == contents(loose)
    assert found.fingerprint() == loose.fingerprint()


def test_what_save_to_disk_wrote_is_read_where_it_lies(folder, saved, tmp_path, monkeypatch):
    """It keeps no folders of paths, so here they are not distinct, and names are positions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = find_source(f"hf:{saved}")
    assert contents(found) == contents(find_images(str(folder)))
    assert names(found) == [str(n) for n in range(13)]
    assert not (tmp_path / "cache").exists()
    assert contents(find_source(f"hf:{saved}/train")) == contents(found)


def test_a_dataset_is_a_folder_a_pattern_a_file_or_a_name(
    parquet, saved, table, tmp_path, monkeypatch
):
    whole = contents(find_source(f"hf:{saved}"))
    assert contents(find_source(f"hf:{parquet}/train-*.parquet")) == whole
    assert contents(find_source(f"hf:{parquet}/train-00000-of-00001.parquet")) == whole
    assert contents(find_source(f"hf:{saved}/train/*.arrow")) == whole
    monkeypatch.chdir(saved.parent)
    monkeypatch.setenv("HOME", str(saved.parent))
    assert contents(find_source("hf:photo:s")) == contents(find_source("hf:~/photo:s")) == whole
    assert find_source("hf:photo:s").place.location == str(saved)
    few = [whole[n] for n in (12, 0, 3)]
    for given in ("validation", "validation:image"):
        assert contents(find_source(f"hf:photo:s:{given}")) == few
    assert contents(find_source("hf:photo:s::image")) == whole
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name: asked.append(name) or DatasetDict({"all": table})
    )
    assert contents(find_source("hf:user/name")) == contents(find_source("hf:name:all")) == whole
    assert asked == ["user/name", "name"]


def test_a_selection_is_stored_and_opened_again(parquet, tmp_path):
    found = find_source(f"hf:{parquet}")
    picked = found.select([9, 2, 2]).select([1, 0])
    assert contents(picked) == [content(found, n) for n in (2, 9)]
    picked.save(tmp_path / "list")
    again = load_source(tmp_path / "list")
    assert names(again) == names(picked)
    assert again.fingerprint() == picked.fingerprint() != found.fingerprint()
    assert contents(again) == contents(picked)
    copy = pickle.loads(pickle.dumps(picked))  # noqa: S301
    assert (copy._column, copy.place) == (None, picked.place)
    assert contents(copy) == contents(picked)
    assert len(pickle.dumps(picked)) < len(content(found, 0))
    with np.load(tmp_path / "list") as stored:
        parts = dict(stored)
    np.savez(tmp_path / "bad.npz", **parts | {"positions": parts["positions"][:1]})
    with pytest.raises(InputError, match=r"bad.npz' is missing or damaged"):
        load_source(tmp_path / "bad.npz")


def test_a_changed_dataset_is_noticed(table, tmp_path):
    place = tmp_path / "set"

    def save(changed: Any) -> None:
        shutil.rmtree(place, ignore_errors=True)
        DatasetDict({"train": changed}).save_to_disk(place)

    save(table)
    find_source(f"hf:{place}").select([3, 1]).save(tmp_path / "list")
    save(table)
    assert len(load_source(tmp_path / "list")) == 2
    longer = [
        {"bytes": b"x", "path": None},
        *table.cast_column("image", Image(decode=False))[1:]["image"],
    ]
    reordered = table.select([1, 0, *range(2, 13)])
    for changed in (
        table.select(range(12)),
        reordered,
        table.remove_columns("image").add_column("image", longer, feature=Image()),
        table.rename_column("image", "photo"),
    ):
        save(changed)
        with pytest.raises(InputError, match=r"set' has changed since the run began: restore it"):
            load_source(tmp_path / "list")
    load_source(tmp_path / "list", check=False)
    shutil.rmtree(place)
    with pytest.raises(InputError, match=r"set' can't be read as a dataset \(it does not exist\)"):
        load_source(tmp_path / "list")


def test_rows_without_bytes(folder, tmp_path):
    path = str(folder / "a" / "0000.png")
    images = [{"bytes": None, "path": path}, {"bytes": b"1", "path": "x"}, None]
    Dataset.from_dict({"image": images}, features=Features({"image": Image()})).to_parquet(
        tmp_path / "x.parquet"
    )
    found = find_source(f"hf:{tmp_path}/x.parquet")
    assert content(found, 0) == Path(path).read_bytes()
    assert content(found, 1) == b"1"
    with pytest.raises(BadImage, match="neither bytes nor a path"):
        found.open(2)
    given = write(tmp_path / "binary", {"b": [b"1", None], "n": [1, 2]}, {
        "b": Value("large_binary"), "n": Value("int64")
    })  # fmt: skip
    assert content(find_source(given), 0) == b"1"
    with pytest.raises(BadImage):
        find_source(given).open(1)


def test_splits_and_columns_are_chosen_or_named(tmp_path):
    two = {"left": one(b"1"), "right": one(b"22"), "raw": [b"333"], "n": [4]}
    types = {"left": Image(), "right": Image(), "raw": Value("binary"), "n": Value("int64")}
    given = write(tmp_path / "two", two, types)
    with pytest.raises(InputError, match=r"no single column of images.*left \(Image\).*n \(int64"):
        find_source(given)
    for column, expected in (("left", b"1"), ("right", b"22"), ("raw", b"333")):
        assert contents(find_source(f"{given}::{column}")) == [expected]
    for column in ("n", "middle"):
        with pytest.raises(InputError, match=f"no column '{column}' of images: give hf:"):
            find_source(f"{given}:train:{column}")
    with pytest.raises(InputError, match="no single column of images"):
        find_source(write(tmp_path / "numbers", {"n": [1]}, {"n": Value("int64")}))
    table = datasets.load_from_disk(tmp_path / "two")
    empty = open_splits(given)._replace(tables={"train": table.select([])})
    with pytest.raises(InputError, match="no rows in 'train': give another split"):
        empty._replace(column="left").images("train")
    DatasetDict({"x": table, "y": table}).save_to_disk(tmp_path / "parts")
    with pytest.raises(InputError, match=r"no split 'train': name one of 'x', 'y', as in hf:"):
        find_source(f"hf:{tmp_path}/parts")
    with pytest.raises(InputError, match=r"no split 'z': name one of"):
        find_source(f"hf:{tmp_path}/parts:z")
    assert len(find_source(f"hf:{tmp_path}/parts:y:raw")) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("hf:./missing", "neither a path here nor a name on the Hub: give hf:FOLDER"),
        ("hf:missing.parquet", "neither a path here nor a name on the Hub"),
        ("hf:a/b/c", "neither a path here nor a name on the Hub"),
        ("hf:", "neither a path here nor a name on the Hub"),
        ("hf:user/name:train:image:more", "neither a path here nor a name on the Hub"),
        ("hf:user/name", r"can't be read as a dataset \(.*(reach|offline).*\): give a folder"),
        ("hf:folder", r"\(it holds no Parquet or Arrow files\)"),
        ("hf:folder/notes.txt", r"\(not all its files are .parquet, or all .arrow\)"),
        ("hf:broken.parquet", "can't be read as a dataset"),
        ("hf:cut", "can't be read as a dataset"),
        (["hf:folder", "folder"], "is one of several: give one dataset alone"),
    ],
)
def test_what_is_no_dataset_is_refused_in_one_line(
    given, words, saved, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    shutil.copytree(saved / "train", tmp_path / "cut")
    for path in (tmp_path / "cut").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=words) as caught:
        find_source(given)
    assert "\n" not in str(caught.value)
    assert "examples" not in capfd.readouterr().err  # no progress bar


def test_a_missing_package_is_named(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs datasets.*: pip install 'fcmae\[datasets\]'"):
        find_source(f"hf:{saved}")


def test_labels_are_those_of_the_files(folder, parquet, saved):
    for given, val in ((saved, "validation"), (parquet, "test")):
        found = find_labelled(f"hf:{given}", 0.0)
        assert found.names == ("a", "ü b")
        assert found.train.labels.tolist() == [0] * 7 + [1] * 6
        assert found.val.labels.tolist() == [1, 0, 0]
        assert (found.train.prefix, found.val.prefix) == ("train/", f"{val}/")
        config = SimpleNamespace(data=f"hf:{given}", labels=None)
        for split in found[:2]:
            assert prefix_of(split.source, config) == split.prefix
    found, loose = find_labelled(f"hf:{parquet}", 0.3), find_labelled(str(folder), 0.3)
    assert found.val.labels.tolist() == loose.val.labels.tolist()
    assert names(found.val.source) == names(loose.val.source)
    measured = Classify.find_split(Path(f"hf:{saved}"), "val", ("ü b", "a"))
    assert measured.labels.tolist() == [0, 1, 1]
    measured = Classify.find_split(Path(f"hf:{saved}:train"), "val", ("ü b", "a"))
    assert (len(measured.source), measured.prefix) == (13, "train/")
    with pytest.raises(InputError, match="no split 'test': name one of 'train', 'validation'"):
        Classify.find_split(Path(f"hf:{saved}"), "test", ("ü b", "a"))
    with pytest.raises(InputError, match="has classes that the model does not have: 'a'"):
        Classify.find_split(Path(f"hf:{saved}"), "val", ("ü b", "c"))


@pytest.mark.parametrize("task", ["multilabel", "segment", "detect"])
def test_a_dataset_has_classes_only(saved, task, tmp_path):
    config = FinetuneConfig(data=f"hf:{saved}", out=str(tmp_path))
    with pytest.raises(InputError, match=f"photo:s' has no labels for {task}: expected"):
        find_labels(TASKS[task], config, Path(config.data))
    assert resolve_task("auto", Path(config.data)) is Classify


def test_columns_of_labels(tmp_path, caplog):
    images = {"image": [{"bytes": b"x" * n, "path": None} for n in range(1, 6)]}

    def found(name: str, **columns: tuple[list[Any], Any]) -> DatasetList:
        values = {key: column for key, (column, _) in columns.items()}
        types = {key: kind for key, (_, kind) in columns.items()}
        given = write(tmp_path / name, images | values, {"image": Image()} | types)
        return open_splits(given).images("train", labelled=True)

    numbers = found("numbers", label=([10, 9, -1, None, 9], Value("int16")))
    assert (numbers.classes, numbers.labels.tolist()) == (("9", "10"), [1, 0, -1, -1, 0])
    words = found("words", labels=(["b", "a", "", None, "b"], Value("string")))
    assert (words.classes, words.labels.tolist()) == (("a", "b"), [1, 0, -1, -1, 1])
    coded = ([1, 2, -1, None, 1], ClassLabel(names=["z", "y", "x"]))
    assert found("coded", other=coded).classes == ("z", "y", "x")
    given = f"hf:{tmp_path}/coded"
    data = find_labelled(given, 0.5)
    assert data.names == ("y", "x")
    assert len(data.train.source) + len(data.val.source) == 3
    assert "2 images in data 'hf:" in caplog.text
    assert labels_of(data.val.source, ("x", "y")).tolist() == [1]
    assert find_source(given).labels.tolist() == [NO_LABEL] * 5
    for name, columns in {
        "none": {},
        "two": {"p": coded, "q": coded},
        "both": {"label": ([1] * 5, Value("int8")), "labels": ([2] * 5, Value("int8"))},
        "numeric": {"label": ([0.5] * 5, Value("float32"))},
    }.items():
        with pytest.raises(InputError, match="no single column of classes, of type ClassLabel"):
            found(name, **columns)
    with pytest.raises(InputError, match=r"names one split, and two are needed: give --val_frac"):
        find_labelled(f"{given}:train", 0.0)
    with pytest.raises(InputError, match=r"has no split validation or val or test, and two"):
        find_labelled(given, 0.0)
    found("unlabelled", label=([None] * 5, Value("string")))
    with pytest.raises(InputError, match="has no image with a label"):
        find_labelled(f"hf:{tmp_path}/unlabelled", 0.2)


def test_a_held_out_split_is_that_of_the_files(tmp_path):
    buffer = io.BytesIO()
    PillowImage.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "photos").mkdir()
    for number in range(520):
        (tmp_path / "photos" / f"{number:03}.png").write_bytes(buffer.getvalue())
    loose = find_images(str(tmp_path / "photos"))
    images = [{"bytes": buffer.getvalue(), "path": name} for name in names(loose)]
    found = find_source(write(tmp_path / "set", {"image": images}, {"image": Image()}))
    for one_, other in zip(split_holdout(loose, 32), split_holdout(found, 32), strict=True):
        assert one_.tolist() == other.tolist()


def test_forked_workers_read_the_same(saved):
    source = find_source(f"hf:{saved}")
    images = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    batches = []
    for workers in (0, 2):
        dataset = PretrainDataset(Split(source), images, PretrainConfig("", ""))
        loader = make_loader(dataset, StepSampler(len(source), 4, 0, 0, 6), workers)
        batches.append([batch.images.numpy() for batch in loader])
    for first, second in zip(*batches, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_pretraining_equals_that_on_files_also_resumed(folder, table, tmp_path):
    """Bit for bit, killed in mid-epoch and resumed with another number of workers; but not on a
    dataset that has changed since."""
    place, out = tmp_path / "set", tmp_path / "run"
    table.save_to_disk(place)
    common = [*TINY, "--epochs", 12, "--batch_size", 4]
    run("pretrain", "--data", folder, "--out", tmp_path / "loose", *common)
    command = ["pretrain", "--data", f"hf:{place}", "--out", out, *common]
    process = start(*command, "--workers", 2)
    wait_for_steps(out, 7, process)
    kill_all(process)
    assert not (out / "exported").exists()
    place.rename(tmp_path / "kept")
    table.select(range(12)).save_to_disk(place)
    done = run(*command, code=2)
    assert done.stderr.count("\n") == 1
    assert "has changed since the run began: restore it or start over" in done.stderr
    shutil.rmtree(place)
    (tmp_path / "kept").rename(place)
    run(*command, "--workers", 1)
    assert weights(out) == weights(tmp_path / "loose") != b""


@pytest.mark.slow
def test_every_command_takes_a_dataset(classes, tmp_path):
    parts = {
        split: Dataset.from_dict(
            {
                "image": [str(path) for path in sorted((classes / split).rglob("*.png"))],
                "label": [
                    int(path.parent.name[-1]) for path in sorted((classes / split).rglob("*.png"))
                ],
            },
            features=Features(
                {"image": Image(), "label": ClassLabel(names=[f"class {n}" for n in range(3)])}
            ),
        )
        for split in ("train", "val")
    }
    DatasetDict(parts).save_to_disk(tmp_path / "set")
    data, tuned = f"hf:{tmp_path}/set", tmp_path / "tuned"
    common = ["--model", "atto", "--img_size", 32, "--epochs", 2, "--batch_size", 8, "--workers", 0]
    common += ["--log_steps", 1, "--checkpoint_steps", 2]
    run("finetune", classes, "--out", tmp_path / "loose", *common)
    process = start("finetune", data, "--out", tuned, *common)
    wait_for_steps(tuned, 3, process)
    kill_all(process)
    run("finetune", data, "--out", tuned, *common)
    assert weights(tuned) == weights(tmp_path / "loose") != b""
    assert metrics(tuned, "val_top1") == metrics(tmp_path / "loose", "val_top1")
    scores = json.loads(run("evaluate", tuned, "--data", data, "--json").stdout)
    assert (scores["split"], scores["n"], len(scores["per_class"])) == ("val", 12, 3)
    probed = json.loads(run("probe", tuned, "--data", data, "--json").stdout)
    assert (probed["train"], probed["val"]) == (24, 12)
    run("predict", tuned, "--images", f"{data}:val", "--out", tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text().splitlines()[1].startswith("0,class")
    run("embed", tuned, "--images", data, "--out", tmp_path / "features.npz")
    assert np.load(tmp_path / "features.npz")["features"].shape == (24, 320)
    pretrained = tmp_path / "pretrained"
    run(
        "pretrain", f"{data}:train", "--out", pretrained, *TINY, "--epochs", 1, "--probe.data", data
    )
    assert metrics(pretrained, "probe_linear")
    pictures = ["--images", data, "--out", tmp_path / "x.png"]
    run("reconstruct", pretrained, *pictures)


def test_a_dataset_is_packed_into_shards(saved, parquet, tmp_path):
    whole = find_source(f"hf:{saved}")
    assert shard(ShardConfig(f"hf:{saved}", str(tmp_path / "positions"), per_shard=5)) == 13
    packed = find_source(str(tmp_path / "positions"))
    assert names(packed) == [f"{n}.png" for n in range(13)]
    assert contents(packed) == contents(whole)
    assert shard(ShardConfig(f"hf:{parquet}", str(tmp_path / "names"), classes=True)) == 13
    packed = find_source(str(tmp_path / "names"))
    assert names(packed) == names(find_source(f"hf:{parquet}"))
    assert packed.classes == ("a", "ü b")
    given = write(tmp_path / "text", {"image": one(b"text")}, {"image": Image()})
    with pytest.raises(InputError, match="image '0' can't be read: not an image of a known format"):
        shard(ShardConfig(given, str(tmp_path / "no")))
