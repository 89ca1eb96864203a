"""Faults of a web server that a run reads its images from."""

from __future__ import annotations

import shutil
from functools import cache, partial
from pathlib import Path

from benchmarks.remote import PASSING, Server, flaky, write_list
from fcmae.commands.shard import ShardConfig
from fcmae.data.sharding import shard
from tests.cli import has_steps, kill_all, metrics, until
from tests.faults.campaign import Generator, Row
from tests.faults.processes import (
    assert_same,
    finish,
    home,
    launch,
    pictures,
    pretrain,
    undisturbed,
)


@cache
def site() -> Path:
    """`pictures` and a list of them, and in five shards."""
    root = home() / "site"
    shutil.copytree(pictures(), root / "photos")
    write_list(root / "photos")
    shard(ShardConfig(str(pictures()), str(root / "shards"), per_shard=5))
    return root


def server_faults(number: int, random: Generator, folder: Path) -> str:
    """A flaky server, perhaps down for a while, perhaps with kills: bit-equal, or one line and
    bit-equal on resume."""
    what = ("flaky", "down", "killed", "down at the start")[number % 4]
    path = ("photos/list.txt", "shards/shard-{000000..000004}.tar")[number // 4 % 2]
    few = flaky(random.uniform(0.05, 0.2), random.uniform(0.05, 0.2), int(random.integers(1 << 30)))
    down, out, did = "", folder / "run", ""
    more: list[object] = []
    if what in ("flaky", "killed") and number % 3:  # too small for all images
        more = ["--cache", folder / "cache", "--cache_gb", 0.0001]
    with Server(site(), lambda path, request: down or few(path, request), delay=0.2) as server:

        def command() -> list[str]:
            workers = int(random.choice([0, 2, 4]))
            return pretrain(out, "--data", f"{server.url}/{path}", "--workers", workers, *more)

        if what != "flaky":
            process = launch(command())
            until(partial(has_steps, out, int(random.integers(3, 20))), process)
            did = f", after step {len(metrics(out))}"
        if what in ("killed", "down at the start"):
            kill_all(process)
        if what in ("down", "down at the start"):
            down = str(random.choice(["500", "503", "reset"]))
            before = metrics(out)
            if what == "down at the start":
                process = launch(command())
            _, err = process.communicate(timeout=120)
            said = " ".join(err.split())
            assert process.returncode == 1, f"exit {process.returncode}: {err[-1500:]}"
            assert "Traceback" not in err, err[-1500:]
            assert "can't be read, tried 5 times" in said, err[-1500:]
            assert what != "down at the start" or metrics(out) == before, "something was lost"
            did, down = f"{did}, {down}", ""
        finish(command())
        counts = dict(server.counts)
    assert_same(out, undisturbed()[0])
    assert not (out / "bad_images.jsonl").exists(), "an image was replaced"
    retries = sum(counts.get(fault, 0) for fault in PASSING)
    cached = ", cache" if more else ""
    return f"{what}, {path.split('/')[0]}{cached}{did}; {retries} of {sum(counts.values())} failed"


ROWS = (
    Row("remote-server", "a web server that fails, resets, sends half and is slow in 10 to 40 % of "
        "its answers; that goes down while the run reads or before it resumes; kills, with 0, 2 or "
        "4 workers, some with a cache: bit-equal to the run on local files, or one line that names "
        "the URL and bit-equal on resume", 50, server_faults, short=2),
)  # fmt: skip
