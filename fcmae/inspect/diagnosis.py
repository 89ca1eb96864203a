"""`fcmae doctor`: does this installation work, and which engine should it use?"""

import importlib.metadata
import platform
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from fcmae.commands.bench import BenchConfig
from fcmae.commands.doctor import DoctorConfig
from fcmae.inspect.benchmark import example, make_step, time_in_turns
from fcmae.inspect.prologue import print_table
from sparse import SparseConvNeXtV2
from sparse.engines import ENGINES, available_engines, get_engine

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "safetensors", "jsonargparse",
            "tensorboard", "MinkowskiEngine")  # fmt: skip
TOLERANCE = 1e-5
EXAMPLE = BenchConfig(batch_size=8, img_size=96)


def doctor(config: DoctorConfig) -> int:
    """Print versions, devices, engines with a parity check against `dense`, and their speed.

    Returns:
        0 if every engine that can run agrees with `dense` to 1e-5, else 1.
    """
    console = Console(highlight=False)
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            console.print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            console.print(f"{package} is not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    console.print(f"{torch.get_num_threads()} threads; CUDA devices: {', '.join(gpus) or 'none'}")
    cpu = torch.device("cpu")
    images, mask = example(EXAMPLE, cpu)
    engines = available_engines()
    steps = {name: partial(make_step(name, "atto", cpu), images, mask) for name in engines}
    rows: list[tuple[str, ...]] = []
    for name, seconds in time_in_turns(steps, 5, cpu).items():
        difference = parity(name, images, mask)
        verdict = "yes" if difference <= TOLERANCE else "DISAGREES"
        rows.append((name, verdict, f"{difference:.1e}", f"{len(images) / seconds:.1f}"))
    agree = all(row[1] == "yes" for row in rows)
    rows += [(name, f"no: {ENGINES[name].missing()}") for name in ENGINES if name not in steps]
    title = "engines: atto, 96×96, 60 % hidden, against dense"
    print_table(("engine", "runs", "largest difference", "images/s"), rows, title)
    auto = [get_engine("auto", kind).name for kind in ("cpu", "cuda")]
    console.print(f"engine auto is {auto[0]} on the CPU here, {auto[1]} on a GPU")
    return int(not agree)


def parity(engine: str, images: Tensor, mask: Tensor) -> float:
    """Largest difference from `dense` over the output and all gradients, relative per tensor."""
    torch.manual_seed(0)
    reference = SparseConvNeXtV2.from_size("atto", engine="dense")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.1)
    other = SparseConvNeXtV2.from_size("atto", engine=engine)
    other.load_state_dict(reference.state_dict())
    pairs = zip(_outputs(reference, images, mask), _outputs(other, images, mask), strict=True)
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)


def _outputs(encoder: SparseConvNeXtV2, images: Tensor, mask: Tensor) -> list[Tensor]:
    """The output and its gradients."""
    images = images.clone().requires_grad_()
    out = encoder(images, mask)
    gradients = torch.autograd.grad(out.square().mean(), [images, *encoder.parameters()])
    return [out.detach(), *gradients]
