"""`fcmae doctor`: is this installation sound, and which engine should it use?"""

from __future__ import annotations

import importlib.metadata
import platform
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcmae.commands.doctor import DoctorConfig
from fcmae.inspect.timing import example, make_step, time_in_turns
from sparse import SparseConvNeXtV2
from sparse.engines import ENGINES, available_engines, get_engine

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "jsonargparse",
            "tensorboard", "MinkowskiEngine")  # fmt: skip
TOLERANCE = 1e-5
IMG_SIZE = (96, 96)
BATCH = 8


def doctor(config: DoctorConfig) -> int:
    """Print versions, devices, engines with a parity check against `dense`, and their speed.

    Returns:
        0 where every engine that can run agrees with `dense` to 1e-5, else 1.
    """
    console = Console()
    console.print(f"python {platform.python_version()} on {platform.platform()}", highlight=False)
    for package in PACKAGES:
        try:
            console.print(f"{package} {importlib.metadata.version(package)}", highlight=False)
        except importlib.metadata.PackageNotFoundError:
            console.print(f"{package} is not installed", highlight=False)
    gpus = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none"
    console.print(f"{torch.get_num_threads()} threads; CUDA devices: {names}", highlight=False)

    table = Table(title="engines: atto, 96×96, 60 % hidden, against dense")
    for heading in ("engine", "runs", "largest difference", "images/s"):
        table.add_column(heading)
    sound = True
    usable = available_engines()
    images, mask = example(BATCH, IMG_SIZE, 0.6, torch.device("cpu"))
    steps = {name: partial(make_step(name, "atto", images.device), images, mask) for name in usable}
    seconds = time_in_turns(steps, 5, torch.device("cpu"))
    for name in ENGINES:
        if name not in usable:
            table.add_row(name, f"no: {ENGINES[name].missing()}", "", "")
            continue
        difference = parity(name, images, mask)
        sound &= difference <= TOLERANCE
        verdict = "yes" if difference <= TOLERANCE else "DISAGREES"
        table.add_row(name, verdict, f"{difference:.1e}", f"{BATCH / seconds[name]:.1f}")
    console.print(table)
    auto = {kind: get_engine("auto", kind).name for kind in ("cpu", "cuda")}
    console.print(
        f"engine auto is {auto['cpu']} on the CPU here, {auto['cuda']} on a GPU", highlight=False
    )
    return 0 if sound else 1


def parity(engine: str, images: Tensor, mask: Tensor) -> float:
    """Largest difference from `dense`, relative per tensor, over the output and all gradients."""
    torch.manual_seed(0)
    reference = SparseConvNeXtV2.from_size("atto", engine="dense")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.1)
    expected = _outputs(reference, images, mask)
    other = SparseConvNeXtV2.from_size("atto", engine=engine)
    other.load_state_dict(reference.state_dict())
    found = _outputs(other, images, mask)
    return max(
        float((found[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )


def _outputs(encoder: SparseConvNeXtV2, images: Tensor, mask: Tensor) -> dict[str, Any]:
    images = images.clone().requires_grad_()
    out = encoder(images, mask)
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return {"output": out.detach(), "images": images.grad, **gradients}
