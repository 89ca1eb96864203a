"""`fcmae doctor`: does this installation work, which engine should it use, and what fits?"""

import importlib.metadata
import platform
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.console import Console

from fcmae.commands.bench import BenchConfig
from fcmae.commands.doctor import DoctorConfig
from fcmae.config.values import height_width
from fcmae.data.find import find_source
from fcmae.data.statistics import Preprocessing, imagenet_mean_std
from fcmae.data.survey import LOOKED_AT, survey
from fcmae.data.windows import random_windows
from fcmae.inspect.memory import SAFE, forecast, memory_of
from fcmae.inspect.parity import parity, tolerance
from fcmae.inspect.prologue import print_table
from fcmae.inspect.steps import WHOLE, example, make_step, time_in_turns
from fcmae.model.mask import check_mask_ratio, grid_of
from fcmae.train.machine import resolve_precision
from fcmae.train.processes import exact_float32, resolve_device
from sparse.engines import ENGINES, available_engines, get_engine
from sparse.errors import InputError
from sparse.sizes import resolve_size

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "jsonargparse",
            "tensorboard", "MinkowskiEngine")  # fmt: skip
EXAMPLE = BenchConfig(batch_size=8, img_size=96)
BATCHES = (8, 32, 128)
"""Batch sizes of the forecast."""


def doctor(config: DoctorConfig) -> int:
    """Print versions, devices, engines with a parity check and their speed, and what fits.

    Returns:
        0 if every engine that can run on the device agrees with `dense` on the CPU, else 1.

    Raises:
        InputError: the device is missing, a size is unknown, or an image has too few patches.
    """
    device = resolve_device(config.device)
    for model in config.models:
        resolve_size(model)
    check_mask_ratio(EXAMPLE.mask_ratio, grid_of(height_width(config.img_size)))
    exact_float32()
    console = Console(highlight=False)
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            console.print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            console.print(f"{package} is not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"{torch.get_num_threads()} threads; CUDA devices: {', '.join(gpus) or 'none'}")
    agree = _check_engines(device)
    auto = [get_engine("auto", kind).name for kind in ("cpu", "cuda")]
    console.print(f"engine auto is {auto[0]} on the CPU here, {auto[1]} on a GPU")
    _forecast_memory(config, device)
    if config.data is not None:
        for line in _look_at(config, device):
            console.print(line)
    return int(not agree)


def _look_at(config: DoctorConfig, device: torch.device) -> list[str]:
    """Describe the images of `config.data`, and how fast the first model trains on such.

    Raises:
        InputError: there are none, or none can be read.
    """
    assert config.data is not None
    source, size = find_source(config.data), height_width(config.img_size)
    count = len(source)
    if config.window is not None:  # several of each, if there are few
        source = source.select(np.resize(np.arange(count), max(count, LOOKED_AT)))
        source = random_windows(source, 0, config.window)
    mean, std = imagenet_mean_std(config.in_chans)
    bands = tuple(config.bands or ())
    images = Preprocessing(size, mean, std, bands=bands, nodata=config.nodata)
    found = survey(source, images, 0, config.max_pixels)
    if not found.sizes:
        raise InputError(f"data {config.data!r}: no image can be read ({': '.join(found.bad[0])})")
    name, batch = config.models[0], EXAMPLE.batch_size
    step = make_step("patch" + WHOLE, name, device)
    taken = partial(step, *example(replace(EXAMPLE, img_size=[*size]), device))
    seconds = time_in_turns({name: taken}, 2, device)[name]
    speed = f"{name} trains on about {batch / seconds:.3g} images/s"
    return [f"{count} images", *found.lines(), speed]


def _check_engines(device: torch.device) -> bool:
    """Print whether each engine agrees and how fast it is; return whether all agree."""
    images, mask = example(EXAMPLE, device)
    engines = available_engines(device.type)
    steps = {name: partial(make_step(name, "atto", device), images, mask) for name in engines}
    rows: list[tuple[str, ...]] = []
    for name, seconds in time_in_turns(steps, 5, device).items():
        difference = parity(name, images, mask)
        verdict = "yes" if difference <= tolerance(device) else "DISAGREES"
        rows.append((name, verdict, f"{difference:.1e}", f"{len(images) / seconds:.1f}"))
    agree = all(row[1] == "yes" for row in rows)
    for name in ENGINES:
        if name not in steps:
            obstacle = ENGINES[name].obstacle(device.type, torch.float32, compiled=False)
            rows.append((name, f"no: {obstacle}"))
    title = f"engines on {device}: atto, 96×96, 60 % hidden, against dense on the CPU"
    print_table(("engine", "runs", "largest difference", "images/s"), rows, title)
    return agree


def _forecast_memory(config: DoctorConfig, device: torch.device) -> None:
    """Print what a step of pretraining needs, by size and batch."""
    precision, memory = resolve_precision("auto", device), memory_of(device)
    needs = [forecast(model, config.img_size, device, precision) for model in config.models]
    parts = {
        "weights": [each.weights for each in needs],
        "gradients": [each.weights for each in needs],
        "AdamW's averages": [2 * each.weights for each in needs],
        "activations of an image": [each.per_image for each in needs],
        **{f"in all, batch {batch}": [each.total(batch) for each in needs] for batch in BATCHES},
    }
    rows = [(name, *(f"{size / 1e6:.0f}" for size in sizes)) for name, sizes in parts.items()]
    if memory:
        whose = "the GPU" if device.type == "cuda" else "RAM"
        fits = (f"{each.largest_batch(memory)}" for each in needs)
        rows.append((f"largest batch in {SAFE:.0%} of {memory / 1e9:.1f} GB of {whose}", *fits))
    h, w = height_width(config.img_size)
    title = f"memory in MB: a step of patch on {device}, {h}×{w}, 60 % hidden, {precision}"
    print_table(("", *config.models), rows, title)
