"""A class for each pixel: cross-entropy and Dice, mean intersection over union."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from fcmae.atomic import check_out_folder
from fcmae.data.augment import Geometry, jittered_geometry, scale_to
from fcmae.data.evaluation import EvalDataset, View, WholeDataset
from fcmae.data.file_list import FileList
from fcmae.data.labelled import TRAIN, VAL, LabelledData, Split
from fcmae.data.masks import (
    IGNORE,
    Mask,
    MaskLabels,
    find_layout,
    find_masks,
    find_pairs,
    voc_colours,
)
from fcmae.data.resize import Valid
from fcmae.data.sample import Batch
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing
from fcmae.data.table import Table
from fcmae.train.processes import World
from finetune.augment import TrainDataset
from finetune.config import FinetuneConfig
from finetune.figures import check_png_folder, save_labels, scratch
from finetune.model import Start
from finetune.segmenter import Segmenter, start_segmenter
from finetune.tasks.base import (
    Measurement,
    Writer,
    confusion_rows,
    draw_confusion,
    mean_of,
)
from finetune.tasks.features import OnFeatures
from finetune.tiling import blended
from sparse.errors import InputError

OVERLAP = 1 / 3
"""Part of a window's side that its neighbour shares, as in the papers' tests: 341 of 512 pixels are
the step."""

WHOLE = 2
"""Images with sides up to this many times those of the crops in training are computed whole."""

COUNTED = 1000
"""Largest number of masks whose pixels are counted for class weights."""

SMALLEST = 1e-30
"""Least probability of a class in blended windows, for its logarithm to be finite."""

SCORES = ("miou", "accuracy")

_log = logging.getLogger(__name__)


class MaskMeasurement(Measurement):
    """Intersection over union and accuracy of pixels in percent, and mean cross-entropy.

    Pixels of class `IGNORE` do not count. `miou` is the mean over classes that are in a mask or a
    prediction.

    Args:
        names: the classes.
        world: see `LabelKind.measurement`.
        state: see `LabelKind`.
    """

    def __init__(self, names: Sequence[str], world: World, state: Mapping[str, Any]) -> None:
        self.names, self.state, self._world, self._images = names, state, world, 0
        self._present = torch.zeros(len(names), dtype=torch.int64, device=world.device)
        counts = MulticlassConfusionMatrix(len(names), ignore_index=IGNORE, validate_args=False)
        self._counts = counts.to(world.device)
        self._loss = MeanMetric(nan_strategy="disable").to(world.device)

    def update(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Add a batch: outputs are enlarged to the targets' size (bilinear)."""
        outputs, targets = resized(outputs.float(), targets.shape[1:]), targets.long()
        guesses = outputs.argmax(1)
        self._counts.update(guesses, targets)
        guesses = guesses.masked_fill(targets == IGNORE, IGNORE)
        seen = torch.zeros(len(targets), IGNORE + 1, dtype=torch.bool, device=targets.device)
        seen.scatter_(1, torch.cat([guesses, targets], 1).flatten(1), True)
        self._present += seen[:, : len(self.names)].sum(0)
        pixels = F.cross_entropy(outputs, targets, ignore_index=IGNORE, reduction="none")
        losses = pixels.mean((1, 2))
        self._loss.update(losses)
        self._images += len(targets)
        return losses

    def compute(self) -> dict[str, float]:
        self.confusion = self._counts.compute().cpu().numpy()
        self.images = sum(self._world.gather(self._images))
        self.present = sum(self._world.gather(self._present.cpu().numpy()))
        total = self.total()
        scores = {name: math.nan if total[name] is None else total[name] for name in SCORES}
        return {**scores, "loss": float(self._loss.compute())}

    def each(self) -> dict[str, dict[str, Any]]:
        """Scores of each class, and `n`, the images with it in their mask or prediction."""
        hits, true = self.confusion.diagonal(), self.confusion.sum(axis=1)
        union = true + self.confusion.sum(axis=0) - hits
        return {
            name: {
                "iou": 100 * int(hits[k]) / int(union[k]) if union[k] else None,
                "accuracy": 100 * int(hits[k]) / int(true[k]) if true[k] else None,
                "n": int(self.present[k]),
            }
            for k, name in enumerate(self.names)
        }

    def total(self) -> dict[str, Any]:
        pixels = int(self.confusion.sum())
        return {
            "miou": mean_of([scores["iou"] for scores in self.each().values()]),
            "accuracy": 100 * int(self.confusion.trace()) / pixels if pixels else None,
            "n": self.images,
        }

    def rows(self) -> list[list[Any]]:
        return confusion_rows(self.confusion, self.names)

    def draw(self) -> Any:
        """Draw the share of each class's pixels that is predicted as each class, in percent."""
        return draw_confusion(self.confusion, self.names)


