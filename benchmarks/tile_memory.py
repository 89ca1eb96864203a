"""Memory and time of predicting the mask of one large image with `--tile`.

    .venv/bin/python -m benchmarks.tile_memory RUN [--side 10000] [--tile 512]

RUN has learned masks. The image is random noise of SIDE × SIDE pixels, a PNG. Prints the peak
resident memory of the process that predicts, and that of one that predicts an image of one tile.
Linux only.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PREDICT = """
import re, sys
from pathlib import Path
from fcmae.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
sys.exit(code)
"""


def predict(run: Path, folder: Path, side: int, tile: int) -> tuple[float, float]:
    """Peak resident memory in MB and seconds of predicting an image."""
    images = folder / f"images-{side}"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "large.png", compress_level=1)
    del pixels
    began = time.perf_counter()
    words = ["predict", run, "--images", images, "--out", folder / f"masks-{side}", "--tile", tile]
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, *map(str, words), "--workers", "0"],
        stderr=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with Image.open(folder / f"masks-{side}" / "large.png") as mask:
        assert mask.size == (side, side)
    found = re.findall(r"^\d+$", done.stderr, re.MULTILINE)
    return int(found[-1]) / 1024, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--tile", type=int, default=512)
    options = parser.parse_args()
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as folder:
        small, _ = predict(options.run, Path(folder), options.tile, options.tile)
        large, seconds = predict(options.run, Path(folder), options.side, options.tile)
    megabytes = options.side**2 / 2**20
    print(
        f"{options.side}×{options.side} with --tile {options.tile}: {large:.0f} MB in "
        f"{seconds:.0f} s; one tile {small:.0f} MB; pixels {3 * megabytes:.0f} MB, mask "
        f"{megabytes:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
