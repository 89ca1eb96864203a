"""Tar shards: what is indexed, what is read, what is noticed; runs equal those on loose files."""

import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fcmae.commands.shard import ShardConfig
from fcmae.data.file_list import find_images
from fcmae.data.find import find_source, load_source
from fcmae.data.image import BadImage
from fcmae.data.labelled import find_labelled
from fcmae.data.sharding import RECORD, shard
from fcmae.data.shards import INDEX, ShardList, expand, find_shards, index_shards, open_shards
from fcmae.data.sources import split_holdout
from finetune.labels import prefix_of
from sparse.errors import InputError
from tests.cli import TINY, kill_all, metrics, reaped, run, start, wait_for_steps, weights
from tests.conftest import write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of images, with names that tar has to extend."""
    root = tmp_path_factory.mktemp("loose")
    write_pictures(root / "a", 7, size=64)
    write_pictures(root / "ü ber.b", 6, size=64)
    (root / "a" / ("long" * 40 + ".png")).write_bytes((root / "a" / "0000.png").read_bytes())
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "shards"
    assert shard(ShardConfig(str(folder), str(out), per_shard=5, classes=True)) == 14
    return out


def content(source, index) -> bytes:
    opened = source.open(index)
    if isinstance(opened, bytes):
        return Path(os.fsdecode(opened)).read_bytes()
    with opened:
        return opened.read()


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def killed_after(steps: int, out: Path, command: list[object]) -> None:
    """Start a run and kill it once it has logged a number of steps."""
    with reaped():
        process = start(*command)
        wait_for_steps(out, steps, process)
        kill_all(process)
    assert not (out / "exported").exists()


def test_shards_hold_the_images_in_their_order_under_their_names(folder, shards):
    loose, packed = find_images(str(folder)), find_source(str(shards))
    assert isinstance(packed, ShardList)
    assert [packed.key(n) for n in range(14)] == [loose.key(n) for n in range(14)]
    assert [content(packed, n) for n in range(14)] == [content(loose, n) for n in range(14)]
    assert packed.fingerprint() == loose.fingerprint()
    assert packed.classes == ("a", "ü ber.b")
    assert packed.labels.tolist() == [0] * 8 + [1] * 6
    names = sorted(path.name for path in shards.iterdir())
    assert names == [INDEX, RECORD, *(f"shard-{n:06}.tar" for n in range(3))]


def test_pythons_tarfile_reads_the_shards(folder, shards):
    with tarfile.open(shards / "shard-000001.tar") as tar:
        names = tar.getnames()
        file = tar.extractfile("a/0005.png")
        assert file is not None
        assert file.read() == (folder / "a" / "0005.png").read_bytes()
        label = tar.extractfile("a/0005.cls")
        assert label is not None
        assert label.read() == b"a"
    assert names[:2] == ["a/0005.png", "a/0005.cls"]
    assert len(names) == 10


def test_a_selection_reads_its_own_images_and_is_stored(shards, tmp_path):
    packed = find_source(str(shards))
    picked = packed.select([9, 2, 2])
    assert [content(picked, n) for n in range(3)] == [content(packed, n) for n in (9, 2, 2)]
    picked.save(tmp_path / "list")
    again = load_source(tmp_path / "list")
    assert isinstance(again, ShardList)
    assert [again.name(n) for n in range(3)] == [packed.name(n) for n in (9, 2, 2)]
    assert again.fingerprint() == picked.fingerprint() != packed.fingerprint()
    assert again.labels.tolist() == [1, 0, 0]
    assert again._files == {}
    assert content(again, 0) == content(packed, 9)
    copy = pickle.loads(pickle.dumps(again))  # noqa: S301
    assert (len(again._files), len(copy._files)) == (1, 0)
    assert content(copy, 0) == content(packed, 9)


def test_shards_are_named_by_folder_file_or_pattern(shards):
    paths = [str(shards / f"shard-{n:06}.tar") for n in range(3)]
    assert find_shards(str(shards)) == paths
    assert find_shards(f"{shards}/shard-{{000000..000002}}.tar") == paths
    assert find_shards(paths[1]) == paths[1:2]
    assert expand("x-{8..10}-{a,b}.tar") == [f"x-{n}-{w}.tar" for n in (8, 9, 10) for w in "ab"]
    assert expand("{0098..0101}") == ["0098", "0099", "0100", "0101"]
    assert len(find_source(paths[:2])) == 10
    with pytest.raises(InputError, match=r"has a descending range: give \{1\.\.3\}"):
        find_source("x-{3..1}.tar")


def test_packing_again_keeps_what_is_there_and_repairs_the_rest(folder, tmp_path):
    config = ShardConfig(str(folder), str(tmp_path / "out"), per_shard=5)
    shard(config)
    paths = sorted((tmp_path / "out").glob("*.tar"))
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    damaged = bytearray(before[1][0])
    damaged[700] ^= 1
    paths[1].write_bytes(damaged)
    paths[2].unlink()
    shard(config)
    after = [(path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    assert [one for one, _ in after] == [one for one, _ in before]
    assert after[0] == before[0]
    for change in ({"per_shard": 6}, {"classes": True}):
        other = ShardConfig(str(folder), str(tmp_path / "out"), **{"per_shard": 5} | change)
        with pytest.raises(InputError, match="holds shards of other images or settings"):
            shard(other)
    (tmp_path / "mine").mkdir()
    write_tar(tmp_path / "mine" / "shard-000000.tar", {"x.png": b"x"})
    with pytest.raises(InputError, match=r"holds shard-000000.tar: give a new folder"):
        shard(ShardConfig(str(folder), str(tmp_path / "mine")))


def test_names_that_do_not_work_in_shards_are_refused_before_any_work(folder, tmp_path):
    out = tmp_path / "out"
    listed = tmp_path / "list.txt"
    for line in (str(folder / "a" / "0000.png"), "../x/y.png"):
        listed.write_text(line)
        with pytest.raises(InputError, match="has no path below a folder"):
            shard(ShardConfig(str(listed), str(out)))
    for half in ("x", "y"):
        write_pictures(tmp_path / half, 2, size=32)
    with pytest.raises(InputError, match="is there twice, from different folders"):
        shard(ShardConfig([str(tmp_path / "x"), str(tmp_path / "y")], str(out)))
    assert not out.exists()


def test_a_mask_beside_an_image_is_not_lost(tmp_path):
    write_pictures(tmp_path / "a", 2, size=64)
    (tmp_path / "a" / "0001.png.msk").write_bytes(b"")
    with pytest.raises(InputError, match=r"0001.png' has a mask beside it \(.msk\)"):
        shard(ShardConfig(str(tmp_path / "a"), str(tmp_path / "out")))


def test_an_index_is_used_only_for_its_shards(shards, tmp_path, monkeypatch, caplog):
    paths = find_shards(str(shards))
    monkeypatch.setattr("fcmae.data.shards.index_shards", None)
    assert len(open_shards(paths)) == 14
    monkeypatch.undo()
    (tmp_path / "moved").mkdir()
    for path in shards.iterdir():
        (tmp_path / "moved" / path.name).write_bytes(path.read_bytes())
    moved = open_shards(find_shards(str(tmp_path / "moved")))
    assert "anew" not in caplog.text  # other times, the same headers
    assert content(moved, 3) == content(find_source(str(shards)), 3)
    part = find_shards(str(tmp_path / "moved"))[2:0:-1]
    assert [open_shards(part).name(n) for n in (0, 4)] == [moved.name(10), moved.name(5)]
    assert "anew" not in caplog.text
    write_tar(tmp_path / "moved" / "x.tar", {"x.png": b"x"})
    assert len(open_shards(find_shards(str(tmp_path / "moved")))) == 15
    assert "indexed anew: the index lacks " in caplog.text


@pytest.mark.parametrize("how", ["content replaced", "cut off", "removed", "renamed inside"])
def test_a_changed_shard_is_noticed_when_it_is_read(tmp_path, how):
    images = {f"{n}.png": bytes([n]) * 600 for n in range(3)}
    path = write_tar(tmp_path / "x.tar", images)
    packed = open_shards([str(path)])
    if how == "content replaced":
        write_tar(path, {"0.png": b"other" * 200, "1.png": b"1", "2.png": b"2"})
    elif how == "cut off":
        os.truncate(path, 2500)
    elif how == "removed":
        path.unlink()
    else:
        write_tar(path, {f"{n}.jpg": bytes([n]) * 600 for n in range(3)})
    with pytest.raises(BadImage, match=r"has changed since|No such file"):
        packed.open(2)
    with pytest.raises(InputError, match=r"shard .* (has changed since|is missing)"):
        packed.checked()


def cut(path: Path, where: int) -> None:
    os.truncate(path, where)


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


FIVE = {f"{n}.png": bytes([n]) * 600 for n in range(5)}
MEMBER = 512 + 1024
"""Bytes of a header and of the content of one of them."""


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda p: cut(p, 2 * MEMBER), f"cut off at byte {2 * MEMBER}"),
        (lambda p: cut(p, 2 * MEMBER + 300), f"cut off at byte {2 * MEMBER}"),
        (lambda p: cut(p, 2 * MEMBER + 700), "it ends inside of '2.png'"),
        (lambda p: flip(p, 2 * MEMBER + 3), f"damaged or cut off at byte {2 * MEMBER}"),
        (lambda p: p.write_bytes(2 * p.read_bytes()), "it has more after its end"),
    ],
)
def test_a_damaged_shard_is_not_shortened(tmp_path, harm, words):
    path = write_tar(tmp_path / "x.tar", FIVE)
    assert len(index_shards([str(path)])) == 5
    harm(path)
    with pytest.raises(InputError, match=words):
        index_shards([str(path)])


def test_hidden_names_links_and_a_leading_dot(tmp_path, caplog):
    path = tmp_path / "x.tar"
    names = ["./a/1.png", "./a/._1.png", "__MACOSX/a/1.png", ".thumb/1.png", "b/2.png"]
    write_tar(path, dict.fromkeys(names, b"x"))
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            info = tarfile.TarInfo(f"c/{kind.decode()}.png")
            info.type, info.linkname = kind, "./a/1.png"
            tar.addfile(info)
    found = index_shards([str(path)])
    assert [found.key(n) for n in range(len(found))] == [b"a/1.png", b"b/2.png"]
    assert "2 images in shards are links or sparse files and are skipped" in caplog.text


def test_a_stray_tar_file_does_not_hide_images(folder, tmp_path):
    write_pictures(tmp_path / "photos" / "cat", 3, size=32)
    write_tar(tmp_path / "photos" / "download.tar", {"x.png": b"x"})
    assert len(find_source(str(tmp_path / "photos"))) == 3
    (tmp_path / "photos" / "loop").symlink_to("loop")
    (tmp_path / "only").mkdir()
    write_tar(tmp_path / "only" / "0.tar", {"x.png": b"x"})
    (tmp_path / "only" / "._0.tar").write_bytes(b"junk")
    (tmp_path / "only" / "loop").symlink_to("loop")
    assert [Path(path).name for path in find_shards(str(tmp_path / "only"))] == ["0.tar"]


def test_changed_labels_are_a_changed_shard(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a.png": b"1", "a.cls": b"3"})
    assert open_shards([str(path)]).classes == ("3",)
    before = path.stat()
    write_tar(path, {"a.png": b"1", "a.cls": b"7"})
    assert path.stat().st_size == before.st_size
    assert open_shards([str(path)]).classes == ("7",)


def test_an_index_heals(shards, tmp_path, monkeypatch, caplog):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in shards.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    open_shards(find_shards(str(moved)))  # other times: headers are read once more
    monkeypatch.setattr("fcmae.data.shards._read_headers", None)
    assert len(open_shards(find_shards(str(moved)))) == 14
    monkeypatch.undo()
    with np.load(moved / INDEX) as stored:
        parts = dict(stored)
    np.savez(moved / INDEX, **parts | {"shard_ids": parts["shard_ids"] + 9})
    assert len(open_shards(find_shards(str(moved)))) == 14
    assert "indexed anew" in caplog.text
    np.testing.assert_array_equal(np.load(moved / INDEX)["shard_ids"], parts["shard_ids"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write_tar(p, {"a.png": b"1"}, "w:gz"), r"is compressed \(gzip\).*fcmae shard"),
        (lambda p: write_tar(p, {"a.txt": b"1"}), "holds no images: members like KEY.jpg"),
        (lambda p: p.write_bytes(b"no tar" * 200), "can't be read as a tar file"),
        (lambda p: p.mkdir(), "can't be read as a tar file"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path, make, words):
    make(tmp_path / "x.tar")
    with pytest.raises(InputError, match=words):
        index_shards([str(tmp_path / "x.tar")])


def test_names_tell_images_apart(tmp_path):
    one = write_tar(tmp_path / "1.tar", {"a.png": b"1", "b.png": b"2"})
    two = write_tar(tmp_path / "2.tar", {"b.png": b"3"})
    with pytest.raises(InputError, match=r"a member 'b.png' that '.*1.tar' has too: rename"):
        index_shards([str(one), str(two)])
    with tarfile.open(one, "a") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=r"1.tar' has a member 'a.png' twice"):
        index_shards([str(one)])


def test_shards_and_folders_do_not_mix(folder, shards):
    with pytest.raises(InputError, match=r"mixes shards with .*give either shards or images"):
        find_source([str(shards), str(folder)])
    with pytest.raises(InputError, match=r"missing.tar' can't be read as a tar file"):
        find_source(str(shards / "missing.tar"))


def test_classes_need_folders(tmp_path):
    write_pictures(tmp_path / "flat", 2, size=32)
    with pytest.raises(InputError, match="is in no folder, which would be its class: omit"):
        shard(ShardConfig(str(tmp_path / "flat"), str(tmp_path / "out"), classes=True))


def test_pretraining_on_shards_equals_that_on_files_also_resumed(folder, shards, tmp_path):
    """Bit for bit, also with another number of workers."""
    common = [*TINY, "--epochs", 25, "--batch_size", 4]
    run("pretrain", "--data", folder, "--out", tmp_path / "loose", *common)
    run("pretrain", "--data", shards, "--out", tmp_path / "packed", *common, "--workers", 2)
    assert weights(tmp_path / "packed") == weights(tmp_path / "loose") != b""
    again = ["pretrain", "--data", shards, "--out", tmp_path / "again", *common]
    killed_after(7, tmp_path / "again", again)
    run(*again, "--workers", 1)
    assert weights(tmp_path / "again") == weights(tmp_path / "loose")


def test_a_run_does_not_resume_on_changed_shards(folder, tmp_path):
    shard(ShardConfig(str(folder), str(tmp_path / "shards"), per_shard=5))
    command = ["pretrain", "--data", tmp_path / "shards", "--out", tmp_path / "run", *TINY]
    killed_after(6, tmp_path / "run", [*command, "--epochs", 200])
    path = tmp_path / "shards" / "shard-000000.tar"
    write_tar(path, {"a/0000.png": b"x"})
    done = run(*command, "--epochs", 200, code=2)
    assert "has changed since it was indexed: restore it" in done.stderr


def test_an_index_is_small_and_fast(tmp_path):
    """A hundredth of a million images: at most 64 bytes each, and loaded at once."""
    paths = []
    for number in range(10):
        members = {f"{number:03}{n:06}.jpg": b"" for n in range(1000)}
        paths.append(str(write_tar(tmp_path / f"{number}.tar", members)))
    began = time.perf_counter()
    packed = open_shards(paths)
    indexed = time.perf_counter() - began
    arrays = [getattr(packed, part) for part in ("names", "lengths", "shard_ids", "offsets")]
    arrays += [packed.sizes, packed.headers, packed.labels, packed._starts]
    assert sum(array.nbytes for array in arrays) <= 64 * len(packed)
    assert all(isinstance(array, np.ndarray) for array in arrays)
    began = time.perf_counter()
    open_shards(paths)
    assert time.perf_counter() - began < min(1.0, indexed)


@pytest.fixture(scope="module")
def labelled(classes, tmp_path_factory) -> Path:
    """`classes` as shards."""
    out = tmp_path_factory.mktemp("labelled")
    for split in ("train", "val"):
        config = ShardConfig(str(classes / split), str(out / split), per_shard=10, classes=True)
        shard(config)
    return out


@pytest.mark.slow
def test_fine_tuning_on_shards_equals_that_on_folders_also_resumed(classes, labelled, tmp_path):
    common = ["--model", "atto", "--img_size", 32, "--epochs", 2, "--batch_size", 8, "--workers", 0]
    common += ["--log_steps", 1, "--checkpoint_steps", 2]
    run("finetune", classes, "--out", tmp_path / "loose", *common)
    run("finetune", labelled, "--out", tmp_path / "packed", *common)
    assert weights(tmp_path / "packed") == weights(tmp_path / "loose") != b""
    assert metrics(tmp_path / "packed", "val_top1") == metrics(tmp_path / "loose", "val_top1")
    again = ["finetune", labelled, "--out", tmp_path / "again", *common]
    killed_after(3, tmp_path / "again", again)
    run(*again)
    assert weights(tmp_path / "again") == weights(tmp_path / "loose")
    scores = [
        json.loads(run("evaluate", tmp_path / "loose", "--data", data, "--json").stdout)
        for data in (classes, labelled)
    ]
    assert scores[0]["per_class"] == scores[1]["per_class"]


def test_labels_of_shards_are_checked(classes, labelled, tmp_path):
    found = find_labelled(str(labelled / "train"), 0.25)
    expected = find_labelled(str(classes / "train"), 0.25)
    assert found.names == expected.names
    assert found.val.labels.tolist() == expected.val.labels.tolist()
    assert [found.val.source.key(n) for n in range(len(found.val.source))] == [
        expected.val.source.key(n) for n in range(len(expected.val.source))
    ]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    write_tar(tmp_path / "train" / "0.tar", {"a.png": b"1", "b.png": b"2", "b.cls": b"x"})
    write_tar(tmp_path / "val" / "0.tar", {"a.png": b"1", "a.cls": b"y"})
    with pytest.raises(InputError, match="has one class, 'x': give at least two"):
        find_labelled(str(tmp_path), 0.0)
    more = {"a.png": b"1", "a.cls": b"z", "b.png": b"2", "b.cls": b"x", "c.png": b"3"}
    write_tar(tmp_path / "train" / "0.tar", more)
    assert find_labelled(str(labelled / "train"), 0.25).train.prefix == ""
    with pytest.raises(InputError, match="has classes that train does not have: 'y'"):
        find_labelled(str(tmp_path), 0.0)
    write_tar(tmp_path / "val" / "0.tar", {"a.png": b"1"})
    with pytest.raises(InputError, match=r"has shards without labels: members like KEY.cls"):
        find_labelled(str(tmp_path), 0.0)


def test_classes_that_no_image_has_are_left_out(labelled, tmp_path):
    for number in range(2):
        source = labelled / "train" / f"shard-{number:06}.tar"
        (tmp_path / source.name).write_bytes(source.read_bytes())
    whole = find_labelled(str(tmp_path), 0.25)
    assert whole.names == ("class 0", "class 1", "class 2")
    (tmp_path / "shard-000001.tar").unlink()
    assert find_labelled(str(tmp_path), 0.25).names == ("class 0", "class 1")


def test_a_held_out_split_is_that_of_the_files(tmp_path):
    write_pictures(tmp_path / "photos" / "x", 520, size=32)
    shard(ShardConfig(str(tmp_path / "photos"), str(tmp_path / "shards")))
    loose, packed = (find_source(str(tmp_path / name)) for name in ("photos", "shards"))
    for one, other in zip(split_holdout(loose, 32), split_holdout(packed, 32), strict=True):
        assert one.tolist() == other.tolist()


def test_names_of_images_do_not_change_when_a_run_resumes(labelled):
    config = SimpleNamespace(data=str(labelled), labels=None)
    for part, split in zip(("train", "val"), find_labelled(str(labelled), 0.0)[:2], strict=True):
        assert prefix_of(split.source, config) == split.prefix == f"{part}/"
