"""How much memory a step of pretraining needs, from the shapes of its tensors."""

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fcmae.commands.bench import BenchConfig
from fcmae.inspect.steps import example
from fcmae.model.fcmae import FCMAE

SAFE = 0.8
"""Share of a device's memory that a forecast may fill: measured peaks are up to 1.17 times it."""


@dataclass(frozen=True)
class Forecast:
    """Bytes that a step of pretraining needs at its peak.

    Attributes:
        weights: of encoder and decoder, float32; their gradients take the same.
        fixed: activations that do not depend on the batch, such as weights in bfloat16.
        per_image: activations of one image.
    """

    weights: int
    fixed: int
    per_image: int

    def total(self, batch: int) -> int:
        """Weights, gradients, AdamW's two averages, and the activations of a batch."""
        return 4 * self.weights + self.fixed + batch * self.per_image

    def largest_batch(self, memory: int) -> int:
        """The largest power of two of images for which a share `SAFE` suffices; 0 if none."""
        images = int(SAFE * memory - self.total(0)) // self.per_image
        return 1 << images.bit_length() - 1 if images > 0 else 0


def forecast(
    model: str, img_size: int | list[int], device: torch.device, precision: str
) -> Forecast:
    """Forecast the memory of `patch` from forward passes of one image and of two.

    Nothing is measured but the sizes of tensors. While a backward pass frees activations it makes
    gradients, so the two are never all there at once; their sum stands in for the temporary tensors
    of the backward pass.

    Args:
        model: size of the encoder.
        img_size: side of the images, or height and width; multiples of 32.
        device: where it would train.
        precision: `fp32` or `bf16`.

    Raises:
        InputError: the size is unknown, or an image has too few patches.
    """
    with torch.device("meta"):
        net = FCMAE.from_size(model, engine="patch")
    net.to_empty(device=device)  # any values will do
    one, two = (_activations(net, img_size, count, device, precision) for count in (1, 2))
    weights = sum(parameter.nbytes for parameter in net.parameters())
    return Forecast(weights, 2 * one - two, two - one)


def _activations(
    net: FCMAE, img_size: int | list[int], count: int, device: torch.device, precision: str
) -> int:
    """Most bytes that a forward pass and its images take at a time, without the weights."""
    images, mask = example(BenchConfig(batch_size=count, img_size=img_size), device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast, Live(net.parameters()) as live:
        net(images, mask)
    return live.peak


class Live(TorchDispatchMode):
    """Follows how many bytes of tensors are alive at a time.

    Args:
        uncounted: tensors that do not count.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self, uncounted: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in uncounted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor):
                self._count(made.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine for other devices; 0 if the system hides it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
