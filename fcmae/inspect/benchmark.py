"""`fcmae bench`: the engines side by side on this machine, every ratio from one process."""

from __future__ import annotations

import json
import os
import platform
import re
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fcmae.commands.bench import BenchConfig
from fcmae.config.values import height_width
from fcmae.inspect.timing import (
    BF16,
    GEMM_FLOPS,
    TIMM,
    WHOLE,
    example,
    gemm_step,
    gpu_peak,
    macs,
    make_step,
    peak_memory,
    time_in_turns,
)
from fcmae.model.mask import check_mask_ratio, grid_of, keep_count
from fcmae.train.machine import versions
from fcmae.train.processes import resolve_device
from sparse.engines import available_engines

PASSES = 3
"""A backward pass multiplies twice as much as the forward pass."""

RATIOS = {
    "dense ÷ timm, unmasked": ("dense", TIMM),
    "patch ÷ dense": ("patch", "dense"),
    "minkowski ÷ patch": ("minkowski", "patch"),
    "patch, bf16 ÷ patch": (f"patch{BF16}", "patch"),
    "patch ÷ patch, whole step": ("patch", f"patch{WHOLE}"),
}
"""Speeds to compare, in images/s."""


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
            **versions(),
        },
        "settings": {
            "batch_size": config.batch_size,
            "img_size": list(img_size),
            "mask_ratio": config.mask_ratio,
            "rounds": config.rounds,
            "visible_share": visible_share(img_size, config.mask_ratio),
        },
        "models": {},
    }
    for model in config.models:
        result["models"][model] = measure(model, config, img_size, device)
    result["ratios"] = {model: _ratios(rows) for model, rows in result["models"].items()}
    print(json.dumps(result)) if config.json else _show(result)
    return result


def visible_share(img_size: tuple[int, int], mask_ratio: float) -> float:
    """Share of the patches that stay visible: the least that a sparse engine can compute."""
    h, w = grid_of(img_size)
    return keep_count(h * w, mask_ratio) / (h * w)


def measure(
    model: str, config: BenchConfig, img_size: tuple[int, int], device: torch.device
) -> dict[str, Any]:
    """Images/s, arithmetic as a share of a matrix product's, and peak memory of each step."""
    names = [*available_engines(device.type), TIMM, f"patch{BF16}", f"patch{WHOLE}"]
    batch = config.batch_size
    images, mask = example(batch, img_size, config.mask_ratio, device)
    steps = {name: partial(make_step(name, model, device), images, mask) for name in names}
    seconds = time_in_turns({**steps, "gemm": gemm_step(device)}, config.rounds, device)
    peak = GEMM_FLOPS / seconds["gemm"]
    visible = visible_share(img_size, config.mask_ratio)
    rows = {}
    for name in names:
        share = visible if name.startswith(("patch", "minkowski")) else 1.0
        flops = 2 * PASSES * macs(model, img_size) * batch * share
        rows[name] = {
            "images_per_s": batch / seconds[name],
            "times_dense": seconds["dense"] / seconds[name],
            "gemm_share": None if name.endswith(WHOLE) else flops / seconds[name] / peak,
            "peak_mb": peak_memory(name, model, batch, img_size, config.mask_ratio)
            if device.type == "cpu"
            else gpu_peak(steps[name], device),
        }
    return rows


def _ratios(rows: dict[str, Any]) -> dict[str, float]:
    return {
        text: rows[a]["images_per_s"] / rows[b]["images_per_s"]
        for text, (a, b) in RATIOS.items()
        if a in rows and b in rows
    }


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
        f"{machine['torch']}",
        highlight=False,
    )
    for model, rows in result["models"].items():
        h, w = settings["img_size"]
        table = Table(
            title=f"{model}: encoder, forward and backward, float32, batch "
            f"{settings['batch_size']}, {h}×{w}, {settings['visible_share']:.0%} visible"
        )
        for heading in ("", "images/s", "÷ dense", "of GEMM", "peak MB", "÷ dense"):
            table.add_column(heading, justify="right" if heading else "left")
        dense = rows["dense"]
        for name, row in rows.items():
            memory, share = row["peak_mb"], row["gemm_share"]
            table.add_row(
                name, f"{row['images_per_s']:.1f}", f"{row['times_dense']:.2f}",
                "–" if share is None else f"{share:.0%}",
                "–" if memory is None else f"{memory:.0f}",
                "–" if memory is None else f"{memory / dense['peak_mb']:.2f}",
            )  # fmt: skip
        console.print(table)
        for text, ratio in result["ratios"][model].items():
            console.print(f"{text}: {ratio:.2f}", highlight=False)
    console.print(
        f"the most that skipping hidden patches can give is {1 / settings['visible_share']:.2f} "
        f"times dense; medians of {settings['rounds']} rounds in turns",
        highlight=False,
    )
