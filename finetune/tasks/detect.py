"""Objects: a box and a class of each, and perhaps a mask; average precision as COCO defines it."""

import csv
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from fcmae.atomic import check_out_file, out_file
from fcmae.data.augment import Geometry, jittered_geometry, scale_to
from fcmae.data.decode import read_image
from fcmae.data.evaluation import EvalDataset, View, WholeDataset
from fcmae.data.file_list import FileList
from fcmae.data.image import BadImage
from fcmae.data.labelled import TRAIN, LabelledData, Split
from fcmae.data.masks import voc_colours
from fcmae.data.object_files import (
    COCO,
    LABELS,
    Place,
    find_objects,
    find_place,
    has_polygons,
    image_ids,
    read_split,
    split_of,
)
from fcmae.data.objects import ObjectLabels, coco_masks, decode
from fcmae.data.rasters import placement_of
from fcmae.data.sample import Batch, each_target, map_tensors
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing, asked_reading
from fcmae.data.table import Table
from fcmae.train.processes import World
from finetune.augment import TrainDataset
from finetune.config import FinetuneConfig
from finetune.detector import Detector, start_detector
from finetune.figures import check_png_folder, save_labels
from finetune.found import (
    Found,
    Part,
    average_precision,
    certain,
    entries,
    errors,
    features,
    fitted,
    label_image,
    merged,
)
from finetune.model import Start
from finetune.tasks.base import Measurement, Writer
from finetune.tasks.features import OnFeatures
from finetune.tiling import starts
from sparse.errors import InputError

OVERLAP = 1 / 3
"""Part of a window's side that its neighbour shares: objects up to this size are whole in one."""

ANCHORS = (4, 8, 16, 32)
"""Sides in pixels that the smallest anchors can have by `anchor_size: auto`."""

SMALL_PART = 0.1
"""Part of the objects that may be smaller than the smallest anchors."""

LOOKED_AT = 100
"""Images whose objects are measured for `anchor_size: auto`."""

_log = logging.getLogger(__name__)


class ObjectDataset(TrainDataset):
    """Crops with their objects, at a random scale; small images are padded."""

    def geometry(self, epoch: int, index: int, size: tuple[int, int]) -> Geometry:
        augment, img_size = self.config.augment, self.images.img_size
        scale = scale_to(augment.short_side, size)
        return jittered_geometry(
            self.config.seed, epoch, index, size, img_size, augment, scale, augment.scale_jitter,
            pad=True,
        )  # fmt: skip


