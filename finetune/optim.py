"""How many layers before the head each parameter is, for layer-wise learning rates."""

import math
from collections.abc import Sequence
from typing import Any

from timm.models import ConvNeXt, group_parameters

from sparse.errors import InputError

BLOCKS_A_GROUP = 3


def layer_depths(model: Any, layer_group: str) -> dict[str, int]:
    """How many layers before the head each parameter is; 0 for the head itself.

    A ConvNeXt's layers are its blocks, or with `group` groups of three blocks within a stage; a
    downsampling belongs to the layer after it. The stem belongs to the first block, but comes
    before the first group. For other models timm defines the layers.

    Raises:
        InputError: timm does not define the layers of this model.
    """
    per_layer = BLOCKS_A_GROUP if layer_group == "group" else 1
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ConvNeXt):
        stages: Any = model.stages
        blocks = [len(stage.blocks) for stage in stages]
        layers = {name: convnext_layer(name, blocks, per_layer) for name in names}
        last = 1 + sum(math.ceil(count / per_layer) for count in blocks)
        return {name: last - layer for name, layer in layers.items()}
    if not hasattr(model, "group_matcher"):
        name = type(model).__name__
        raise InputError(f"timm does not define the layers of {name}: use --optim.layer_decay 1")
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: math.ceil((last - layer) / per_layer) for name, layer in layers.items()}


def convnext_layer(name: str, blocks: Sequence[int], per_layer: int) -> int:
    """Number of the layer that a parameter of timm's ConvNeXt is in, counted from the stem.

    Args:
        blocks: how many there are in each stage.
        per_layer: 1, or how many blocks make a group.

    With groups of three, `blocks` (3, 3, 27, 3) makes twelve: stem 0, groups 1 to 12, head 13.
    """
    layers = [math.ceil(count / per_layer) for count in blocks]
    part, *place = name.split(".")
    if part == "stem":
        return 0 if per_layer > 1 else 1
    if part != "stages":
        return 1 + sum(layers)
    stage = int(place[0])
    block = int(place[2]) if place[1] == "blocks" else 0
    return 1 + sum(layers[:stage]) + block // per_layer
