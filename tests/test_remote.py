"""Sources under URLs: what is tried again, refused and kept, and that runs equal local ones."""

import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from benchmarks.remote import Server, flaky, write_list
from fcmae.commands.shard import ShardConfig
from fcmae.data import remote
from fcmae.data.file_list import FileList, find_images
from fcmae.data.find import find_source, load_source
from fcmae.data.image import BadImage
from fcmae.data.labelled import find_labelled
from fcmae.data.sharding import shard
from fcmae.data.shards import INDEX, ShardList, find_shards
from fcmae.data.table import find_in_table, labels_file, read_classes, read_table
from sparse.errors import InputError, RunError
from tests.cli import TINY, begin, kill_all, metrics, run, start, wait_for_steps, weights
from tests.conftest import write_pictures

NAMES = ["0000.png", "a b/50% #1?.png", "a b/ü.png", "a-b.png"]
"""In the byte order of their paths."""

PATTERN = "shards/shard-{000000..000004}.tar"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.001)
    yield
    remote.use_cache(None, 1)


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> Path:
    """Images whose names have to be quoted, and files that are not images."""
    root = tmp_path_factory.mktemp("named")
    (source,) = write_pictures(root, 1, size=32).iterdir()
    for name in [*NAMES[1:], ".hidden/1.png", "a b/.2.png", "notes.md"]:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, root / name)
        with (root / name).open("ab") as file:  # after its end, so that all differ
            file.write(name.encode())
    (root / "list.txt").write_text("\n".join(["# names", *NAMES]))
    return root


