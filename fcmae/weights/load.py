"""Finding weights and loading models, from a run, a checkpoint, a timm folder or a file."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fcmae.data.statistics import CROP_PCT, Preprocessing, default_preprocessing, stored_reading
from fcmae.model.fcmae import FCMAE
from fcmae.model.mask import MIN_VALID
from fcmae.train import checkpoint
from fcmae.train.run_paths import WHOLE_MODEL, RunPaths
from fcmae.weights.hub import HUB, download
from fcmae.weights.read import CONFIG_FILE, WEIGHTS_FILE, read_json, read_state
from sparse import SparseConvNeXtV2
from sparse.convert import canonical, encoder_part
from sparse.encoder import init_fan_in
from sparse.errors import InputError, brief
from sparse.layouts import Architecture, infer_architecture
from sparse.sizes import SIDES

_log = logging.getLogger(__name__)


class Weights(NamedTuple):
    """Weights in our names (the encoder's without prefix, `decoder.*` if there is a decoder), their
    architecture, and where they come from, in words. The final norm that fine-tuning learned is not
    part of an encoder: `norm` has its weight and bias, or is empty."""

    state: dict[str, Tensor]
    architecture: Architecture
    origin: str
    norm: dict[str, Tensor]


def load_weights(source: str | Path) -> Weights:
    """Read weights in any known layout from a run, checkpoint or timm folder, or from a file.

    A classifier is dropped, which `origin` mentions.

    Raises:
        InputError: missing, damaged, refused, not finite, or not a ConvNeXt V2.
    """
    path = find_weights(source)
    state, notes = read_state(path)
    try:
        weights = canonical(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise InputError(f"{path}: NaN or infinity in {brief(broken)}: use an older file")
    if {"head.fc.weight", "head.weight"} & state.keys():
        notes.append("without its classifier")
    norm = {  # between pooling and classifier, in timm's or the official names
        name.rpartition(".")[2]: tensor
        for name, tensor in state.items()
        if name.rpartition(".")[0] in ("head.norm", "norm")
    }
    return Weights(weights, infer_architecture(weights), ", ".join([str(path), *notes]), norm)


def find_weights(source: str | Path) -> Path:
    """Return the weight file that `source` stands for.

    A run stands for its best weights if it keeps those, as fine-tuning does, else for its newest
    intact checkpoint, else for its exported model; a checkpoint or timm folder for its
    model.safetensors; a file for itself; `hf:USER/NAME` for what is on the Hugging Face Hub.

    Raises:
        InputError: there are no readable weights.
    """
    path = download(str(source)) if str(source).startswith(HUB) else Path(source)
    run = RunPaths(path)
    for file in (path, run.best / WEIGHTS_FILE):
        if file.is_file():
            return file
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give a run, a timm folder or a file")
    for folder in (checkpoint.newest_good(run.checkpoints), run.exported, path):
        if folder is not None and (folder / WEIGHTS_FILE).is_file():
            return folder / WEIGHTS_FILE
    if damaged := checkpoint.list_checkpoints(run.checkpoints):
        reason = checkpoint.damage(damaged[0])
        raise InputError(f"{path}: all checkpoints are damaged (newest: {reason}); give another")
    raise InputError(f"{path}: no weights: expected a run or a folder with {WEIGHTS_FILE}")


def is_tuned(source: str | Path) -> bool:
    """Whether weights have a head that fine-tuning trained, or belong to such a run.

    Raises:
        InputError: there are no readable weights.
    """
    file = find_weights(source)
    command = read_json(file.with_name(checkpoint.STATE)).get("command")
    classes = read_json(file.with_name(CONFIG_FILE)).get("num_classes")
    return command == "finetune" or bool(classes) or (file.parent / WHOLE_MODEL).is_dir()


def init_encoder(encoder: SparseConvNeXtV2, source: str) -> None:
    """Start an encoder of pretraining from given weights. The first layer is adapted to the input
    channels and to the size of patches; parameters that the weights do not have, such as GRN, keep
    their initial values.

    Raises:
        InputError: the weights can't be read, or are of another size.
    """
    weights = load_weights(source)
    state = dict(encoder_part(weights.state))
    stem = adapt_in_chans(state["stem.0.weight"], encoder.in_chans)
    state["stem.0.weight"] = adapt_patch_size(stem, encoder.patch_size)
    found = infer_architecture(state)
    if (found.depths, found.dims) != (encoder.depths, encoder.dims):
        raise InputError(
            f"init_from {source!r} has depths {list(found.depths)} and dims {list(found.dims)}, "
            f"the model {list(encoder.depths)} and {list(encoder.dims)}: choose its --model"
        )
    missing, unexpected = encoder.load_state_dict(state, strict=False)
    if unexpected:
        raise InputError(f"init_from {source!r} has {unexpected[0]!r}, which is not in the model")
    if missing:
        _log.warning("not in %s, so they keep their initial values: %s", source, ", ".join(missing))
    _log.info("encoder starts from %s", weights.origin)


def adapt_patch_size(stem_weight: Tensor, patch_size: int) -> Tensor:
    """Fit the stem's weight (C, I, K, K) to patches of another size, K = patch_size / 8.

    A smaller kernel has the sums over blocks of the larger one: it answers to an image as the
    larger one does to the same image enlarged, each pixel repeated. A larger one has the entries
    repeated, divided by their number: it answers to an image as the smaller one does to the means
    of its blocks.
    """
    side, before = patch_size // SIDES[0], stem_weight.shape[-1]
    if side < before:
        blocks = stem_weight.unflatten(3, (side, -1)).unflatten(2, (side, -1))
        return blocks.sum((3, 5))
    times = side // before
    repeated = stem_weight.repeat_interleave(times, 2).repeat_interleave(times, 3)
    return repeated / times**2


def adapt_in_chans(stem_weight: Tensor, in_chans: int) -> Tensor:
    """Fit the stem's weight (C, I, 4, 4) to another number of input channels.

    One channel gets the sum over the old ones, which is the response to a grey image; more channels
    get copies in turn, scaled by I / in_chans so that activations keep their scale. This is timm's
    rule for I = 3, generalised to any I.
    """
    before = stem_weight.shape[1]
    if in_chans == 1:
        return stem_weight.sum(1, keepdim=True)
    turns = [channel % before for channel in range(in_chans)]
    return stem_weight[:, turns] * (before / in_chans)


def read_settings(weights_file: Path) -> dict[str, Any]:
    """Return what is recorded next to weights: the settings in the state.json of a checkpoint, else
    the config.json of a timm folder, else {}.

    Raises:
        InputError: the file is damaged.
    """
    settings = read_json(weights_file.with_name(checkpoint.STATE)).get("settings")
    return settings or read_json(weights_file.with_name(CONFIG_FILE))


def read_preprocessing(weights_file: Path) -> Preprocessing | None:
    """Return how images were prepared for weights, or None if it is not recorded next to them.

    Raises:
        InputError: the file next to them is damaged.
    """
    known: Any = read_settings(weights_file)
    known = {**known.get("augment", {}), **known.get("pretrained_cfg", {}), **known}
    known |= known.get("reading", {})
    size = known.get("img_size", known.get("input_size", [])[1:])
    size = [size, size] if isinstance(size, int) else size
    mean, std = known.get("mean"), known.get("std")
    if not all(isinstance(values, list) and values for values in (size, mean, std)):
        return None
    crop_pct = known.get("crop_pct", CROP_PCT)
    kind = "bilinear" if known.get("interpolation") == "bilinear" else "bicubic"
    reading = stored_reading(known)
    return Preprocessing((size[0], size[1]), tuple(mean), tuple(std), crop_pct, kind, **reading)


@dataclass(frozen=True)
class Backbone:
    """An encoder in evaluation mode.

    Attributes:
        encoder: the encoder.
        images: how images are prepared for it.
        origin: where its weights come from, in words.
        label_names: the classes that it was fine-tuned on, if any.
    """

    encoder: SparseConvNeXtV2
    images: Preprocessing
    origin: str
    label_names: tuple[str, ...] = ()


def load_backbone(
    source: str, device: torch.device, img_size: tuple[int, int] | None = None
) -> Backbone:
    """Load the encoder of a run, a checkpoint, a timm folder or a weight file.

    Images are prepared as they were for these weights, if that is recorded.

    Args:
        source: see `find_weights`.
        device: where the encoder will be.
        img_size: (height, width), multiples of the patch's side; None takes the multiples nearest
            to the recorded size, else 224.

    Raises:
        InputError: missing, damaged, or not a ConvNeXt.
    """
    file = find_weights(source)
    weights = load_weights(file)
    encoder = SparseConvNeXtV2(**vars(weights.architecture))
    encoder.load_state_dict(encoder_part(weights.state))
    images = read_preprocessing(file) or default_preprocessing(encoder.in_chans)
    p = encoder.patch_size
    height, width = img_size or (max(round(n / p), 1) * p for n in images.img_size)
    images = replace(images, img_size=(height, width))
    names = read_settings(file).get("label_names")
    names = tuple(names) if isinstance(names, list) else ()
    return Backbone(encoder.to(device).eval(), images, weights.origin, names)


def random_backbone(like: Backbone) -> Backbone:
    """The same architecture with the random weights from which pretraining starts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = SparseConvNeXtV2(**vars(infer_architecture(like.encoder.state_dict())))
        init_fan_in(encoder)
    device = next(like.encoder.parameters()).device
    return replace(like, encoder=encoder.to(device).eval(), origin="random weights")


class Pretrained(NamedTuple):
    """A pretrained model with its decoder, in evaluation mode.

    Attributes:
        model: the model.
        images: how images are prepared.
        step: the completed steps.
        min_valid: share of a patch's pixels that have to count.
        window: side of the part of an image that crops were cut from; None for all of it.
    """

    model: FCMAE
    images: Preprocessing
    step: int
    min_valid: float
    window: int | None


def load_pretrained(run: str, device: torch.device) -> Pretrained:
    """Load the model of a run of pretraining, or of one of its checkpoints.

    Raises:
        InputError: there is no good checkpoint, or it is not one of pretraining.
    """
    path = Path(run)
    named = (path / checkpoint.MANIFEST).exists()
    checkpoints = RunPaths(path).checkpoints
    saved = checkpoint.load_checkpoint(path) if named else checkpoint.newest_checkpoint(checkpoints)
    if saved is None:
        raise InputError(f"{run!r} has no good checkpoint: give the --out of `fcmae pretrain`")
    command, settings = saved.state.get("command"), saved.state["settings"]
    if command != "pretrain":
        raise InputError(f"{run!r} is a run of `fcmae {command}`: give one of `fcmae pretrain`")
    tensors = saved.tensors("model")
    model = FCMAE(
        SparseConvNeXtV2(**vars(infer_architecture(tensors))), settings["decoder"]["dim"],
        settings["decoder"]["depth"], settings["mask_ratio"], settings["norm_pix_loss"],
    )  # fmt: skip
    model.load_state_dict(tensors)
    height, width = settings["img_size"]
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    images = Preprocessing((height, width), mean, std, **stored_reading(settings))
    min_valid = settings.get("min_valid", MIN_VALID)
    window = settings.get("window")
    return Pretrained(model.to(device).eval(), images, saved.state["step"], min_valid, window)
