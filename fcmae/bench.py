"""`fcmae bench`: the engines side by side on this machine.

Times are medians over rounds in which every contestant takes one turn, so that a machine whose
speed drifts moves all of them alike. Memory is measured in a process each.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcmae.distributed import resolve_device
from fcmae.mask import check_mask_ratio, grid_of, keep_count
from fcmae.run import versions
from fcmae.settings import height_width
from fcmae.tool_config import BenchConfig
from sparse import SparseConvNeXtV2
from sparse.engines import ENGINES
from sparse.engines.minkowski import why_unavailable
from sparse.sizes import PATCH, resolve_size

TIMM = "timm, unmasked"
GEMM_SIDE = 2048

Step = Callable[[], object]


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, print a table or JSON, and return what was measured.

    Raises:
        InputError: a size or ratio that no model can take.
    """
    img_size = height_width(config.img_size)
    check_mask_ratio(config.mask_ratio, grid_of(img_size))
    device = resolve_device(config.device)
    result: dict[str, Any] = {
        "machine": {
            "processor": _processor(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "gemm_gflops": round(gemm_gflops(device)),
            **versions(),
        },
        "settings": {
            "batch_size": config.batch_size,
            "img_size": list(img_size),
            "mask_ratio": config.mask_ratio,
            "rounds": config.rounds,
            "visible_share": visible_share(img_size, config.mask_ratio),
        },
        "models": {model: measure(model, config, img_size, device) for model in config.models},
    }
    print(json.dumps(result)) if config.json else _show(result)
    return result


def visible_share(img_size: tuple[int, int], mask_ratio: float) -> float:
    """Share of the patches that stay visible: the least that a sparse engine can compute."""
    h, w = grid_of(img_size)
    return keep_count(h * w, mask_ratio) / (h * w)


def measure(
    model: str, config: BenchConfig, img_size: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """Images/s and peak memory of one training step (forward and backward) of the encoder."""
    names = [name for name in ENGINES if name != "minkowski" or device.type == "cpu"]
    if why_unavailable() is not None and "minkowski" in names:
        names.remove("minkowski")
    images, mask = example(config.batch_size, img_size, config.mask_ratio, device)
    steps = {name: encoder_step(model, name, images, mask) for name in names}
    steps[TIMM] = timm_step(model, images)
    seconds = time_in_turns(steps, config.rounds, device)
    dense = seconds["dense"]
    return {
        name: {
            "images_per_s": config.batch_size / seconds[name],
            "times_dense": dense / seconds[name],
            "peak_mb": peak_memory(name, model, config.batch_size, img_size, config.mask_ratio)
            if device.type == "cpu"
            else _gpu_peak(steps[name], device),
        }
        for name in steps
    }


def example(
    batch: int, img_size: tuple[int, int], mask_ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Random images on the device and random masks on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *img_size, generator=generator).to(device)
    h, w = grid_of(img_size)
    rank = torch.rand(batch, h * w, generator=generator).argsort(1).argsort(1)
    return images, (rank >= keep_count(h * w, mask_ratio)).view(batch, h, w)


def encoder_step(model: str, engine: str, images: Tensor, mask: Tensor) -> Step:
    encoder = SparseConvNeXtV2.from_size(model, engine=engine).to(images.device)

    def step() -> None:
        encoder(images, mask).square().mean().backward()
        encoder.zero_grad(set_to_none=True)

    return step


def timm_step(model: str, images: Tensor) -> Step:
    """timm's own dense model of the size, which knows no mask: the honest yardstick of `dense`."""
    size = resolve_size(model)
    net: Any = timm.create_model(f"convnextv2_{size.name}", num_classes=0).to(images.device)

    def step() -> None:
        net.forward_features(images).square().mean().backward()
        net.zero_grad(set_to_none=True)

    return step


def time_in_turns(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
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
        [sys.executable, "-W", "ignore", "-m", "fcmae.bench", arguments],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout)


def _peak_of_one_step(
    name: str, model: str, batch: int, img_size: list[int], mask_ratio: float
) -> float:
    device = torch.device("cpu")
    size = (img_size[0], img_size[1])
    images, mask = example(batch, size, mask_ratio, device)
    small, small_mask = example(1, (2 * PATCH, 2 * PATCH), 0.5, device)
    for warm_up in (True, False):  # the first step loads kernels and makes thread pools
        x, m = (small, small_mask) if warm_up else (images, mask)
        step = timm_step(model, x) if name == TIMM else encoder_step(model, name, x, m)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # sets the high-water mark to what is in use now
        before = _status("VmRSS")
        step()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A line of this process's memory statistics, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"{key}:\s+(\d+) kB", file.read())
    assert found is not None
    return int(found[1])


def _gpu_peak(step: Step, device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def gemm_gflops(device: torch.device) -> float:
    """The device's float32 matrix product speed in 10⁹ operations a second: best of five."""
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        began = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * GEMM_SIDE**3 / best / 1e9


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = re.findall(r"model name\s*:\s*(.+)", file.read())
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _show(result: dict[str, Any]) -> None:
    console = Console()
    machine, settings = result["machine"], result["settings"]
    console.print(
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}, torch "
        f"{machine['torch']}; GEMM {machine['gemm_gflops']} GFLOP/s",
        highlight=False,
    )
    for model, rows in result["models"].items():
        h, w = settings["img_size"]
        table = Table(
            title=f"{model}: encoder, forward and backward, float32, batch "
            f"{settings['batch_size']}, {h}×{w}, {settings['visible_share']:.0%} visible"
        )
        for heading in ("", "images/s", "÷ dense", "peak MB", "÷ dense"):
            table.add_column(heading, justify="right" if heading else "left")
        dense = rows["dense"]
        for name, row in rows.items():
            memory = row["peak_mb"]
            table.add_row(
                name, f"{row['images_per_s']:.1f}", f"{row['times_dense']:.2f}",
                "–" if memory is None else f"{memory:.0f}",
                "–" if memory is None else f"{memory / dense['peak_mb']:.2f}",
            )  # fmt: skip
        console.print(table)
    console.print(
        f"the most that skipping hidden patches can give is {1 / settings['visible_share']:.2f} "
        f"times dense; medians of {settings['rounds']} rounds in turns",
        highlight=False,
    )


if __name__ == "__main__":
    print(_peak_of_one_step(*json.loads(sys.argv[1])))
