"""Objects in images: a box, a class and perhaps a mask of each.

Boxes are left, top, right and bottom in pixels: the pixel (x, y) covers x to x + 1 and y to y + 1,
so a box of a whole image is (0, 0, width, height).
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from fcmae.data.augment import Geometry
from fcmae.data.file_list import FileList
from fcmae.data.image import BadImage
from fcmae.data.masks import mask_numbers, stem
from fcmae.data.sources import Indices
from sparse.errors import InputError

Boxes = npt.NDArray[np.float64]
Rle = dict[str, Any]
"""A mask in COCO's run-length encoding: `size` (height, width), and `counts`, compressed bytes."""

_STORED = (
    "sizes", "starts", "boxes", "classes", "crowd", "shapes", "shape_starts", "folder",
    "relative", "has_masks",
)  # fmt: skip

PLAIN = ("boxes", "labels")
"""What a crop has of objects without masks."""

LEAST_SIDE = 1.0
"""Objects of which a crop shows less than this many pixels, across or down, are not learned."""


@dataclass(frozen=True)
class ObjectLabels:
    """The objects of images, one after the other in the order of the images.

    Args:
        files: the images.
        names: the classes.
        sizes: (width, height) that each image has according to its labels; 0 where they don't say.
        starts: where the objects of each image begin, and where the last ones end.
        boxes: (N, 4), in pixels, or in shares of the image's sides if `relative`.
        classes: (N,) from 0.
        crowd: (N,) whether it is a group of objects, or a difficult one, which is neither learned
            nor counted as missed.
        shapes: masks as the JSON of COCO's segmentations, end to end.
        shape_starts: where they begin and end; all 0 without masks.
        folder: label images, with a number for each object: all else is read from them; or ''.
        relative: see `boxes`.
        has_masks: whether masks are wanted and there.
        faults: (image, what is wrong) of objects that were changed or left out.
    """

    files: FileList
    names: tuple[str, ...]
    sizes: Indices
    starts: Indices
    boxes: Boxes
    classes: Indices
    crowd: npt.NDArray[np.bool_]
    shapes: npt.NDArray[np.uint8]
    shape_starts: Indices
    folder: str = ""
    relative: bool = False
    has_masks: bool = False
    faults: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def select(self, part: Indices) -> "ObjectLabels":
        """Return some of the images with their objects."""
        lengths = np.diff(self.starts)[part]
        names = {self.files.name(index) for index in part.tolist()}
        starts = np.concatenate([[0], np.cumsum(lengths)])
        kept = np.repeat(self.starts[part] - starts[:-1], lengths) + np.arange(starts[-1])
        shapes = [self._shape(int(place)) for place in kept]
        blob, shape_starts = joined(shapes)
        return replace(
            self, files=self.files.select(part), sizes=self.sizes[part],
            starts=starts, boxes=self.boxes[kept], classes=self.classes[kept],
            crowd=self.crowd[kept], shapes=blob, shape_starts=shape_starts,
            faults=tuple(fault for fault in self.faults if fault[0] in names),
        )  # fmt: skip

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything but the images and faults, to be stored; see `stored`."""
        return {name: np.asarray(getattr(self, name)) for name in _STORED}

    @classmethod
    def stored(cls, files: FileList, names: tuple[str, ...], arrays: Any) -> "ObjectLabels":
        """Return labels from `arrays`.

        Raises:
            KeyError, ValueError: they are not complete.
        """
        parts = {name: arrays[name] for name in _STORED}
        parts |= {name: bool(parts[name]) for name in ("relative", "has_masks")}
        found = cls(files, names, **parts | {"folder": str(parts["folder"])})
        places = len(found.boxes), len(found.classes), len(found.crowd), int(found.starts[-1])
        if len(found.starts) != len(files) + 1 or len({*places}) > 1:
            raise ValueError("its parts do not fit together")
        return found

    def cut(
        self, index: int, geometry: Geometry, img_size: tuple[int, int] | None
    ) -> dict[str, Any]:
        """Return the objects of an image: `boxes` (N, 4) float32 and `labels` (N,) from 1.

        Args:
            index: of the image.
            geometry: how a crop was cut.
            img_size: (H, W) of the crop after it was resized: objects are clipped to it, and crowds
                left out. With masks, `masks` (N, H, W) has them, and boxes enclose them. None
                leaves the image whole: `crowd` (N,) bool, `size` (1, 2), which are (H, W), and
                `masks` as `Rle`s.

        Raises:
            BadImage: the image has another size than its labels say, or its label image can't be
                read.
        """
        wanted = tuple(self.sizes[index].tolist())
        if any(wanted) and wanted != geometry.size:
            sides = [f"{w}×{h}" for w, h in (wanted, geometry.size)]
            raise BadImage(f"the labels are for {sides[0]} pixels, the image has {sides[1]}")
        if self.folder:
            numbers = self._numbers(index, geometry.size)
            if img_size is not None:
                found = _cropped(moved(numbers, geometry, img_size))
                return found if self.has_masks else {key: found[key] for key in PLAIN}
            boxes = enclosing(numbers)
            masks = [*_rles_of(numbers, boxes)] if self.has_masks else []
            classes, crowd = np.zeros(len(boxes), np.int64), np.zeros(len(boxes), bool)
        else:
            here = slice(int(self.starts[index]), int(self.starts[index + 1]))
            boxes, classes, crowd = self.boxes[here], self.classes[here], self.crowd[here]
            if self.relative:
                boxes = boxes * np.array(geometry.size * 2)
            if img_size is not None:
                return self._shown(here, boxes, classes, crowd, geometry, img_size)
            masks = []
            if self.has_masks:
                masks = [self._rle(place, geometry.size) for place in range(here.start, here.stop)]
        size = np.array([geometry.size[::-1]])
        whole: dict[str, Any] = {"boxes": boxes.astype(np.float32), "labels": classes + 1}
        whole |= {"crowd": crowd, "size": size}
        return whole | ({"masks": masks} if self.has_masks else {})

    def _shown(
        self,
        here: slice,
        boxes: Boxes,
        classes: Indices,
        crowd: npt.NDArray[np.bool_],
        geometry: Geometry,
        img_size: tuple[int, int],
    ) -> dict[str, Any]:
        """The objects that a crop shows; see `cut`."""
        boxes = moved_boxes(boxes, geometry, img_size)
        sides = boxes[:, 2:] - boxes[:, :2]
        kept = np.flatnonzero((sides >= LEAST_SIDE).all(1) & ~crowd)
        if not self.has_masks:
            return {"boxes": boxes[kept].astype(np.float32), "labels": classes[kept] + 1}
        masks = np.zeros((len(kept), *img_size), np.uint8)
        for place, n in enumerate(kept.tolist()):
            rle = self._rle(here.start + n, geometry.size)
            masks[place] = moved(decode(rle), geometry, img_size)
        return _seen(masks, classes[kept])

    def _numbers(self, index: int, size: tuple[int, int]) -> npt.NDArray[Any]:
        numbers = mask_numbers(self.label_image(index))
        if numbers.shape[::-1] != size:
            sides = [f"{w}×{h}" for w, h in (numbers.shape[::-1], size)]
            raise BadImage(f"the label image has {sides[0]} pixels, its image {sides[1]}")
        return numbers

    def label_image(self, index: int) -> bytes:
        """Return the path of an image's label image."""
        return os.path.join(os.fsencode(self.folder), stem(self.files.key(index)) + b".png")

    def _shape(self, place: int) -> bytes:
        return self.shapes[self.shape_starts[place] : self.shape_starts[place + 1]].tobytes()

    def _rle(self, place: int, size: tuple[int, int]) -> Rle:
        rle = encode_shape(json.loads(self._shape(place)), size)
        if tuple(rle["size"]) != size[::-1]:
            raise BadImage(f"a mask is for {rle['size'][1]}×{rle['size'][0]} pixels, not its image")
        return rle


