"""Steps to measure, their time and their memory. Needs torch, numpy, timm and safetensors only.

Times are medians over rounds in which every contestant takes one turn, so that drift of the
machine's speed affects all of them equally. Memory is measured in a separate process.
"""

import ctypes
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fcmae.commands.bench import BenchConfig
from fcmae.config.values import height_width
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import grid_of, keep_count, random_masks
from fcmae.train.optimizer import parameter_groups
from sparse import SparseConvNeXtV2
from sparse.engines.base import Layout
from sparse.sizes import PATCH, resolve_size

TIMM = "timm, unmasked"
BF16 = ", bf16"
WHOLE = ", whole step"

PASSES = 3
"""Forward and backward: a backward pass multiplies twice as much as a forward pass."""

Step = Callable[[], object]


def example(config: BenchConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images on the device and random masks on the CPU.

    Raises:
        InputError: the mask ratio leaves nothing visible, or nothing hidden.
    """
    batch, img_size = config.batch_size, height_width(config.img_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *img_size, generator=generator).to(device)
    return images, random_masks(batch, grid_of(img_size), config.mask_ratio, generator)


def make_step(
    name: str, model: str, device: torch.device, compiled: bool = False
) -> Callable[..., None]:
    """Forward and backward pass of a model, on images (B, 3, H, W) and a mask (B, H/32, W/32).

    The step also takes the mask's layout, if it is made ahead.

    Args:
        name: of an engine, or `TIMM`, timm's dense model of this size, which takes no mask and to
            which `dense` is compared. `BF16` may follow, for autocast, and `WHOLE` after an engine,
            for a step of pretraining with decoder, loss, gradient norm and AdamW.
        model: size of the ConvNeXt V2.
        device: where it runs.
        compiled: compile the encoder, or timm's model.
    """
    whole, half = name.endswith(WHOLE), BF16 in name
    engine = name.removesuffix(WHOLE).removesuffix(BF16)
    net: Any
    if engine == TIMM:
        net = timm.create_model(f"convnextv2_{resolve_size(model).name}", num_classes=0)
    else:
        net = (FCMAE if whole else SparseConvNeXtV2).from_size(model, engine=engine)
    net = net.to(device)
    run = net.forward_features if engine == TIMM else net
    if compiled and engine == TIMM:
        run = torch.compile(run)
    elif compiled:
        (net.encoder if whole else net).compile_encode()
    optimizer = torch.optim.AdamW(parameter_groups(net, 0.05), fused=True) if whole else None

    def step(images: Tensor, mask: Tensor, layout: Layout | None = None) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            out = run(images) if engine == TIMM else run(images, mask, layout=layout)
        (out.loss if whole else out.float().square().mean()).backward()
        if optimizer is not None:
            nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
            optimizer.step()
        net.zero_grad(set_to_none=True)

    return step


def macs(model: str, img_size: tuple[int, int]) -> float:
    """Multiply-adds of one image's forward pass with nothing hidden."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = timm.create_model(f"convnextv2_{resolve_size(model).name}", num_classes=0)
        net(torch.empty(1, 3, *img_size))
    return counter.get_total_flops() / 2


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


def peak_memory(name: str, model: str, config: BenchConfig) -> float | None:
    """Peak memory of one step in MB beyond the loaded model, in a fresh process; Linux only."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    call = f"_one_step{(name, model, config)!r}"
    script = f"from fcmae.inspect.steps import BenchConfig, _one_step; print({call})"
    command = [sys.executable, "-W", "ignore", "-c", script]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _one_step(name: str, model: str, config: BenchConfig) -> float:
    device = torch.device("cpu")
    step = make_step(name, model, device)
    # The first step loads kernels, and creates thread pools and the optimizer's state. Memory that
    # it freed is returned to the system, so that all memory of the next one counts.
    step(*example(replace(config, batch_size=1, img_size=2 * PATCH, mask_ratio=0.5), device))
    images, mask = example(config, device)
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # resets the high-water mark to the current use
    before = _status("VmRSS")
    step(images, mask)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """An entry of this process's memory statistics, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.findall(rf"{key}:\s+(\d+) kB", file.read())[0])


def gpu_peak(step: Step, device: torch.device) -> float:
    """Peak memory in MB that one step allocates on a GPU."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def visible_share(config: BenchConfig) -> float:
    """Share of the patches that stay visible: the least work of a sparse engine."""
    h, w = grid_of(height_width(config.img_size))
    return keep_count(h * w, config.mask_ratio) / (h * w)
