"""A forward and backward pass as one CUDA graph: one launch instead of thousands.

A step of small batches launches its kernels more slowly than a fast GPU runs them: see
docs/performance.md. A graph replays the kernels that it once recorded, at the same addresses.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WARM_UP = 3
"""Passes before the recording, in which libraries choose kernels and allocate their buffers."""

Pass = Callable[..., tuple[Tensor, Tensor]]
"""Maps input tensors to a loss and a tensor without gradient."""


class Graph:
    """A recorded pass, its backward pass included. Inputs must keep their shapes.

    Args:
        run: without random numbers, and without waiting for the GPU.
        parameters: that get gradients; all must take part.
        inputs: an example, on the GPU.
    """

    def __init__(
        self, run: Pass, parameters: Iterable[nn.Parameter], inputs: Sequence[Tensor]
    ) -> None:
        self._run, self._parameters = run, [*parameters]
        self._inputs = [tensor.clone() for tensor in inputs]
        self.replays = 0
        self._record()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The results for other inputs; the second one is overwritten by the next call."""
        self.replays += 1
        found: tuple[Tensor, Tensor] = _Replay.apply(self, inputs, *self._parameters)
        return found

    def replay(self, inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The results and the gradients of the loss, in memory that the next replay overwrites."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._found

    def _record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # The loader's thread may pin memory meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._found = self._compute()

    def _compute(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        device = self._inputs[0].device.type
        # A weight that autocast casts only once would be cast outside the graph.
        with torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device),
            cache_enabled=False,
        ):  # fmt: skip
            loss, other = self._run(*self._inputs)
        with torch.autocast(device, enabled=False):  # the loop's backward pass is outside it, too
            gradients = [*torch.autograd.grad(loss, self._parameters)]
        return loss.detach(), other.detach(), gradients


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, inputs: Sequence[Tensor], *_: Tensor) -> Any:
        loss, other, ctx.gradients = graph.replay(inputs)
        ctx.graph, ctx.replay = graph, graph.replays
        ctx.mark_non_differentiable(other)
        ctx.set_materialize_grads(False)
        return loss.clone(), other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> Any:
        if ctx.replay != ctx.graph.replays:
            raise RuntimeError("backward after another forward pass, which replaced its gradients")
        # New tensors: a parameter may keep them as its gradient.
        return None, None, *torch._foreach_mul(ctx.gradients, grad_loss)
