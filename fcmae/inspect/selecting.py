"""`fcmae select`: which images to label next.

A set of images covers an image as well as the most similar one of the set does; the set to label is
the one that covers all images best on average (facility location). It is chosen greedily: first the
most typical image, then always the one that adds most. Labelled images are in the set from the
start.

With few labels, dense regions teach more than remote ones: random choice beats k-center, which
takes outliers, and is beaten by TypiClust (arXiv 2202.02794), which needs as many clusters as
labels, and ProbCover (arXiv 2205.11320), which needs the radius of a ball. Coverage by a smooth
kernel (MaxHerding, arXiv 2407.12212) was better than both in its authors' comparison and hardly
depends on the kernel's width.

Similarity is the cosine of features minus their mean: if features share a large offset, all
cosines are close to 1 without that.
"""

import csv
import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fcmae.atomic import check_out_file, out_file
from fcmae.commands.select import SelectConfig
from fcmae.console import tracked
from fcmae.data.file_list import refuse_to_replace
from fcmae.data.find import find_source
from fcmae.data.labelled import Split
from fcmae.data.sources import Indices, Source, key_hashes
from fcmae.data.table import read_table
from fcmae.inspect.embedding import Features, extract
from fcmae.inspect.prologue import Setting, set_up
from fcmae.inspect.thumbnails import sheet, thumbnails
from fcmae.weights.load import Backbone, load_backbone
from sparse.errors import InputError

COPY = 0.99
"""Cosine from which two images are near-duplicates. Of 3,068 photographs, after a short pretraining
run, four were this close to another one, two of them a true pair; from 0.98 to 0.99 mostly colours
were alike. Of resized, blurred and recompressed copies, most were closer."""

WIDTH = 0.5
"""A cosine of 1 - `WIDTH` covers 1/e as well as a cosine of 1."""

POOL = 16_384
"""Of more images, this many stand for all while the set is chosen; or four times the set."""

SHORT = 1e-3
"""Features that differ from the mean by a smaller share of its length do not differ."""

PER_ROW, SIDE, DRAWN = 10, 96, 1000
"""Images in a row of the contact sheet, their side in pixels, and how many are drawn at most."""

_ROWS = 1024

_log = logging.getLogger(__name__)


