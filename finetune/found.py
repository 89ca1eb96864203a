"""Objects that a detector found: in the pixels of their image, as COCO's results, and measured.

What is found in an image is a dictionary of `boxes` (N, 4) float64, `labels` (N,) from 1, `scores`
(N,), all numpy, and with masks `masks`, a list of `Part`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from fcmae.data.objects import encode_part
from fcmae.data.rasters import Placement
from finetune.detector import MOST_FOUND

AGREE = 0.5
"""Two boxes of a class are one object if they share this part of the smaller one's area."""

CERTAIN = 0.5
"""Probability above which an object counts, where a run has chosen no threshold."""

NUMBERS = 65_535
"""Largest number of objects in a label image, which has 16 bits."""

Found = dict[str, Any]


class Part(NamedTuple):
    """A mask of which only a part (h, w) can be true: its place in the image, and the part."""

    left: int
    top: int
    mask: npt.NDArray[np.bool_]

    def within(self, array_HW: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the part of an array of the image's size that the mask is for, as a view."""
        h, w = self.mask.shape
        return array_HW[self.top : self.top + h, self.left : self.left + w]


def fitted(output: Mapping[str, Any], size: tuple[int, int]) -> Found:
    """Return what a model found, in the pixels of an image of another size (H, W).

    Args:
        output: of the model for one image, and `shape`, the (H, W) it was given.
        size: of the image that boxes and masks are for.
    """
    (h, w), (height, width) = output["shape"], size
    scale = torch.tensor([width / w, height / h] * 2)
    boxes = output["boxes"].float().cpu() * scale
    found: Found = {
        "boxes": boxes.double().numpy(),
        "labels": output["labels"].cpu().numpy(),
        "scores": output["scores"].float().cpu().numpy(),
    }
    if "masks" in output:
        masks = output["masks"].float().cpu()
        found["masks"] = [_pasted(mask, box, size) for mask, box in zip(masks, boxes, strict=True)]
    return found


def _pasted(mask_1hw: Tensor, box: Tensor, size: tuple[int, int]) -> Part:
    """A mask's probabilities enlarged to its box: the pixels whose centres have at least 1/2."""
    left, top = (max(0, math.floor(side)) for side in box[:2].tolist())
    right, bottom = (
        min(most, math.ceil(side)) for side, most in zip(box[2:].tolist(), size[::-1], strict=True)
    )
    # The centres of pixels, from -1 at the box's left and upper sides to 1 at the others.
    across, down = (
        2 * (torch.arange(first, last) + 0.5 - low) / (high - low).clamp(min=1e-3) - 1
        for first, last, low, high in ((left, right, box[0], box[2]), (top, bottom, box[1], box[3]))
    )
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
    enlarged = F.grid_sample(
        mask_1hw[None], grid[None], padding_mode="border", align_corners=False
    )[0, 0]
    inside = (grid.abs() <= 1).all(-1)
    return Part(left, top, ((enlarged >= 0.5) & inside).numpy())


def kept(found: Found, which: npt.NDArray[Any]) -> Found:
    """Return some of the objects, by their places or by a mask of them."""
    places = np.flatnonzero(which) if which.dtype == np.bool_ else which
    part = {name: found[name][places] for name in ("boxes", "labels", "scores")}
    if "masks" in found:
        part["masks"] = [found["masks"][place] for place in places.tolist()]
    return part


def certain(found: Found, thresholds: Sequence[float] | None) -> Found:
    """Return the objects with at least the score that their class needs."""
    least = np.array(thresholds)[found["labels"] - 1] if thresholds else CERTAIN
    return kept(found, found["scores"] >= least)


def merged(parts: Sequence[Found]) -> Found:
    """Join what was found in overlapping windows: an object that several saw counts once.

    From the highest score on, an object takes those of other windows that are of its class and
    share `AGREE` of the smaller box with it. It gets the box and the mask around all of them.

    Args:
        parts: of each window, in the pixels of the whole image.
    """
    window = np.repeat(np.arange(len(parts)), [len(part["scores"]) for part in parts])
    whole: Found = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("boxes", "labels", "scores")
    }
    if "masks" in parts[0]:
        whole["masks"] = [mask for part in parts for mask in part["masks"]]
    boxes, labels = whole["boxes"], whole["labels"]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    free, firsts = np.ones(len(labels), bool), []
    for first in np.argsort(-whole["scores"], kind="stable").tolist():
        if not free[first]:
            continue
        firsts.append(first)
        free[first] = False
        others = np.flatnonzero(free & (labels == labels[first]) & (window != window[first]))
        low = np.maximum(boxes[others, :2], boxes[first, :2])
        high = np.minimum(boxes[others, 2:], boxes[first, 2:])
        shared = (high - low).clip(0).prod(1)
        same = others[shared > AGREE * np.minimum(areas[others], areas[first])]
        if not len(same):
            continue
        free[same] = False
        group = [first, *same.tolist()]
        boxes[first] = [*boxes[group, :2].min(0), *boxes[group, 2:].max(0)]
        if "masks" in whole:
            whole["masks"][first] = _union([whole["masks"][n] for n in group])
    return kept(whole, np.array(firsts, np.int64))