@pytest.fixture(scope="module")
def site(pictures, tmp_path_factory) -> Path:
    """24 images, a list of them, and five shards."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(pictures, root / "photos")
    write_list(root / "photos")
    shard(ShardConfig(str(pictures), str(root / "shards"), per_shard=5))
    return root


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory) -> Path:
    """The run on files of this machine that the others have to equal."""
    out = tmp_path_factory.mktemp("local") / "run"
    run("pretrain", "--data", pictures, "--out", out, *TINY, *RUN)
    return out


RUN = ["--epochs", 8, "--augment.mean", "data", "--augment.std", "data"]


def contents(source) -> list[bytes]:
    opened = [source.open(index) for index in range(len(source))]
    return [Path(os.fsdecode(o)).read_bytes() if isinstance(o, bytes) else o.read() for o in opened]


def first(count: int, fault: str):
    """A fault in the first answers only."""
    return lambda path, number: fault if number < count else ""


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "short", "fewer"])
def test_what_may_pass_is_tried_again(site, fault):
    expected = (site / "photos" / "0003.png").read_bytes()
    with Server(site, first(3, fault)) as server:
        assert remote.read(f"{server.url}/photos/0003.png", 100, 400) == expected[100:500]
        assert server.counts[fault] == 3
    if fault != "fewer":  # without a size, nobody can know
        with Server(site, first(3, fault)) as server:
            assert remote.read(f"{server.url}/photos/0003.png") == expected


@pytest.mark.parametrize("status", ["404", "403", "401", "416"])
def test_a_refusal_is_final(site, status):
    with Server(site, lambda path, number: status) as server:
        url = f"{server.url}/photos/0003.png"
        for use in (remote.read, lambda url: remote.read(url, 3, 5)):
            with pytest.raises(BadImage, match=rf"^{url}: (answer {status} .*|no such file)$"):
                use(url)
        assert server.counts[status] == 2
        with pytest.raises(BadImage, match=rf"answer {status}"):
            remote.info(url)
        assert not remote.exists(url)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", "answer 500 Internal Server Error"),
        ("slow", r"no answer within 0\.1 s"),
        ("fewer", r"ConnectionError: 2 of 5 bytes arrived"),
    ],
)
def test_what_outlasts_all_tries_is_not_a_bad_image(site, fault, words, monkeypatch):
    monkeypatch.setattr(remote, "TIMEOUT", 0.1)
    with Server(site, lambda path, number: fault, delay=5) as server:
        url = f"{server.url}/photos/0003.png"
        with pytest.raises(RunError, match=rf"^{url} can't be read, tried 5 times \({words}\)$"):
            remote.read(url, 3, 5)
        assert server.counts[fault] == 5


def test_waiting_doubles(monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    monkeypatch.setattr(remote, "WAIT", 0.25)
    with Server(Path()) as server:
        url = f"{server.url}/x.png"
    with pytest.raises(RunError, match=r"Cannot connect to host"):
        remote.read(url)
    assert waits == [0.25, 0.5, 1, 2]


def test_a_server_without_ranges_is_refused_at_once(site):
    with Server(site, lambda path, number: "whole") as server:
        url = f"{server.url}/photos/0003.png"
        with pytest.raises(RunError, match=r"is sent whole .* use a server that supports range"):
            remote.read(url, 3, 5)
        assert server.counts["whole"] == 1
        assert remote.read(url) == (site / "photos" / "0003.png").read_bytes()


def test_a_cache_answers_for_the_server_in_any_process(site, tmp_path):
    with Server(site) as server:
        url = f"{server.url}/photos/0003.png"
        remote.use_cache(str(tmp_path / "cache"), 1)
        parts = [remote.cached(url, start, 100, "a") for start in (0, 50)]
        parts += [remote.cached(url), remote.cached(url, 0, 100, "b")]
        assert sum(server.counts.values()) == 4
        remote.use_cache(str(tmp_path / "cache"), 1)
        again = [remote.cached(url, start, 100, "a") for start in (0, 50)]
        again += [remote.cached(url), remote.cached(url, 0, 100, "b")]
        assert sum(server.counts.values()) == 4
    content = (site / "photos" / "0003.png").read_bytes()
    assert parts == again == [content[:100], content[50:150], content, content[:100]]
    with pytest.raises(InputError, match=r"cache .* can't be made .* another folder"):
        remote.use_cache(str(site / "photos" / "0003.png" / "x"), 1)


@pytest.mark.parametrize("damage", ["flipped", "cut off", "empty", "zeros"])
def test_a_damaged_entry_is_read_anew(site, tmp_path, damage):
    with Server(site) as server:
        remote.use_cache(str(tmp_path), 1)
        expected = remote.cached(f"{server.url}/photos/0003.png")
        (entry,) = tmp_path.iterdir()
        stored = entry.read_bytes()
        harmed = {
            "flipped": stored[:50] + bytes([stored[50] ^ 1]) + stored[51:],
            "cut off": stored[:-1],
            "empty": b"",
            "zeros": bytes(4),
        }
        entry.write_bytes(harmed[damage])
        assert remote.cached(f"{server.url}/photos/0003.png") == expected
        assert sum(server.counts.values()) == 2
    assert entry.read_bytes() == stored


def test_a_cache_has_a_limit_and_drops_what_was_not_used(tmp_path):
    (tmp_path / "mine.txt").write_text("stays")
    (tmp_path / f"{'0' * 64}.range.123").write_bytes(bytes(50_000))  # of a killed process
    os.utime(tmp_path / f"{'0' * 64}.range.123", (0, 0))
    cache = remote.Cache(tmp_path, 100_000)
    keys = [f"{number:064x}" for number in range(1, 31)]
    for time, key in enumerate(keys, 1):
        cache.put(key, bytes([time]) * 9996)
        os.utime(tmp_path / f"{key}.range", (time, time))
        cache.get(keys[0])
        assert sum(path.stat().st_size for path in tmp_path.glob("*.range*")) <= 100_000
    assert [key for key in keys if cache.get(key)] == [keys[0], *keys[-8:]]
    assert (tmp_path / "mine.txt").exists()


def test_a_full_disk_is_only_slower(site, tmp_path):
    remote.use_cache(str(tmp_path / "cache"), 1)
    (tmp_path / "cache").rmdir()
    with Server(site) as server:
        for _ in range(2):
            assert len(remote.cached(f"{server.url}/photos/0003.png", 0, 9)) == 9
        assert server.counts[""] == 2


def test_a_list_and_a_folder_are_the_images_of_the_folder_here(named, tmp_path):
    expected = find_images(str(named))
    assert [expected.name(n) for n in range(4)] == NAMES
    memory = fsspec.filesystem("memory")
    memory.put(str(named), "/bucket/named", recursive=True)
    mixed = tmp_path / "mixed.txt"
    with Server(named) as server:
        mixed.write_text("\n".join(f"{server.url}/0000.png {named}/a-b.png".split()))
        for given in (f"{server.url}/list.txt", "memory://bucket/named", f"file://{named}"):
            found = find_source(given)
            assert found.fingerprint() == expected.fingerprint()
            assert contents(found) == contents(expected)
            found.select([3, 0]).save(tmp_path / "stored")
            assert contents(load_source(tmp_path / "stored")) == contents(expected.select([3, 0]))
        assert contents(find_source(str(mixed)))[1] == contents(expected)[0]
        both = find_images([str(named), f"{server.url}/list.txt", f"{server.url}/a-b.png?x=1"])
        assert contents(both) == contents(expected) * 2 + contents(expected)[3:]
        with pytest.raises(InputError, match="holds no images that are not named already"):
            find_images([f"{server.url}/list.txt"] * 2)


def test_packing_reads_urls(site, tmp_path):
    with Server(site, flaky(0.3, 0)) as server:
        config = ShardConfig(f"{server.url}/photos/list.txt", str(tmp_path / "out"), per_shard=5)
        assert shard(config) == 24
    for path in (site / "shards").glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("photos", "is a web page, not a list of images: give the URL of a folder, but web serve"),
        ("missing.txt", "can't be read .*missing.txt: no such file.*a text file of paths"),
        ("x.png", "can't be read .*x.png: answer 404"),
        ("slash.txt", "has '/a.png': paths must be relative to its URL, or URLs"),
        ("empty.txt", "holds no images"),
        ("list.zip", "is not a folder, an image or a text file"),
        ("{0..1}.tar", r"0\.tar' can't be read as a tar file \(.*answer 404"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(path, words, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "slash.txt").write_text("b.png\n/a.png")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "list.zip").write_bytes(b"PK\0\0")
    with Server(tmp_path) as server, pytest.raises(InputError, match=words) as caught:
        find_source(f"{server.url}/{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_by_position(site, pictures, tmp_path, index, monkeypatch):
    shutil.copytree(site / "shards", tmp_path / "shards")
    if index:
        monkeypatch.setattr("fcmae.data.shards._read_headers", None)
    else:
        (tmp_path / "shards" / INDEX).unlink()
    with Server(tmp_path, flaky(0.2, 0)) as server:
        found = find_source(f"{server.url}/{PATTERN}")
        assert isinstance(found, ShardList)
        assert found.fingerprint() == find_images(str(pictures)).fingerprint()
        assert contents(found) == contents(find_images(str(pictures)))
        found.save(tmp_path / "stored")
        assert contents(load_source(tmp_path / "stored").select([7])) == contents(found)[7:8]
    assert not (tmp_path / "shards" / INDEX).exists() or index


def test_a_folder_of_shards_where_folders_are_listed(site):
    memory = fsspec.filesystem("memory")
    memory.put(str(site / "shards"), "/bucket/shards", recursive=True)
    assert len(find_shards("memory://bucket/shards/")) == 5
    assert contents(find_source("memory://bucket/shards")) == contents(
        find_source(str(site / "shards"))
    )


def test_an_index_is_used_only_for_shards_of_its_sizes(site, tmp_path, caplog):
    shutil.copytree(site / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "shard-000004.tar"
    shutil.copy(tmp_path / "shards" / "shard-000000.tar", path)
    with Server(tmp_path) as server, pytest.raises(InputError, match=r"has a member '0000\.png'"):
        find_source(f"{server.url}/{PATTERN}")
    assert "indexed anew" in caplog.text


def test_a_run_resumes_on_the_same_shards_only(site, tmp_path, monkeypatch):
    shutil.copytree(site / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "shard-000001.tar"
    with Server(tmp_path) as server:
        find_source(f"{server.url}/{PATTERN}").save(tmp_path / "stored")
        os.utime(path, (1, 1))
        load_source(tmp_path / "stored")  # another ETag, the same headers
        content = bytearray(path.read_bytes())
        content[5] ^= 1
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"shard-000001.tar' (has changed|can't be read)"):
            load_source(tmp_path / "stored")
        path.unlink()
        with pytest.raises(InputError, match=r"shard-000001.tar' is missing .*: restore it"):
            load_source(tmp_path / "stored")
        stored = load_source(tmp_path / "stored", check=False)
        with pytest.raises(BadImage, match=r"shard-000001.tar: no such file"):
            stored.open(5)


def test_labels_are_in_a_csv_file_with_urls(classes, tmp_path):
    with Server(classes) as server:
        rows = [f"{server.url}/train/class%20{k}/{n}.png,{k}" for k in range(3) for n in range(4)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
        found = find_in_table(read_table(tmp_path / "labels.csv"), 0.25, read_classes)
        assert found.names == ("0", "1", "2")
        content = contents(found.train.source.select([0]))[0]
    name = found.train.source.name(0).rpartition("/")[2]
    assert content == (classes / "train" / "class 0" / name).read_bytes()
    for url in ("s3://bucket/photos", "https://host/labels.csv"):
        with pytest.raises(InputError, match="give a CSV file on this machine, with the URLs"):
            labels_file(SimpleNamespace(data=url, labels=None))
    with pytest.raises(InputError, match="'s3://bucket/photos' is not on this machine"):
        find_labelled("s3://bucket/photos", 0)


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "aiohttp.py").write_text("raise ImportError('No module named aiohttp')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)])
    command = ["pretrain", "https://host/list.txt", "--out", tmp_path / "run"]
    done = run(*command, code=2, PYTHONPATH=path)
    assert done.stderr.endswith(": pip install 'fcmae[datasets]'\n")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    (tmp_path / "list.txt").write_text("a.png\nnothing://x/a.png\n")
    for source in ("nothing://x", str(tmp_path / "list.txt")):
        with pytest.raises(InputError, match=r"'nothing://x.*' can't be read, Protocol not known"):
            find_source(source)


FORKS = """
import gc, os, sys
from fcmae.data import remote
from fcmae.data.find import find_source
remote.TRIES = 1  # nothing may have to be tried again
source = find_source(sys.argv[1])
first, children = source.open(0).read(), []
for _ in range(2):
    if not (child := os.fork()):
        for index in range(48):
            source.open(index % 24)
        gc.collect()
        os._exit(0)
    children.append(child)
