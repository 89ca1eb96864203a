"""Classification as a task for the training loop: the loss, averaged weights, the best ones."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fcmae.data.batch import normalise
from fcmae.data.evaluation import LabelledBatch
from fcmae.train.checkpoint import SavedCheckpoint, load_model_tensors
from fcmae.train.optimizer import ema_decay
from fcmae.train.processes import World
from fcmae.train.run_folder import RunFolder, check_bad_share
from fcmae.train.task import Interrupted
from fcmae.weights.export import write_timm_folder
from fcmae.weights.read import BEST
from finetune.augment import seeded
from finetune.model import set_training
from sparse.devices import to_device
from sparse.errors import RunError

TOP = 5


class Score(NamedTuple):
    """How a model did on the validation pictures: percentages, and the mean cross-entropy."""

    top1: float
    top5: float
    loss: float


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
    """See `fcmae.train.loop.Task`.

    Args:
        model, optimizer: on the device.
        frozen: only the head is trained.
        ema: most decay of the averaged weights; None keeps none.
        mean, std: what images are normalised with.
        label_smoothing: as in the config.
        mixup: timm's, or None.
        epochs, val_epochs: how many there are, and how many lie between two measurements.
        validation: what to measure on, this process's share of it, in equally many batches.
        files: number of files, to train and to measure on; `max_bad` is the share of them that may
            prove unreadable.
        timm_config: the config.json of the exported model.
        folder: where the main process records; None on the others.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: bool,
        ema: float | None,
        mean: list[float],
        std: list[float],
        label_smoothing: float,
        mixup: Mixup | None,
        epochs: int,
        val_epochs: int,
        validation: DataLoader[Any],
        autocast: torch.dtype | None,
        files: int,
        max_bad: float,
        timm_config: dict[str, Any],
        world: World,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.optimizer, self.files = model, optimizer, files
        self.ema = None if ema is None else Ema(model, ema)
        self.best: dict[str, Tensor] | None = None
        self.best_score: dict[str, Any] | None = None
        self._frozen = frozen
        self._mean, self._std = mean, std
        self._label_smoothing, self._mixup = label_smoothing, mixup
        self._epochs, self._val_epochs = epochs, val_epochs
        self._validation, self._autocast = validation, autocast
        self._max_bad = max_bad
        self._timm_config = timm_config
        self._world, self._folder = world, folder
        set_training(model, frozen)

    def loss(self, forward: nn.Module, batch: LabelledBatch) -> Tensor:
        images, labels = self._on_device(batch)
        if self._mixup is None:
            logits = forward(images)
            return F.cross_entropy(logits, labels, label_smoothing=self._label_smoothing)
        # The loop seeds torch's stream at each step; numpy's, which timm draws from, follows it.
        with seeded(int(torch.randint(2**62, ()))):
            images, targets = self._mixup(images, labels)  # smoothed already
        return F.cross_entropy(forward(images), targets)

    def after_step(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(step)

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Measure the model and its average, and keep the better weights of all epochs so far.

        What counts is top-1, of the averaged weights where there are any; then the lower loss.
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
        return {
            f"{name}_{key}": value
            for name, score in scores.items()
            for key, value in score._asdict().items()
        }

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average, and the best weights: a run that goes on from here forgets later ones."""
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
            self.write_best(self._folder.path / BEST)

    def write_best(self, out: Path) -> None:
        """Write the best weights as a timm folder, or take away what is there if there are none."""
        if self.best is None:
            shutil.rmtree(out, ignore_errors=True)
        else:
            write_timm_folder(self.best, self._timm_config, out)

    @torch.no_grad()
    def _measure(self, models: dict[str, nn.Module], stop: Callable[[], bool]) -> dict[str, Score]:
        """Score each model over all processes.

        Raises:
            Interrupted: the run has to stop.
            RunError: too many pictures, or all, can't be read.
        """
        sums = torch.zeros(len(models), 4, dtype=torch.float64)
        bad: list[tuple[str, str]] = []
        for batch in self._validation:
            if stop():
                raise Interrupted
            bad += batch.bad
            if len(batch):
                sums += self._tally(models.values(), batch)
        self._record_bad(bad)
        sums = self._world.sum(sums.to(self._world.device, _sum_dtype(self._world.device))).cpu()
        if not sums[0, 3]:
            raise RunError("none of the validation pictures can be read: see bad_images.jsonl")
        return {
            name: Score(100 * top1 / count, 100 * top5 / count, loss / count)
            for name, (top1, top5, loss, count) in zip(models, sums.tolist(), strict=True)
        }

    def _tally(self, models: Iterable[nn.Module], batch: LabelledBatch) -> Tensor:
        """For each model: hits, hits among five, sum of the cross-entropy, pictures."""
        images, labels = self._on_device(batch)
        rows = []
        for model in models:
            with torch.autocast(images.device.type, self._autocast, self._autocast is not None):
                logits = model(images)
            logits = logits.float()
            hits = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            rows.append([hits[:, 0].sum().item(), hits.sum().item(), loss.item(), len(labels)])
        return torch.tensor(rows, dtype=torch.float64)

    def _keep_best(self, model: nn.Module, score: Score, epoch: int, step: int) -> None:
        before = self.best_score
        if before and _rank(score.top1, score.loss) <= _rank(before["top1"], before["loss"]):
            return
        self.best_score = {"epoch": epoch, "step": step, **score._asdict()}
        if self._folder is not None:
            self.best = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in model.state_dict().items()
            }
            self.write_best(self._folder.path / BEST)

    def _on_device(self, batch: LabelledBatch) -> tuple[Tensor, Tensor]:
        device = self._world.device
        images = normalise(batch.images, self._mean, self._std, device)
        images = images.contiguous(memory_format=torch.channels_last)
        return images, to_device(batch.labels, device)

    def _record_bad(self, bad: list[tuple[str, str]]) -> None:
        everywhere = [entry for entries in self._world.gather(bad) for entry in entries]
        distinct = self._folder.record_bad(everywhere) if self._folder is not None else 0
        check_bad_share(self._world.agree([distinct])[0], self.files, self._max_bad)


def _rank(top1: float, loss: float) -> tuple[float, float]:
    """Orders scores: the higher top-1, then the lower loss, of which NaN is the worst."""
    return top1, -loss if math.isfinite(loss) else -math.inf


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
