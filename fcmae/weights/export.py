"""The command `fcmae convert`: a pretrained checkpoint becomes a folder that timm loads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fcmae.atomic import atomic_write, check_out_file, check_out_folder
from fcmae.commands.convert import ConvertConfig
from fcmae.data.statistics import Preprocessing, default_preprocessing
from fcmae.train.checkpoint import save_tensors
from fcmae.weights.hub import known_license
from fcmae.weights.load import find_weights, load_weights, read_preprocessing
from fcmae.weights.read import CONFIG_FILE, WEIGHTS_FILE, read_json
from sparse.convert import CONV_MLP_WIDTHS, encoder_part, to_minkowski, to_timm
from sparse.errors import InputError, RunError
from sparse.layouts import Architecture
from sparse.sizes import PATCH, SIDES, SIZES


def convert(config: ConvertConfig) -> Path:
    """Convert `config.source` and return the path written: a timm folder, or a Minkowski file.

    Image size, mean and std are those that the weights were trained with, if the source has them,
    else 224 px and ImageNet's.

    Raises:
        InputError: an unreadable or unsuitable source, or an `out` that must not be overwritten.
        RunError: `out` could not be written.
    """
    timm = config.layout == "timm"
    if timm:
        out = check_out_folder(config.out)
    else:
        out = check_out_file(config.out, ".pth", ".pt", ".safetensors")
    file = find_weights(config.source)
    weights = load_weights(file)
    kind = weights.architecture
    try:
        if timm:
            _check_out(out, kind)
            images = read_preprocessing(file) or default_preprocessing(kind.in_chans)
            state = encoder_part(weights.state)
            export_folder(state, kind, out, images, known_license(str(file)))
        else:
            export_minkowski(weights.state, out)
    except OSError as error:
        raise RunError(f"out {out} could not be written: {error}") from error
    print(f"{out}: written from {weights.origin}")
    if timm:
        if kind.patch_size == 16:
            print("timm has one more layer for patches of 16: see docs/data.md")
        else:
            print(f'load it with timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def export_folder(
    encoder_state: Mapping[str, Tensor],
    architecture: Architecture,
    out_dir: str | Path,
    images: Preprocessing,
    licence: str | None = None,
) -> Path:
    """Write the encoder as a folder for timm, model.safetensors and config.json, and return it.

    It loads strictly with `timm.create_model("local-dir:OUT_DIR", pretrained=True)` and, for a
    published size, with `timm.create_model(NAME, num_classes=0, checkpoint_path=…)`. The bytes
    depend on the arguments alone. Each file is replaced atomically.

    Args:
        encoder_state: in our names.
        architecture: of `encoder_state`.
        out_dir: created if missing.
        images: how images are prepared.
        licence: that the weights come with, if any.

    Raises:
        InputError: mean or std does not have one number per input channel, or names and shapes are
            not those of a complete encoder.
    """
    channels = architecture.in_chans
    if not len(images.mean) == len(images.std) == channels:
        both = f"mean {list(images.mean)} and std {list(images.std)}"
        raise InputError(f"{both} must have one number for each of the {channels} input channels")
    name, model_args = timm_variant(architecture)
    layers = {"classifier": "head.fc", "first_conv": "stem.0"}
    config = timm_config(name, model_args, architecture.dims[3], images, layers, licence=licence)
    return write_timm_folder(to_timm(encoder_state), config, Path(out_dir))


def write_timm_folder(state: Mapping[str, Tensor], config: Mapping[str, Any], out: Path) -> Path:
    """Write a timm model's state dict and its `timm_config` as a folder, and return it.

    The bytes depend on the arguments alone. Each file is replaced atomically.
    """
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / WEIGHTS_FILE) as path:
        save_tensors(state, path)
    with atomic_write(out / CONFIG_FILE) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def export_minkowski(state: Mapping[str, Tensor], path: Path) -> None:
    """Write weights in our names as the official pretraining script stores them.

    Encoder names get the prefix `encoder.`; a decoder is kept. A .pth or .pt file has them under
    the key `model`, a .safetensors file at the top level.

    Raises:
        InputError: names and shapes are not those of a complete model.
    """
    converted = to_minkowski(
        {name if name.startswith("decoder.") else f"encoder.{name}": state[name] for name in state}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".safetensors":
            save_tensors(converted, temporary)
        else:
            torch.save({"model": converted}, temporary)


def timm_config(
    name: str,
    model_args: Mapping[str, Any],
    num_features: int,
    images: Preprocessing,
    layers: Mapping[str, Any],
    label_names: Sequence[str] = (),
    licence: str | None = None,
) -> dict[str, Any]:
    """Return the config.json of a timm folder, with or without a classifier.

    Args:
        name: timm's variant.
        model_args: arguments that differ from that variant's.
        num_features: width of the classifier's input.
        images: how images are prepared.
        layers: names of the `classifier` and of the `first_conv`, as timm's own configs give them.
        label_names: the classes in the order of the classifier's outputs; empty without one.
        licence: that the weights come with, if any.
    """
    channels = len(images.mean)
    config = {
        "architecture": name,
        "num_classes": len(label_names),
        "num_features": num_features,
        "global_pool": "avg" if name.startswith("convnext") else "",
        "model_args": dict(model_args),
        "label_names": list(label_names),
        "reading": images.recorded(),
        "pretrained_cfg": {
            "input_size": [channels, *images.img_size],
            "fixed_input_size": "img_size" in model_args,
            "interpolation": images.interpolation,
            "crop_pct": images.crop_pct,
            "mean": list(images.mean),
            "std": list(images.std),
            "num_classes": len(label_names),
            "classifier": layers["classifier"],
            **({"license": licence} if licence else {}),
            # Early timm 1.0 assumes that a named first layer has 3 channels, and would replace ours
            # by random numbers; without the name it loads the layer unchanged.
            **({"first_conv": layers.get("first_conv")} if channels == 3 else {}),
        },
    }
    return {key: value for key, value in config.items() if value or key == "num_classes"}


def create_model(name: str, **arguments: Any) -> Any:
    """`timm.create_model`, for weights of any patch size.

    With a stem of stride 2, timm's ConvNeXt halves the map once more before its first stage. Ours
    does not, so this layer is removed.
    """
    import timm  # only what fine-tunes or exports needs it

    model: Any = timm.create_model(name, **arguments)
    if name.startswith("convnextv2") and arguments.get("patch_size") == 2:
        model.stages[0].downsample = nn.Identity()
    return model


def timm_variant(architecture: Architecture) -> tuple[str, dict[str, Any]]:
    """Return timm's model name and the arguments that make it this architecture.

    Free sizes are based on a variant that stores the MLP in the shape that `to_timm` returns.
    """
    shape, width = (architecture.depths, architecture.dims), architecture.dims[0]
    same = [size for size in SIZES.values() if (size.depths, size.dims) == shape]
    as_wide = [size for size in SIZES.values() if size.dims[0] == width in CONV_MLP_WIDTHS]
    base = [*same, *as_wide, SIZES["tiny"]][0]
    arguments: dict[str, Any] = {}
    if base.depths != architecture.depths:
        arguments["depths"] = list(architecture.depths)
    if base.dims != architecture.dims:
        arguments["dims"] = list(architecture.dims)
    if not architecture.use_grn:
        arguments["use_grn"] = False
    if architecture.layer_scale:
        arguments["ls_init_value"] = architecture.layer_scale
    if architecture.patch_size != PATCH:
        arguments["patch_size"] = architecture.patch_size // SIDES[0]
    return f"convnextv2_{base.name}", arguments


def _check_out(out: Path, architecture: Architecture) -> None:
    """Refuse any folder that is not new, empty, or an earlier conversion of the same model.

    Raises:
        InputError: `out` holds something else, which the message names.
    """
    names = {path.name for path in out.iterdir() if path.name[0] != "."} if out.is_dir() else set()
    if not names:
        return
    there = read_json(out / CONFIG_FILE)
    channels = there.get("pretrained_cfg", {}).get("input_size", [None])[0]
    found = [there.get("architecture"), there.get("model_args", {}), there.get("num_classes")]
    if other := sorted(names - {WEIGHTS_FILE, CONFIG_FILE}):
        what = repr(other[0])
    elif [*found, channels] != [*timm_variant(architecture), 0, architecture.in_chans]:
        what = f"another model: {found[0]}, {found[1]}, {found[2]} classes, {channels} channels"
    else:
        return
    raise InputError(f"out {out} holds {what}: give a new or empty folder")
