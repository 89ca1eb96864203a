"""Pretraining over HTTP from a server that fails and stalls, against the same run on local files.

    .venv/bin/python -m benchmarks.remote [--images 1000] [--epochs 2] [--faults 0.05] [--slow 0.05]

Three runs of a tiny model with two workers: on a folder, on a list of paths under a URL, and on tar
shards under a URL, without a cache and then twice with one. Of the server's answers, FAULTS fail
(500, a closed connection, half of the content) and SLOW take half a second longer. The weights must
be the same bit for bit; exit code 1 says that they are not.
"""

import argparse
import itertools
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from fcmae.commands.shard import ShardConfig
from fcmae.data.sharding import shard

PASSING = ("500", "reset", "short")
"""Faults after which another try works."""

TINY = [
    *("--depths", "[1,1,1,1]", "--dims", "[8,16,24,32]", "--decoder.dim", "16", "--img_size", "64"),
    *("--batch_size", "32", "--workers", "2", "--engine", "patch", "--holdout", "0"),
]


class Server(ThreadingHTTPServer):
    """A web server for a folder, with ranges, ETags and faults; a context manager.

    Args:
        folder: to serve.
        fault: maps the path and the number of a request to a fault or "". A status such as "404";
            "reset" closes the connection; "short" sends half of the content and closes it; "fewer"
            sends half of the content as if it were all; "whole" ignores ranges; "slow" waits
            `delay` seconds first.
        delay: seconds.

    Attributes:
        counts: of each fault, "" for good answers.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        folder: Path,
        fault: Callable[[str, int], str] = lambda path, number: "",
        delay: float = 0.5,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.fault, self.delay = folder, fault, delay
        self.numbers, self.counts = itertools.count(), Counter[str]()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that are gone."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path)
        fault = server.fault(path, next(server.numbers))
        server.counts[fault] += 1
        file = server.folder / path.lstrip("/")
        if fault == "slow":
            server.closing.wait(server.delay)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif fault.isdigit() or not file.exists():
            self.send_error(int(fault) if fault.isdigit() else 404)
        else:
            page = file.is_dir()
            self._send(b"<html>" if page else file.read_bytes(), fault, file.stat().st_mtime_ns)

    def _send(self, content: bytes, fault: str, changed: int) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole = len(content)
        if part and fault != "whole":
            first, last = int(part[1]), min(int(part[2]), whole - 1)
            if first > last:
                self.send_error(416)
                return
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        if fault == "fewer":
            content = content[: len(content) // 2]
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{changed:x}-{whole:x}"')
        self.end_headers()
        if fault == "short":
            content, self.close_connection = content[: len(content) // 2], True
        if self.command == "GET":
            self.wfile.write(content)


def flaky(faults: float, slow: float, seed: int = 0) -> Callable[[str, int], str]:
    """Return faults for shares of the requests, drawn by their number."""

    def fault(path: str, number: int) -> str:
        draw = random.Random(f"{seed} {number}").random()
        if draw < faults:
            return PASSING[number % len(PASSING)]
        return "slow" if draw < faults + slow else ""

    return fault


def write_list(folder: Path, name: str = "list.txt") -> None:
    """List the images of a folder in a text file there."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    (folder / name).write_text("\n".join(names))


def pretrain(data: str, out: Path, *options: str) -> tuple[float, bytes]:
    """Run to the end; return its seconds and the exported weights."""
    command = [sys.executable, "-m", "fcmae", "pretrain", data, "--out", str(out), *TINY, *options]
    began = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    return seconds, (out / "exported" / "model.safetensors").read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--slow", type=float, default=0.05)
    options = parser.parse_args()
    epochs = ["--epochs", str(options.epochs)]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "photos").mkdir()
        random_state = np.random.default_rng(0)
        for number in range(options.images):
            coarse = Image.fromarray(random_state.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((96, 96)).save(root / "photos" / f"{number:05}.png")
        write_list(root / "photos")
        shard(ShardConfig(str(root / "photos"), str(root / "shards"), per_shard=200))
        count = len(list((root / "shards").glob("*.tar")))
        pattern = f"shards/shard-{{000000..{count - 1:06}}}.tar"
        seconds, expected = pretrain(str(root / "photos"), root / "local", *epochs)
        print(f"local files: {seconds:.1f} s")
        cache = ["--cache", str(root / "cache")]
        same = True
        with Server(root, flaky(options.faults, options.slow)) as server:
            for what, path, more in (
                ("list", "photos/list.txt", []),
                ("shards", pattern, []),
                ("shards, cache empty", pattern, cache),
                ("shards, cache full", pattern, cache),
            ):
                server.counts.clear()
                out = root / f"run {what}"
                seconds, found = pretrain(f"{server.url}/{path}", out, *epochs, *more)
                counts = dict(server.counts)
                same &= found == expected
                retries = sum(counts.get(fault, 0) for fault in PASSING)
                kinds = ", ".join(f"{counts.get(fault, 0)} {fault}" for fault in (*PASSING, "slow"))
                equal = "equal" if found == expected else "DIFFER"
                print(
                    f"{what}: {seconds:.1f} s, {sum(counts.values())} requests, {retries} failed "
                    f"({kinds}), weights {equal}"
                )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