def joined(parts: Iterable[bytes]) -> tuple[npt.NDArray[np.uint8], Indices]:
    """Return byte strings end to end, and where they begin and end."""
    kept = list(parts)
    starts = np.cumsum([0, *map(len, kept)])
    return np.frombuffer(b"".join(kept), np.uint8), starts


def moved(
    numbers_HW: npt.NDArray[Any], geometry: Geometry, img_size: tuple[int, int]
) -> npt.NDArray[Any]:
    """Return the numbers of pixels, cut, resized to the nearest, flipped and padded with 0 as an
    image was."""
    left, top, width, height = geometry.box
    crop = torch.from_numpy(
        numbers_HW[top : top + height, left : left + width].astype(np.float32)
    )  # exact: numbers have at most 16 bits
    shape = geometry.shape or img_size
    resized = F.interpolate(crop[None, None], size=shape, mode="nearest-exact")[0, 0].numpy()
    down, across = (-1 if flip else 1 for flip in (geometry.flip_v, geometry.flip_h))
    canvas = np.zeros(img_size, numbers_HW.dtype)
    canvas[: shape[0], : shape[1]] = resized[::down, ::across]
    return canvas


def moved_boxes(boxes: Boxes, geometry: Geometry, img_size: tuple[int, int]) -> Boxes:
    """Return boxes (N, 4) cut, resized and flipped as an image was: clipped to the crop."""
    left, top, width, height = geometry.box
    h, w = geometry.shape or img_size
    sides = np.array([width, height, width, height], np.float64)
    cut = np.clip(boxes - [left, top, left, top], 0, sides) * (np.array([w, h, w, h]) / sides)
    if geometry.flip_h:
        cut[:, [0, 2]] = w - cut[:, [2, 0]]
    if geometry.flip_v:
        cut[:, [1, 3]] = h - cut[:, [3, 1]]
    return cut


