"""Fine-tuning as a task for the training loop: the loss, averaged weights, the best ones."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fcmae.data.sample import Batch, normalise
from fcmae.train.checkpoint import SavedCheckpoint, load_model_tensors
from fcmae.train.machine import autocast_dtype
from fcmae.train.optimizer import ema_decay
from fcmae.train.run_folder import RunFolder, check_bad_share
from fcmae.train.script import Resolved
from fcmae.train.task import Interrupted
from fcmae.weights.export import write_timm_folder
from finetune.config import FinetuneConfig
from finetune.model import set_training
from finetune.tasks.base import LabelKind
from sparse.devices import to_device
from sparse.errors import RunError

BEST = "best"
"""The file of a checkpoint that holds the best weights so far."""


LOWER_RATE = 4
"""Factor between a learning rate with which a model does not learn and the one to try next."""

_log = logging.getLogger(__name__)


class Ema:
    """A running average of a model's weights and running statistics.

    Its decay is `min(most, (1 + t) / (10 + t))` after t updates.
    """

    def __init__(self, model: nn.Module, most: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._most = most
        own, source = self.model.state_dict(), model.state_dict()
        averaged = [name for name, tensor in own.items() if tensor.is_floating_point()]
        self._own = [own[name] for name in averaged]
        self._source = [source[name] for name in averaged]
        self._copied = [(own[name], source[name]) for name in own.keys() - set(averaged)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights after its update number `step`, from 1."""
        torch._foreach_lerp_(self._own, self._source, 1 - ema_decay(step, self._most))
        for own, source in self._copied:
            own.copy_(source)


class FinetuneTask:
    """See `fcmae.train.task.Task`.

    Args:
        config: what was asked.
        kind: the kind of label.
        model: on the device.
        optimizer: of what is trained.
        resolved: how images are prepared, and the processes.
        epochs: of the whole run.
        val_epochs: how many lie between two measurements.
        validation: what to measure on, this process's share of it, in equally many batches.
        timm_config: the config.json of the exported model.
        folder: where the main process records; None on the others.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        kind: LabelKind,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        resolved: Resolved,
        epochs: int,
        val_epochs: int,
        validation: DataLoader[Any],
        timm_config: dict[str, Any],
        folder: RunFolder | None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.files = len(kind.data.train.source) + len(kind.data.val.source)
        self.ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
        self.best: dict[str, Tensor] | None = None
        self.best_score: dict[str, Any] | None = None
        self._config, self._kind = config, kind
        self._warned_at_chance = False
        self._frozen = config.freeze == "backbone"
        self._images, self._world = resolved.images, resolved.world
        self._autocast = autocast_dtype(resolved.precision)
        self._epochs, self._val_epochs = epochs, val_epochs
        self._validation, self._timm_config, self._folder = validation, timm_config, folder
        set_training(model, self._frozen)

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        return self._kind.loss(forward, *self._on_device(batch))

    def after_step(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(step)

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Measure the model and its average, and keep the best weights of all epochs so far.

        What counts are the scores of the averaged weights where there are any.
        """
        if epoch % self._val_epochs and epoch != self._epochs:
            return {}
        models = {"val": self.model}
        if self.ema is not None:
            models["ema"] = self.ema.model
        self._world.share(buffer for model in models.values() for buffer in model.buffers())
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # batches differ in size here
                scores = self._measure(models, stop)
        finally:
            set_training(self.model, self._frozen)
        name = [*models][-1]
        self._keep_best(models[name], scores[name], epoch, step)
        self._warn_at_chance([*scores.values()], epoch)
        return {
            f"{name}_{key}": value for name, score in scores.items() for key, value in score.items()
        }

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average, and the best weights: a run that resumes from here forgets later ones."""
        ema = {} if self.ema is None else {"ema": self.ema.model.state_dict()}
        best = {} if self.best is None else {BEST: self.best}
        return ema | best

    def extra_state(self) -> dict[str, Any]:
        return {"best": self.best_score}

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        if self.ema is not None:
            load_model_tensors(self.ema.model, checkpoint.tensors("ema"))
        self.best = checkpoint.tensors(BEST) or None
        self.best_score = checkpoint.state["best"]
        if self._folder is not None:
            self.write_best(self._folder.paths.best)

    def write_best(self, out: Path) -> None:
        """Write the best weights as a timm folder, or remove what is there if there are none."""
        if self.best is None:
            shutil.rmtree(out, ignore_errors=True)
        else:
            write_timm_folder(self.best, self._timm_config, out)

    @torch.no_grad()
    def _measure(
        self, models: dict[str, nn.Module], stop: Callable[[], bool]
    ) -> dict[str, dict[str, float]]:
        """Score each model over all processes.

        Raises:
            Interrupted: the run has to stop.
            RunError: too many images, or all, can't be read.
        """
        device = self._world.device
        scores = {name: self._kind.scores(device) for name in models}
        bad: list[tuple[str, str]] = []
        for batch in self._validation:
            if stop():
                raise Interrupted
            bad += batch.bad
            if len(batch):
                images, targets = self._on_device(batch)
                for name, model in models.items():
                    with torch.autocast(device.type, self._autocast, self._autocast is not None):
                        outputs = model(images)
                    scores[name].update(outputs, targets)
        self._record_bad(bad)
        found = {name: score.compute() for name, score in scores.items()}
        if not all(found.values()):
            raise RunError("none of the validation images can be read: see bad_images.jsonl")
        return found

    def _warn_at_chance(self, scores: list[dict[str, float]], epoch: int) -> None:
        """Warn once, from half of the epochs on, where the model has not begun to learn."""
        if self._folder is None or self._warned_at_chance or 2 * epoch < self._epochs:
            return
        chance = self._kind.chance(scores)
        if chance is not None:
            self._warned_at_chance = True
            _log.warning(
                "after %d of %d epochs %s: the model has not learned; train it again in another "
                "--out with --optim.base_lr %g",
                epoch, self._epochs, chance, self._config.optim.base_lr / LOWER_RATE,
            )  # fmt: skip

    def _keep_best(self, model: nn.Module, scores: dict[str, float], epoch: int, step: int) -> None:
        before, rank = self.best_score, self._kind.rank
        if before and rank(scores) <= rank(before):
            return
        self.best_score = {"epoch": epoch, "step": step, **scores}
        if self._folder is not None:
            self.best = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in model.state_dict().items()
            }
            self.write_best(self._folder.paths.best)

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self._world.device
        images = normalise(batch.images, self._images.mean, self._images.std, device)
        assert batch.targets is not None
        targets = to_device(batch.targets, device)
        return images.contiguous(memory_format=torch.channels_last), targets

    def _record_bad(self, bad: list[tuple[str, str]]) -> None:
        everywhere = [entry for entries in self._world.gather(bad) for entry in entries]
        distinct = self._folder.record_bad(everywhere) if self._folder is not None else 0
        check_bad_share(self._world.agree([distinct])[0], self.files, self._config.max_bad)
