"""The command `fcmae convert`: a pretrained checkpoint becomes a folder that timm loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fcmae.atomic import atomic_write, check_out_file, check_out_folder
from fcmae.commands.convert import ConvertConfig
from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.train.checkpoint import MANIFEST, STATE
from fcmae.train.run_paths import RunPaths
from fcmae.weights.load import find_weights, load_weights
from fcmae.weights.preprocessing import read_preprocessing
from fcmae.weights.read import CONFIG_FILE, WEIGHTS_FILE, read_json
from sparse.convert import CONV_MLP_WIDTHS, encoder_part, to_minkowski, to_timm
from sparse.errors import InputError, RunError
from sparse.layouts import Architecture
from sparse.sizes import PATCH, SIZES


def convert(config: ConvertConfig) -> Path:
    """Convert `config.source` and return the path written: a timm folder, or a Minkowski file.

    Image size, mean and std are those that the weights were trained with where the source says
    them, else 224 px and ImageNet's.

    Raises:
        InputError: an unreadable or unfitting source, or an `out` that must not be overwritten.
        RunError: `out` could not be written.
    """
    out = Path(config.out)
    _check_out(out, config.layout)
    file = find_weights(config.source)
    weights = load_weights(file)
    if config.layout == "timm":
        _check_same_model(out, weights.architecture)
    try:
        if config.layout == "minkowski":
            export_minkowski(weights.state, out)
        else:
            architecture = weights.architecture
            images = read_preprocessing(file) or default_preprocessing(architecture.in_chans)
            encoder = encoder_part(weights.state)
            export_folder(encoder, architecture, out, images)
    except OSError as error:
        raise RunError(f"out {out} could not be written: {error}") from error
    print(f"{out}: written from {weights.origin}")
    if config.layout == "timm":
        print(f'load it with timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def export_folder(
    encoder_state: Mapping[str, Tensor],
    architecture: Architecture,
    out_dir: str | Path,
    images: Preprocessing,
) -> Path:
    """Write the encoder as a folder for timm, model.safetensors and config.json, and return it.

    It loads strictly with `timm.create_model("local-dir:OUT_DIR", pretrained=True)` and, for a
    published size, with `timm.create_model(NAME, num_classes=0, checkpoint_path=…)`. The bytes
    depend on the arguments alone. Each file is replaced atomically.

    Args:
        encoder_state: in our names.
        architecture: what `encoder_state` holds.
        out_dir: created where missing.
        images: how images are prepared.

    Raises:
        InputError: mean or std of another length than the input channels, or names and shapes that
            do not make one whole encoder.
    """
    for name, values in (("mean", images.mean), ("std", images.std)):
        if len(values) != architecture.in_chans:
            raise InputError(
                f"{name} {list(values)} must have one number for each of the "
                f"{architecture.in_chans} input channels"
            )
    name, model_args = timm_variant(architecture)
    config = timm_config(name, model_args, architecture.dims[3], images)
    config["pretrained_cfg"]["pool_size"] = [side // PATCH for side in images.img_size]
    return write_timm_folder(to_timm(encoder_state), config, Path(out_dir))


def write_timm_folder(state: Mapping[str, Tensor], config: Mapping[str, Any], out: Path) -> Path:
    """Write a timm model's state dict and its `timm_config` as a folder, and return it.

    The bytes depend on the arguments alone. Each file is replaced atomically.
    """
    out.mkdir(parents=True, exist_ok=True)
    _save_tensors(state, out / WEIGHTS_FILE)
    with atomic_write(out / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def export_minkowski(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write weights in our names as the official pretraining script stores them, and return `path`.

    Encoder names get the prefix `encoder.`, a decoder is kept. A .pth or .pt file has them under
    the key `model`, a .safetensors file at the top.

    Raises:
        InputError: names and shapes that do not make one whole model.
    """
    converted = to_minkowski(
        {name if name.startswith("decoder.") else f"encoder.{name}": state[name] for name in state}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _save_tensors(converted, path)
    else:
        with atomic_write(path) as temporary:
            torch.save({"model": converted}, temporary)
    return path


def timm_config(
    name: str,
    model_args: Mapping[str, Any],
    num_features: int,
    images: Preprocessing,
    label_names: Sequence[str] = (),
    classifier: str | Sequence[str] = "head.fc",
    first_conv: str | Sequence[str] | None = "stem.0",
) -> dict[str, Any]:
    """Return the config.json of a timm folder, with or without a classifier.

    Args:
        name: timm's variant.
        model_args: what differs from that variant.
        num_features: width of what the classifier sees.
        images: how images are prepared.
        label_names: the classes in the order of the classifier's outputs; none without one.
        classifier: names of the classifier's layers in the state dict.
        first_conv: names of the layers that see the image.
    """
    channels = len(images.mean)
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": len(label_names),
        "num_features": num_features,
    }
    if name.startswith("convnext"):
        config["global_pool"] = "avg"
    if model_args:
        config["model_args"] = dict(model_args)
    if label_names:
        config["label_names"] = list(label_names)
    config["pretrained_cfg"] = {
        "input_size": [channels, *images.img_size],
        "fixed_input_size": "img_size" in model_args,
        "interpolation": images.interpolation,
        "crop_pct": images.crop_pct,
        "mean": list(images.mean),
        "std": list(images.std),
        "num_classes": len(label_names),
        "classifier": classifier,
    }
    if channels == 3:
        # Early timm 1.0 takes any named first layer for one of 3 channels, and would replace ours
        # by random numbers; without the name it loads the layer as it is.
        config["pretrained_cfg"]["first_conv"] = first_conv
    return config


