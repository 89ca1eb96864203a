"""What has to be checked and measured on a GPU, in one command.

    python -m benchmarks.gpu [--toy] [--out gpu.json]

It needs torch, numpy, timm, safetensors and Pillow only, and is made to take at most 8 minutes. It
checks that the engines agree, that a step never waits for the GPU, that compiled code and a CUDA
graph equal eager code and that a killed run resumes, and runs the tests marked `gpu` where pytest
and what they need are installed. It measures images/s of whole steps of small batches, how fast the
loader feeds the model, where a step's time goes, the share of the time in which the GPU is busy,
and images/s, TFLOP/s, the share of the card's bfloat16 peak and the memory of atto, tiny and base
at the largest power of two of images that fits. `--toy` runs every part in miniature, on a CPU too.
Results go to one JSON file and one table.
"""

import argparse
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fcmae.commands.bench import BenchConfig
from fcmae.config.pretraining import PretrainConfig
from fcmae.data.file_list import find_images
from fcmae.data.labelled import Split
from fcmae.data.loader import PretrainDataset, make_loader
from fcmae.data.order import StepSampler
from fcmae.data.sample import Batch, Sample, collate, normalise
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.parity import parity, tolerance
from fcmae.inspect.steps import (
    BF16,
    PASSES,
    TIMM,
    gpu_peak,
    macs,
    make_step,
    time_in_turns,
    visible_share,
)
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import grid_of, random_mask
from fcmae.train.checkpoint import SavedCheckpoint, newest_checkpoint
from fcmae.train.clock import Clock
from fcmae.train.loop import Loop
from fcmae.train.machine import resolve_workers
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import AutoEpochs, Plan
from fcmae.train.processes import World, exact_float32
from fcmae.train.run_folder import RunFolder, read_lines
from fcmae.train.run_paths import RunPaths
from fcmae.train.signals import Signals
from fcmae.train.task import Images, Resolved, Task
from sparse import SparseConvNeXtV2
from sparse.engines import get_engine

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PEAK_SIDE = 8192
"""Side of the square matrices whose product in bfloat16 counts as the card's peak."""

SECONDS = 2.0
"""For which a step is repeated: thousands of images take one or more."""

ROOT = Path(__file__).parent.parent


class Part(argparse.Namespace):
    """The size of everything: on a GPU, or `toy`."""

    def __init__(self, toy: bool) -> None:
        self.toy = toy
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.models = ["atto"] if toy else ["atto", "tiny", "base"]
        self.side = 64 if toy else 224
        self.largest = 4 if toy else 2048
        self.per_gpu = 4 if toy else 64
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


def make_loop(part: Part, out: Path, steps: int, model: str = "atto", **options: Any) -> Loop:
    """The training loop around an FCMAE on the device, in bfloat16 on a GPU."""
    config = PretrainConfig(
        data="-", out=str(out), trackers=[], checkpoint_minutes=0.0,
        **{"batch_size": 4, "log_steps": 10**9, **options},
    )  # fmt: skip
    task = Synthetic(config)
    torch.manual_seed(0)
    task.model = FCMAE.from_size(model, engine="patch").to(part.device)
    task.model.cuda_graph = config.cuda_graph and part.device.type == "cuda"
    task.optimizer = make_optimizer(task.model, config.optim)
    task.images = Images(find_images(str(out.parent / "images")), {})
    precision = "bf16" if part.device.type == "cuda" else "fp32"
    task.resolved = Resolved(
        Preprocessing((part.side,) * 2, MEAN, STD), Plan(steps, 1, 1e-3, 10), precision,
        world=World(device=part.device),
    )  # fmt: skip
    return Loop(task)


def stepper(loop: Loop) -> Callable[[Batch], object]:
    """A step of the loop on one batch."""
    clock = Clock()
    return lambda batch: loop._train_step(iter([batch]), lambda *_: None, clock)


