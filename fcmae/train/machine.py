"""What a run uses of the machine: precision, worker processes and disk space."""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fcmae import __version__
from fcmae.train.checkpoint import list_checkpoints
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError

MOST_WORKERS = 16


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → bf16 on GPUs that support it, else fp32: on CPUs all engines then agree to 1e-5."""
    if precision != "auto":
        return precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bfloat16 products (AVX512-BF16 or AMX)."""
    found: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def resolve_workers(workers: str | int, device: torch.device) -> int:
    """`auto` → one process per core of this machine and training process, at most 16.

    A quarter of that if the model runs on the CPU too: workers are faster than the model there, and
    use its cores.
    """
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MOST_WORKERS, share if device.type != "cpu" else share // 4))


def check_disk(config: Any, model: nn.Module, copies: int) -> str:
    """Refuse a run whose checkpoints do not fit on the disk of `config.out`.

    A checkpoint has the weights, AdamW's two averages of trained ones, and further `copies`.

    Returns:
        A line for the log: what they need and what is free.

    Raises:
        InputError: less is free than `keep_checkpoints` and one being written need in addition to
            the existing ones.
    """
    keep = config.keep_checkpoints
    sizes = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    size = sum(size * (1 + copies + 2 * trained) for size, trained in sizes)
    need = size * (max(keep - len(list_checkpoints(RunPaths(Path(config.out)).checkpoints)), 0) + 1)
    folder = Path(config.out).absolute()
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if need > free:
        raise InputError(
            f"out {config.out!r} has {free / 1e9:.2f} GB free, but its checkpoints, {keep} and one "
            f"being written, need {need / 1e9:.2f} GB more: free some or give another --out"
        )
    most = f"at most {keep + 1} of {size / 1e6:.0f} MB, {free / 1e9:.1f} GB free"
    return f"checkpoints in {config.out}: {most}"


def versions() -> dict[str, str]:
    """The versions that computed a checkpoint, which records them."""
    return {
        "fcmae": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
