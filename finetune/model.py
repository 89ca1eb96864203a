"""The dense model to train: timm's, with a new classifier, from weights or from scratch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import first_difference
from fcmae.weights.export import timm_variant
from fcmae.weights.load import find_weights, load_weights
from fcmae.weights.preprocessing import read_preprocessing
from fcmae.weights.read import CONFIG_FILE, read_json, read_state
from sparse.convert import encoder_part, to_timm
from sparse.encoder import init_fan_in
from sparse.errors import InputError
from sparse.sizes import SIZES

V2 = "convnextv2_"
DEFAULT_MODEL = "atto"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What training starts from.

    Attributes:
        name: timm's name of the model.
        args: what differs from that, such as depths and dims.
        state: weights in timm's names, without classifier; None from scratch.
        origin: where the weights are from, in words.
        images: how images were prepared for the weights, where that is known.
    """

    name: str
    args: dict[str, Any]
    state: dict[str, Tensor] | None = None
    origin: str = "scratch"
    images: Preprocessing | None = None


def find_model(model: str | None, weights: str, in_chans: int) -> Start:
    """Find the model that a config asks for, and its weights.

    Args:
        model: a size of ConvNeXt V2, a timm name, or None for the weights' own (else atto).
        weights: a timm folder, run, checkpoint or file, or `none`.

    Raises:
        InputError: an unknown model, or weights that can't be read or are of another one.
    """
    name = None if model is None else timm_name(model)
    if weights == "none":
        return Start(name or timm_name(DEFAULT_MODEL), {})
    try:
        file = find_weights(weights)
    except InputError as error:
        raise InputError(f"weights {error}; or none, to train from scratch") from error
    images = read_preprocessing(file)
    own = read_json(file.with_name(CONFIG_FILE))
    theirs = own.get("architecture", name or V2)
    wanted = name or theirs
    if wanted != theirs and not (wanted.startswith(V2) and theirs.startswith(V2)):
        raise InputError(
            f"weights {weights!r} are of {theirs}, model is {model!r}: leave --model out, or give "
            "weights of that model"
        )
    if not wanted.startswith(V2):
        state, _ = read_state(file)
        args = dict(own.get("model_args", {}))
        return Start(timm_name(wanted), args, state, str(file), images)
    found = load_weights(file)
    variant, args = timm_variant(found.architecture)
    if name is not None and (name != variant or args):
        sizes = "" if not args else f" with {', '.join(f'{k} {v}' for k, v in args.items())}"
        raise InputError(
            f"weights {weights!r} are of {variant}{sizes}, model is {model!r}: leave --model out, "
            "or give weights of that model"
        )
    if found.architecture.in_chans != in_chans:
        raise InputError(
            f"weights {weights!r} are for {found.architecture.in_chans} channels, in_chans is "
            f"{in_chans}: give --in_chans {found.architecture.in_chans}"
        )
    state = to_timm(encoder_part(found.state))
    state |= {f"head.norm.{kind}": tensor for kind, tensor in found.norm.items()}
    return Start(variant, args, state, found.origin, images)


def timm_name(model: str) -> str:
    """Return timm's name of a model: sizes of ConvNeXt V2 are named for short.

    Raises:
        InputError: timm has no such model; names the nearest.
    """
    name = f"{V2}{model}" if model in SIZES else model
    base, _, tag = name.partition(".")
    if timm.is_model(base) and tag:
        raise InputError(
            f"model {model!r} names published weights ({tag}), which are not downloaded: use {base}"
        )
    if not timm.is_model(name):
        sizes = [str(size) for size in SIZES]
        near = get_close_matches(model, [*sizes, *timm.list_models()], n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(sizes)} or a timm name"
        raise InputError(f"model {model!r} is unknown: {hint}")
    return name


