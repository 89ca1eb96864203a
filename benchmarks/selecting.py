"""Time and memory of choosing images to label among many, and how well they cover them.

    .venv/bin/python -m benchmarks.selecting [--images 1000000] [--count 1000] [--pool 16384]

The features are synthetic: clusters of unequal size in a subspace, and an offset. What is covered
is the mean over all images, from 0 to 1; random images are the comparison. Linux only.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fcmae.inspect import selecting
from fcmae.inspect.benchmark import processor
from fcmae.train.machine import versions

CLUSTERS, DIMENSIONS, PART = 300, 32, 65_536


def synthetic(images: int, channels: int) -> Tensor:
    """Features (images, channels), made a part at a time."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIMENSIONS, channels, generator=generator)
    centres = torch.randn(CLUSTERS, DIMENSIONS, generator=generator)
    sizes = 1 / torch.arange(1, CLUSTERS + 1)
    features = torch.empty(images, channels)
    for part in features.split(PART):
        members = torch.multinomial(sizes, len(part), replacement=True, generator=generator)
        spread = 0.5 * torch.randn(len(part), DIMENSIONS, generator=generator)
        part[:] = (centres[members] + spread) @ mixing + 10
    return features


def peak() -> float:
    """Peak resident memory of this process in GB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 2**20


def coverage(features: Tensor, chosen: Tensor) -> float:
    """How well the chosen images cover all, on average."""
    mean = features[: selecting.POOL].mean(0)
    unit = selecting.directions(features[chosen], mean)
    total = 0.0
    for part in features.split(selecting.POOL):
        cosines = selecting.nearest(selecting.directions(part, mean), unit)
        total += float(selecting.covers(cosines).sum())
    return total / len(features)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--channels", type=int, default=320)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=selecting.POOL)
    options = parser.parse_args()
    selecting.POOL = options.pool
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {versions()['torch']}")
    features = synthetic(options.images, options.channels)
    hashes = np.random.default_rng(0).permutation(options.images).astype(np.uint64)
    size, before = features.nbytes / 2**30, peak()
    began = time.perf_counter()
    chosen = selecting.choose(features, options.count, hashes_N=hashes)
    seconds = time.perf_counter() - began
    print(
        f"{options.count} of {options.images} images, {options.channels} channels, compared in "
        f"full {options.pool}: {seconds:.0f} s; peak memory {peak():.2f} GB, {before:.2f} GB of it "
        f"before, with features of {size:.2f} GB"
    )
    ours = coverage(features, torch.tensor(chosen))
    random = coverage(features, torch.randperm(options.images)[: options.count])
    print(f"covered: {ours:.4f}, by random images {random:.4f}, ratio {ours / random:.3f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