for index in range(48):
    source.open(index % 24)
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
assert source.open(0).read() == first
"""


@pytest.mark.parametrize("path", ["photos/list.txt", PATTERN])
def test_a_process_and_those_it_forked_read_at_the_same_time(site, path):
    with Server(site) as server:
        process = begin([sys.executable, "-W", "ignore", "-c", FORKS, f"{server.url}/{path}"])
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("path", ["photos/list.txt", PATTERN])
def test_a_run_on_a_flaky_server_equals_the_local_one(site, local, tmp_path, path):
    """Bit for bit, with two workers, forked after the main process has read from the server."""
    out = tmp_path / "run"
    with Server(site, flaky(0.05, 0.05), delay=0.2) as server:
        command = ["pretrain", "--data", f"{server.url}/{path}", "--out", out, *TINY, *RUN]
        run(*command, "--workers", 2)
        assert server.counts["slow"] > 0 < server.counts["500"]
    assert weights(out) == weights(local) != b""
    assert metrics(out) == metrics(local)
    assert not (out / "bad_images.jsonl").exists()


@pytest.mark.slow
def test_missing_images_are_replaced_as_those_of_a_folder(site, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "photos")
    (folder / "list.txt").write_text("\n".join(path.name for path in pictures.iterdir()))
    (folder / "0007.png").unlink()
    outs = []
    with Server(tmp_path) as server:
        for number, data in enumerate((folder / "list.txt", f"{server.url}/photos/list.txt")):
            outs.append(tmp_path / f"run{number}")
            run("pretrain", "--data", data, "--out", outs[-1], *TINY, "--epochs", 2)
    assert weights(outs[0]) == weights(outs[1])
    assert all("0007.png" in (out / "bad_images.jsonl").read_text() for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stays_down_ends_the_run_which_resumes(site, local, tmp_path, workers):
    """One line and exit 1; no image takes the place of another. Then with other workers, a kill,
    and a cache."""
    out, down = tmp_path / "run", False
    with Server(site, lambda path, number: "503" if down else "") as server:
        data = f"{server.url}/{PATTERN if workers else 'photos/list.txt'}"
        command = ["pretrain", "--data", data, "--out", out, *TINY, *RUN, "--log_steps", 1]
        process = start(*command, "--workers", workers)
        wait_for_steps(out, 8, process)
        down = True
        _, err = process.communicate(timeout=120)
        last = " ".join(err.split("error: ")[-1].split())
        assert process.returncode == 1, err
        assert "Traceback" not in err
        assert "can't be read, tried 5 times (answer 503" in last
        assert last.endswith("; it resumes from the last checkpoint")
        assert not (out / "bad_images.jsonl").exists()
        down = False
        process = start(*command, "--workers", 2 - workers, "--cache", tmp_path / "cache")
        wait_for_steps(out, len(metrics(out)) + 3, process)
        kill_all(process)
        run(*command, "--workers", 1, "--cache", tmp_path / "cache", "--cache_gb", 0.1)
    assert weights(out) == weights(local)
    assert metrics(out) == metrics(local)
    assert 0 < len(list((tmp_path / "cache").iterdir())) <= 24


def test_names_below_a_url_are_those_that_were_listed():
    files = FileList.of("https://host/a", [b"b c.png", b"https://other/d.png"])
    assert [files.path(n) for n in (0, 1)] == [b"https://host/a/b%20c.png", b"https://other/d.png"]
    assert [files.name(n) for n in (0, 1)] == ["b c.png", "https://other/d.png"]
    assert FileList.of("s3://b/a", [b"c d.png"]).path(0) == b"s3://b/a/c d.png"
    assert np.array_equal(files.select([1]).lengths, [19])