def endless(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch


def check_engines(part: Part) -> dict[str, float]:
    """Largest relative difference between patch on the device and dense on the CPU, in float32."""
    batch = make_batch(2, part.side, part.device)
    assert batch.masks is not None
    worst = parity("patch", normalise(batch.images, MEAN, STD, part.device), batch.masks)
    assert worst < tolerance(part.device), f"patch differs from dense by {worst:.1e}"
    return {"largest_difference": worst}


def check_marked() -> dict[str, str]:
    """The tests marked `gpu`, without the project's settings, which need plugins."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", ".",
         "-p", "no:cacheprovider", "-m", "gpu and not slow", "tests/test_gpu.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    said = (done.stdout + done.stderr).strip()
    if missing := re.search(r"No module named '?(\w+)", said):
        return {"not run": f"{missing[1]} is not installed"}
    assert done.returncode == 0, said.splitlines()[-1]
    return {"pytest": said.splitlines()[-1]}


def check_no_waiting(part: Part, folder: Path) -> dict[str, int]:
    """Steps through the loop in which nothing makes the host wait, except what is logged."""
    loop = make_loop(part, folder / "waiting", part.steps)
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


def check_graph(part: Part, folder: Path) -> dict[str, float]:
    """Largest relative difference between the losses of steps with a CUDA graph and without."""
    batches = [make_batch(4, part.side, part.device) for _ in range(2)]
    losses = []
    for graph in (True, False):
        loop = make_loop(part, folder / "graph", 10**6, cuda_graph=graph, accumulate=2)
        clock, found = Clock(), []
        for _ in range(part.steps // 4):
            loop._train_step(iter(batches), lambda *_: None, clock)
            with loop.task.resolved.autocast():
                found.append(float(loop.task.loss(loop.forward, batches[0]).detach()))
        losses.append(found)
    worst = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    assert worst < 1e-2, f"losses with a graph differ by {worst:.1e}"
    return {"largest_difference": worst}


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
    """Median over as many repeats as fit into `SECONDS`, at least three."""
    first = time_in_turns({"": step}, 1, part.device)[""]
    repeats = min(part.repeats, max(3, int(SECONDS / first)))
    return time_in_turns({"": step}, repeats, part.device)[""]


def encoder_step(
    part: Part, model: str, kind: str, compiled: bool, count: int
) -> Callable[[], None]:
    """Forward and backward pass of an encoder in bfloat16; `kind` is patch, dense or `TIMM`."""
    batch = make_batch(count, part.side, part.device)
    images = normalise(batch.images, MEAN, STD, part.device)
    step = make_step(kind + BF16, model, part.device, compiled)
    layout = batch.sites if kind == "patch" else None
    return lambda: step(images, batch.masks, layout)


def largest_batch(part: Part, model: str, kind: str) -> int:
    """The largest power of two of images whose step fits in memory."""
    count, best = 4, 4
    while count <= part.largest:
        try:
            encoder_step(part, model, kind, False, count)()
            part.wait()
        except torch.OutOfMemoryError:
            break
        finally:
            gc.collect()  # graphs and their models refer to each other
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
    """A row for each mode, model and kind: images/s, TFLOP/s, share of the peak and memory."""
    peak, kinds, rows = peak_flops(part), ("patch", "dense", TIMM), list[dict[str, Any]]()
    config = BenchConfig(img_size=part.side)
    counts = {m: min(largest_batch(part, m, kind) for kind in kinds) for m in part.models}
    for compiled in (False,) if part.toy else (False, True):
        for model, count in counts.items():
            flops = 2 * PASSES * macs(model, (part.side, part.side))
            for kind in kinds:
                if time.perf_counter() > until:
                    print("no time for the rest of the table", flush=True)
                    return rows
                step = encoder_step(part, model, kind, compiled, count)
                rate = count / seconds_of(part, step)
                done = rate * flops * (visible_share(config) if kind == "patch" else 1.0)
                on_gpu = part.device.type == "cuda"
                rows.append({
                    "model": model, "kind": kind, "compiled": compiled, "batch": count,
                    "images_per_s": rate, "tflops": done / 1e12, "peak_share": done / peak,
                    "peak_mb": gpu_peak(step, part.device) if on_gpu else None,
                })  # fmt: skip
                print("row", json.dumps(rows[-1]), flush=True)
    return rows


def whole_steps(part: Part, folder: Path) -> dict[str, dict[str, float]]:
    """Images/s of whole pretraining steps of a batch for one of 64 GPUs, with and without graph."""
    found = {}
    for model in part.models:
        batch = make_batch(part.per_gpu, part.side, part.device)
        steps = {
            name: partial(
                stepper(make_loop(part, folder / "s", 10**6, model, cuda_graph=graph)), batch
            )
            for name, graph in (("graph", True), ("eager", False))
        }
        seconds = time_in_turns(steps, part.repeats, part.device)
        found[model] = {name: part.per_gpu / taken for name, taken in seconds.items()}
    return found


def kernels(part: Part, folder: Path) -> dict[str, Any]:
    """The ten kernels that take most of a pretraining step, and how busy they keep the device."""
    batch = make_batch(part.per_gpu, part.side, part.device)
    step = stepper(make_loop(part, folder / "kernels", 10**6, part.models[-1]))
    seconds = seconds_of(part, lambda: step(batch))  # a profile slows the host down
    steps, on_gpu = 2 if part.toy else 10, part.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        for _ in range(steps):
            step(batch)
        part.wait()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)  # in microseconds
    return {
        "busy_share": total / 1e6 / steps / seconds,
        "top": [{"kernel": e.key, "share": getattr(e, name) / total} for e in events[:10]],
    }


def images_per_s(
    part: Part, batches: Iterable[Batch], use: Callable[[Batch], object], skip: int
) -> float:
    """Images per second that are used, after some batches that are not timed."""
    began, count = 0.0, 0
    for number, batch in enumerate(batches):
        if number == skip:
            part.wait()
            began, count = time.perf_counter(), 0
        use(batch)
        count += len(batch)
    part.wait()
    return count / (time.perf_counter() - began)


def feeding(part: Part, folder: Path) -> dict[str, Any]:
    """Images/s of the loader alone by workers, of atto's whole step alone, and of both together.

    `cores_to_feed` is how many cores reading images keep up with the model.
    """
    config = PretrainConfig(data="-", out="-", img_size=part.side, batch_size=min(part.images, 64))
    images = Preprocessing((part.side, part.side), MEAN, STD)
    source = find_images(str(folder / "images"))
    dataset = PretrainDataset(Split(source), images, config)
    lay_out = get_engine("patch", part.device.type).lay_out

    def read(workers: int) -> Iterable[Batch]:
        sampler = StepSampler(len(source), config.batch_size, 0, 0, 10 * max(workers, 1))
        return make_loader(dataset, sampler, workers, part.device.type == "cuda", lay_out)

    step = stepper(make_loop(part, folder / "feeding", 10**6, batch_size=config.batch_size))
    most, usual = len(os.sched_getaffinity(0)), int(resolve_workers("auto", part.device))
    # Each worker reads two batches ahead; these, and its start, are not timed.
    loader = {
        workers: images_per_s(part, read(workers), lambda _: None, 3 * workers)
        for workers in sorted({1, usual, most})
    }
    ready = next(iter(read(0)))
    model = images_per_s(part, islice(endless(ready), 4 if part.toy else 60), step, 2)
    together = images_per_s(part, read(usual), step, 3 * usual)
    return {
        "loader": loader,
        "model": model,
        "together": together,
        "workers": usual,
        "together_of_slower": together / min(model, loader[usual]),
        "cores_to_feed": math.ceil(model * most / loader[most]),
    }


def write_images(folder: Path, count: int) -> None:
    """JPEGs of 500×375 pixels, as photographs of ImageNet are."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def attempt(title: str, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a part finds, or its error: the others run nevertheless."""
    try:
        found = {"ok": True, **part()}
    except Exception as error:  # noqa: BLE001  # whatever it is, it is reported
        traceback.print_exc()
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        found = {"ok": False, "error": line}
    print(title, json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="every part in miniature, on a CPU too")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kill_at", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    part, began = Part(options.toy), time.perf_counter()
    exact_float32()
    if options.train is not None:
        train(part, options.train, options.kill_at)
        return 0
    if part.device.type != "cuda" and not options.toy:
        print("no CUDA device: --toy runs every part on the CPU", file=sys.stderr)
        return 2
    # Rows that are begun may take a minute to compile.
    until = began + 45 * options.minutes
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
            "a graph equals eager": lambda: check_graph(part, folder),
            "a killed run resumes": lambda: check_resume(part, folder),
            "tests marked gpu": check_marked,
        }
        for title, check in checks.items():
            result["checks"][title] = attempt(title, check)
        result["feeding"] = attempt("feeding, images/s:", lambda: feeding(part, folder))
        result["steps"] = attempt("steps, images/s:", lambda: whole_steps(part, folder))
        result["kernels"] = attempt("kernels", lambda: kernels(part, folder))
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        result["speed"] = measure(part, until)
    heads = ("batch", "images/s", "TFLOP/s", "peak", "MB")
    print(f"{'model':6}{'kind':16}{'mode':9}", *(f"{head:>9}" for head in heads))
    for row in result["speed"]:
        memory = "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        print(
            f"{row['model']:6}{row['kind']:16}{'compiled' if row['compiled'] else 'eager':9}",
            f"{row['batch']:9} {row['images_per_s']:9.1f} {row['tflops']:9.2f}",
            f"{row['peak_share']:9.0%} {memory:>9}",
        )
    if result["kernels"]["ok"]:
        busy = result["kernels"]["busy_share"]
        print(f"the device is busy for {busy:.0%} of a whole step; of this:")
        for row in result["kernels"]["top"]:
            print(f"{row['share']:5.0%} {row['kernel'][:90]}")
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: written after {(time.perf_counter() - began) / 60:.1f} minutes")
    parts = [*result["checks"].values(), result["feeding"], result["steps"], result["kernels"]]
    return 0 if all(part["ok"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
