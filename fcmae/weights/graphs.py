"""A model as a graph of operators in one file: ONNX, or torch.export's .pt2.

Each writer reads its file back, runs it, and returns how far it is from the model.
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fcmae.weights.read import first_line
from sparse.errors import InputError
from sparse.sizes import PATCH

INPUT = "images"
SMALLEST = 2
"""Patches along a side that a graph of any size takes at least: a single row is computed in another
way than several."""

ONNX_BYTES = 2**31
"""A file of ONNX can't be larger."""

METADATA = "fcmae.json"
"""Name of the description in a .pt2 file."""


@dataclass(frozen=True)
class Exportable:
    """What is written.

    Attributes:
        model: float32, in evaluation mode, on the CPU; maps normalised images (B, C, H, W) to a
            tensor (B, …).
        shape: (C, H, W) of the images.
        any_size: whether H and W may be other multiples of 32, from 64.
        output: the name of the output.
        description: JSON that travels along.
    """

    model: nn.Module
    shape: tuple[int, int, int]
    any_size: bool
    output: str
    description: Mapping[str, Any]

    def examples(self) -> Iterator[Tensor]:
        """Images of two sizes, where there can be two, in batches of one and three."""
        generator, (channels, height, width) = torch.Generator().manual_seed(0), self.shape
        sizes = {(height, width), (height + PATCH, 2 * PATCH) if self.any_size else (height, width)}
        for batch in (1, 3):
            for size in sorted(sizes):
                yield torch.randn(batch, channels, *size, generator=generator)


def write_onnx(what: Exportable, path: Path, opset: int, half: bool) -> float:
    """Write an ONNX file, and return the largest relative difference from the model.

    Args:
        what: the model.
        path: of the file.
        opset: version of the operators.
        half: compute in float16; see `HalfPrecision`.

    Raises:
        InputError: a package is missing, or the model is too large for one file.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise InputError(
            f"to onnx needs {error.name}, which is not installed: pip install 'fcmae[export]'"
        ) from error
    model = HalfPrecision(what.model) if half else what.model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size >= ONNX_BYTES:
        hint = "--to pt2" if half else "--half true or --to pt2"
        raise InputError(f"to onnx: {size / 1e9:.1f} GB of weights, and a file holds 2: use {hint}")
    traced = _traced(what, model)
    with _exporting():
        program = torch.onnx.export(
            traced, dynamo=True, opset_version=opset, input_names=[INPUT],
            output_names=[what.output], verbose=False,
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["fcmae"] = json.dumps(what.description)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return difference(
        what, lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
    )


def write_pt2(what: Exportable, path: Path) -> float:
    """Write a file for `torch.export.load`, and return the largest relative difference from the
    model. Its extra file `METADATA` has the description."""
    program = _traced(what, what.model)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: json.dumps(what.description)})
    with path.open("rb") as file:
        return difference(what, torch.export.load(file).module())


def read_description(path: Path) -> dict[str, Any] | None:
    """The description in a file that `write_onnx` or `write_pt2` wrote; None for another one."""
    try:
        if path.suffix.lower() == ".onnx":
            import onnx

            properties = onnx.load(path, load_external_data=False).metadata_props
            text = {entry.key: entry.value for entry in properties}["fcmae"]
        else:
            extra = {METADATA: ""}
            with path.open("rb") as file, _quiet():
                torch.export.load(file, extra_files=extra)
            text = extra[METADATA]
        found: dict[str, Any] = json.loads(text)
    except Exception:  # noqa: BLE001  # whatever a foreign file holds
        return None
    return found


def difference(what: Exportable, run: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of outputs on the examples, relative to the largest output."""
    worst = 0.0
    with torch.no_grad():
        for images in what.examples():
            expected, found = what.model(images), run(images)
            error = (found - expected).abs().max() / expected.abs().max()
            worst = max(worst, float(error.nan_to_num(float("inf"))))
    return worst


class HalfPrecision(nn.Module):
    """A model in float16 with inputs and outputs in float32.

    The norms of GRN stay float32: that of a channel's map exceeds 65,504, the largest number in
    float16, on images on which the network answers strongly, and then all outputs are NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        exact = [
            (module, name, buffer)
            for module in self.model.modules()
            if getattr(module, "exact_buffers", False)
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.model.half()
        for module, name, buffer in exact:
            setattr(module, name, buffer)
        for module in [*self.model.modules()]:
            for name, child in module.named_children():
                if isinstance(child, GlobalResponseNorm):
                    setattr(module, name, _Wide(child.float()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        out: Tensor = self.model(images_BCHW.half())
        return out.float()


class _Wide(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.float())
        return out.to(x.dtype)


def _traced(what: Exportable, model: nn.Module) -> ExportedProgram:
    """The graph of a model, for any number of images, and any multiples of 32 as their sides."""
    dims: dict[int, Any] = {0: Dim("batch")}
    if what.any_size:
        for place, name in ((2, "rows"), (3, "columns")):
            dims[place] = PATCH * Dim(name, min=SMALLEST)
    channels, *sides = what.shape
    # Sizes that are equal, or 1, would be treated as constants.
    height, width = (3 * PATCH, 5 * PATCH) if what.any_size else sides
    example = torch.randn(2, channels, height, width)
    with _exporting(), torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(dims,))


@contextmanager
def _exporting() -> Iterator[None]:
    """Run an exporter quietly, and report in one line what it can't express.

    Raises:
        InputError: it failed.
    """
    with _quiet():
        try:
            yield
        except Exception as error:  # whatever a model of timm does
            why = first_line(error)
            raise InputError(f"this model can't be written as a graph: {why}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporters say of their own parts."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
