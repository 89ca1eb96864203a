"""Images that are broken, too large or hard to find."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fcmae.data.file_list import find_images
from tests.cli import environment, until
from tests.faults.campaign import Generator, Row
from tests.faults.processes import finish, launch, pretrain

MEMORY = 1500 * 2**20
"""Bytes that a process may use to read one image."""

LARGEST = {
    "jpg": (13_300, 13_400), "png": (13_300, 13_400), "tif": (13_300, 13_400),
    "webp": (7_300, 7_300), "progressive.jpg": (9_400, 9_500), "jp2": (6_600, 6_700),
}  # fmt: skip
"""Sizes just under the limit of each format."""

READ = """
import re, sys
from fcmae.data.decode import read_image
from fcmae.data.image import BadImage, Reading
for path in sys.argv[1:]:
    try:
        picture = read_image(path, Reading(3, 179_000_000))
        picture.resized((0, 0, *picture.size), (224, 224)).pixels
        print("read")
    except BadImage as error:
        print("refused:", error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def read_alone(paths: list[Path]) -> tuple[list[str], int]:
    """Read images in a separate process; return the result of each and the peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, paths)], env=environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    *came, peak = done.stdout.splitlines()
    return came, int(peak)


def broken(number: int, random: Generator, folder: Path) -> str:
    """10,000 images, 1 % broken: all named, none crashes the run, the same weights twice."""
    count, bad = 10_000, 100
    data = folder / "data"
    data.mkdir()
    for i in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{i:05d}.png")
    chosen = sorted(f"{i:05d}.png" for i in random.choice(count, bad, replace=False))
    for i, name in enumerate(chosen):
        content = (data / name).read_bytes()
        (data / name).write_bytes([b"", content[: len(content) // 2], b"no picture"][i % 3])
    (data / "00000.png").rename(data / "00000.jpg")  # its content decides
    chosen = ["00000.jpg" if name == "00000.png" else name for name in chosen]
    states = []
    for run, workers in (("a", 2), ("b", 0)):
        out = folder / run
        options = ["--data", data, "--epochs", 1, "--batch_size", 64, "--checkpoint_steps", 100]
        finish(pretrain(out, *options, "--workers", workers, "--holdout", 0))
        lines = (out / "bad_images.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["path"] for line in lines) == sorted(chosen)
        states.append((out / "exported" / "model.safetensors").read_bytes())
    assert states[0] == states[1], "different replacements"
    return f"{bad} of {count} found, twice"


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


def with_size(form: str, path: Path, width: int, height: int) -> None:
    """Write a small file whose header declares width × height pixels."""
    if form == "png":
        path.write_bytes(png_header(width, height))
        return
    Image.new("RGB", (64, 48), (9, 99, 199)).save(path, quality=90)
    content = bytearray(path.read_bytes())
    if form == "jpg":
        at = content.index(b"\xff\xc0") + 5
        content[at : at + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    elif form == "tif":
        for old, new in (
            (struct.pack("<HHI", 256, 4, 1), width),
            (struct.pack("<HHI", 257, 4, 1), height),
        ):
            at = content.find(old[:2])
            content[at + 8 : at + 12] = struct.pack("<I", new)
            content[at + 2 : at + 4] = struct.pack("<H", 4)
    path.write_bytes(content)


def bombs(number: int, random: Generator, folder: Path) -> str:
    """Headers that declare too many pixels are refused; unusual files need bounded memory."""
    side = int(random.integers(14_000, 31_000))
    lying = []
    for form in ("png", "tif", "jpg"):
        lying.append(folder / f"bomb.{form}")
        with_size(form, lying[-1], side, side)
    honest = []
    for name, size in {
        "thin.png": (1, 500),
        "flat.jpg": (30_000, 1),
        "long.png": (30_000, 7),
    }.items():
        Image.new("RGB", size, (1, 2, 3)).save(folder / name)
        honest.append(folder / name)
    frames = [Image.new("RGB", (40, 30), (i, i, i)) for i in (10, 200)]
    for name in ("animated.gif", "pages.tif", "animated.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
        honest.append(folder / name)
    form = tuple(LARGEST)[number % len(LARGEST)]
    width, height = LARGEST[form]
    large = Image.new("RGB", (width, height), (20, 40, 60))
    path = folder / f"large.{form}"
    options = {"progressive": True, "subsampling": 0} if form == "progressive.jpg" else {}
    large.save(path, **({"quality": 50, "method": 0} if form == "webp" else options))
    came, peak = read_alone([*lying, *honest, path])
    assert all(word.startswith("refused") and "max_pixels" in word for word in came[:3]), came
    assert came[3:] == ["read"] * (len(honest) + 1), came
    assert peak <= MEMORY, f"{form} took {peak / 1e6:.0f} MB ({came[-1]})"
    return f"{side}² refused; {width}×{height} {form}: {came[-1][:60]}, {peak / 1e6:.0f} MB in all"


def links(number: int, random: Generator, folder: Path) -> str:
    """Loops, dangling links, odd names, vanishing files: indexed within 1 s, nothing twice."""
    data = folder / "data"
    shape = number % 5
    (data / "a" / "b").mkdir(parents=True)
    names = [
        b"plain.png",
        b"two words.png",
        b"new\nline.png",
        b"latin-\xe9.png",
        "schön.png".encode(),
    ]
    for i, name in enumerate(names):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "one.png")
        os.rename(os.fsencode(folder / "one.png"), os.path.join(os.fsencode(data / "a"), name))
        assert i < 5
    for i in range(20):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / "a" / f"{i:02d}.png")
    (data / "dangling.png").symlink_to(data / "nowhere.png")
    (data / "a" / "b" / "up").symlink_to(
        [data, data / "a", data / "a" / "b", Path("up"), Path("../../a")][shape]
    )
    if shape == 4:
        (data / "x").symlink_to(data / "y")
        (data / "y").symlink_to(data / "x")
    began = time.monotonic()
    found = find_images(str(data))
    seconds = time.monotonic() - began
    assert seconds <= 1, f"{seconds:.1f} s"
    assert len(found) == 25, [found.name(i) for i in range(len(found))]
    out = folder / "run"
    process = launch(pretrain(out, "--data", data, "--epochs", 8, "--max_bad", 0.3))
    until(lambda: (out / "train.log").exists(), process)
    for i in range(4):
        (data / "a" / f"{i:02d}.png").unlink()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-1500:]
    return f"shape {shape}, {1000 * seconds:.0f} ms"


def golden(number: int, random: Generator, folder: Path) -> str:
    """The decoder's own tests: every mode and form against expected values."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_decode.py", "-p", "no:cacheprovider"],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:]
    return done.stdout.strip().splitlines()[-1]


ROWS = (
    Row("broken", "10,000 images, 1 % of them empty, truncated or text: exactly these are named, "
        "every run uses the same replacements, and content decides over a wrong extension", 1,
        broken),
    Row("bombs", "headers of up to 10⁹ pixels, 1 px wide, 30,000 px long, animated, many pages, "
        "and images just under max_pixels: refused unread or read as specified, in at most 1.5 GB",
        20,
        bombs),
    Row("links", "loops of links, dangling ones, vanishing files, names with spaces, newlines and "
        "bytes that are not UTF-8: indexed within 1 s, nothing twice, nothing crashes", 10, links),
    Row("golden", "images of every mode and format, decoded to the expected values within 2/255", 1,
        golden, short=0),
)  # fmt: skip
