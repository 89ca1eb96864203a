"""Our loader of images with masks against a data set with torchvision's v2 transforms.

    .venv/bin/python -m benchmarks.mask_loader FOLDER [--img_size 128] [--workers 2] [--rounds 5]

FOLDER is a split with `images` and `masks` or `instances`. Both decode an image and its mask,
resize them by a factor between 0.5 and 2, log-uniform, cut a crop, flip, normalise and collate
batches of 64. Torchvision resizes the whole image before it cuts. Medians of rounds in turns.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.loader import BATCH, MEAN, STD, show, speed
from fcmae.data.loader import make_loader
from fcmae.data.masks import find_masks
from fcmae.data.order import StepSampler
from fcmae.data.sample import normalise
from fcmae.data.statistics import Preprocessing
from finetune.config import FinetuneConfig
from finetune.tasks.segment import MaskDataset

SCALES = (0.5, 2.0)


class LogUniformResize(v2.Transform):
    """Resize by a factor between `SCALES`, log-uniform, but to no side below `least`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least = least

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        h, w = flat_inputs[0].shape[-2:]
        low, high = SCALES
        factor = max(low * (high / low) ** torch.rand(()).item(), self._least / min(h, w))
        return {"size": [round(h * factor), round(w * factor)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        bicubic = v2.InterpolationMode.BICUBIC
        return self._call_kernel(v2.functional.resize, inpt, **params, interpolation=bicubic)


class Pairs(Dataset[Any]):
    """Images and masks as tv_tensors."""

    def __init__(self, folder: Path, img_size: int) -> None:
        self._images = sorted((folder / "images").iterdir())
        masks = folder / ("masks" if (folder / "masks").is_dir() else "instances")
        self._masks = [masks / f"{path.stem}.png" for path in self._images]
        self._objects = masks.name == "instances"
        kinds = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.uint8}
        self._transform = v2.Compose([
            LogUniformResize(img_size), v2.RandomCrop((img_size, img_size)),
            v2.RandomHorizontalFlip(), v2.ToDtype(kinds, scale=True), v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self._images[index]) as picture:
            image = tv_tensors.Image(picture.convert("RGB"))
        with Image.open(self._masks[index]) as picture:
            numbers = np.array(picture)
        classes = (numbers > 0) if self._objects else numbers
        return self._transform(image, tv_tensors.Mask(torch.from_numpy(classes.astype(np.uint8))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", type=Path, help="folder with images and masks")
    parser.add_argument("--img_size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    side = (options.img_size, options.img_size)
    split = find_masks(str(options.data), 0.1).train
    config = FinetuneConfig(data="-", out="-")
    config.augment.scale_jitter = [*SCALES]
    ours = MaskDataset(split, Preprocessing(side, tuple(MEAN), tuple(STD)), config)
    theirs = Pairs(options.data, options.img_size)

    def theirs_once() -> float:
        loader = DataLoader(theirs, BATCH, shuffle=True, num_workers=options.workers)
        return speed(loader, min(options.batches, len(loader) - 1), lambda batch: batch)

    def ours_once() -> float:
        sampler = StepSampler(len(split.source), BATCH, 0, 0, options.batches + 1)

        def finish(batch: Any) -> Any:
            return normalise(batch.images, MEAN, STD, "cpu"), batch.targets

        loader = make_loader(ours, sampler, options.workers)
        return speed(loader, options.batches, finish)

    title = f"{len(split.source)} images with masks, {options.workers} workers, {side[0]} px"
    contestants = {"torchvision": theirs_once, "ours": ours_once}
    show(Console(highlight=False), title, contestants, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