def build_model(
    start: Start,
    num_classes: int,
    in_chans: int,
    img_size: tuple[int, int],
    drop_path: float = 0.0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Build the model with its initial weights, and return it with its arguments for timm.

    timm's models that are tied to an image size are built for `img_size`, and stochastic depth is
    set where the model has it. The backbone's weights are loaded strictly; only the classifier
    keeps its initial ones.

    Raises:
        InputError: the weights are of another model, or it can't take images of this size.
    """
    optional: dict[str, Any] = {"img_size": img_size}
    if drop_path:
        optional["drop_path_rate"] = drop_path
    model = None
    while model is None:
        try:
            model = timm.create_model(
                start.name, num_classes=num_classes, in_chans=in_chans, **(start.args | optional)
            )
        except TypeError as error:
            refused = [key for key in optional if f"'{key}'" in str(error)]
            if not refused:
                raise
            del optional[refused[0]]
            if refused == ["drop_path_rate"]:
                _log.warning("%s has no stochastic depth: drop_path is not used", start.name)
        except (ValueError, AssertionError) as error:
            raise _wrong_size(start.name, img_size, error) from error
    if start.state is not None:
        load_backbone(model, start.state, start.origin)
    _check_forward(model, start.name, in_chans, img_size, num_classes)
    optional.pop("drop_path_rate", None)
    return model, start.args | optional


def load_backbone(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load all weights but the classifier's, which are left as they are.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    heads = tuple(f"{name}." for name in classifier_names(model))
    own = model.state_dict()
    given = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    expected = {name: tensor for name, tensor in own.items() if not name.startswith(heads)}
    difference = first_difference(given, expected)
    if difference is not None:
        name, there, here = difference
        raise InputError(
            f"{origin}: {name} is {there} there and {here} in this model: give weights of the "
            "same --model, --in_chans and --img_size"
        )
    model.load_state_dict(own | given)
    fresh = sorted(own.keys() - given.keys())
    _log.info("weights from %s; left at their initial values: %s", origin, ", ".join(fresh))


def classifier_names(model: Any) -> tuple[str, ...]:
    """Names of the layers that turn features into classes, as timm's configs give them."""
    names = model.pretrained_cfg.get("classifier")
    if not names:
        raise InputError(f"timm's {type(model).__name__} has no classifier: choose another --model")
    return (names,) if isinstance(names, str) else tuple(names)


def head_parts(model: nn.Module) -> frozenset[str]:
    """Top modules that hold the classifier, with the norm before it where it is in there."""
    return frozenset(name.split(".")[0] for name in classifier_names(model))


def init_convnext(model: nn.Module) -> None:
    """Give a ConvNeXt's layers but the classifier weights of deviation 1/√fan_in.

    Other models keep their own initial weights.
    """
    if isinstance(model, ConvNeXt):
        init_fan_in(model, spare=[model.get_submodule(name) for name in classifier_names(model)])


def scale_classifier(model: nn.Module, scale: float) -> None:
    """Multiply the classifier's initial weights, so that training starts near even chances."""
    with torch.no_grad():
        for name in classifier_names(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.mul_(scale)


def freeze_backbone(model: nn.Module) -> None:
    """Leave only the head to be trained."""
    heads = head_parts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in heads)


def check_part(model: nn.Module, part: int) -> None:
    """Make sure that a part of a batch, on one process at a time, is enough for the model.

    Raises:
        InputError: it is one image, and batch norm needs several to normalise by.
    """
    if part == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise InputError(
            "the model has batch norm and is shown one image at a time: choose batch_size at least "
            "2 × accumulate × processes"
        )


def set_training(model: nn.Module, frozen: bool) -> None:
    """Switch to training; a frozen backbone stays in evaluation, its running statistics too."""
    model.train()
    if frozen:
        heads = head_parts(model)
        for name, part in model.named_children():
            part.train(name in heads)


@torch.no_grad()
def _check_forward(
    model: nn.Module, name: str, in_chans: int, img_size: tuple[int, int], num_classes: int
) -> None:
    model.eval()
    try:
        out = model(torch.zeros(1, in_chans, *img_size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise _wrong_size(name, img_size, error) from error
    if not isinstance(out, Tensor) or out.shape != (1, num_classes):
        raise InputError(f"model {name!r} gives no scores for {num_classes} classes: take another")


def _wrong_size(name: str, img_size: tuple[int, int], error: Exception) -> InputError:
    own = timm.get_pretrained_cfg(name)
    hint = f"; it is made for {list(own.input_size[1:])}" if own else ""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"img_size {list(img_size)} does not suit {name} ({reason}){hint}")
