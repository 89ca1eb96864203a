"""`fcmae diversity`: have the channels of a block collapsed into copies of each other?

The paper's measure (arXiv 2301.00808, section 4): for an image and a layer of C channels, the mean
over all pairs of channels of (1 - cosine) / 2, each channel's map taken as a vector; then the mean
over images. About 0.5 means that channels are unrelated, 0 that all are the same map.

It is measured on the widest activations of every block, after GELU and, in V2, GRN: the input of
fc2. Nothing is hidden. A channel that is zero on an image has no direction: it is excluded from
that image's mean, and the share of such channels is reported separately. An image on which all
channels are zero is excluded; a block that is zero on every image has diversity 0.
"""

import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.atomic import check_out_file, out_file
from fcmae.commands.diversity import DiversityConfig
from fcmae.data.file_list import refuse_to_replace
from fcmae.data.labelled import Split
from fcmae.data.sample import normalise
from fcmae.data.sources import split_holdout
from fcmae.inspect import figures
from fcmae.inspect.channel_maps import blocks_of, channel_maps, draw, find_block
from fcmae.inspect.embedding import pooled
from fcmae.inspect.figures import block_order
from fcmae.inspect.prologue import Setting, print_result, print_table, set_up
from fcmae.weights.load import Backbone, load_backbone
from sparse import SparseConvNeXtV2
from sparse.block import SparseBlock
from sparse.engines.base import Sites

MAPPED = 3
"""Images whose maps are drawn."""

_log = logging.getLogger(__name__)


def diversity(config: DiversityConfig, show: bool = True) -> dict[str, Any]:
    """Measure every block of one or several encoders on the same images; print a table or JSON.

    Args:
        config: what was asked for.
        show: False prints nothing.

    Returns:
        {source: {`blocks`: {name: {`diversity`, `zero`}}, `mean`, `images`}}: `zero` is the share
        of channels that are zero, `mean` that of `diversity` over the blocks.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    sources = [config.source] if isinstance(config.source, str) else config.source
    settings = {source: set_up(config, source, load_backbone, ".png", ".svg") for source in sources}
    first = settings[sources[0]]
    maps = None if config.maps is None else check_out_file(config.maps, ".png")
    blocks = [find_block(setting.model.encoder, config.block) for setting in settings.values()]
    split = first.find_images()
    refuse_to_replace(maps, split.source)
    if len(split.source) > config.count:
        chosen = split_holdout(split.source, config.count, 0)[1]
        split = split._replace(source=split.source.select(chosen))
    result = {source: _measured(setting, split) for source, setting in settings.items()}
    print_result(result, config.json, show, _print_table)
    if (out := first.out) is not None:
        lines = {
            source: {name: block["diversity"] for name, block in entry["blocks"].items()}
            for source, entry in result.items()
        }
        with out_file(out) as path:
            figures.diversity(lines, (7, 3.5)).savefig(path, format=out.suffix[1:], dpi=150)
        _log.info("plot: %s", out)
    if maps is not None:
        _draw_maps(maps, settings, blocks, split)
    return result


def _draw_maps(
    out: Path,
    settings: Mapping[str, Setting[Backbone]],
    blocks: Sequence[tuple[str, SparseBlock]],
    split: Split,
) -> None:
    """Draw the maps of a block of each encoder, on the first images that each can read."""
    few = split._replace(source=split.source.select(range(min(MAPPED, len(split.source)))))
    maps, pixels = {}, torch.empty(0)
    for (source, setting), (name, block) in zip(settings.items(), blocks, strict=True):
        encoder, found = setting.model.encoder, list[Tensor]()
        shown_images = list[Tensor]()
        for batch, images in setting.batches(few):
            found.append(channel_maps(encoder, images, block))
            shown_images.append(batch.images)
        maps[f"{source}, {name}"], stored = torch.cat(found), torch.cat(shown_images)
        channels = stored.shape[1]
        pixels = normalise(stored, (0.0,) * channels, (1.0,) * channels, "cpu").clamp(0, 1)
    shown = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    with out_file(out) as path:
        draw(shown.permute(0, 2, 3, 1), maps).savefig(path, format="png", dpi=150)
    _log.info("maps: %s", out)


def _measured(setting: Setting[Backbone], split: Split) -> dict[str, Any]:
    batches = (images for _, images in setting.batches(split, "diversity"))
    blocks, count = block_diversity(setting.model.encoder, batches)
    mean = statistics.fmean(block["diversity"] for block in blocks.values())
    return {"blocks": blocks, "mean": mean, "images": count}


def block_diversity(
    encoder: SparseConvNeXtV2, batches: Iterable[Tensor]
) -> tuple[dict[str, dict[str, float]], int]:
    """`diversity` and share of `zero` channels of every block, by name, and the number of images.

    Args:
        batches: normalised images (B, C, H, W), nothing hidden.
    """
    blocks = blocks_of(encoder)
    sums = {block: torch.zeros(3) for block in blocks.values()}

    def record(block: Any, arguments: tuple[Tensor, Sites]) -> None:
        hidden_NC, sites = block.hidden(*arguments), arguments[1]
        sums[block] += channel_diversity(hidden_NC.view(sites.images.batch, -1, hidden_NC.shape[1]))

    hooks = [block.register_forward_pre_hook(record) for block in blocks.values()]
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
    result = {}
    for name, block in blocks.items():
        distance, zero, images_with_any = sums[block].tolist()
        result[name] = {"diversity": distance / max(images_with_any, 1), "zero": zero / count}
    return result, count


def channel_diversity(x_BNC: Tensor) -> Tensor:
    """Sums over images → (3,): the mean cosine distance of all pairs of channels, the share of zero
    channels, and the number of images on which not all channels are zero.

    Args:
        x_BNC: N positions of C channels.
    """
    norm_BC = torch.linalg.vector_norm(x_BNC.float(), dim=1)
    live_BC = norm_BC > 0
    unit_BNC = x_BNC.float() / torch.where(live_BC, norm_BC, 1.0)[:, None]
    count_B = live_BC.sum(1).clamp_min(1)
    together_B = unit_BNC.sum(2).square().sum(1)
    diversity_B = (1 - together_B / count_B**2) / 2
    any_B = live_BC.any(1)
    zero_B = 1 - live_BC.float().mean(1)
    return torch.stack([(diversity_B * any_B).sum(), zero_B.sum(), any_B.sum()]).cpu()


def _print_table(result: dict[str, Any]) -> None:
    entries = result.values()
    rows = []
    for name in sorted({name for entry in entries for name in entry["blocks"]}, key=block_order):
        row = [name]
        for each in (entry["blocks"].get(name) for entry in entries):
            row += [f"{each['diversity']:.3f}", f"{100 * each['zero']:.1f}"] if each else ["", ""]
        rows.append(row)
    rows += [[], ["mean", *(cell for entry in entries for cell in (f"{entry['mean']:.3f}", ""))]]
    headings = ["block", *(heading for source in result for heading in (source, "zero %"))]
    print_table(headings, rows, "mean cosine distance: 0 collapsed, 0.5 unrelated")
