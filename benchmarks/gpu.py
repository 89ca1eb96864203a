"""What has to be checked and measured on a GPU, in one command.

    python -m benchmarks.gpu [--toy] [--out gpu.json]

It needs torch, numpy, timm, safetensors and Pillow only, and no run takes longer than 8 minutes. It
checks that the engines agree, that a step never waits for the GPU, that compiled code equals eager
code and that a killed run resumes; it measures images/s, TFLOP/s, the share of the card's bfloat16
peak and the memory of atto, tiny and base at the largest power of two of images that fits, where a
step's time goes, and what the loader delivers beside it. `--toy` runs every part in miniature, on a
CPU too. Results go to one JSON file and one table.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import Batch, Sample, collate, normalise
from fcmae.data.statistics import Preprocessing
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import grid_of, random_mask
from fcmae.train.checkpoint import SavedCheckpoint, newest_checkpoint
from fcmae.train.loop import Loop
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import AutoEpochs, Plan
from fcmae.train.processes import World
from fcmae.train.run_folder import RunFolder, read_lines
from fcmae.train.run_paths import RunPaths
from fcmae.train.signals import Signals
from fcmae.train.task import Images, Resolved, Task
from sparse import SparseConvNeXtV2
from sparse.engines import get_engine

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PEAK_SIDE = 8192
"""Side of the square matrices whose product in bfloat16 counts as the card's peak."""

PASSES = 3
"""A backward pass multiplies twice as much as the forward pass."""