def timm_variant(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """Return timm's model name and the arguments that make it this architecture.

    Free sizes build on a variant that stores the MLP in the shape that `to_timm` gives it.
    """
    width = architecture.dims[0]
    shape = (architecture.depths, architecture.dims)
    same = [size for size in SIZES.values() if (size.depths, size.dims) == shape]
    if same:
        base = same[0]
    elif width in CONV_MLP_WIDTHS:
        base = next(size for size in SIZES.values() if size.dims[0] == width)
    else:
        base = SIZES["tiny"]
    arguments: dict[str, Any] = {}
    if base.depths != architecture.depths:
        arguments["depths"] = list(architecture.depths)
    if base.dims != architecture.dims:
        arguments["dims"] = list(architecture.dims)
    if not architecture.use_grn:
        arguments["use_grn"] = False
    if architecture.layer_scale:
        arguments["ls_init_value"] = 1e-6  # any number: the weights replace it
    return f"convnextv2_{base.name}", arguments


def _save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    # More than one metadata key would be written in an order that changes between processes.
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # it wraps the operating system's errors
            raise OSError(str(error)) from error


def _check_same_model(out: Path, architecture: Architecture) -> None:
    """Refuse to put a model in the place of another one, or of something else.

    Raises:
        InputError: the folder holds no model, a classifier, or an encoder of another kind.
    """
    names = sorted(p.name for p in out.iterdir() if p.name[0] != ".") if out.is_dir() else []
    if not names:
        return
    there = read_json(out / CONFIG_FILE)
    if "architecture" not in there:
        what = f"{names[0]!r} and no model"
    elif there.get("num_classes"):
        what = f"a classifier of {there['num_classes']} classes"
    else:
        name, args = timm_variant(architecture)
        size = there.get("pretrained_cfg", {}).get("input_size", [architecture.in_chans])
        same = there["architecture"] == name and there.get("model_args", {}) == args
        if same and size[0] == architecture.in_chans:
            return
        what = f"another model ({there['architecture']}, {size[0]} channels)"
    raise InputError(f"out {out} holds {what}: give a new or empty folder")


def _check_out(out: Path, layout: str) -> None:
    if layout == "minkowski":
        if out.suffix not in (".pth", ".pt", ".safetensors") or out.is_dir():
            raise InputError(
                f"out {out}: the minkowski layout is one file; name it .pth, .pt or .safetensors"
            )
        check_out_file(out)
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out} is a file; give a folder for {WEIGHTS_FILE} and {CONFIG_FILE}")
    check_out_folder(out)
    run = RunPaths(out)
    for path in (run.checkpoints, run.config, out / STATE, out / MANIFEST):
        if path.exists():
            raise InputError(
                f"out {out} holds a run or a checkpoint ({path.name}); give another folder, "
                f"such as {run.exported}"
            )
