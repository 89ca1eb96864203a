"""Faults of runs on tar shards: kills, and shards that are damaged between start and resume."""

from __future__ import annotations

import os
import tarfile
from functools import cache, partial
from pathlib import Path

from fcmae.commands.shard import ShardConfig
from fcmae.data.sharding import shard
from tests.cli import has_steps, kill_all, metrics, run, until
from tests.faults.campaign import Generator, Row
from tests.faults.processes import (
    assert_same,
    finish,
    home,
    killed,
    launch,
    pictures,
    pretrain,
    undisturbed,
)


@cache
def packed() -> Path:
    """`pictures` in five shards."""
    shard(ShardConfig(str(pictures()), str(home() / "shards"), per_shard=5))
    return home() / "shards"


def on_shards(out: Path, *options: object) -> list[str]:
    """Pretraining on shards, with the settings of `pretrain`."""
    return pretrain(out, "--data", packed(), *options)


def killed_on_shards(number: int, random: Generator, folder: Path) -> str:
    """As `killed`; the run never stopped equals one on the files."""
    assert_same(undisturbed(train=on_shards)[0], undisturbed()[0])
    return killed(number, random, folder, train=on_shards)


def damaged_shard(number: int, random: Generator, folder: Path) -> str:
    """A shard is changed while a run is down: refused by name, and resumed once it is restored."""
    shards = folder / "shards"
    shard(ShardConfig(str(pictures()), str(shards), per_shard=5))
    command = pretrain(folder / "run", "--data", shards)
    process = launch(command)
    until(partial(has_steps, folder / "run", int(random.integers(4, 12))), process)
    kill_all(process)
    path = shards / f"shard-{int(random.integers(0, 5)):06}.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [info.offset_data - 512 for info in tar]
    what = ("header", "cut off", "removed", "other", "later end")[number % 5]
    if what == "header":
        place = int(random.choice(headers)) + int(random.integers(0, 156))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif what == "cut off":
        os.truncate(path, int(random.integers(1, len(content))))
    elif what == "removed":
        path.unlink()
    elif what == "other":
        other = shards / f"shard-{(int(path.stem[-6:]) + 1) % 5:06}.tar"
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(content + bytes(512))
    before = metrics(folder / "run")
    said = run(*command, code=2).stderr
    assert path.name in said, said
    assert len(said.strip().splitlines()) == 1, said
    assert metrics(folder / "run") == before, "something was lost"
    path.write_bytes(content)
    finish(command)
    assert_same(folder / "run", undisturbed()[0])
    return f"{what} of {path.name}, after step {len(before)}"


ROWS = (
    Row("shards-kill", "as `kill`, of a run on tar shards, which equals one on the files", 50,
        killed_on_shards),
    Row("shards-damage", "a shard with a flipped header, cut off, removed, replaced or longer when "
        "a run resumes: refused in one line, and bit-equal once it is restored", 50,
        damaged_shard),
)  # fmt: skip
