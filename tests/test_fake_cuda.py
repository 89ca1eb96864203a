"""A step of pretraining on a GPU that is not there: fake tensors have a shape, a type and a device.

An operation on tensors of two devices raises, and so does one whose result depends on values, which
on a GPU would make the host wait: `nonzero`, `.item()`, a boolean index, `.cpu()`. Autograd wants a
real device, so that every custom function's backward pass is called by hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fcmae.data.sample import Batch, Sample, _constants, collate, normalise
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import random_mask
from fcmae.train.loop import Loop
from fcmae.train.pretraining import pretrain
from fcmae.train.processes import OnHost
from sparse.engines import get_engine
from sparse.ops.grn_mlp import _GrnMlp
from sparse.ops.windows import _WindowedDepthwise
from tests.test_pretrain_input import config

CUDA = torch.device("cuda", 0)
DTYPES = {False: torch.float32, True: torch.bfloat16}


def to_cuda(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters one by one, since `nn.Module.to` refuses fake ones."""
    for module in model.modules():
        for name, parameter in [*module._parameters.items()]:
            if parameter is not None:
                fake = mode.from_tensor(parameter.detach())
                with mode:
                    module._parameters[name] = nn.Parameter(fake.to(CUDA), requires_grad=False)


def batch_of(side: int = 96, count: int = 3) -> Batch:
    """A batch as a worker makes it for a GPU: 8-bit images, masks, and the sites laid out."""
    grid = (side // 32, side // 32)
    samples = [
        Sample(np.zeros((3, side, side), np.uint8), i, random_mask(0, 0, i, grid, 0.6))
        for i in range(count)
    ]
    lay_out = get_engine("patch", "cuda").lay_out
    assert lay_out is not None
    return collate(samples, lay_out)


@contextmanager
def autocast(enabled: bool) -> Iterator[None]:
    """bfloat16 on "cuda"; `torch.autocast` itself refuses where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


class NoWaiting(TorchDispatchMode):
    """Raises on a copy between host and GPU for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            there = torch.device(kwargs.get("device") or args[0].device)
            if there.type != args[0].device.type and not kwargs.get("non_blocking"):
                raise AssertionError(f"a blocking copy from {args[0].device} to {there}")
        return func(*args, **kwargs)


class Recorded:
    """A context of autograd that remembers what a forward pass saves."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad = (True,) * 20

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


def watched(function: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a custom function's forward pass record its context and result, without autograd."""

    def apply(*arguments: Any) -> Any:
        ctx = Recorded()
        out = function.forward(ctx, *arguments)
        calls.append((function, ctx, out))
        return out

    monkeypatch.setattr(function, "apply", apply)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_reads_nothing_back_and_stays_on_its_device(
    precision: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of()
    model = FCMAE.from_size("atto", engine="patch", recompute=recompute)
    calls: list[Any] = []
    for function in (_GrnMlp, _WindowedDepthwise):
        watched(function, calls, monkeypatch)
    _constants.cache_clear()
    mode = FakeTensorMode()
    to_cuda(model, mode)
    fake = batch.moved(mode.from_tensor)
    with mode, torch.no_grad():
        normalise(fake.images, (0.5,) * 3, (0.5,) * 3, CUDA)  # copies its constants once
        with NoWaiting(), autocast(precision == "bf16"):
            images = normalise(fake.images, (0.5,) * 3, (0.5,) * 3, CUDA)
            assert fake.masks is not None
            out = model(images, fake.masks, layout=fake.sites)
        assert (out.loss.device, out.pred.device) == (CUDA, CUDA)
        half = precision == "bf16"
        assert (out.loss.dtype, out.pred.dtype) == (torch.float32, DTYPES[half])
        assert len(calls) == 2 * 12 + 1  # the decoder's depthwise convolution is the library's
        for function, ctx, made in calls:
            gradients = function.backward(ctx, torch.empty_like(made))
            assert all(g is None or g.device == CUDA for g in gradients)
    _constants.cache_clear()


@pytest.mark.parametrize(
    "read", [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.sum().item()]
)
def test_what_would_wait_for_the_gpu_raises_here(read: Any) -> None:
    with FakeTensorMode(), pytest.raises(Exception, match=r"aten\.(nonzero|_local_scalar_dense)"):
        read(torch.ones(3, device=CUDA))


def test_a_blocking_copy_raises_here() -> None:
    with FakeTensorMode(), NoWaiting():
        there = torch.ones(3).to(CUDA, non_blocking=True)
        with pytest.raises(AssertionError, match="blocking copy from cpu"):
            torch.ones(3).to(CUDA)
        with pytest.raises(AssertionError, match="blocking copy from cuda"):
            there.cpu()


class Reads(TorchDispatchMode):
    """Lists operations that make the host wait: reads of values, shapes that depend on them."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(self.WAITING) or (name == "index" and any_bool(args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def any_bool(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_a_step_that_is_not_logged_reads_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nonfinite: str
) -> None:
    """What `OnHost` reads has arrived on the host; workers lay out the sites."""
    step, arrived, reads = Loop._train_step, OnHost.read, []

    def counted(loop: Loop, *arguments: Any) -> Any:
        with Reads() as mode:
            new = step(loop, *arguments)
        reads.append(mode.found)
        return new

    def uncounted(values: OnHost) -> list[float]:
        with torch.utils._python_dispatch._disable_current_modes():
            return arrived(values)

    monkeypatch.setattr(Loop, "_train_step", counted)
    monkeypatch.setattr(OnHost, "read", uncounted)
    given = {"engine": "patch", "workers": 1, "log_steps": 100, "nonfinite": nonfinite, "epochs": 4}
    assert pretrain(config(pictures, tmp_path / "run", **given)) == 0
    assert len(reads) > 3
    assert reads[1:-1] == [[]] * (len(reads) - 2)
    assert reads[0]  # the first step is logged
