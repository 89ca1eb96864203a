"""`fcmae bench`: the engines compared on this machine, every ratio from one process."""

import os
import platform
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fcmae.commands.bench import BenchConfig
from fcmae.config.values import height_width
from fcmae.inspect.prologue import print_result, print_table
from fcmae.inspect.steps import (
    BF16,
    PASSES,
    TIMM,
    WHOLE,
    example,
    gpu_peak,
    macs,
    make_step,
    peak_memory,
    time_in_turns,
    visible_share,
)
from fcmae.train.machine import versions
from fcmae.train.processes import resolve_device
from sparse.engines import available_engines

GEMM_SIDE = 2048
"""The device's peak is that of a float32 product of square matrices of this side."""

GEMM_FLOPS = 2 * GEMM_SIDE**3

RATIOS = (
    ("dense", TIMM),
    ("patch", "dense"),
    ("minkowski", "patch"),
    (f"patch{BF16}", "patch"),
    ("patch", f"patch{WHOLE}"),
)
"""Speeds to compare, in images/s."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, print a table or JSON, and return the result.

    Raises:
        InputError: no model can take this size or ratio.
    """
    device = resolve_device(config.device)
    models = {model: measure(model, config, device) for model in config.models}
    result = {
        "machine": {
            "processor": processor(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            **versions(),
        },
        "settings": {
            "batch_size": config.batch_size,
            "img_size": list(height_width(config.img_size)),
            "mask_ratio": config.mask_ratio,
            "rounds": config.rounds,
            "visible_share": visible_share(config),
        },
        "models": models,
        "ratios": {
            model: {
                f"{a} ÷ {b}": rows[a]["images_per_s"] / rows[b]["images_per_s"]
                for a, b in RATIOS
                if a in rows and b in rows
            }
            for model, rows in models.items()
        },
    }
    print_result(result, config.json, True, _print_tables)
    return result


def measure(model: str, config: BenchConfig, device: torch.device) -> dict[str, Any]:
    """Images/s, arithmetic as a share of a matrix product's, and peak memory of each step."""
    images, mask = example(config, device)
    names = [*available_engines(device.type), TIMM, f"patch{BF16}", f"patch{WHOLE}"]
    steps = {name: partial(make_step(name, model, device), images, mask) for name in names}
    a = torch.randn(GEMM_SIDE, GEMM_SIDE, device=device)
    seconds = time_in_turns({**steps, "gemm": lambda: a @ a}, config.rounds, device)
    peak = GEMM_FLOPS / seconds["gemm"]
    flops = 2 * PASSES * macs(model, height_width(config.img_size))
    on_cpu = device.type == "cpu"
    rows = {}
    for name, step in steps.items():
        speed = config.batch_size / seconds[name]
        share = visible_share(config) if name.startswith(("patch", "minkowski")) else 1.0
        rows[name] = {
            "images_per_s": speed,
            "times_dense": seconds["dense"] / seconds[name],
            "gemm_share": None if name.endswith(WHOLE) else speed * flops * share / peak,
            "peak_mb": peak_memory(name, model, config) if on_cpu else gpu_peak(step, device),
        }
    return rows


def processor() -> str:
    """The processor's name and its number of cores."""
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8") if described.exists() else ""
    names = re.findall(r"model name\s*:\s*(.+)", text)
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _print_tables(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    machine, settings = result["machine"], result["settings"]
    console.print("{processor}, {threads} threads, {device}, torch {torch}".format(**machine))
    for model, rows in result["models"].items():
        h, w = settings["img_size"]
        print_table(
            ("", "images/s", "÷ dense", "of GEMM", "peak MB", "÷ dense"),
            [_cells(name, row, rows["dense"]["peak_mb"]) for name, row in rows.items()],
            f"{model}: encoder, forward and backward, float32, batch {settings['batch_size']}, "
            f"{h}×{w}, {settings['visible_share']:.0%} visible",
        )
        for text, ratio in result["ratios"][model].items():
            console.print(f"{text}: {ratio:.2f}")
    limit, rounds = 1 / settings["visible_share"], settings["rounds"]
    console.print(f"sparsity gives at most {limit:.2f} times dense; medians of {rounds} rounds")


def _cells(name: str, row: dict[str, Any], dense_mb: float) -> list[str]:
    share, memory = row["gemm_share"], row["peak_mb"]
    speeds = [f"{row['images_per_s']:.1f}", f"{row['times_dense']:.2f}"]
    speeds.append("–" if share is None else f"{share:.0%}")
    peak = ["–", "–"] if memory is None else [f"{memory:.0f}", f"{memory / dense_mb:.2f}"]
    return [name, *speeds, *peak]
