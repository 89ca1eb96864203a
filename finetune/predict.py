"""`fcmae predict`: the predictions of a fine-tuned model for new images, in files."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fcmae.atomic import check_out_file, check_out_folder
from fcmae.commands.predict import PredictConfig
from fcmae.config.values import MAX_PIXELS
from fcmae.data.evaluation import EvalDataset, WholeDataset
from fcmae.data.file_list import FileList, refuse_to_replace
from fcmae.data.image import BadImage
from fcmae.data.labelled import Split
from fcmae.data.sample import Batch
from fcmae.data.sources import Source
from fcmae.data.statistics import Preprocessing
from fcmae.inspect.prologue import Setting, set_up, write_skipped
from fcmae.inspect.reconstructing import shown_range
from finetune.figures import check_png_folder, save_png
from finetune.tuned import Tuned, load_tuned
from sparse.errors import InputError

_log = logging.getLogger(__name__)


def predict(config: PredictConfig) -> Path:
    """Predict labels of images, and return the file or the folder of masks written.

    Columns of a CSV file after `path`:

    - classify: `label`, `score`, `label2`, `score2`, …, the most probable classes and the model's
      probabilities, from 0 to 1;
    - multilabel: the probability of each class;
    - regress: each target.

    Masks are PNGs in a folder; boxes and objects COCO's results in a JSON file, with the number of
    objects of each class and image in a CSV file beside it, and label images in a folder beside it.

    A path begins with `config.images` as given; from a list of paths it is absolute. Images that
    can't be read are skipped and listed in bad_images.jsonl: in the folder, or beside the file with
    its name in front.

    Raises:
        InputError: the weights, the images or `out` is wrong.
        RunError: no image could be read, or `out` could not be written.
    """
    if config.out.lower().endswith((".csv", ".json")):
        check_out_file(config.out)  # what is wrong with any kind, before a model is loaded
    else:
        check_out_folder(config.out)
    setting = set_up(config, config.source, load_tuned)
    kind, written = setting.model.kind, 0
    out, split = kind.check_out(config.out), setting.find_images()
    refuse_to_replace(out, split.source)
    if config.tile is not None and not kind.tiles:
        what = f"tile {config.tile} is for masks and objects"
        raise InputError(f"{what}, and the task is {kind.task}: omit it")
    overlays = None if config.overlay is None else check_out_folder(config.overlay)
    if overlays is not None:
        check_png_folder(overlays, split.source)
        if overlays.resolve() == out.resolve():
            raise InputError(f"overlay and out are both {config.out!r}: give two folders")
    dataset = kind.eval_dataset(split, setting.images, MAX_PIXELS)
    with torch.no_grad(), kind.writing(out, split.source, config.top) as write:
        for batch, found in _each(setting, split, dataset, config.tile):
            paths = [_path(split.source, i, config.images) for i in batch.indices.tolist()]
            write(paths, batch, found)
            if overlays is not None:
                for index, prediction in zip(batch.indices.tolist(), found, strict=True):
                    try:
                        image = rgb_image(split.source, index, setting.images)
                    except BadImage as error:
                        _log.warning("%s is not drawn: %s", split.name(index), error)
                        continue
                    drawn = kind.overlay(image, prediction)
                    save_png(drawn, overlays, split.source.key(index))
            written += len(batch)
    _log.info("%s: %d images", out, written)
    write_skipped(setting.skipped, out)
    return out


def _each(
    setting: Setting[Tuned], split: Split, dataset: EvalDataset, tile: int | None
) -> Iterator[tuple[Batch, Any]]:
    """Yield batches and their predictions; with `tile`, of one image each, computed in windows."""
    model, kind = setting.model.model, setting.model.kind
    if tile is None or not isinstance(dataset, WholeDataset):
        for batch, images in setting.batches(split, dataset=dataset):
            yield batch, kind.predictions(model, batch, images, setting.images)
        return
    bad = list[tuple[str, str]]()
    for index in range(len(dataset)):
        try:
            view = dataset.view(index)
            found = kind.tiled(model, view, tile)
        except BadImage as error:
            bad.append((split.name(index), str(error)))
        else:
            indices = torch.tensor([index])
            yield Batch(torch.empty(1, 0), indices, geometry=[view.geometry]), [found]
    setting.report(split, bad)


def rgb_image(source: Source, index: int, how: Preprocessing) -> Image.Image:
    """Return an image as 8-bit RGB, of its own size: the only channel or the first three."""
    opened = how.read(source, index, MAX_PIXELS)
    width, height = opened.size
    pixels, channels = opened.resized((0, 0, width, height), (height, width)).pixels, len(how.mean)
    if pixels.dtype != np.uint8:
        low, high = shown_range(torch.from_numpy(pixels))
        pixels = (255 * (pixels - low) / (high - low)).round().clip(0, 255).astype(np.uint8)
    shown = [0, 1, 2] if channels >= 3 else [0, 0, 0]
    return Image.fromarray(np.ascontiguousarray(pixels[shown].transpose(1, 2, 0)))


def _path(source: Source, index: int, images: str) -> str:
    if os.path.isdir(os.path.expanduser(images)):
        return os.path.join(images, os.fsdecode(source.key(index)))
    return os.fsdecode(source.path(index)) if isinstance(source, FileList) else source.name(index)
