"""The interface of a kind of label to fine-tuning."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fcmae.data.labelled import LabelledData
from fcmae.train.checkpoint import SavedCheckpoint
from finetune.config import FinetuneConfig


class Scores(Protocol):
    """Scores of one model over the validation images of all processes."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of this process."""

    def compute(self) -> dict[str, float]:
        """Return each score by its name, `loss` among them, over all processes."""


class LabelKind(Protocol):
    """How one kind of label is read, learned and scored.

    Args:
        config: what was asked for.

    Attributes:
        data: the labelled images and the names of the model's outputs, such as classes, set by
            `find`.
    """

    data: LabelledData

    def __init__(self, config: FinetuneConfig) -> None: ...

    def find(self, start: SavedCheckpoint | None) -> LabelledData:
        """Find the labelled images; a resumed run takes those of the stored lists.

        Raises:
            InputError: there are none, or their labels can't be learned.
        """

    def check(self, part: int) -> None:
        """Check what depends on the number of images in a part of a step.

        Raises:
            InputError: the part does not suit the config.
        """

    def loss(self, forward: nn.Module, images_BCHW: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of normalised images; `forward` is the model, perhaps wrapped in DDP."""

    def scores(self, device: torch.device) -> Scores:
        """Return empty scores; the best weights are those of the highest `rank`."""

    def rank(self, scores: dict[str, float]) -> tuple[float, ...]:
        """Return a key that orders scores, the best highest."""

    def chance(self, scores: Sequence[dict[str, float]]) -> str | None:
        """Return a text if the scores of all models are those of guessing, else None."""

    def summary(self, scores: dict[str, float]) -> str:
        """Return the scores in words, for the log."""
