"""Large images: the time and memory of a crop, against decoding all.

    .venv/bin/python -m benchmarks.rasters [--side 20000] [--crops 100]

Writes a GeoTIFF, an OME-TIFF and a zarr of SIDE×SIDE pixels of three bands to a temporary folder
(3 GB), compressed in tiles of 256 pixels. A crop is of 224 pixels, opened anew; resident memory is
what a process needs more after all crops than before.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
import tifffile
import zarr

from fcmae.data.decode import read_image
from fcmae.data.image import Reading

CROP, TILE, BLOCK = 224, 256, 1024
MOST = 10**10


def write_all(folder: Path, side: int) -> list[Path]:
    """Write the same image three times: a random texture, repeated."""
    random = np.random.default_rng(0)
    steps = random.normal(size=(BLOCK, BLOCK, 3)).cumsum(1)
    block = (4 * steps + 128).clip(0, 255).astype(np.uint8)
    row_HWC = np.tile(block, (1, -(-side // BLOCK), 1))[:, :side]
    tops = range(0, side, BLOCK)
    paths = [folder / name for name in ("map.tif", "slide.ome.tif", "slide.zarr")]
    profile = {
        "driver": "GTiff", "width": side, "height": side, "count": 3, "dtype": "uint8",
        "tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "zlevel": 1,
        "nodata": 0, "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
        "bigtiff": "if_safer",
    }  # fmt: skip
    with rasterio.open(paths[0], "w", **profile) as data:
        for top in tops:
            rows = row_HWC[: side - top]
            window = (top, top + len(rows)), (0, side)
            data.write(rows.transpose(2, 0, 1), window=window)
    tiles = (
        row_HWC[top % BLOCK : top % BLOCK + TILE, left : left + TILE]
        for top in range(0, side, TILE)
        for left in range(0, side, TILE)
    )
    tifffile.imwrite(
        paths[1], tiles, shape=(side, side, 3), dtype="uint8", tile=(TILE, TILE), ome=True,
        compression="zlib", photometric="rgb", metadata={"axes": "YXS"}, bigtiff=True,
    )  # fmt: skip
    array = zarr.create_array(
        paths[2], shape=(3, side, side), chunks=(3, TILE, TILE), dtype="uint8"
    )
    for top in tops:
        rows = row_HWC[: side - top]
        array[:, top : top + len(rows)] = rows.transpose(2, 0, 1)
    return paths


def resident() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def crops(path: Path, side: int, count: int) -> tuple[list[float], float]:
    """Return the seconds of each crop, and the memory that all need."""
    places = np.random.default_rng(1).integers(0, side - CROP, (count + 5, 2)).tolist()
    seconds = []
    for number, (left, top) in enumerate(places):
        if number == 5:  # packages are imported, and buffers have their size
            before = resident()
        began = time.perf_counter()
        read_image(str(path), Reading(3)).resized((left, top, CROP, CROP), (CROP, CROP))
        seconds.append(time.perf_counter() - began)
    return seconds[5:], resident() - before


def whole(path: Path, side: int) -> tuple[float, float]:
    """Return the seconds and the memory of decoding all for one crop."""
    began, before = time.perf_counter(), resident()
    everything = read_image(str(path), Reading(3, MOST)).resized((0, 0, side, side), (side, side))
    used = resident() - before
    del everything
    return time.perf_counter() - began, used


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--crops", type=int, default=100)
    options = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for path in write_all(Path(folder), options.side):
            with fresh.Pool(1) as pool:
                seconds, memory = pool.apply(crops, (path, options.side, options.crops))
            with fresh.Pool(1) as pool:
                at_once, all_memory = pool.apply(whole, (path, options.side))
            low, middle, high = np.percentile(seconds, [5, 50, 95]) * 1000
            print(
                f"{path.name}: a crop {middle:.1f} ms ({low:.1f} to {high:.1f}), {memory:.0f} MB; "
                f"all {at_once:.1f} s, {all_memory:.0f} MB"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
