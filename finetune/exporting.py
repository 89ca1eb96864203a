"""`fcmae export`: a model for other programs, compared with its source."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from fcmae import __version__
from fcmae.atomic import check_out_file, check_out_folder, out_file
from fcmae.commands.export import ExportConfig
from fcmae.config.values import height_width
from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.weights.export import create_model, timm_variant
from fcmae.weights.graphs import SMALLEST, Exportable, read_description, write_onnx, write_pt2
from fcmae.weights.load import find_weights, is_tuned, load_weights, read_preprocessing
from fcmae.weights.read import CONFIG_FILE, read_json
from fcmae.weights.transformers import write_transformers
from finetune.tuned import load_tuned
from sparse.convert import encoder_part, to_timm
from sparse.errors import InputError, RunError
from sparse.layouts import Architecture
from sparse.sizes import PATCH

LIMIT, HALF_LIMIT = 1e-4, 5e-2
"""Largest relative difference from the source in float32 and in float16."""

BACKBONE = "backbone"
"""The task of a model without a head."""


class Source(NamedTuple):
    """A model to export: with its preprocessing, its task, the names of its outputs, and its
    architecture if it is a ConvNeXt V2 that classifies or has no head."""

    what: Exportable
    images: Preprocessing
    task: str
    names: tuple[str, ...]
    architecture: Architecture | None


def export(config: ExportConfig) -> Path:
    """Export `config.source` and return the path written.

    The output of a backbone is `features` (B, C), pooled and normalised; of classes `logits`
    (B, K); of masks `logits` (B, K, H, W), for images of one size; of numbers `numbers` (B, K) in
    their own units. Inputs are `images`, normalised; their mean and std, size, and the names of the
    outputs are in ONNX's metadata under `fcmae`, in `fcmae.json` of a .pt2 file, or in the JSON
    files of transformers.

    Raises:
        InputError: an unsuitable source, or an `out` that must not be overwritten.
        RunError: the export differs from the source, or `out` could not be written.
    """
    if config.half and config.to != "onnx":
        raise InputError(f"half is for onnx, not for {config.to}: omit it")
    out = _check_out(config.to, config.out)
    source = load_source(config)
    if config.to == "transformers":
        if source.architecture is None:
            raise InputError(
                "to transformers: it has ConvNeXt V2 backbones and classifiers, and "
                f"{config.source} is for {source.task}: use --to onnx or pt2"
            )
        with _out_folder(out) as folder:
            found = write_transformers(
                source.what, source.architecture, source.images, source.names, folder
            )
            _check(found, LIMIT)
    else:
        with out_file(out) as path:
            if config.to == "onnx":
                found = write_onnx(source.what, path, config.opset, config.half)
            else:
                found = write_pt2(source.what, path)
            _check(found, HALF_LIMIT if config.half else LIMIT)
    print(f"{out}: written, loaded, and within {found:.1e} of the source, relative to its outputs")
    return out


def load_source(config: ExportConfig) -> Source:
    """Load what is to be exported.

    Raises:
        InputError: missing, damaged, or of a kind that can't be exported.
    """
    size = None if config.img_size is None else height_width(config.img_size)
    file, device = find_weights(config.source), torch.device("cpu")
    described = read_json(file.with_name(CONFIG_FILE))
    output, any_size, architecture = "features", True, None
    if is_tuned(file):
        tuned = load_tuned(config.source, device, size, fast=False)
        kind, images = tuned.kind, tuned.images
        model, task, names, output = kind.exported(tuned.model), kind.task, kind.names, kind.output
        fixed = described.get("pretrained_cfg", {}).get("fixed_input_size", False)
        any_size = kind.any_size and not fixed
        if task == "classify" and str(described["architecture"]).startswith("convnextv2"):
            architecture = load_weights(file).architecture
    else:
        weights = load_weights(file)
        architecture, task, names = weights.architecture, BACKBONE, ()
        images = read_preprocessing(file) or default_preprocessing(architecture.in_chans)
        images = replace(images, img_size=size or images.img_size)
        name, args = timm_variant(architecture)
        model = create_model(name, num_classes=0, in_chans=architecture.in_chans, **args)
        model.load_state_dict(to_timm(encoder_part(weights.state)))
        model.eval()
    description = {
        "task": task, "outputs": list(names), "img_size": list(images.img_size),
        "mean": list(images.mean), "std": list(images.std), "crop_pct": images.crop_pct,
        "interpolation": images.interpolation, "fcmae": __version__,
    }  # fmt: skip
    shape = len(images.mean), *images.img_size
    any_size = any_size and min(images.img_size) >= SMALLEST * PATCH
    what = Exportable(model, shape, any_size, output, description)
    return Source(what, images, task, names, architecture)


def _check(found: float, limit: float) -> None:
    if not found <= limit:
        raise RunError(
            f"the export differs from its source by {found:.1e}, more than {limit:.0e}: not written"
        )


def _check_out(to: str, out: str) -> Path:
    """Check where the export will be written; an earlier one may be there.

    Raises:
        InputError: it can't be written, or something else is there.
    """
    if to != "transformers":
        path = check_out_file(out, f".{to}")
        other = path.exists() and read_description(path) is None
    else:
        path = check_out_folder(out)
        there = path.is_dir() and any(path.iterdir())
        other = there and "fcmae_version" not in read_json(path / CONFIG_FILE)
    if other:
        raise InputError(f"out {out!r} exists and is not such an export: give a new path")
    return path


@contextmanager
def _out_folder(out: Path) -> Iterator[Path]:
    """Yield a folder whose files are moved to `out` at the end.

    Raises:
        RunError: they could not be written.
    """
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        out.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            file.replace(out / file.name)
    except OSError as error:
        raise RunError(f"out {str(out)!r} could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
