"""timm's dense models to train: from weights or from scratch."""

import logging
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.data.statistics import Preprocessing
from fcmae.train.checkpoint import first_difference
from fcmae.weights.export import create_model, timm_variant
from fcmae.weights.load import find_weights, load_weights, read_preprocessing
from fcmae.weights.read import CONFIG_FILE, first_line, read_json, read_state
from finetune import roadmap  # noqa: F401  # timm then knows its models
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
        args: arguments that differ from its defaults, such as depths and dims.
        state: weights in timm's names; None from scratch.
        origin: where the weights come from, in words.
        images: how images were prepared for the weights, if known.
        whole: load the classifier too; else it keeps its initial weights.
    """

    name: str
    args: dict[str, Any]
    state: dict[str, Tensor] | None = None
    origin: str = "scratch"
    images: Preprocessing | None = None
    whole: bool = False


def find_model(model: str | None, weights: str, in_chans: int) -> Start:
    """Find the model and the weights that a config asks for.

    Args:
        model: a size of ConvNeXt V2, a timm name, or None for the weights' own (else atto).
        weights: a timm folder, run, checkpoint or file, or `none`.

    Raises:
        InputError: an unknown model, or weights that can't be read or are of another model.
    """
    name = None if model is None else timm_name(model)
    if weights == "none":
        return Start(name or timm_name(DEFAULT_MODEL), {})
    file = find_weights(weights)
    own = read_json(file.with_name(CONFIG_FILE))
    variant = own.get("architecture", name or V2)
    if is_v2 := variant.startswith(V2):
        state, architecture, origin, norm = load_weights(file)
        if architecture.in_chans != in_chans:
            raise InputError(
                f"weights {weights!r} are for {architecture.in_chans} channels, in_chans is "
                f"{in_chans}: give --in_chans {architecture.in_chans}"
            )
        variant, args = timm_variant(architecture)
        state = to_timm(encoder_part(state))
        state |= {f"head.norm.{kind}": tensor for kind, tensor in norm.items()}
    else:
        state, _ = read_state(file)
        args, origin = own.get("model_args", {}), str(file)
    if name is not None and (name != variant or (is_v2 and args)):
        sizes = "".join(f", {key} {value}" for key, value in args.items())
        raise InputError(
            f"weights {weights!r} are of {variant}{sizes}, model is {model!r}: omit --model"
        )
    return Start(timm_name(variant), args, state, origin, read_preprocessing(file))


def timm_name(model: str) -> str:
    """Return timm's name of a model: sizes of ConvNeXt V2 have short names.

    Raises:
        InputError: timm has no such model; suggests the nearest.
    """
    name = f"{V2}{model}" if model in SIZES else model
    base, _, tag = name.partition(".")
    if tag and timm.is_model(base):
        raise InputError(
            f"model {model!r} names published weights ({tag}), which are not downloaded: use {base}"
        )
    if not timm.is_model(name):
        near = get_close_matches(model, [*SIZES, *timm.list_models()], n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(SIZES)} or a timm name"
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

    Models of timm with a fixed image size are built for `img_size`; stochastic depth is set if the
    model supports it. Weights are loaded strictly.

    Raises:
        InputError: the weights are of another model, or it can't take images of this size.
    """
    size: dict[str, Any] = {"img_size": img_size}
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    for optional in (size | rate, size, rate, {}):
        try:
            model = create_model(
                start.name, num_classes=num_classes, in_chans=in_chans, **(start.args | optional)
            ).eval()
            with torch.no_grad():
                out = model(torch.zeros(1, in_chans, *img_size))
            break
        except TypeError as error:  # an argument that this model does not have
            refused = error
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            own = timm.get_pretrained_cfg(start.name)
            hint = f"; it is made for {list(own.input_size[1:])}" if own else ""
            raise InputError(
                f"img_size {list(img_size)} does not suit {start.name} ({first_line(error)}){hint}"
            ) from error
    else:
        raise InputError(
            f"{start.origin}: model_args {start.args} do not suit {start.name} ({refused})"
        ) from refused
    if not isinstance(out, Tensor) or out.shape != (1, num_classes):
        raise InputError(f"model {start.name!r} does not score {num_classes} classes: use another")
    if rate and optional.pop("drop_path_rate", None) is None:
        _log.warning("%s has no stochastic depth: drop_path is not used", start.name)
    if start.state is not None:
        load_state(model, start.state, start.origin, start.whole)
    return model, start.args | optional


def load_state(
    model: nn.Module, state: dict[str, Tensor], origin: str, whole: bool = False
) -> None:
    """Load all weights, or all but the classifier's, which stay unchanged.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    heads = () if whole else tuple(f"{name}." for name in classifier_names(model))
    own = model.state_dict()
    given, expected = (
        {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
        for tensors in (state, own)
    )
    if difference := first_difference(given, expected):
        raise InputError(
            f"{origin}: {difference}: give weights of the same --model and --in_chans, made for "
            "this --img_size"
        )
    model.load_state_dict(own | given)
    if fresh := sorted(own.keys() - given.keys()):
        _log.info("weights from %s; these keep their initial values: %s", origin, ", ".join(fresh))


def classifier_names(model: Any) -> tuple[str, ...]:
    """Names of the layers that turn features into classes, as timm's configs give them."""
    names = model.pretrained_cfg.get("classifier")
    if not names:
        raise InputError(f"timm's {type(model).__name__} has no classifier: choose another --model")
    return (names,) if isinstance(names, str) else tuple(names)


def init_convnext(model: Any) -> None:
    """Give all layers of a ConvNeXt but the classifier weights of standard deviation 1/√fan_in.

    Other models keep their initial weights, and so do decoders, which a model with a `backbone`
    has.
    """
    backbone: nn.Module = getattr(model, "backbone", model)
    if any(isinstance(part, ConvNeXtBlock) for part in backbone.modules()):
        heads = () if model is not backbone else classifier_names(model)
        init_fan_in(backbone, spare=[backbone.get_submodule(name) for name in heads])


def scale_classifier(model: nn.Module, scale: float) -> None:
    """Scale the classifier's initial weights, so that training starts near equal probabilities."""
    with torch.no_grad():
        for name in classifier_names(model):
            for parameter in model.get_submodule(name).parameters():
                parameter.mul_(scale)


def freeze_backbone(model: nn.Module) -> None:
    """Train the head only: the top-level modules that hold the classifier, and with it perhaps a
    norm before it."""
    heads = [name.split(".")[0] for name in classifier_names(model)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in heads)


def set_training(model: nn.Module) -> None:
    """Switch to training mode; a frozen backbone stays in evaluation mode."""
    model.train()
    for part in model.modules():
        trained = [parameter.requires_grad for parameter in part.parameters()]
        if trained and not any(trained):
            part.eval()
