"""Which images to label: choices by hand and checked by brute force; the command; the projector."""

import csv
import json
import math
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.cli import main
from fcmae.commands.embed import EmbedConfig
from fcmae.commands.select import SelectConfig
from fcmae.commands.shard import ShardConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.sharding import shard
from fcmae.inspect import projector
from fcmae.inspect.embedding import Features, embed
from fcmae.inspect.projector import SIDE
from fcmae.inspect.prologue import set_up
from fcmae.inspect.selecting import COPY, WIDTH, choose, select
from fcmae.inspect.thumbnails import sheet, thumbnails
from fcmae.weights.load import load_backbone
from sparse.errors import InputError
from tests.browser import open_page
from tests.cli import TINY, begin, run, until
from tests.conftest import write_pictures


def at(*degrees: float) -> torch.Tensor:
    """Points on a circle around (10, 20)."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], 1) + torch.tensor([10.0, 20.0])


COMPASS = at(0, 12, -12, 90, 180, 192, 168, 270)
"""Groups of three around 0° and 180°, and single points at 90° and 270°; their mean is (10, 20)."""


def check_greedy(features: torch.Tensor, chosen: list[int], labelled: torch.Tensor) -> None:
    """Check in double precision that no other image would have added more than each one did."""
    both = torch.cat([features, labelled]).double() - features.double().mean(0)
    unit = both / both.norm(dim=1, keepdim=True)
    cosines, n = unit @ unit.T, len(features)
    there = [*range(n, len(both))]
    for image in chosen:
        allowed = (cosines[:n, there] < COPY).all(1)
        covers = ((cosines[:n] - 1) / WIDTH).exp()
        covered = covers[:, there].amax(1) if there else torch.zeros(n)
        gains = (covers[:, :n] - covered[:, None]).clamp_min(0).sum(0)
        assert allowed[image]
        assert gains[image] > gains[allowed].max() - 1e-5
        there.append(image)


def test_typical_images_come_first_then_those_that_are_not_covered():
    chosen = choose(COMPASS, 4)
    assert {*chosen[:2]} == {0, 4}  # the middle of each group, not its sides
    assert {*chosen[2:]} == {3, 7}
    assert chosen == choose(COMPASS * 100 + 3, 4)  # neither scale nor offset matters


def test_what_labelled_images_cover_comes_last():
    assert choose(COMPASS, 1, labelled_MC=at(6))[0] == 4
    assert {*choose(COMPASS, 2, labelled_MC=at(6, 174))} == {3, 7}
    chosen = choose(COMPASS, 8, labelled_MC=at(0))
    assert len(chosen) == 7  # 0° has a label
    assert chosen[0] == 4
    assert {*chosen[1:3]} == {3, 7}


def test_near_duplicates_are_chosen_once():
    repeated = torch.cat([COMPASS] * 3 + [at(181)])  # one degree apart: a cosine of 0.9998
    chosen = choose(repeated, 25)
    assert len(chosen) == 8
    angles = sorted(number % 8 if number < 24 else 4 for number in chosen)
    assert angles == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("labels", [0, 5])
def test_each_image_adds_most(labels):
    generator = torch.Generator().manual_seed(labels)
    features = torch.randn(120, 5, generator=generator) + 4
    features[100:] = features[:20]
    labelled = torch.randn(labels, 5, generator=generator) + 4
    chosen = choose(features, 70, labelled)
    assert len(set(chosen)) == 70
    check_greedy(features, chosen, labelled)


def test_the_order_of_the_images_does_not_matter(monkeypatch):
    """Also where a sample stands for all, and where it runs out."""
    monkeypatch.setattr("fcmae.inspect.selecting.POOL", 40)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(300, 4, generator=generator)
    hashes = np.random.default_rng(3).permutation(300).astype(np.uint64)
    order = np.random.default_rng(4).permutation(300)
    for count in (10, 60, 200):
        chosen = choose(features, count, hashes_N=hashes)
        again = choose(features[order], count, hashes_N=hashes[order])
        assert chosen == order[again].tolist()
        assert len(set(chosen)) == count


def test_a_sample_that_runs_out_of_distinct_images_is_followed_by_another(monkeypatch):
    monkeypatch.setattr("fcmae.inspect.selecting.POOL", 10)
    features = torch.cat([at(0).repeat(500, 1), at(*range(0, 360, 30))])
    chosen = choose(features, 12)
    assert sorted(max(number, 500) for number in chosen) == [*range(500, 512)]


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_identical_images_are_one(noise):
    generator = torch.Generator().manual_seed(0)
    features = torch.full((30, 8), 3.0) + noise * torch.randn(30, 8, generator=generator)
    assert len(choose(features, 5)) == 1
    assert len(choose(torch.cat([features, 2 * features]), 5)) == 2
    assert choose(features, 5, labelled_MC=features[:1]) == []
    assert len(choose(torch.zeros(4, 3), 2)) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of eight images, and a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    write_pictures(root / "a", 8)
    write_pictures(root / "b ü", 8, seed=1)
    (root / "a" / "broken.png").write_bytes(b"none")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    run("pretrain", "--data", pictures, "--out", out, *TINY, "--epochs", 1)
    return out


def rows(path: Path) -> list[str]:
    """The paths of a written choice; its ranks ascend from 1."""
    with path.open(encoding="utf-8", newline="") as file:
        table = [*csv.DictReader(file)]
    assert [*table[0]] == ["path", "rank"]
    assert [row["rank"] for row in table] == [str(rank) for rank in range(1, len(table) + 1)]
    return [row["path"] for row in table]


def test_the_command_writes_a_table_and_a_contact_sheet(trained, folder, tmp_path):
    out, contact = tmp_path / "new" / "next.csv", tmp_path / "next.png"
    command = ["select", trained, "--images", folder, "--count", 12, "--workers", 0, "--out"]
    done = run(*command, out, "--contact", contact)
    assert "skipped, since it can't be read: a/broken.png" in done.stderr
    chosen = rows(out)
    assert len({*chosen}) == 12
    assert all((folder / name).is_file() for name in chosen)
    with Image.open(contact) as image:
        assert image.size == (10 * 100 + 4, 2 * 100 + 4)
        corner = np.asarray(image)[4:100, 4:100]
    setting = set_up(
        EmbedConfig(str(trained), str(folder), "", workers=0), str(trained), load_backbone
    )
    split = Split(find_images(str(folder)))
    where = [split.name(index) for index in range(17)].index(chosen[0])
    assert np.array_equal(corner, thumbnails(setting, split, [where], 96)[0].permute(1, 2, 0))
    run(*command, tmp_path / "again.csv", "--batch_size", 3)
    assert rows(tmp_path / "again.csv") == chosen


def test_labelled_images_are_not_chosen(trained, folder, tmp_path):
    """Given as a folder, as an earlier choice, and by paths relative to a file or absolute."""
    config = SelectConfig(
        str(trained), str(folder), count=6, out=str(tmp_path / "1.csv"), workers=0
    )
    first = select(config)
    assert first == rows(tmp_path / "1.csv")
    for name in first:
        shutil.copy(folder / name, tmp_path / name.replace("/", " "))
    lines = [str(folder / first[0]), *(name.replace("/", " ") for name in first[1:])]
    (tmp_path / "labels.csv").write_text("\n".join(["path", *lines]), encoding="utf-8")
    for labelled in (tmp_path, tmp_path / "1.csv", tmp_path / "labels.csv"):
        config = SelectConfig(
            str(trained), str(folder), 10, str(tmp_path / "2.csv"), str(labelled), workers=0
        )
        assert {*select(config), *first} == {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*.png")
            if path.name != "broken.png"
        }, labelled


def test_shards_have_the_same_choice(trained, folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "a" / "broken.png").unlink()
    shard(ShardConfig(str(whole), str(tmp_path / "shards"), per_shard=5))
    chosen = [
        select(SelectConfig(str(trained), str(source), 9, str(tmp_path / "x.csv"), workers=0))
        for source in (whole, tmp_path / "shards")
    ]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "20"], "count 20 is more than the 17 images of '{images}': use 17 or less"),
        (["--count", "17"], "count 17 is more than the 16 distinct ones among the 16 images"),
        (["--count", "0"], "count 0 must be at least 1, such as 100"),
        (["--labelled", "{images}"], "all 16 images of '{images}' are labelled already"),
        (
            ["--labelled", "{half}"],
            "more than the 8 distinct ones that are not labelled",
        ),
        (["--labelled", "{tmp}/no"], "labelled '{tmp}/no' does not exist: give a folder"),
        (
            ["--labelled", "{tmp}/gone.csv"],
            "2 images that do not exist, the first is 'no.png'",
        ),
        (["--labelled", "{tmp}/odd.csv"], "odd.csv has no column 'path'"),
        (["--out", "{tmp}/next.txt"], "out '{tmp}/next.txt' must be a file ending in .csv"),
        (["--contact", "{tmp}/next.jpg"], "'{tmp}/next.jpg' must be a file ending in .png"),
        (["--contact", "{half}/0000.png"], "0000.png' is one of the images"),
    ],
)
def test_wrong_input_is_one_line(words, message, trained, folder, tmp_path, capsys):
    names = {"images": folder, "half": folder / "a", "tmp": tmp_path}
    (tmp_path / "gone.csv").write_text("path,label\na/0001.png,a\nno.png,a\nnone.png,b\n")
    (tmp_path / "odd.csv").write_text("name\na/0001.png\n")
    out = tmp_path / "next.csv"
    given = [word.format(**names) for word in words]
    command = ["select", str(trained), "--images", str(folder), "--workers", "0"]
    if "--count" not in given:
        command += ["--count", "10"]
    if "--out" not in given:
        command += ["--out", str(out)]
    assert main([*command, *given]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fcmae select: error: ")
    assert message.format(**names) in line
    assert not out.exists()


def test_identical_images_are_counted(trained, tmp_path):
    for number in range(6):
        Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / f"{number}.png")
    Image.new("RGB", (64, 64), (30, 30, 200)).save(tmp_path / "blue.png")
    config = SelectConfig(str(trained), str(tmp_path), 3, str(tmp_path / "next.csv"), workers=0)
    with pytest.raises(InputError, match=r"the 2 distinct ones among the 7 images.*--count 2"):
        select(config)


def test_features_that_are_not_finite_are_refused(trained, folder, tmp_path, monkeypatch):
    def broken(*_):
        values = torch.ones(16, 32)
        values[[3, 5], 7] = torch.tensor([torch.nan, torch.inf])
        return Features(values, np.arange(16), [])

    monkeypatch.setattr("fcmae.inspect.selecting.extract", broken)
    config = SelectConfig(str(trained), str(folder), 3, str(tmp_path / "next.csv"))
    with pytest.raises(InputError, match=r"features of 2 images are not finite.*'a/0003.png'"):
        select(config)


def test_a_sheet_has_its_images_in_rows():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 4)
    pixels = np.asarray(sheet(images, 3, gap=2))
    assert pixels.shape == (2 + 2 * 6, 2 + 3 * 6, 3)
    assert pixels[2 + 6 : 12, 2 + 6 : 12, 0].tolist() == [[4] * 4] * 4
    assert (pixels[8:, 14:] == 255).all()


def test_dim_images_are_stretched(trained, tmp_path):
    """16-bit images that use one hundredth of their range."""
    deep = np.linspace(0, 600, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "dim.png")
    config = EmbedConfig(str(trained), str(tmp_path), "", workers=0)
    setting = set_up(config, str(trained), load_backbone)
    shown = thumbnails(setting, setting.find_images(), [0], 32)
    assert shown.shape == (1, 3, 32, 32)
    assert shown.min() < 10
    assert shown.max() > 245


def test_the_projector_gets_features_names_labels_and_thumbnails(trained, folder, tmp_path):
    out, board = tmp_path / "features.npz", tmp_path / "deep" / "board"
    embed(EmbedConfig(str(trained), str(folder), str(out), str(board), workers=0))
    with np.load(out) as file:
        features, paths = file["features"], file["paths"].tolist()
    found = np.loadtxt(board / "features.tsv", delimiter="\t")
    np.testing.assert_allclose(found, features, rtol=1e-5)
    lines = (board / "metadata.tsv").read_text("utf-8").splitlines()
    assert lines == ["name\tlabel", *(f"{path}\t{path.partition('/')[0]}" for path in paths)]
    with Image.open(board / "sprite.png") as sprite:
        assert sprite.size == (4 * SIDE, 4 * SIDE)
        fifth = np.asarray(sprite)[SIDE : 2 * SIDE, :SIDE].astype(float)
    with Image.open(folder / paths[4]) as image:
        colour = np.asarray(image.convert("RGB"))[13:-13, 5:-5].mean((0, 1))
    assert np.abs(fifth.mean((0, 1)) - colour).max() < 4


def test_the_projector_replaces_no_image(trained, folder, tmp_path):
    shutil.copy(folder / "a" / "0000.png", tmp_path / "sprite.png")
    out = tmp_path / "x.npz"
    with pytest.raises(InputError, match=r"sprite.png' is one of the images"):
        embed(EmbedConfig(str(trained), str(tmp_path), str(out), str(tmp_path), workers=0))
    assert not out.exists()


def test_of_too_many_images_a_sample_is_shown(trained, folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(projector, "MOST", 5)
    board, flat = tmp_path / "board", folder / "a"
    with caplog.at_level("INFO"):
        embed(EmbedConfig(str(trained), str(flat), str(tmp_path / "x.npz"), str(board), workers=0))
    assert "it shows a sample of 5 of the 8 images" in caplog.messages
    names = (board / "metadata.tsv").read_text().splitlines()  # no folders, no labels
    assert len(names) == 5
    assert names == sorted(names)
    assert {*names} < {path.name for path in flat.iterdir()}
    assert len(np.loadtxt(board / "features.tsv", delimiter="\t")) == 5


@pytest.mark.slow
def test_tensorboard_shows_the_map(trained, tmp_path):
    """With thumbnails: the colour of the images appears on the page."""
    rng = np.random.default_rng(0)
    for label in ("one", "two"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((64, 64, 3), (255, 0, 255), np.uint8)
            pixels[rng.integers(0, 2, (64, 64)) > 0, 1] = rng.integers(0, 60)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    board = tmp_path / "board"
    config = EmbedConfig(
        str(trained), str(tmp_path / "images"), str(tmp_path / "x.npz"), str(board)
    )
    config.workers = 0
    embed(config)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = begin(
        [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(board),
         "--port", str(port), "--load_fast=false"]
    )  # fmt: skip
    data = f"http://127.0.0.1:{port}/data/plugin/projector"

    def ask(what: str) -> bytes:
        with urllib.request.urlopen(f"{data}/{what}") as answer:
            return answer.read()

    def ready() -> bool:
        time.sleep(0.3)
        try:
            return json.loads(ask("runs")) == ["."]
        except (urllib.error.URLError, ConnectionError):
            return False

    assert until(ready, process)
    (entry,) = json.loads(ask("info?run=."))["embeddings"]
    assert entry["tensorShape"] == [20, 32]
    assert ask("metadata?run=.&name=features").startswith(b"name\tlabel\none/0.png\tone\n")
    values = np.frombuffer(ask("tensor?run=.&name=features"), np.float32)
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_allclose(values.reshape(20, 32), file["features"], rtol=1e-5)
    for wait_ms in (20_000, 60_000, 180_000):  # of virtual time: a busy machine needs more
        page = open_page(f"http://127.0.0.1:{port}/#projector", tmp_path / "map.png", 1200, wait_ms)
        with Image.open(tmp_path / "map.png") as image:
            red, green, blue = np.asarray(image.convert("RGB"), int).transpose(2, 0, 1)
        pink = (red > 200) & (blue > 200) & (green < 90)
        if pink.sum() > 500:
            break
    assert pink.sum() > 500, "no thumbnail is shown"
    assert not [line for line in page.console if re.search(r"\berror\b", line, re.IGNORECASE)]
