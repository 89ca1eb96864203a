"""One class per image: cross-entropy, top-1 and top-5."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fcmae.data.labelled import (
    LabelledData,
    Split,
    at_chance,
    find_labelled,
    labels_of,
    majority_share,
)
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.resume import stored_files
from finetune.augment import seeded
from finetune.config import FinetuneConfig
from sparse.errors import InputError

TOP = 5

_log = logging.getLogger(__name__)


class ClassScores:
    """Top-1 and top-5 in percent and the mean cross-entropy; see `finetune.tasks.base.Scores`.

    With fewer than five classes, `top5` counts all of them.

    Args:
        classes: their number.
        device: of the outputs.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        top: dict[str, Any] = {"num_classes": classes, "average": "micro", "validate_args": False}
        self._accuracy = {
            f"top{k}": MulticlassAccuracy(top_k=min(k, classes), **top).to(device) for k in (1, TOP)
        }
        self._loss = MeanMetric(nan_strategy="disable").to(device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        outputs = outputs.float()
        for metric in self._accuracy.values():
            metric.update(outputs, targets)
        self._loss.update(F.cross_entropy(outputs, targets, reduction="none"))

    def compute(self) -> dict[str, float]:
        with warnings.catch_warnings():  # a process may have had no image
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            found = {name: 100 * float(m.compute()) for name, m in self._accuracy.items()}
            return found | {"loss": float(self._loss.compute())}


class Classify:
    """See `finetune.tasks.base.LabelKind`."""

    data: LabelledData

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self._mixup: Mixup | None = None

    def find(self, start: SavedCheckpoint | None) -> LabelledData:
        config, found = self.config, None
        try:
            found = find_labelled(config.data, config.val_fraction, exclude=config.out)
        except InputError as error:
            if start is None or not os.path.isdir(os.path.expanduser(config.data)):
                raise
            _log.warning("resuming with the images that the run began with: %s", error)
        data = found if start is None else self._stored(start, found)
        assert data is not None
        self.data = data
        train, val = len(data.train.source), len(data.val.source)
        _log.info(f"found {train} training, {val} validation images of {len(data.names)} classes")
        augment = config.augment
        if augment.mixup or augment.cutmix:
            self._mixup = Mixup(
                augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing,
                num_classes=len(data.names),
            )  # fmt: skip
        return data

    def check(self, part: int) -> None:
        if self._mixup is not None and part % 2:
            batch = self.config.batch_size
            raise InputError(
                f"batch_size {batch} makes parts of {part} images, but mixup and cutmix pair them: "
                f"use {batch + batch // part}"
            )

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.config.augment.label_smoothing
        if self._mixup is not None:
            # The loop seeds torch's stream at each step; numpy's, timm's source, follows it.
            with seeded(int(torch.randint(2**62, ()))):
                images_BCHW, targets = self._mixup(images_BCHW, targets)
            smoothing = 0.0  # they are smoothed already
        return F.cross_entropy(forward(images_BCHW), targets, label_smoothing=smoothing)

    def scores(self, device: torch.device) -> ClassScores:
        return ClassScores(len(self.data.names), device)

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """The higher top-1, then the lower loss, of which NaN is the worst."""
        loss = scores["loss"]
        return scores["top1"], -loss if math.isfinite(loss) else -math.inf

    def chance(self, scores: Sequence[dict[str, float]]) -> str | None:
        labels, top1 = self.data.val.labels, max(score["top1"] for score in scores)
        assert labels is not None
        if not at_chance(top1, labels):
            return None
        share = majority_share(labels)
        return f"top-1 is {top1:.1f} %, always answering the most frequent class {share:.1f} %"

    def summary(self, scores: dict[str, float]) -> str:
        return f"top-1 {scores['top1']:.1f} %, top-5 {scores['top5']:.1f} %"

    def _stored(self, start: SavedCheckpoint, found: LabelledData | None) -> LabelledData:
        names = tuple(start.state["settings"]["label_names"])

        def stored(part: str, there: Split | None) -> Split:
            files = stored_files(None if there is None else there.source, start, part)
            (root,) = files.roots
            whole = root == os.path.abspath(os.path.expanduser(self.config.data))
            prefix = "" if whole else f"{os.path.basename(root)}/"
            return Split(files, prefix, labels_of(files, names))

        return LabelledData(
            stored("train", found and found.train), stored("val", found and found.val), names
        )