def select(config: SelectConfig) -> list[str]:
    """Choose the images to label next, write them to a CSV file, and return their names in order.

    The columns are `path`, relative to `config.images`, and `rank`, from 1. Images that can't be
    read are reported and skipped.

    Raises:
        InputError: the weights, the images, what is labelled or `out` is wrong; features are not
            finite; there are fewer distinct images without labels than `count`.
        RunError: no image could be read, or `out` could not be written.
    """
    setting = set_up(config, config.source, load_backbone, ".csv")
    contact = None if config.contact is None else check_out_file(config.contact, ".png")
    split, count = setting.find_images(), config.count
    refuse_to_replace(contact, split.source)
    if count > len(split.source):
        given = f"the {len(split.source)} images of {config.images!r}"
        raise InputError(f"count {count} is more than {given}: use {len(split.source)} or less")
    others, known = _labelled(config.labelled, split.source)
    found = _features(setting, split)
    labelled = found.values[np.isin(found.indices, known)]
    if others is not None:
        labelled = torch.cat([labelled, _features(setting, Split(others)).values])
    hashes = key_hashes(split.source)[found.indices]
    chosen = found.indices[choose(found.values, count, labelled, hashes, shown=True)]
    given = f"{len(found.indices)} images of {config.images!r}"
    if len(chosen) < count:
        if len(labelled) and not len(chosen):
            raise InputError(f"all {given} are labelled already, or nearly equal to labelled ones")
        unlabelled = " that are not labelled" if len(labelled) else ""
        what = f"the {len(chosen)} distinct ones{unlabelled} among the {given}"
        rule = f"near-duplicates count once: use --count {len(chosen)}"
        raise InputError(f"count {count} is more than {what}; {rule}")
    names = [split.source.name(index) for index in chosen]
    with (
        out_file(Path(config.out)) as path,
        # Names that are not UTF-8 are written as their bytes.
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = enumerate(names, 1)
        csv.writer(file).writerows([("path", "rank"), *((name, rank) for rank, name in rows)])
    _log.info("%s: %d of %s, from %s", config.out, count, given, setting.model.origin)
    if contact is not None:
        drawn = thumbnails(setting, split, chosen[:DRAWN], SIDE)
        with out_file(contact) as path:
            sheet(drawn, PER_ROW, gap=4).save(path, format="PNG")
        _log.info("%s: the first %d of them", contact, len(drawn))
    return names


def _labelled(labelled: str | None, source: Source) -> tuple[Source | None, Indices]:
    """Find the labelled images: those to read, and the positions of others in `source`.

    Raises:
        InputError: an image is missing, or there is none.
    """
    none = np.empty(0, np.int64)
    if labelled is None:
        return None, none
    if not labelled.lower().endswith(".csv"):
        return find_source(labelled, setting="labelled"), none
    listed = read_table(labelled).source
    there = np.array([os.path.exists(listed.path(row)) for row in range(len(listed))])
    absent = {listed.name(row) for row in np.flatnonzero(~there).tolist()}
    names = enumerate(map(source.name, range(len(source) if absent else 0)))
    known = {name: index for index, name in names if name in absent}
    if missing := sorted(absent - known.keys()):
        raise InputError(
            f"labelled {labelled!r} names {len(missing)} images that do not exist, the first is "
            f"{missing[0]!r}: paths are relative to {listed.roots[0]} or images, or absolute"
        )
    files = listed.select(np.flatnonzero(there)) if there.any() else None
    return files, np.array([*known.values()], np.int64)


def _features(setting: Setting[Backbone], split: Split) -> Features:
    """Return the features of the images.

    Raises:
        InputError: some are not finite.
    """
    found = extract(setting.model.encoder, setting.batches(split, "features"))
    finite = torch.cat([part.isfinite().all(1) for part in found.values.split(POOL)])
    if len(odd := np.flatnonzero(~finite.numpy())):
        raise InputError(
            f"{setting.model.origin}: the features of {len(odd)} images are not finite, the first "
            f"is {split.name(found.indices[odd[0]])!r}: give weights that have not diverged"
        )
    return found


def choose(
    features_NC: Tensor,
    count: int,
    labelled_MC: Tensor | None = None,
    hashes_N: npt.NDArray[np.uint64] | None = None,
    shown: bool = False,
) -> list[int]:
    """Return the positions of the images to label, best first.

    They are fewer than `count` if all others are near-duplicates of them or of labelled ones.

    Args:
        features_NC: finite, float32.
        count: how many to choose.
        labelled_MC: features of labelled images.
        hashes_N: of the images' names. In their order images are sampled and compared, so the
            choice does not depend on the order of the features. None keeps that order.
        shown: show a progress bar on terminals.
    """
    left = torch.arange(len(features_NC))
    if hashes_N is not None:
        left = torch.from_numpy(np.argsort(hashes_N, kind="stable"))
    mean_C, size = features_NC[left[:POOL]].double().mean(0).float(), max(POOL, 4 * count)
    taken = new = directions(features_NC[:0] if labelled_MC is None else labelled_MC, mean_C)
    chosen: list[int] = []
    while len(chosen) < count:
        near = [nearest(directions(features_NC[part], mean_C), new) for part in left.split(POOL)]
        left = left[torch.cat(near) < COPY]
        if not len(left):
            break
        pool = left[:size]
        unit = directions(features_NC[pool], mean_C)
        picks = _spread(unit, covers(nearest(unit, taken)), count - len(chosen), shown)
        chosen += pool[picks].tolist()
        new = unit[picks]
        taken = torch.cat([taken, new])
    return chosen


def directions(features_NC: Tensor, mean_C: Tensor) -> Tensor:
    """Return unit vectors (N, C + 1) whose products are the cosines of features minus their mean.

    The last number brings vectors that are too `SHORT` to have a direction to length 1: they all
    have cosine 1 with each other, and 0 with others.
    """
    centred = features_NC - mean_C
    shortest = max(SHORT * float(mean_C.norm()), 1e-30)
    centred /= centred.norm(dim=1, keepdim=True).clamp_min(shortest)
    missing = 1 - centred.square().sum(1, keepdim=True)
    return torch.cat([centred, missing.clamp_min(0).sqrt()], 1)


def nearest(unit_NC: Tensor, others_MC: Tensor) -> Tensor:
    """Return the largest cosine of each vector with one of the others (N,); -inf without others."""
    best = unit_NC.new_full((len(unit_NC),), -torch.inf)
    for some in filter(len, others_MC.split(_ROWS)):
        best = torch.maximum(best, (unit_NC @ some.T).amax(1))
    return best


def covers(cosines: Tensor) -> Tensor:
    """How well an image covers another, from 0 to 1."""
    return (cosines - 1).div_(WIDTH).exp_()


def _spread(unit_SC: Tensor, covered_S: Tensor, count: int, shown: bool) -> list[int]:
    """Choose images greedily by how much they raise the sum of what is covered.

    After each choice, only what images gain from those that are now covered better is computed
    again: about S / n of them for the n-th choice, so all choices together cost as much as
    ln(count) comparisons of all images with each other.

    Args:
        unit_SC: directions of the images.
        covered_S: how well each is covered before.
        count: how many to choose; fewer if only near-duplicates are left.
        shown: show a progress bar on terminals.
    """
    picks: list[int] = []
    everything = torch.arange(len(unit_SC))
    gains = _gains(unit_SC, everything, covered_S, torch.ones_like(covered_S))
    for _ in tracked(range(count), count, "choosing" if shown else None):
        best = int(gains.argmax())
        if gains[best] == -torch.inf:
            break
        picks.append(best)
        cosines = unit_SC @ unit_SC[best]
        better = torch.maximum(covered_S, covers(cosines))
        rows = (better > covered_S).nonzero().flatten()
        gains -= _gains(unit_SC, rows, covered_S, better)
        gains[cosines >= COPY] = gains[best] = -torch.inf
        covered_S = better
    return picks


def _gains(unit_SC: Tensor, rows: Tensor, low_S: Tensor, high_S: Tensor) -> Tensor:
    """Sums (S,), float64, over `rows` of how far each image raises what is covered from `low`,
    up to `high`."""
    total = torch.zeros(len(unit_SC), dtype=torch.float64)
    for some in rows.split(_ROWS):
        low, high = low_S[some, None], high_S[some, None]
        covered = covers(unit_SC[some] @ unit_SC.T)
        total += torch.clamp(covered, low, high, out=covered).sub_(low).sum(0)
    return total
