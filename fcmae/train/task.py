"""The interface of a kind of training to the script and the loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fcmae.data.sources import Source
from fcmae.data.statistics import MeanStd, Preprocessing
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.plan import AutoEpochs, Plan
from fcmae.train.processes import ALONE, World
from fcmae.train.run_folder import RunFolder
from sparse.engines.base import Layout
from sparse.errors import RunError


class Interrupted(Exception):
    """An evaluation was cut short because the run has to stop."""


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Attributes:
        train: the training images.
        lists: the images of the run by part; lists of files are stored in its folder.
        others: further images that must be the same on all processes.
        parts: the parts of training images that crops are cut from, if these are not the images.
    """

    train: Source
    lists: Mapping[str, Source]
    others: Sequence[Source] = ()
    parts: Source | None = None

    @property
    def looked_at(self) -> Source:
        """What mean and standard deviation are measured on."""
        return self.train if self.parts is None else self.parts


@dataclass(frozen=True)
class Resolved:
    """What a config leaves open, resolved from the data, the weights and the machine.

    Attributes:
        images: how images are prepared.
        plan: the steps and their learning rates.
        precision: `fp32` or `bf16`.
        workers: processes that read images.
        part: images of one process in one part of a step.
        start: the checkpoint that the run resumes from, if any.
        world: the processes.
    """

    images: Preprocessing
    plan: Plan
    precision: str = "fp32"
    workers: int = 0
    part: int = 1
    start: SavedCheckpoint | None = None
    world: World = ALONE

    def autocast(self) -> torch.autocast:
        """The context of forward passes: computed in `precision`, with weights in float32."""
        bf16 = self.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=bf16)


class Task(ABC):
    """A kind of training. Its methods are called in the order in which they are defined here.

    Args:
        config: what was asked for.

    Attributes:
        command: the command that runs it, recorded in its checkpoints.
        auto_epochs: what `epochs: auto` stands for.
        least_warmup: the fewest steps of warm-up that the learning rate needs.
        weight_copies: copies of the weights in a checkpoint besides the model's own.
        images, resolved, model, optimizer, folder: set by the script, in this order, as soon as
            they are known. `folder` is None on all processes but the main one.
    """

    command: ClassVar[str]
    auto_epochs: ClassVar[AutoEpochs]
    least_warmup = 0
    weight_copies = 0

    images: Images
    resolved: Resolved
    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: RunFolder | None = None

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def check(self, device: torch.device) -> tuple[int, int]:
        """Return (height, width) of the images, after all checks that need no data.

        Raises:
            InputError: the config can't be run on this device.
        """

    @abstractmethod
    def find_images(self, start: SavedCheckpoint | None) -> Images:
        """Find the images; a resumed run takes those of the stored lists.

        Raises:
            InputError: there are none, or they do not suit the config.
        """

    def named_mean_std(self) -> Mapping[str, MeanStd]:
        """What `augment.mean` and `augment.std` may name besides `imagenet` and `data`."""
        return {}

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return the model with its initial weights, on the device: a function of the seed."""

    def layer_depths(self) -> Mapping[str, int] | None:
        """How many layers before the head each parameter is, for layer-wise learning rates.

        Raises:
            InputError: the model does not allow it.
        """
        return None

    def begin(self) -> None:
        """Called once the folder is open, before the loop."""

    @abstractmethod
    def announcement(self) -> list[str]:
        """Lines for the log on what the run will do; the first names the model."""

    def settings(self) -> dict[str, Any]:
        """The config with everything resolved, as checkpoints record it."""
        resolved = self.resolved
        return {
            **asdict(self.config),
            "epochs": resolved.plan.epochs,
            "img_size": list(resolved.images.img_size),
            "mean": list(resolved.images.mean),
            "std": list(resolved.images.std),
            "clip": resolved.images.clip,
            "precision": resolved.precision,
            "workers": resolved.workers,
        }

    def lay_out(self) -> Callable[[Tensor], Layout] | None:
        """What lays out the encoder's sites ahead, where images are read, if anything."""
        return None

    @abstractmethod
    def dataset(self) -> Dataset[Any]:
        """Training samples by (epoch, index)."""

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        """Restore what `extra_tensors` and `extra_state` returned."""

    @abstractmethod
    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        """Mean loss of one part of a batch; `forward` is the model, perhaps wrapped in DDP."""

    def after_step(self, step: int) -> None:
        """Called after each update, with the number of completed steps."""

    @abstractmethod
    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Evaluate after epoch `epoch` (from 1) and return what to log.

        Raises:
            Interrupted: `stop()` became true; a resumed run repeats the epoch's end.
        """

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Further tensors to save, by file."""
        return {}

    def extra_state(self) -> dict[str, Any]:
        """Further JSON to save."""
        return {}

    @abstractmethod
    def export(self, folder: RunFolder) -> None:
        """Write the finished model to `folder.paths.exported`."""

    def record_bad(self, bad: Sequence[tuple[str, str]]) -> set[str]:
        """Record the unreadable images of all processes, and return their names.

        Args:
            bad: (name, reason) of this process's images.

        Raises:
            RunError: more than the share `max_bad` of all images could not be read.
        """
        world, most = self.resolved.world, self.config.max_bad
        everywhere = [entry for entries in world.gather(list(bad)) for entry in entries]
        distinct = 0 if self.folder is None else self.folder.record_bad(everywhere)
        distinct, total = world.agree([distinct])[0], sum(map(len, self.images.lists.values()))
        if distinct > most * total:
            raise RunError(
                f"{distinct} of {total} images could not be read, more than max_bad = {most:.0%}: "
                "see bad_images.jsonl in the run folder, fix the data or raise --max_bad"
            )
        return {name for name, _ in everywhere}