class Part(argparse.Namespace):
    """The size of everything: on a GPU, or `toy`."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.models = ["atto"] if toy else ["atto", "tiny", "base"]
        self.side = 64 if toy else 224
        self.largest = 4 if toy else 2048
        self.repeats = 2 if toy else 20
        self.steps = 8 if toy else 200
        self.images = 16 if toy else 512
        self.peak_side = 256 if toy else PEAK_SIDE

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_batch(count: int, side: int, device: torch.device) -> Batch:
    """Random 8-bit images with masks and, for the patch engine, their sites laid out."""
    random, grid = np.random.default_rng(0), grid_of((side, side))
    pixels = random.integers(0, 256, (count, 3, side, side), np.uint8)
    samples = [Sample(pixels[i], i, random_mask(0, 0, i, grid, 0.6)) for i in range(count)]
    lay_out = get_engine("patch", device.type).lay_out
    assert lay_out is not None
    batch = collate(samples, lay_out)
    return batch.pin_memory() if device.type == "cuda" else batch


class Synthetic(Task):
    """Pretraining on one batch in memory, again and again."""

    command = "pretrain"
    auto_epochs = AutoEpochs(1, 1, 1)

    def check(self, device: torch.device) -> tuple[int, int]:
        raise NotImplementedError

    def find_images(self, start: SavedCheckpoint | None) -> Images:
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def announcement(self) -> list[str]:
        raise NotImplementedError

    def dataset(self) -> Any:
        raise NotImplementedError

    def export(self, folder: RunFolder) -> None:
        raise NotImplementedError

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        images = normalise(batch.images, MEAN, STD, self.resolved.world.device)
        return forward(images, batch.masks, layout=batch.sites).loss

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        return {}


def make_loop(part: Part, out: Path, steps: int, **options: Any) -> Loop:
    """The training loop around a small FCMAE on the device, in bfloat16 on a GPU."""
    config = PretrainConfig(
        data="-", out=str(out), trackers=[], checkpoint_minutes=0.0, batch_size=4, **options
    )
    task = Synthetic(config)
    torch.manual_seed(0)
    task.model = FCMAE.from_size("atto", engine="patch").to(part.device)
    task.optimizer = make_optimizer(task.model, config.optim)
    task.images = Images(find_images(str(out.parent / "images")), {})
    precision = "bf16" if part.device.type == "cuda" else "fp32"
    task.resolved = Resolved(
        Preprocessing((part.side,) * 2, MEAN, STD), Plan(steps, 1, 1e-3, 10), precision,
        world=World(device=part.device),
    )  # fmt: skip
    return Loop(task)


def endless(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def check_engines(part: Part) -> dict[str, float]:
    """Largest relative difference between patch on the device and dense on the CPU, in float32."""
    batch = make_batch(2, part.side, part.device)
    images = normalise(batch.images, MEAN, STD, "cpu")
    results = []
    state: Any = None
    for engine, device in (("dense", torch.device("cpu")), ("patch", part.device)):
        torch.manual_seed(0)
        encoder = SparseConvNeXtV2.from_size("atto", engine=engine)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.normal_(0, 0.1)
        state = state or encoder.state_dict()
        encoder.load_state_dict(state)
        out = encoder.to(device)(images.to(device), batch.masks)
        out.square().mean().backward()
        grads = {name: p.grad.cpu() for name, p in encoder.named_parameters() if p.grad is not None}
        results.append({"output": out.detach().cpu(), **grads})
    worst = max(
        float((results[1][name] - value).abs().max() / value.abs().max().clamp_min(1e-6))
        for name, value in results[0].items()
    )
    assert worst < 1e-4, f"patch differs from dense by {worst:.1e}"
    return {"largest_difference": worst}


def check_no_waiting(part: Part, folder: Path) -> dict[str, int]:
    """Steps through the loop in which nothing makes the host wait, except what is logged."""
    loop = make_loop(part, folder / "waiting", part.steps, log_steps=10**9)
    batches = endless(make_batch(4, part.side, part.device))
    train_step, count = loop._train_step, 0

    def step(*arguments: Any) -> Any:
        nonlocal count
        if loop.step in (0, part.steps - 1):  # these are logged
            return train_step(*arguments)
        count += 1
        if part.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            return train_step(*arguments)
        finally:
            if part.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    loop._train_step = step  # type: ignore[method-assign, assignment]
    loop.save = lambda must=False: None  # type: ignore[method-assign]
    assert loop.run(batches, Signals()) == 0
    return {"steps": count}


def check_compiled(part: Part) -> dict[str, float]:
    """Largest difference between the compiled encoder and the eager one."""
    batch = make_batch(2, part.side, part.device)
    images = normalise(batch.images, MEAN, STD, part.device)
    encoder = SparseConvNeXtV2.from_size("atto", engine="patch").to(part.device)
    eager = encoder(images, batch.masks).detach()
    encoder.compile_encode()
    compiled = encoder(images, batch.masks).detach()
    difference = float((compiled - eager).abs().max() / eager.abs().max())
    assert difference < 1e-3, f"compiled differs from eager by {difference:.1e}"
    return {"largest_difference": difference}


def train(part: Part, out: Path, kill_at: int) -> None:
    """Train to the end, or resume, and be killed after a step."""
    loop = make_loop(part, out, part.steps, checkpoint_steps=max(part.steps // 8, 1), log_steps=1)
    start = newest_checkpoint(RunPaths(out).checkpoints)
    loop.folder = loop.task.folder = RunFolder(loop.config, start)
    if start is not None:
        loop.restore(start)
    after = loop.task.after_step

    def after_step(step: int) -> None:
        after(step)
        if step == kill_at:
            part.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    loop.task.after_step = after_step  # type: ignore[method-assign]
    assert loop.run(endless(make_batch(4, part.side, part.device)), Signals()) == 0
    loop.folder.close()


def check_resume(part: Part, folder: Path) -> dict[str, float]:
    """A run that is killed and resumed logs the losses of one that is never stopped."""
    losses = []
    for name, kills in (("whole", [0]), ("killed", [part.steps // 2, 0])):
        for kill_at in kills:
            command = [sys.executable, "-m", "benchmarks.gpu", "--train", str(folder / name)]
            command += ["--kill_at", str(kill_at), *(["--toy"] if part.toy else [])]
            done = subprocess.run(command, capture_output=True, text=True)
            expected = -signal.SIGKILL if kill_at else 0
            assert done.returncode == expected, done.stderr[-500:]
        lines = read_lines(RunPaths(folder / name).metrics)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == len(losses[1]) == part.steps
    worst = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    assert worst < 1e-2, f"the resumed run's losses differ by {worst:.1e}"
    return {"steps": part.steps, "largest_difference": worst}


def seconds_of(part: Part, step: Callable[[], object]) -> float:
    """Median seconds of a step, after two that warm up."""
    times = []
    for number in range(part.repeats + 2):
        part.wait()
        began = time.perf_counter()
        step()
        part.wait()
        if number > 1:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_step(part: Part, model: str, kind: str, compiled: bool, count: int) -> Callable[[], None]:
    """Forward and backward pass of an encoder in bfloat16; `kind` is patch, dense or timm."""
    batch = make_batch(count, part.side, part.device)
    images = normalise(batch.images, MEAN, STD, part.device)
    net: Any
    if kind == "timm":
        net = timm.create_model(f"convnextv2_{model}", num_classes=0).to(part.device)
        run = torch.compile(net.forward_features) if compiled else net.forward_features
    else:
        net = SparseConvNeXtV2.from_size(model, engine=kind).to(part.device)
        if compiled:
            net.compile_encode()
        layout = batch.sites if kind == "patch" else None
        run = lambda x: net(x, batch.masks, layout)  # noqa: E731

    def step() -> None:
        with torch.autocast(part.device.type, torch.bfloat16):
            out = run(images)
        out.float().square().mean().backward()
        net.zero_grad(set_to_none=True)

    return step


def largest_batch(part: Part, model: str, kind: str) -> int:
    """The largest power of two of images whose step fits in memory."""
    count, best = 4, 4
    while count <= part.largest:
        try:
            make_step(part, model, kind, False, count)()
            part.wait()
        except torch.OutOfMemoryError:
            break
        finally:
            if part.device.type == "cuda":
                torch.cuda.empty_cache()
        best, count = count, 2 * count
    return best


def peak_flops(part: Part) -> float:
    """Operations per second of a product of square matrices in bfloat16."""
    side = part.peak_side
    a = torch.randn(side, side, device=part.device, dtype=torch.bfloat16)
    return 2 * side**3 / seconds_of(part, lambda: a @ a)


def measure(part: Part, until: float) -> list[dict[str, Any]]:
    """A row for each model, kind and mode: images/s, TFLOP/s, share of the peak and memory."""
    peak, rows = peak_flops(part), []
    for model in part.models:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            timm.create_model(f"convnextv2_{model}", num_classes=0)(
                torch.empty(1, 3, part.side, part.side)
            )
        flops = PASSES * counter.get_total_flops()
        count = min(largest_batch(part, model, kind) for kind in ("patch", "dense", "timm"))
        for kind in ("patch", "dense", "timm"):
            for compiled in (False, True):
                if time.perf_counter() > until or (compiled and part.toy):
                    continue
                step = make_step(part, model, kind, compiled, count)
                step()
                memory = None
                if part.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    step()
                    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
                rate = count / seconds_of(part, step)
                visible = batch_visible(part) if kind == "patch" else 1.0
                done = rate * flops * visible
                rows.append({
                    "model": model, "kind": kind, "compiled": compiled, "batch": count,
                    "images_per_s": rate, "tflops": done / 1e12, "peak_share": done / peak,
                    "peak_mb": memory,
                })  # fmt: skip
    return rows


def batch_visible(part: Part) -> float:
    h, w = grid_of((part.side, part.side))
    return float(1 - random_mask(0, 0, 0, (h, w), 0.6).mean())


def kernels(part: Part) -> list[dict[str, Any]]:
    """The ten kernels that take most of a pretraining step's time."""
    batch = make_batch(part.largest if part.toy else 64, part.side, part.device)
    model = FCMAE.from_size(part.models[-1], engine="patch").to(part.device)

    def step() -> None:
        images = normalise(batch.images, MEAN, STD, part.device)
        with torch.autocast(part.device.type, torch.bfloat16):
            loss = model(images, batch.masks, layout=batch.sites).loss
        loss.backward()

    step()
    on_gpu = part.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        step()
        part.wait()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    return [{"kernel": event.key, "share": getattr(event, name) / total} for event in events[:10]]


