"""The processes of a run: how torchrun describes them, and the messages between them."""

import os
import re
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from sparse.devices import to_device
from sparse.errors import InputError, RunError, brief

Result = TypeVar("Result")


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

    def prepare(self, work: Callable[[], Result]) -> Result:
        """Do what may fail on one machine alone, such as finding the images; no process leaves the
        others waiting.

        Args:
            work: exchanges no messages.

        Raises:
            InputError: on all processes, if it was raised on one; names that machine.
        """
        if self.size == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except InputError as error:
            failure = str(error)
        failures = self.gather((failure, socket.gethostname()))
        for rank, (message, host) in enumerate(failures):
            if message is not None:
                everywhere = all(other == message for other, _ in failures)
                where = "" if everywhere else f"process {rank} on {host}: "
                raise InputError(f"{where}{message}")
        return result  # type: ignore[return-value]

    def check_same(self, shared: Mapping[str, Any]) -> None:
        """Make sure that all processes are about to do the same.

        Args:
            shared: values by name that all must have in common.

        Raises:
            InputError: on all of them, if a value differs; names the machine.
        """
        (main, first), *others = self.gather((socket.gethostname(), dict(shared)))
        for rank, (host, other) in enumerate(others, 1):
            for name in [*first, *(other.keys() - first.keys())]:
                here, there = first.get(name), other.get(name)
                if here != there:
                    raise InputError(
                        f"process {rank} on {host} has {name} {there!r} and process 0 on {main} "
                        f"{here!r}: all must be given the same command and see the same files, "
                        "with --data and --out on a shared disk"
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


class _Replica(nn.Module):
    """A model; called without arguments, the sum of its trained parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> Any:
        if inputs:
            return self.model(*inputs, **options)
        return sum(p.sum() for p in self.model.parameters() if p.requires_grad)


def replicate(model: nn.Module) -> DistributedDataParallel:
    """Wrap a model so that all processes have the mean of their gradients, summed in a fixed order.

    After one step DDP rearranges its buckets in the order in which gradients came. With more than
    two processes that changes the order of the sums, so the first step of a resumed run would
    differ in its last bits. Here DDP does so before the first step of every run.
    """
    # Without `device_ids`, which would copy masks to the GPU and wait for it.
    replica = DistributedDataParallel(_Replica(model))
    replica().backward()
    model.zero_grad(set_to_none=True)
    return replica


def patience() -> timedelta:
    """How long processes wait for each other: ten minutes, or `FCMAE_PATIENCE` seconds.

    Raises:
        InputError: the variable is not a positive number.
    """
    given = os.environ.get("FCMAE_PATIENCE", "600")
    if not re.fullmatch(r"\d{1,6}", given) or not int(given):
        raise InputError(f"FCMAE_PATIENCE {given!r} is not a number of seconds: use 600")
    return timedelta(seconds=int(given))


def agree_on_prefix(store: Store, rank: int, size: int, limit: timedelta) -> str:
    """Agree on a prefix for names in a store that may hold those of processes that died.

    torchrun keeps its store over restarts, which its agents count differently once a machine was
    replaced. So each process asks under a name never used before. The main one answers whoever
    asked last in a rank's place, until each rank has confirmed its answer, which dead ones do not.

    Args:
        store: shared by all processes.
        rank, size: this process's number and how many there are.
        limit: how long to wait for the others.

    Raises:
        RunError: another process did not come in time.
        torch.distributed.DistError: the store is lost.
    """
    deadline = time.monotonic() + limit.total_seconds()
    late = f"process 0 did not find all of {size} processes"
    if rank:
        name = uuid4().hex
        store.set(f"request/{rank}", name)
        while time.monotonic() < deadline:
            if store.check([f"answer/{name}"]):
                prefix = store.get(f"answer/{name}").decode()
                store.set(f"{prefix}/{rank}", "")
                if store.check([f"{prefix}/complete"]):
                    return prefix
            time.sleep(0.1)
    else:
        prefix, others = uuid4().hex, range(1, size)
        confirmed = [f"{prefix}/{other}" for other in others]
        while time.monotonic() < deadline:
            for other in others:
                if store.check([f"request/{other}"]):
                    store.set(f"answer/{store.get(f'request/{other}').decode()}", prefix)
            if store.check(confirmed):
                store.set(f"{prefix}/complete", "")
                return prefix
            time.sleep(0.1)
        missing = [str(other) for other in others if not store.check([f"{prefix}/{other}"])]
        late = f"process {brief(missing)} of {size} did not come"
    raise RunError(
        f"{late} within {limit.total_seconds():.0f} s: see what its machine reported, and repeat "
        "the command on all machines"
    )


def _is_lost(error: RuntimeError) -> bool:
    """Return whether torch says that another process, the network or the store is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def exact_float32() -> None:
    """Have GPUs compute float32 products and convolutions in float32.

    By default cuDNN rounds the factors of a float32 convolution to TF32, which has 10 bits of
    mantissa instead of 23. Engines then differ by 1e-3, and results depend on the card. For speed,
    use bf16. Results on CPUs, which have no TF32, stay the same.
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

    Raises:
        RunError: other processes, the network or torchrun's store are lost, now or while the block
            runs; torchrun restarts those that are left.
    """
    exact_float32()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size, limit = int(os.environ.get("WORLD_SIZE", 1)), patience()
    if size == 1:
        yield World(device=device)
        return
    backend, rank = "nccl" if device.type == "cuda" else "gloo", int(os.environ["RANK"])
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
        names = PrefixStore("fcmae", store)
        own = PrefixStore(agree_on_prefix(names, rank, size, limit), names)
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
        yield World(rank, size, device, dist.new_group(backend="gloo", timeout=limit))
    except RuntimeError as error:
        if isinstance(error, RunError) or not _is_lost(error):
            raise
        line = str(error).strip().partition("\n")[0]
        reason = re.sub(r"^\[[^]]*\] *|\. This is typically .*", "", line)
        raise RunError(
            f"lost the other processes ({reason}): see what they reported; the same command, or "
            "torchrun --max_restarts, resumes from the last checkpoint"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
