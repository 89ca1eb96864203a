"""Steps to time, and how: what `fcmae bench` and `fcmae doctor` share with the benchmarks.

Times are medians over rounds in which every contestant takes one turn, so that a machine whose
speed drifts moves all of them alike. Memory is measured in a process each.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import grid_of, random_masks
from fcmae.train.optimizer import parameter_groups
from sparse import SparseConvNeXtV2
from sparse.sizes import PATCH, STRIDES, resolve_size

TIMM = "timm, unmasked"
BF16 = ", bf16"
WHOLE = ", whole step"
GEMM_SIDE = 2048
GEMM_FLOPS = 2 * GEMM_SIDE**3

Step = Callable[[], object]
ImageStep = Callable[[Tensor, Tensor], None]


def example(
    batch: int, img_size: tuple[int, int], mask_ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random images on the device and random masks on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *img_size, generator=generator).to(device)
    return images, random_masks(batch, grid_of(img_size), mask_ratio, generator)


def make_step(name: str, model: str, device: torch.device) -> ImageStep:
    """Forward and backward pass of a model, on images (B, 3, H, W) and a mask (B, H/32, W/32).

    Args:
        name: an engine's, by itself, followed by `BF16` for autocast, or followed by `WHOLE` for a
            step of pretraining: with decoder, loss, gradient norm and AdamW. Or `TIMM`: timm's own
            dense model of the size, which knows no mask and is the honest yardstick of `dense`.
    """
    if name == TIMM:
        return _timm_step(model, device)
    if name.endswith(WHOLE):
        return _whole_step(model, name.removesuffix(WHOLE), device)
    encoder = SparseConvNeXtV2.from_size(model, engine=name.removesuffix(BF16)).to(device)

    def step(images: Tensor, mask: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=name.endswith(BF16)):
            features = encoder(images, mask)
        features.float().square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    return step


def _whole_step(model: str, engine: str, device: torch.device) -> ImageStep:
    fcmae = FCMAE.from_size(model, engine=engine).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(fcmae, 0.05), fused=True)

    def step(images: Tensor, mask: Tensor) -> None:
        fcmae(images, mask).loss.backward()
        nn.utils.get_total_norm([p.grad for p in fcmae.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timm_step(model: str, device: torch.device) -> ImageStep:
    size = resolve_size(model)
    net: Any = timm.create_model(f"convnextv2_{size.name}", num_classes=0).to(device)

    def step(images: Tensor, _: Tensor) -> None:
        net.forward_features(images).square().mean().backward()
        net.zero_grad(set_to_none=True)

    return step


def gemm_step(device: torch.device) -> Step:
    """A float32 product of square matrices, `GEMM_FLOPS` operations: the device at its best."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device)
    return lambda: a @ a


def macs(model: str, img_size: tuple[int, int]) -> float:
    """Multiply-adds of one image's forward pass, nothing hidden."""
    size = resolve_size(model)
    total, before = 0, 3 * STRIDES[0] ** 2
    for stride, depth, dim in zip(STRIDES, size.depths, size.dims, strict=True):
        sites = img_size[0] // stride * (img_size[1] // stride)
        total += sites * (before * dim + depth * (49 * dim + 8 * dim**2))
        before = 4 * dim
    return float(total)


def time_in_turns(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each step over rounds in which all take a turn, after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(
    name: str, model: str, batch: int, img_size: tuple[int, int], mask_ratio: float
) -> float | None:
    """Megabytes by which one step raises a fresh process above the loaded model; Linux only."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    arguments = json.dumps([name, model, batch, list(img_size), mask_ratio])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fcmae.inspect.timing", arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def _peak_of_one_step(
    name: str, model: str, batch: int, img_size: list[int], mask_ratio: float
) -> float:
    device = torch.device("cpu")
    step = make_step(name, model, device)
    # The first step loads kernels, makes thread pools and the optimizer's state; what it freed is
    # given back, so that the next one's memory is all counted.
    step(*example(1, (2 * PATCH, 2 * PATCH), 0.5, device))
    images, mask = example(batch, (img_size[0], img_size[1]), mask_ratio, device)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # sets the high-water mark to what is in use now
    before = _status("VmRSS")
    step(images, mask)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A line of this process's memory statistics, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"{key}:\s+(\d+) kB", file.read())
    assert found is not None
    return int(found[1])


def gpu_peak(step: Step, device: torch.device) -> float:
    """Megabytes by which one step raises what is allocated on a GPU."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


if __name__ == "__main__":
    print(_peak_of_one_step(*json.loads(sys.argv[1])))