def _union(masks: Sequence[Part]) -> Part:
    left, top = min(mask.left for mask in masks), min(mask.top for mask in masks)
    bottom = max(mask.top + mask.mask.shape[0] for mask in masks)
    right = max(mask.left + mask.mask.shape[1] for mask in masks)
    whole = np.zeros((bottom - top, right - left), bool)
    for mask in masks:
        mask._replace(left=mask.left - left, top=mask.top - top).within(whole)[mask.mask] = True
    return Part(left, top, whole)


def entries(found: Found, size: tuple[int, int], image: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return objects as entries of COCO's results.

    Args:
        found: in the pixels of the image.
        size: (H, W) of the image.
        image: keys that each entry gets, such as `image_id`.
    """
    result = []
    for n, box in enumerate(found["boxes"].tolist()):
        sides = [box[2] - box[0], box[3] - box[1]]
        entry = {
            **image, "category_id": int(found["labels"][n]), "bbox": [box[0], box[1], *sides],
            "score": float(found["scores"][n]),
        }  # fmt: skip
        if "masks" in found:
            left, top, mask = found["masks"][n]
            rle = encode_part(mask, left, top, size)
            entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
        result.append(entry)
    return result


def label_image(found: Found, size: tuple[int, int]) -> npt.NDArray[np.uint16]:
    """Return the number of the object at each pixel (H, W), from 1 by score, or 0.

    Where objects overlap, it is the one with the higher score. There are at most `NUMBERS`.
    """
    numbers = np.zeros(size, np.uint16)
    order = np.argsort(-found["scores"], kind="stable")[:NUMBERS]
    for number in range(len(order), 0, -1):
        part: Part = found["masks"][order[number - 1]]
        part.within(numbers)[part.mask] = number
    return numbers


def errors(found: Found, target: Mapping[str, Any]) -> float:
    """Return 1 - F1 of the objects with a score of at least `CERTAIN` in an image: matched to true
    ones of their class from the highest score on, at an IoU of the boxes of at least 0.5."""
    sure = certain(found, None)
    wanted = ~target["crowd"]
    boxes, labels = target["boxes"][wanted].astype(np.float64), target["labels"][wanted]
    if not len(boxes) + len(sure["labels"]):
        return 0.0
    ious = box_iou(*map(torch.from_numpy, (sure["boxes"], boxes))).numpy()
    ious[sure["labels"][:, None] != labels] = 0
    hits = 0
    for row in np.argsort(-sure["scores"], kind="stable"):
        if ious.shape[1] and ious[row].max() >= 0.5:
            ious[:, ious[row].argmax()] = 0
            hits += 1
    return 1 - 2 * hits / (len(boxes) + len(sure["labels"]))


class Precision(NamedTuple):
    """COCO's precision, -1 where it does not exist, and scores, at each (IoU, recall, class)."""

    precision: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def mean(self, iou: int | None = None, place: int | None = None) -> float | None:
        """Average precision in percent, perhaps at one IoU (0: 0.50, 5: 0.75) or of one class."""
        part = self.precision if iou is None else self.precision[[iou]]
        part = part if place is None else part[:, :, [place]]
        return 100 * float(part[part > -1].mean()) if (part > -1).any() else None

    def thresholds(self) -> list[float]:
        """The score of each class with the highest F1 at an IoU of 0.5."""
        recall = np.linspace(0, 1, self.precision.shape[1])[:, None]
        precision = self.precision[0].clip(0)
        f1 = 2 * precision * recall / (precision + recall).clip(1e-9)
        best, classes = f1.argmax(0), np.arange(f1.shape[1])
        chosen = np.where(f1[best, classes] > 0, self.scores[0, best, classes], CERTAIN)
        return [float(value) for value in chosen]


def average_precision(
    found: Sequence[Sequence[Mapping[str, Any]]],
    targets: Sequence[Mapping[str, Any]],
    classes: int,
    masks: bool,
) -> Precision:
    """Return COCO's precision of what was found in images, for up to 500 objects in each.

    Args:
        found: in each image, see `entries`.
        targets: see `ObjectLabels.cut`, of whole images, all numpy.
        classes: their number.
        masks: whether masks are compared, not boxes.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (target, part) in enumerate(zip(targets, found, strict=True), 1):
        height, width = target["size"][0].tolist()
        images.append({"id": number, "height": height, "width": width})
        results += [{**entry, "image_id": number} for entry in part]
        for n, box in enumerate(target["boxes"].tolist()):
            sides = [box[2] - box[0], box[3] - box[1]]
            item = {
                "id": len(objects) + 1, "image_id": number, "bbox": [box[0], box[1], *sides],
                "category_id": int(target["labels"][n]), "iscrowd": int(target["crowd"][n]),
                "area": sides[0] * sides[1],
            }  # fmt: skip
            if masks:
                item["segmentation"] = target["masks"][n]
            objects.append(item)
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    if not results:  # the library needs one
        there = np.bincount([n["category_id"] for n in objects if not n["iscrowd"]],
                            minlength=classes + 1)[1:] > 0  # fmt: skip
        empty = np.where(there, 0.0, -1.0) * np.ones((10, 101, 1))
        return Precision(empty, np.full_like(empty, CERTAIN))
    truth = COCO({"images": images, "annotations": objects, "categories": categories})
    judge = COCOeval_faster(
        truth, truth.loadRes(results), "segm" if masks else "bbox", print_function=_say_nothing
    )
    judge.params.maxDets = [1, 10, MOST_FOUND]
    judge.evaluate()
    judge.accumulate()
    return Precision(*(judge.eval[name][:, :, :, 0, -1] for name in ("precision", "scores")))


def _say_nothing(*_words: Any) -> None:
    pass


def features(found: Found, names: Sequence[str], where: Placement) -> dict[str, Any]:
    """Return objects as GeoJSON in the coordinates of a map: the outlines of their masks, or boxes.

    Args:
        found: in the pixels of the map.
        names: of the classes.
        where: the map is.
    """
    a, b, c, d, e, f = where.transform[:6]
    outlines = []
    if "masks" in found:
        from rasterio import Affine
        from rasterio.features import shapes

        for left, top, mask in found["masks"]:
            placed = Affine(a, b, a * left + b * top + c, d, e, d * left + e * top + f)
            parts = shapes(mask.astype(np.uint8), mask=mask, transform=placed)
            outlines.append([shape["coordinates"] for shape, _ in parts])
    else:
        for x1, y1, x2, y2 in found["boxes"].tolist():
            corners = (x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)
            outlines.append([[[(a * x + b * y + c, d * x + e * y + f) for x, y in corners]]])
    collection: dict[str, Any] = {"type": "FeatureCollection"}
    if where.crs:  # of GeoJSON 2008: GDAL and QGIS read it, RFC 7946 knows degrees alone
        named = {"name": where.crs.to_string()}
        collection["crs"] = {"type": "name", "properties": named}
    return {
        **collection,
        "features": [
            {
                "type": "Feature",
                "properties": {"class": names[label - 1], "score": score},
                "geometry": {"type": "MultiPolygon", "coordinates": outline},
            }
            for label, score, outline in zip(
                found["labels"].tolist(), found["scores"].tolist(), outlines, strict=True
            )
        ],
    }