def resized(outputs: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps (B, K, …) of another size (H, W), bilinear."""
    if outputs.shape[2:] == tuple(size):
        return outputs
    return F.interpolate(outputs, size=tuple(size), mode="bilinear", align_corners=False)


class MaskDataset(TrainDataset):
    """Crops with their masks, at a random scale: see `jittered_geometry`."""

    def geometry(self, epoch: int, index: int, size: tuple[int, int]) -> Geometry:
        augment, img_size = self.config.augment, self.images.img_size
        scale = scale_to(augment.short_side, size)
        return jittered_geometry(
            self.config.seed, epoch, index, size, img_size, augment, scale, augment.scale_jitter
        )


class Segment(OnFeatures):
    """A class for each pixel. The state has `short_side`; see `WholeDataset`."""

    task = "segment"
    any_size = False  # the decoder's pooling is traced for one size
    layout = "train/images and train/masks, or train/instances; or ADE20K's folders"
    heads = ("upernet",)
    score = "miou"
    tiles = True
    inside = Segmenter.inside

    config: FinetuneConfig
    _weights: Tensor | None = None

    @classmethod
    def recognises(cls, labels: Table | Path) -> bool:
        return isinstance(labels, Path) and find_layout(labels) is not None

    @classmethod
    def find_folder(cls, config: FinetuneConfig) -> LabelledData:
        return find_masks(config.data, config.val_fraction, config.out)

    @classmethod
    def find_split(cls, folder: Path, split: str, names: Sequence[str]) -> Split:
        layout = find_layout(folder)
        if layout is None:
            raise cls.not_labels(folder)
        own = dict(zip((TRAIN, VAL), layout.splits, strict=True)).get(split, split)
        if not layout.exists(folder, own):
            if layout.inside or not layout.exists(folder, ""):
                images, masks = layout.folders(folder, own)
                raise InputError(f"{images} and {masks} are missing: give another --split")
            _log.info("%s has no folder %r: all of its images are measured", folder, own)
            own = ""
        return find_pairs(folder, layout, own, names)

    @classmethod
    def labels_of(cls, files: Source, names: Sequence[str]) -> Any:
        """Masks beside the images of a stored list, whose root is a folder of images."""
        assert isinstance(files, FileList)
        (images,) = map(Path, files.roots)
        for root in (images.parent.parent, images.parent):
            layout = find_layout(root)
            if layout is None:
                continue
            for split in (*layout.splits, ""):
                place, masks = layout.folders(root, split)
                if place.resolve() == images.resolve() and masks.is_dir():
                    return MaskLabels(files, masks, layout, len(names))
        raise InputError(f"the masks of {images} are missing: restore them")

    def prepare(self, config: FinetuneConfig, train: Any, device: torch.device) -> None:
        super().prepare(config, train, device)
        self.config, self.state = config, {"short_side": config.augment.short_side}
        if config.class_weights == "balanced":
            counts = train.counts(COUNTED)
            fewest = counts[counts > 0].min()  # also of a class that the counted masks lack
            weights = counts.sum() / (len(counts) * np.maximum(counts, fewest))
            self._weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def build_model(
        self, start: Start, in_chans: int, img_size: tuple[int, int], drop_path: float = 0.0
    ) -> tuple[nn.Module, dict[str, Any]]:
        width = None
        if start.whole and start.state is not None:
            with_aux = any(name.startswith("aux.") for name in start.state)
            width = start.state["net.segmentation_head.0.weight"].shape[1]
        else:
            with_aux = self.config.aux_weight > 0
            if self.config.decoder_channels != "auto":
                width = self.config.decoder_channels
        return start_segmenter(start, in_chans, len(self.names), width, with_aux, drop_path)

    def train_dataset(
        self, split: Split, images: Preprocessing, config: FinetuneConfig
    ) -> TrainDataset:
        return MaskDataset(split, images, config)

    def eval_dataset(self, split: Split, images: Preprocessing, max_pixels: int) -> EvalDataset:
        short_side = self.state.get("short_side")
        return WholeDataset(split, images, max_pixels, short_side)

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of both heads and Dice loss.

        Cross-entropy is divided by the number of all pixels, ignored ones included, as in the
        papers' code: so parts of the same size count the same.
        """
        from segmentation_models_pytorch.losses import DiceLoss

        scores, aux = forward(images_BCHW)
        scores, wanted, config = scores.float(), targets.long(), self.config
        total = self._cross_entropy(scores, wanted)
        if aux is not None:
            total = total + config.aux_weight * self._cross_entropy(aux.float(), wanted)
        if config.dice_weight:
            dice = DiceLoss("multiclass", ignore_index=IGNORE)
            total = total + config.dice_weight * dice(scores, wanted)
        return total

    def _cross_entropy(self, scores: Tensor, wanted: Tensor) -> Tensor:
        summed = F.cross_entropy(
            scores, wanted, self._weights, ignore_index=IGNORE, reduction="sum"
        )
        return summed / wanted.numel()

    def infer(self, model: Callable[[Tensor], Tensor], images_BCHW: Tensor, how: Any) -> Tensor:
        """Scores (B, K, H, W); of large images log-probabilities, blended from windows."""
        sides = zip(images_BCHW.shape[2:], how.img_size, strict=True)
        if all(side <= WHOLE * most for side, most in sides):
            return model(images_BCHW)
        strips = self._strips(model, images_BCHW, how.img_size)
        return torch.cat([*strips], dim=1)[None].clamp_min(SMALLEST).log()

    def _strips(
        self, model: Callable[[Tensor], Tensor], images_1CHW: Tensor, window: tuple[int, int]
    ) -> Iterator[Tensor]:
        """Yield the probabilities of an image in strips (K, rows, W)."""

        def scores(top: int, left: int, h: int, w: int) -> Tensor:
            return model(images_1CHW[:, :, top : top + h, left : left + w])[0].float().softmax(0)

        height, width = images_1CHW.shape[2:]
        return blended(scores, (height, width), window, OVERLAP)

    def measurement(self, world: World, final: bool = False) -> MaskMeasurement:
        return MaskMeasurement(self.names, world, self.state)

    def chance(self, scores: Sequence[Mapping[str, float]], val: Any) -> str | None:
        """One class everywhere has its share of the pixels as IoU, and 0 for the others."""
        best = max(score["miou"] for score in scores)
        if best > 100 / len(self.names):
            return None
        counts = val.counts(COUNTED)
        constant = 100 * counts.max() / (counts.sum() * (counts > 0).sum())
        if best > constant:
            return None
        return f"mean IoU is {best:.1f} %, that of one class for all pixels {constant:.1f} %"

    # Predictions

    def to_show(self, output: Tensor) -> Tensor:
        """The most probable classes (H, W), which take less memory."""
        return output.argmax(0).byte().cpu()

    def show(
        self, image: Image.Image, output: Tensor, target: npt.NDArray[Any]
    ) -> tuple[list[Image.Image], str, str]:
        guess, truth = (
            np.array(Image.fromarray(classes).resize(image.size, Image.Resampling.NEAREST))
            for classes in (output.numpy(), target)
        )
        counted = truth != IGNORE
        text = f"{100 * (guess == truth)[counted].mean():.0f} % correct" if counted.any() else "?"
        return [self.overlay(image, truth), self.overlay(image, guess)], "left", f"right, {text}"

    def overlay(self, image: Image.Image, prediction: Mask) -> Image.Image:
        """Return an RGB image with the classes (H, W) in colours over it.

        The first class is left as it is if it is a background.
        """
        colours = voc_colours(IGNORE + 1)[prediction]
        plain = prediction == IGNORE
        if self.names[0].lower() in ("background", "0", "other", "unlabeled"):
            plain |= prediction == 0
        pixels = np.asarray(image.convert("RGB"))
        mixed = np.where(plain[..., None], pixels, (pixels.astype(np.uint16) + colours) // 2)
        return Image.fromarray(mixed.astype(np.uint8))

    def predictions(
        self,
        model: Callable[[Tensor], Tensor],
        batch: Batch,
        images_BCHW: Tensor,
        how: Preprocessing,
    ) -> list[Mask]:
        """Masks of the images' original size, `IGNORE` where pixels do not count."""
        (geometry,) = batch.geometry
        assert geometry is not None
        valid = None if batch.valid is None else batch.valid[0].numpy()
        return [self._mask(model, images_BCHW, valid, geometry, how)]

    def _mask(
        self,
        model: Callable[[Tensor], Tensor],
        image_1CHW: Tensor,
        valid: Valid | None,
        geometry: Geometry,
        how: Preprocessing,
    ) -> Mask:
        scores = resized(self.infer(model, image_1CHW, how).float(), geometry.size[::-1])
        mask: Mask = scores[0].argmax(0).byte().cpu().numpy()
        if valid is not None:
            mask[~_enlarged(valid, geometry.size)] = IGNORE
        return mask

    def tiled(self, model: nn.Module, view: View, tile: int) -> Mask:
        """As `predictions`. Memory beyond the image, if it is not stored in tiles, and its mask,
        which is a file if it is large, is that of a few rows of windows."""
        device = next(model.parameters()).device
        if max(view.size) <= tile:
            image, valid = view.prepared(0, 0, *view.size, device)
            return self._mask(model, image, valid, view.geometry, view.how)
        mask, row = scratch(view.size), 0
        holes = list[tuple[tuple[slice, slice], Valid]]()

        def scores(top: int, left: int, h: int, w: int) -> Tensor:
            image, valid = view.prepared(top, left, h, w, device)
            if valid is not None:
                holes.append(((slice(top, top + h), slice(left, left + w)), valid))
            return model(image)[0].float().softmax(0)

        for strip in blended(scores, view.size, (tile, tile), OVERLAP):
            mask[row : row + strip.shape[1]] = strip.argmax(0).byte().cpu().numpy()
            row += strip.shape[1]
            while holes and holes[0][0][0].stop <= row:
                place, valid = holes.pop(0)
                mask[place][~valid] = IGNORE
        return (
            mask if mask.shape[::-1] == view.geometry.size else _enlarged(mask, view.geometry.size)
        )

    def check_out(self, out: str) -> Path:
        if out.lower().endswith(".csv"):
            raise InputError(f"out {out!r} must be a folder: masks are images")
        return check_out_folder(out)

    @contextmanager
    def writing(self, out: Path, source: Source, top: int) -> Iterator[Writer]:
        """Write a PNG of class indices for each image, or of a map a GeoTIFF."""
        check_png_folder(out, source)

        def write(paths: Sequence[str], batch: Batch, masks: Sequence[Mask]) -> None:
            for index, mask in zip(batch.indices.tolist(), masks, strict=True):
                save_labels(mask, out, source, index, IGNORE)

        yield write


def _enlarged(values_HW: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """Values of the nearest pixels, as an array of (width, height)."""
    return np.array(Image.fromarray(values_HW).resize(size, Image.Resampling.NEAREST))