class ObjectMeasurement(Measurement):
    """COCO's average precision in percent, for up to 500 objects in an image. The loss of an image
    is 1 - F1 (`finetune.found.errors`).

    Args:
        kind: of the labels.
        world: see `LabelKind.measurement`.
        final: see there: the thresholds are given.
    """

    def __init__(self, kind: "Detect", world: World, final: bool) -> None:
        self.kind, self.state, self._world, self._final = kind, kind.state, world, final
        self._own: list[tuple[list[dict[str, Any]], Mapping[str, Any], float]] = []

    def update(self, outputs: Any, targets: Any) -> Tensor:
        losses = []
        for output, target in zip(outputs, each_target(targets), strict=True):
            plain = map_tensors(target, lambda value: value.cpu().numpy())
            size = tuple(plain["size"][0].tolist())
            found = fitted(output, size)
            losses.append(errors(found, plain))
            self._own.append((entries(found, size, {}), plain, losses[-1]))
        return torch.tensor(losses)

    def compute(self) -> dict[str, float]:
        parts = [part for own in self._world.gather(self._own) for part in own]
        found, losses = [part[0] for part in parts], [part[2] for part in parts]
        self.targets = [part[1] for part in parts]
        names, masks = self.kind.names, self.kind.masks
        self.box = average_precision(found, self.targets, len(names), masks=False)
        self.main = self.box
        if masks:
            self.main = average_precision(found, self.targets, len(names), masks=True)
        if not self._final:
            self.state = {**self.kind.state, "thresholds": self.main.thresholds()}
        scores = {name: value for name, value in self.total().items() if name != "n"}
        logged = {name: math.nan if value is None else value for name, value in scores.items()}
        return {**logged, "loss": float(np.mean(losses)) if losses else math.nan}

    def each(self) -> dict[str, dict[str, Any]]:
        """Scores of each class, `objects`, their number, and `n`, the images that have one."""
        result = {}
        for place, name in enumerate(self.kind.names):
            counts = [
                int(((target["labels"] == place + 1) & ~target["crowd"]).sum())
                for target in self.targets
            ]
            result[name] = {
                "ap": self.main.mean(place=place),
                "ap50": self.main.mean(0, place),
                "objects": sum(counts),
                "n": sum(count > 0 for count in counts),
            }
        return result

    def total(self) -> dict[str, Any]:
        scores: dict[str, Any] = {
            "ap": self.main.mean(), "ap50": self.main.mean(0), "ap75": self.main.mean(5)
        }  # fmt: skip
        box = {"box_ap": self.box.mean()} if self.kind.masks else {}
        return {**scores, **box, "n": len(self.targets)}

    def draw(self) -> Any:
        """Draw the precision of each class over its recall, at an IoU of 0.5."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="recall", ylabel="precision at IoU 0.5")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        for place, name in enumerate(self.kind.names[:10]):
            curve = self.main.precision[0, :, place]
            if (curve > -1).any():
                axes.plot(np.linspace(0, 1, len(curve)), curve, label=name.replace("$", r"\$"))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        return figure


def _resized(mask_HW: Any, size: tuple[int, int]) -> Any:
    """A mask of (width, height) pixels, the nearest of the given ones."""
    return np.asarray(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST)) > 0


class Detect(OnFeatures):
    """A box and a class for each object.

    The state has `head`, `anchor_size`, `short_side` and, chosen on val, `thresholds`: the score of
    each class from which on an object counts in pictures, label images and numbers of objects.
    """

    task = "detect"
    layout = "a COCO file, Pascal VOC's or YOLO's folders"
    heads = ("faster", "cascade")
    resolves = ("anchor_size",)
    score = "ap"
    tiles = True
    inside = Detector.inside
    masks = False

    config: FinetuneConfig

    def exported(self, model: nn.Module) -> nn.Module:
        raise InputError(
            f"task {self.task}: what a detector computes depends on what it finds, and can't be "
            "written as a graph: use `fcmae predict`, or export the weights that it started from"
        )

    @classmethod
    def recognises(cls, labels: Table | Path) -> bool:
        if not isinstance(labels, Path):
            return False
        place = find_place(labels, TRAIN) or find_place(labels, "")
        return place is not None and cls.suits(place)

    @classmethod
    def suits(cls, place: Place) -> bool:
        """Return whether labels of a format have what is learned."""
        return place.format != LABELS

    @classmethod
    def find_folder(cls, config: FinetuneConfig) -> LabelledData:
        return find_objects(config.data, config.val_fraction, config.max_bad, cls.masks, config.out)

    @classmethod
    def find_split(cls, folder: Path, split: str, names: Sequence[str]) -> Split:
        divided = find_place(folder, split) or find_place(folder, TRAIN)
        if divided is None and find_place(folder, "") is not None:
            _log.info("%s has no split %r: all of its images are measured", folder, split)
            split = ""
        return split_of(read_split(folder, split, tuple(names), cls.masks), folder)

    def prepare(self, config: FinetuneConfig, train: Any, device: torch.device) -> None:
        super().prepare(config, train, device)
        coco_masks()  # raises without the library
        if config.class_weights != "none":
            raise InputError(f"class_weights balanced is not for task {self.task}: use none")
        self.config = config
        anchor, short_side = config.anchor_size, config.augment.short_side
        self.state = {
            "head": self.heads[0] if config.head == "auto" else config.head,
            "short_side": short_side,
            "anchor_size": _anchor(train, config) if anchor == "auto" else anchor,
        }

    def build_model(
        self, start: Start, in_chans: int, img_size: tuple[int, int], drop_path: float = 0.0
    ) -> tuple[nn.Module, dict[str, Any]]:
        if start.whole and start.state is not None:
            width = start.state["pyramid.fpn.inner_blocks.0.0.weight"].shape[0]
        else:
            width = None
            if self.config.decoder_channels != "auto":
                width = self.config.decoder_channels
        return start_detector(
            start, in_chans, len(self.names), self.state["head"], self.masks, width,
            self.state["anchor_size"], drop_path,
        )  # fmt: skip

    def train_dataset(
        self, split: Split, images: Preprocessing, config: FinetuneConfig
    ) -> TrainDataset:
        return ObjectDataset(split, images, config)

    def eval_dataset(self, split: Split, images: Preprocessing, max_pixels: int) -> EvalDataset:
        short_side = self.state.get("short_side")
        return WholeDataset(split, images, max_pixels, short_side, covers=False)

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Any) -> Tensor:
        """Losses of the proposals and of the heads. torchvision draws a sample of both from torch's
        stream, which the loop seeds at each step."""
        return forward(images_BCHW, [*each_target(targets)])

    def infer(self, model: Callable[[Tensor], Any], images_BCHW: Tensor, how: Any) -> Any:
        """What the model finds in each image, see `Detector`, and the `shape` that it was given."""
        return [{**found, "shape": images_BCHW.shape[2:]} for found in model(images_BCHW)]

    def measurement(self, world: World, final: bool = False) -> ObjectMeasurement:
        coco_masks()
        return ObjectMeasurement(self, world, final)

    def chance(self, scores: Sequence[Mapping[str, float]], val: Any) -> str | None:
        best = max((score["ap50"] for score in scores if score["ap50"] > 0), default=0.0)
        return None if best else "no object has been found: AP is 0"

    # Predictions

    def to_show(self, output: Any) -> Any:
        return map_tensors(output, Tensor.cpu)

    def show(
        self, image: Image.Image, output: Any, target: Any
    ) -> tuple[list[Image.Image], str, str]:
        size = image.height, image.width
        height, width = target["size"][0].tolist()
        guess = certain(fitted(output, size), self.state.get("thresholds"))
        wanted = ~target["crowd"]
        scale = np.array([image.width / width, image.height / height] * 2)
        truth: Found = {
            "boxes": target["boxes"][wanted] * scale,
            "labels": target["labels"][wanted],
            "scores": np.ones(int(wanted.sum())),
        }
        if "masks" in target:
            truth["masks"] = [
                Part(0, 0, _resized(decode(target["masks"][n]), image.size))
                for n in np.flatnonzero(wanted).tolist()
            ]
        counts = [f"{len(part['labels'])} objects" for part in (truth, guess)]
        return [self.overlay(image, truth), self._drawn(image, guess)], *counts  # type: ignore[return-value]

    def overlay(self, image: Image.Image, prediction: Found) -> Image.Image:
        """Return an RGB image with the boxes, or the masks, of those that are certain."""
        return self._drawn(image, certain(prediction, self.state.get("thresholds")))

    def _drawn(self, image: Image.Image, found: Found) -> Image.Image:
        drawn = image.convert("RGB")
        colours = voc_colours(256)
        if "masks" in found:
            pixels = np.array(drawn)
            for number, part in enumerate(found["masks"]):
                inside = part.within(pixels)
                colour = colours[1 + number % 255].astype(np.uint16)
                inside[part.mask] = (inside[part.mask] + colour) // 2
            drawn = Image.fromarray(pixels)
        pen, line = ImageDraw.Draw(drawn), max(1, min(image.size) // 250)
        for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            colour = tuple(colours[1 + (label - 1) % 255].tolist())
            if "masks" not in found:
                pen.rectangle(box, outline=colour, width=line)
            if len(self.names) > 1 and box[2] - box[0] >= 24:
                pen.text((box[0] + line + 1, box[1] + line), self.names[label - 1], colour)
        return drawn

    def predictions(
        self,
        model: Callable[[Tensor], Any],
        batch: Batch,
        images_BCHW: Tensor,
        how: Preprocessing,
    ) -> list[Found]:
        """What is found, in the pixels of the images as they are."""
        (geometry,) = batch.geometry
        assert geometry is not None
        (output,) = self.infer(model, images_BCHW, how)
        return [fitted(output, geometry.size[::-1])]

    def tiled(self, model: nn.Module, view: View, tile: int) -> Found:
        """As `predictions`, in windows: see `finetune.found.merged`."""
        device = next(model.parameters()).device
        height, width = sides = [min(length, tile) for length in view.size]
        tops, lefts = (
            starts(length, side, OVERLAP) for length, side in zip(view.size, sides, strict=True)
        )
        parts = []
        for top in tops:
            for left in lefts:
                window, _ = view.prepared(top, left, height, width, device)
                (output,) = self.infer(model, window, view.how)
                shift = torch.tensor([left, top] * 2, dtype=torch.float32)
                output |= {"boxes": output["boxes"].float().cpu() + shift, "shape": view.size}
                parts.append(fitted(output, view.geometry.size[::-1]))
        return merged(parts)

    def check_out(self, out: str) -> Path:
        coco_masks()
        return check_out_file(out, ".json")

    @contextmanager
    def writing(self, out: Path, source: Source, top: int) -> Iterator[Writer]:
        """Write COCO's results, as one JSON file; `X.counts.csv` beside it, the number of certain
        objects of each class; if there are masks `X.instances`, a folder of label images; and of
        maps `X.geojson`, a folder of their certain objects in their coordinates."""
        folder, geojson = out.with_suffix(".instances"), out.with_suffix(".geojson")
        check_png_folder(folder, source, names=self.masks)
        ids = image_ids(source.roots[0]) if isinstance(source, FileList) else {}
        first = 1 + max(ids.values(), default=-1)  # of images that the file does not list
        with (
            out_file(out) as results_path,
            results_path.open("w", encoding="utf-8") as results,
            out_file(out.with_suffix(".counts.csv")) as counts_path,
            counts_path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as counts,
        ):
            table = csv.writer(counts)
            table.writerow(["path", *self.names])
            before = "["

            def write(paths: Sequence[str], batch: Batch, outputs: Sequence[Found]) -> None:
                nonlocal before
                for path, index, found, cut in zip(
                    paths, batch.indices.tolist(), outputs, batch.geometry, strict=True
                ):
                    assert cut is not None
                    key, size = source.key(index), cut.size[::-1]
                    number = ids.get(key, first + index if ids else index)
                    image = {"image_id": number, "file_name": source.name(index)}
                    for entry in entries(found, size, image):
                        results.write(before + json.dumps(entry))
                        before = ",\n"
                    sure = certain(found, self.state.get("thresholds"))
                    numbers = np.bincount(sure["labels"], minlength=len(self.names) + 1)[1:]
                    table.writerow([path, *numbers.tolist()])
                    if self.masks:
                        save_labels(label_image(sure, size), folder, source, index)
                    if (where := placement_of(source.open(index))) is not None:
                        objects = features(sure, self.names, where)
                        name = os.fsdecode(key).lstrip("/") + ".geojson"
                        with out_file(geojson / name) as file:
                            file.write_text(json.dumps(objects), encoding="utf-8")

            yield write
            results.write("]\n" if before != "[" else "[]\n")


class Instances(Detect):
    """A mask and a class for each object."""

    task = "instances"
    layout = "a COCO file with masks, or train/images and train/instances"
    heads = ("mask", "cascade")
    masks = True

    @classmethod
    def suits(cls, place: Place) -> bool:
        return place.format == LABELS or (place.format == COCO and has_polygons(place.labels))


def _anchor(labels: ObjectLabels, config: FinetuneConfig) -> int:
    """The largest of `ANCHORS` that at most a tenth of the objects are smaller than."""
    sizes: list[float] = []
    for index in np.unique(np.linspace(0, len(labels) - 1, LOOKED_AT, dtype=int)).tolist():
        try:
            size = read_image(labels.files.open(index), asked_reading(config)).size
            there = labels.cut(index, Geometry(size, (0, 0, *size)), None)
        except BadImage:
            continue  # training reports it
        boxes = there["boxes"][~there["crowd"]] * scale_to(config.augment.short_side, size)
        sides = boxes[:, 2:] - boxes[:, :2]
        sizes += np.sqrt(sides.prod(1)).tolist()
    small = float(np.quantile(sizes, SMALL_PART)) if sizes else ANCHORS[-1]
    chosen = max((side for side in ANCHORS if side <= small), default=ANCHORS[0])
    _log.info("anchors from %d pixels: a tenth of the objects are smaller than %.0f", chosen, small)
    return chosen
