"""`fcmae diversity`: have the channels of a block collapsed into copies of each other?

The paper's measure (arXiv 2301.00808, section 4): for an image and a layer of C channels, the mean
over all pairs of channels of (1 - cosine) / 2, each channel's map taken as a vector; then the mean
over images. About 0.5 says that channels have nothing to do with each other, 0 that all are the
same map.

Taken in the widest activations of every block, after GELU and, in V2, GRN: what enters fc2. The
images are shown whole, nothing hidden. A channel that is zero on an image has no direction: it
takes no part in that image's mean, and the share of such channels is reported beside it. An image
on which all are zero takes no part at all; a block of which that holds for every image has 0.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fcmae.atomic import out_file
from fcmae.commands.diversity import DiversityConfig
from fcmae.data.labelled import Split
from fcmae.data.sources import split_holdout
from fcmae.inspect import figures
from fcmae.inspect.features import pooled
from fcmae.inspect.figures import block_order
from fcmae.inspect.prologue import Setting, batches, images_of, set_up
from fcmae.weights.load import Backbone, load_backbone
from sparse import SparseConvNeXtV2
from sparse.block import SparseBlock
from sparse.engines.base import Sites

_log = logging.getLogger(__name__)


def diversity(config: DiversityConfig, show: bool = True) -> dict[str, Any]:
    """Measure every block of one or several encoders on the same images; print a table or JSON.

    Args:
        config: what was asked.
        show: False prints nothing.

    Returns:
        {source: {`blocks`: {name: {`diversity`, `zero`}}, `mean`, `images`}}: `zero` is the share
        of channels that are zero, `mean` that of `diversity` over the blocks.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    sources = [config.source] if isinstance(config.source, str) else config.source
    find = images_of(config)
    settings = {
        source: set_up(replace(config, source=source), load_backbone, find, ".png", ".svg")
        for source in sources
    }
    result = {
        source: _measured(setting._replace(images=_chosen(setting.images, config.count)), config)
        for source, setting in settings.items()
    }
    if show and config.json:
        print(json.dumps(result))
    elif show:
        _print_table(result)
    out = settings[sources[0]].out
    if out is not None:
        with out_file(out) as path:
            lines = [
                (source, {name: block["diversity"] for name, block in entry["blocks"].items()})
                for source, entry in result.items()
            ]
            figures.diversity(lines, (7, 3.5)).savefig(path, format=out.suffix[1:], dpi=150)
        _log.info("plot: %s", out)
    return result


def _chosen(split: Split, count: int) -> Split:
    """At most `count` of the images, chosen by a hash."""
    if len(split.source) <= count:
        return split
    return split._replace(source=split.source.select(split_holdout(split.source, count, 0)[1]))


def _measured(setting: Setting[Backbone, Split], config: DiversityConfig) -> dict[str, Any]:
    count = 0

    def shown() -> Iterator[Tensor]:
        nonlocal count
        for batch, images in batches(setting, config, "diversity"):
            count += len(batch)
            yield images

    blocks = block_diversity(setting.model.encoder, shown())
    mean = float(np.mean([block["diversity"] for block in blocks.values()]))
    return {"blocks": blocks, "mean": mean, "images": count}


def block_diversity(
    encoder: SparseConvNeXtV2, batches: Iterable[Tensor]
) -> dict[str, dict[str, float]]:
    """`diversity` and share of `zero` channels of every block, by its name.

    Args:
        batches: normalised images (B, C, H, W), nothing hidden.
    """
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, block: SparseBlock) -> None:
        def look(_: Any, arguments: tuple[Tensor, Sites]) -> None:
            x_NC, sites = arguments
            found = channel_diversity(
                block.hidden(x_NC, sites).view(sites.images.batch, -1, 4 * x_NC.shape[1])
            )
            sums[name] = sums.get(name, 0) + found

        hooks.append(block.register_forward_pre_hook(look))

    for name, module in encoder.named_modules():
        if isinstance(module, SparseBlock):
            watch(name, module)
    was_training = encoder.training
    encoder.eval()
    count = 0
    try:
        for images in batches:
            pooled(encoder, images)
            count += len(images)
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()
    return {
        name: {
            "diversity": float(total[0] / total[2].clamp_min(1)),
            "zero": float(total[1]) / count,
        }
        for name, total in sums.items()
    }


def channel_diversity(x_BNC: Tensor) -> Tensor:
    """Sums over images: of the mean cosine distance of all pairs of channels, of the share of
    channels that are zero, and of images on which not all are → (3,).

    Args:
        x_BNC: N positions of C channels.
    """
    norm_BC = torch.linalg.vector_norm(x_BNC.float(), dim=1)
    live_BC = norm_BC > 0
    unit_BNC = x_BNC.float() / torch.where(live_BC, norm_BC, 1.0)[:, None]
    count_B = live_BC.sum(1).clamp_min(1)
    together_B = unit_BNC.sum(2).square().sum(1)
    diversity_B = (1 - together_B / count_B**2) / 2
    some_B = live_BC.any(1)
    zero_B = 1 - live_BC.float().mean(1)
    return torch.stack([(diversity_B * some_B).sum(), zero_B.sum(), some_B.sum()]).cpu()


def _print_table(result: dict[str, Any]) -> None:
    table = Table(title="mean cosine distance: 0 collapsed, 0.5 unrelated")
    table.add_column("block")
    for source in result:
        table.add_column(source, justify="right")
        table.add_column("zero %", justify="right")
    for name in sorted(
        {name for entry in result.values() for name in entry["blocks"]}, key=block_order
    ):
        row = [name]
        for entry in result.values():
            block = entry["blocks"].get(name)
            row += ["", ""] if block is None else [
                f"{block['diversity']:.3f}", f"{100 * block['zero']:.1f}"
            ]  # fmt: skip
        table.add_row(*row)
    table.add_section()
    means = [cell for entry in result.values() for cell in (f"{entry['mean']:.3f}", "")]
    table.add_row("mean", *means)
    Console(highlight=False).print(table, markup=False)
