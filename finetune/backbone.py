"""A timm model as the backbone of a larger one, which uses its features of strides 4 to 32."""

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fcmae.train.checkpoint import first_difference
from fcmae.weights.read import first_line
from finetune.model import Start
from finetune.optim import BLOCKS_A_GROUP, convnext_layer
from sparse.errors import InputError

TRIED = (64, 96)
"""Size of an image that a new model is tried with: unlike the one that a backbone is made for."""

_log = logging.getLogger(__name__)


def start_on_features(
    start: Start,
    in_chans: int,
    drop_path: float,
    build: Callable[[str, dict[str, Any]], Any],
    what: str,
) -> tuple[Any, dict[str, Any]]:
    """Build a model with its initial weights, the backbone's those of `start`, if any; return it
    with the backbone's arguments for timm.

    Args:
        start: where it begins.
        in_chans: channels of the images.
        drop_path: rate of stochastic depth, set if the backbone supports it.
        build: makes the model, from timm's name of the backbone and its arguments. The model has
            the backbone as `backbone`, and as `inside` what precedes its parameters' names.
        what: the model's name for messages.

    Raises:
        InputError: a library is not installed, the backbone has no features of strides 4 to 32 for
            images of any size, or the weights are of another model.
    """
    if patch := 8 * start.args.get("patch_size", 0):
        raise InputError(
            f"{start.origin} was pretrained with --patch_size {patch}: {what} needs strides of 4 "
            "to 32, which --patch_size 32 gives"
        )
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    any_size = {"strict_img_size": False}  # of timm's Swin
    refused: Exception | None = None
    for optional in (rate, {}, rate | any_size, any_size):
        args = start.args | optional
        try:
            model = build(start.name, args)
            with torch.no_grad():
                model.eval()(torch.zeros(1, in_chans, *TRIED))
            break
        except (RuntimeError, ValueError, LookupError, AttributeError, TypeError,
                AssertionError) as error:  # fmt: skip
            refused = refused or error
    else:
        assert refused is not None
        raise InputError(
            f"model {start.name!r} has no features for {what} ({first_line(refused)}): use a "
            "ConvNeXt or ResNet"
        ) from refused
    if drop_path and "drop_path_rate" not in optional:
        _log.warning("%s has no stochastic depth: drop_path is not used", start.name)
    if start.state is not None and start.whole:
        if difference := first_difference(start.state, model.state_dict()):
            raise InputError(f"{start.origin}: {difference}: the folder is damaged, restore it")
        model.load_state_dict(start.state)
    elif start.state is not None:
        load_backbone(model.backbone, start.state, start.origin)
    return model, args


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the weights of a timm model into the backbone; its head is not part of that.

    Raises:
        InputError: names or shapes differ; prints both sides of the first difference.
    """
    own = backbone.state_dict()
    given = {_flat(name): tensor for name, tensor in state.items()}
    loaded = {name: given[_flat(name)] for name in own if _flat(name) in given}
    if difference := first_difference(loaded, own):
        raise InputError(f"{origin}: {difference}: give weights of the same --model and --in_chans")
    backbone.load_state_dict(loaded)


def backbone_state(
    state: Mapping[str, Tensor], inside: str, name: str, in_chans: int, args: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return a model's backbone in the names of timm's model without a classifier.

    Layers that features do not need get initial values: in a ConvNeXt the last norm, weight 1 and
    bias 0; in others perhaps layers after the features.
    """
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0, in_chans=in_chans, **args)
    own = {
        _flat(key.removeprefix(inside)): tensor
        for key, tensor in state.items()
        if key.startswith(inside)
    }
    missing = {key.rpartition(".")[0] for key in whole.state_dict() if _flat(key) not in own}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the bytes depend on the weights alone
        for part in map(whole.get_submodule, sorted(missing)):
            part.to_empty(device="cpu", recurse=False)
            part.reset_parameters()  # type: ignore[operator]
    return {key: own.get(_flat(key), tensor) for key, tensor in whole.state_dict().items()}


def _flat(name: str) -> str:
    """timm joins the first two parts of some names where it returns features."""
    return name.replace(".", "_")


def feature_depths(model: Any, layer_group: str) -> dict[str, int]:
    """How many layers before the head each parameter is; see `finetune.optim.layer_depths`.

    Raises:
        InputError: the backbone is not a ConvNeXt.
    """
    backbone = model.backbone
    stages: list[Any] = [getattr(backbone, f"stages_{stage}", None) for stage in range(4)]
    blocks = [len(getattr(stage, "blocks", ())) for stage in stages]
    if not all(blocks):
        raise InputError("the layers of this backbone are not known: use --optim.layer_decay 1")
    per_layer = BLOCKS_A_GROUP if layer_group == "group" else 1
    last, depths = convnext_layer("head", blocks, per_layer), {}
    for name, _ in model.named_parameters():
        within = re.sub(r"^(stem|stages)_(\d+)", r"\1.\2", name.removeprefix(model.inside))
        part = within if name.startswith(model.inside) else "head"
        depths[name] = last - convnext_layer(part, blocks, per_layer)
    return depths
