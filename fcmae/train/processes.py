"""The processes of a run: how torchrun describes them, and the messages between them."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from sparse.devices import to_device
from sparse.errors import InputError

PATIENCE = timedelta(minutes=10)
"""How long processes wait for each other."""


@dataclass(frozen=True)
class World:
    """This process and its place among those of the run.

    Attributes:
        rank, size: this process's number and how many there are.
        device: where it computes.
        control: group for messages between hosts' CPUs; None in a run of one process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    control: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place, on its device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, votes: list[int]) -> list[int]:
        """Largest of each vote over all processes, exchanged between CPUs: no GPU waits."""
        if self.size == 1:
            return votes
        tensor = torch.tensor(votes)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [int(vote) for vote in tensor]

    def gather(self, item: Any) -> list[Any]:
        """Collect a small object from every process, in order of rank, on every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self.control)
        return items

    def check_same(self, shared: Mapping[str, Any]) -> None:
        """Make sure that all processes are about to do the same.

        Args:
            shared: values by name that all must have in common.

        Raises:
            InputError: on all of them, if a value differs.
        """
        first, *others = self.gather(dict(shared))
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                here, there = first.get(name), other.get(name)
                if here != there:
                    raise InputError(
                        f"process 0 has {name} {here!r} and process {rank} {there!r}: all must be "
                        "given the same command, with --data and --out on a shared disk"
                    )


ALONE = World()
"""The world of a run of one process on the CPU."""


class OnHost:
    """Values being copied from a device to the host, which waits for them only in `read`."""

    def __init__(self, values: Tensor) -> None:
        self._values = to_device(values, "cpu")
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return [float(value) for value in self._values]


def resolve_device(name: str) -> torch.device:
    """`auto` → this process's GPU if there is one, else the CPU.

    Raises:
        InputError: the device is unknown or missing.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if not re.fullmatch(r"cpu|mps|cuda:\d{1,3}", name):
        raise InputError(f"device {name!r} is unknown: use auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise InputError(f"device {name!r} is not one of {gpus} CUDA devices; use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' is missing: use cpu or auto")
    return device


def _store() -> Store:
    """Where processes find each other: torchrun's store, with separate names for every restart.

    torchrun keeps one store over its restarts, in which processes would find the addresses of those
    that died. Machines may count restarts differently, so with several the count can't be a name.
    """
    store, _, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size):
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def exact_float32() -> None:
    """Have GPUs compute float32 products and convolutions in float32.

    By default cuDNN rounds the factors of a float32 convolution to TF32, which has 10 bits of
    mantissa instead of 23. Engines then differ by 1e-3, and results depend on the card. Who wants
    speed asks for bf16. Results on CPUs, which have no TF32, stay the same.
    """
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with warnings.catch_warnings():
        # The old name of cuDNN's setting, which torch's compiler still reads: reading it raises if
        # the two names disagree.
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.fp32_precision = "ieee"


@contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, or be a world of one.

    Gradients use nccl between GPUs and gloo between CPUs; control messages use gloo.
    """
    exact_float32()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=_store(), rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size, device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