def enclosing(numbers_HW: npt.NDArray[Any]) -> Boxes:
    """Return the boxes of the numbers above 0 in a label image, in their order."""
    down, across = np.nonzero(numbers_HW)
    order = np.argsort(numbers_HW[down, across], kind="stable")
    down, across = down[order], across[order]
    _, first = np.unique(numbers_HW[down, across], return_index=True)
    if not len(first):
        return np.zeros((0, 4))
    lows = [np.minimum.reduceat(places, first) for places in (across, down)]
    highs = [np.maximum.reduceat(places, first) + 1 for places in (across, down)]
    return np.stack([*lows, *highs], 1).astype(np.float64)


def _cropped(numbers_HW: npt.NDArray[Any]) -> dict[str, Any]:
    """The objects of a label image's crop, of one class."""
    there = np.unique(numbers_HW[numbers_HW > 0])
    masks: npt.NDArray[Any] = np.equal(numbers_HW, there[:, None, None])
    return _seen(masks.astype(np.uint8), np.zeros(len(there), np.int64))


def _seen(masks_NHW: npt.NDArray[np.uint8], classes: Indices) -> dict[str, Any]:
    """What `cut` returns of masks in a crop: those with a pixel, and the boxes around them."""
    across, down = (np.asarray(masks_NHW.any(axis=side)) for side in (1, 2))
    lows = [side.argmax(1) for side in (across, down)]
    highs = [side.shape[1] - side[:, ::-1].argmax(1) for side in (across, down)]
    boxes, kept = np.stack([*lows, *highs], 1).astype(np.float32), across.any(1)
    return {"boxes": boxes[kept], "labels": classes[kept] + 1, "masks": masks_NHW[kept]}


# Run-length encoding


def coco_masks() -> Any:
    """Return the functions of faster-coco-eval on masks.

    Raises:
        InputError: it is not installed.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise InputError(
            "boxes and objects need faster-coco-eval: pip install 'fcmae[detect]'"
        ) from error
    return mask


def encode_shape(shape: Any, size: tuple[int, int]) -> Rle:
    """Return a segmentation of a COCO file, polygons or run lengths, as `Rle`.

    Args:
        shape: as JSON has it.
        size: (width, height) of the image.
    """
    width, height = size
    masks = coco_masks()
    if isinstance(shape, list):
        return masks.merge(masks.frPyObjects(shape, height, width))
    if isinstance(shape["counts"], list):
        return masks.frPyObjects(shape, height, width)
    return {"size": list(shape["size"]), "counts": shape["counts"].encode()}


def decode(rle: Rle) -> npt.NDArray[np.uint8]:
    """Return a mask (H, W) of 0 and 1."""
    return coco_masks().decode(rle)


def encode_part(mask_hw: npt.NDArray[Any], left: int, top: int, size: tuple[int, int]) -> Rle:
    """Encode a mask of which only a part (h, w) at (left, top) can be above 0.

    Args:
        mask_hw: the part.
        left, top: its place.
        size: (height, width) of the whole mask.
    """
    height, width = size
    # COCO counts down the columns; runs are where the positions of set pixels are interrupted.
    across, down = np.nonzero(mask_hw.T)
    places = (left + across) * height + top + down
    breaks = np.flatnonzero(np.diff(places) != 1)
    firsts = places[np.concatenate([[0], breaks + 1])] if len(places) else places
    lasts = places[np.concatenate([breaks, [len(places) - 1]])] if len(places) else places
    edges = np.stack([firsts, lasts + 1], 1).ravel()
    counts = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
    whole = {"size": [height, width], "counts": counts if counts[-1] else counts[:-1]}
    return coco_masks().frPyObjects(whole, height, width)


def _rles_of(numbers_HW: npt.NDArray[Any], boxes: Boxes) -> Iterable[Rle]:
    """The mask of each number above 0 in a label image, whose boxes are given."""
    size = numbers_HW.shape[0], numbers_HW.shape[1]
    numbers = np.unique(numbers_HW[numbers_HW > 0])
    for number, box in zip(numbers, boxes, strict=True):
        left, top, right, bottom = map(int, box)
        yield encode_part(numbers_HW[top:bottom, left:right] == number, left, top, size)