def loader_rate(part: Part, folder: Path) -> dict[str, float]:
    """Images/s that the loader delivers with each number of workers, sites included."""
    config = PretrainConfig(data="-", out="-", img_size=part.side, batch_size=min(part.images, 64))
    images = Preprocessing((part.side, part.side), MEAN, STD)
    source = find_images(str(folder / "images"))
    dataset = PretrainDataset(Split(source), images, config)
    lay_out = get_engine("patch", part.device.type).lay_out
    assert lay_out is not None
    rates = {}
    most = len(os.sched_getaffinity(0))
    for workers in sorted({1, most // 2, most} - {0}):
        sampler = StepSampler(len(source), config.batch_size, 0, 0, 2 if part.toy else 16)
        loader = make_loader(
            dataset, sampler, workers, part.device.type == "cuda",
            lambda masks: lay_out(masks, part.device.type),
        )  # fmt: skip
        began, count = time.perf_counter(), 0
        for batch in loader:
            count += len(batch)
        rates[str(workers)] = count / (time.perf_counter() - began)
    return rates


def write_images(folder: Path, count: int) -> None:
    """JPEGs of 500×375 pixels, as photographs of ImageNet are."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="every part in miniature, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill_at", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    part, began = Part(options.toy), time.perf_counter()
    if options.train is not None:
        train(part, options.train, options.kill_at)
        return 0
    if part.device.type != "cuda" and not options.toy:
        print("no CUDA device: --toy runs every part on the CPU", file=sys.stderr)
        return 2
    on_gpu = part.device.type == "cuda"
    result: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "timm": timm.__version__,
        },
        "checks": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", part.images)
        checks: dict[str, Callable[[], Any]] = {
            "engines agree": lambda: check_engines(part),
            "a step does not wait": lambda: check_no_waiting(part, folder),
            "compiled equals eager": lambda: check_compiled(part),
            "a killed run resumes": lambda: check_resume(part, folder),
        }
        for title, check in checks.items():
            try:
                result["checks"][title] = {"ok": True, **check()}
            except Exception as error:  # noqa: BLE001  # reported; the other parts are measured too
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                result["checks"][title] = {"ok": False, "error": line}
            print(title, json.dumps(result["checks"][title]), flush=True)
        result["loader"] = loader_rate(part, folder)
        print("loader, images/s by workers:", json.dumps(result["loader"]), flush=True)
        result["kernels"] = kernels(part)
        result["speed"] = measure(part, began + 60 * options.minutes)
    heads = ("batch", "images/s", "TFLOP/s", "peak", "MB")
    print(f"{'model':6}{'kind':7}{'mode':9}", *(f"{head:>9}" for head in heads))
    for row in result["speed"]:
        memory = "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        print(
            f"{row['model']:6}{row['kind']:7}{'compiled' if row['compiled'] else 'eager':9}",
            f"{row['batch']:9} {row['images_per_s']:9.1f} {row['tflops']:9.2f}",
            f"{row['peak_share']:9.0%} {memory:>9}",
        )
    for row in result["kernels"]:
        print(f"{row['share']:5.0%} {row['kernel'][:90]}")
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: written after {(time.perf_counter() - began) / 60:.1f} minutes")
    return 0 if all(check["ok"] for check in result["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
