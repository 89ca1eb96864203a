"""Fine-tuning as a task for the training script: from labelled images to a trained model."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fcmae import rng
from fcmae.config.values import height_width
from fcmae.data.duplicates import report_duplicates, write_duplicates
from fcmae.data.evaluation import each_batch
from fcmae.data.find import find_source
from fcmae.data.labelled import LabelledData
from fcmae.data.sample import Batch, normalise
from fcmae.data.statistics import MeanStd, imagenet_mean_std
from fcmae.train.checkpoint import SavedCheckpoint, load_model_tensors
from fcmae.train.plan import AutoEpochs
from fcmae.train.run_folder import RunFolder
from fcmae.train.script import train
from fcmae.train.task import Images, Interrupted, Task
from fcmae.weights.export import timm_config
from fcmae.weights.hub import known_license
from finetune.augment import TrainDataset, recolouring
from finetune.blocks import speed_up
from finetune.config import FinetuneConfig
from finetune.figures import SHOWN, Examples, draw_predictions, write_figures
from finetune.labels import (
    check_task,
    find_labels,
    open_labels,
    resolve_task,
    save_labels,
    stored_labels,
)
from finetune.model import (
    Start,
    find_model,
    init_convnext,
    set_training,
)
from finetune.tasks import TASKS
from finetune.tasks.base import LabelKind, Measurement
from finetune.tuned import STATE, TASK
from sparse.encoder import check_compiler
from sparse.errors import InputError, RunError, brief

HEAD_SCALE = 0.001
"""What `head_init_scale: null` means with pretrained weights (arXiv 2301.00808, Tables 9 to 11)."""

LEAST_WARMUP = 100
"""Fewest steps of warm-up, unless set by the user or longer than half of the run. A steeper rise
can make features of different images equal: see docs/experiments.md, Short runs."""

MEASUREMENTS = 30
"""Number of measurements on the validation images with `val_epochs: auto`."""

LOWER_RATE = 4
"""If a model does not learn, the learning rate to try next is lower by this factor."""

BEST = "best"
"""The file of a checkpoint that holds the best weights so far."""

_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune, or resume the run in `config.out`; see `fcmae.train.script.train`."""
    return train(Finetuning(config))


class Finetuning(Task):
    """A timm model on labelled images.

    Args:
        config: what was asked for.

    Attributes:
        kind: the kind of label, set by `find_images`.
        data: the labelled images, with labels as targets, set by `find_images`.
    """

    command = "finetune"
    auto_epochs = AutoEpochs(crops=60_000, fewest=20, most=200)

    config: FinetuneConfig
    kind: LabelKind
    data: LabelledData

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.least_warmup = LEAST_WARMUP if config.freeze == "none" else 0
        self.weight_copies = 1 + (config.ema_decay is not None)  # the best weights and the average
        self.best: dict[str, Tensor] | None = None
        self.best_score: dict[str, Any] | None = None
        self._warned_at_chance = False

    def check(self, device: torch.device) -> tuple[int, int]:
        check_task(self.config.task)
        self._device = device
        img_size = height_width(self.config.img_size, multiple=1)
        recolouring(self.config.augment, img_size, [0.5])
        if self.config.compile:
            check_compiler()
        return img_size

    def find_images(self, start: SavedCheckpoint | None) -> Images:
        """Find the images and the model, whose weights a resumed run no longer needs."""
        config = self.config
        if start is None:
            self._origin = find_model(config.model, config.weights, config.in_chans)
        else:
            settings = start.state["settings"]
            self._origin = Start(settings["model"], settings["model_args"], origin=str(start.path))
        self._suspects = None
        if config.near_duplicates is not None:
            self._suspects = find_source(config.near_duplicates, setting="near_duplicates")
        data = self._find_labels(start)
        return Images(data.train.source, {"train": data.train.source, "val": data.val.source})

    def _find_labels(self, start: SavedCheckpoint | None) -> LabelledData:
        config = self.config
        if start is None:
            labels = open_labels(config)
            kind = resolve_task(config.task, labels)
            data = find_labels(kind, config, labels)
        else:
            kind = TASKS[start.state["settings"]["task"]]
            data = stored_labels(kind, config, start)
        self._labels = data
        self.kind = kind(data.names)
        if config.head not in ("auto", *kind.heads):
            raise InputError(f"head {config.head} is not for task {kind.task}: use auto")
        if start is not None:
            config = replace(config, **{key: start.state["settings"][key] for key in kind.resolves})
        self.kind.prepare(config, data.train.labels, self._device)
        train, val = (split._replace(labels=self.kind.encode(split.labels)) for split in data[:2])
        self.data = LabelledData(train, val, data.names)
        counts = f"{len(train.source)} training, {len(val.source)} validation images"
        _log.info("found %s for %s: %s", counts, kind.task, brief(data.names, 8))
        return self.data

    def named_mean_std(self) -> Mapping[str, MeanStd]:
        images = self._origin.images
        if images is None or len(images.mean) != self.config.in_chans:
            return {"weights": imagenet_mean_std(self.config.in_chans)}
        return {"weights": (images.mean, images.std)}

    def build_model(self) -> nn.Module:
        config, resolved = self.config, self.resolved
        self.kind.check(resolved.part, config.batch_size)
        torch.manual_seed(rng.seed_for(config.seed, rng.FINETUNE, 0, 0))
        model, self._args = self.kind.build_model(
            self._origin, config.in_chans, resolved.images.img_size, config.drop_path
        )
        if config.weights == "none" and config.init == "fan_in":
            init_convnext(model)
        self.kind.scale_head(model, head_scale(config))
        if config.freeze == "backbone":
            self.kind.freeze(model)
        device, processes = resolved.world.device, resolved.world.size
        if processes > 1 and device.type == "cuda":  # torch has none for CPUs
            model = convert_sync_batchnorm(model)
        model = model.to(device)
        speed_up(model, config.compile)
        norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
        if resolved.part == 1 and any(not isinstance(part, nn.SyncBatchNorm) for part in norms):
            raise InputError(
                "the model has batch norm, but sees one image at a time: use a larger "
                "--batch_size, at least 2 × accumulate × processes"
            )
        return model

    def layer_depths(self) -> Mapping[str, int] | None:
        optim = self.config.optim
        return (
            None
            if optim.layer_decay == 1
            else self.kind.layer_depths(self.model, optim.layer_group)
        )

    def begin(self) -> None:
        config, resolved, world = self.config, self.resolved, self.resolved.world
        crop_pct, interpolation = config.augment.crop_pct, config.augment.interpolation
        self._how = replace(resolved.images, crop_pct=crop_pct, interpolation=interpolation)
        model: Any = self.model
        licence = known_license(config.weights) if world.is_main else None  # who writes it
        self._timm_config = timm_config(
            self._origin.name, self._args, model.num_features, self._how, model.pretrained_cfg,
            self.kind.names, licence,
        )  # fmt: skip
        self.ema = None if config.ema_decay is None else make_ema(model, config.ema_decay)
        set_training(model)
        if self.folder is not None:
            save_labels(self._labels, self.folder.paths)
        if config.compile:
            model.compile()  # in place: the average was copied before and stays uncompiled
        if self._suspects is not None:
            found = report_duplicates(self._suspects, self.data, config.workers, world)
            if self.folder is not None:
                write_duplicates(found, self.folder.paths.near_duplicates)

    def announcement(self) -> list[str]:
        config, origin, parameters = self.config, self._origin, list(self.model.parameters())
        total = sum(p.numel() for p in parameters) / 1e6
        trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
        lines = [
            f"{origin.name} from {origin.origin}, {trained:.3g} of {total:.3g} M weights trained",
            f"layer decay {config.optim.layer_decay:g}",
        ]
        recoloured = config.augment.color_jitter or config.augment.randaugment
        if recoloured and config.in_chans not in (1, 3):
            lines.append("randaugment and color_jitter are not used: they need 1 or 3 channels")
        if origin.images and origin.images.img_size != self.resolved.images.img_size:
            h, w = origin.images.img_size
            lines.append(
                f"the weights saw images of {h}×{w}: --img_size '[{h},{w}]' gives the same"
            )
        return lines

    def settings(self) -> dict[str, Any]:
        model = {"model": self._origin.name, "model_args": self._args}
        kind = {"task": self.kind.task, "label_names": list(self.kind.names)}
        kind |= {key: self.kind.state[key] for key in self.kind.resolves}
        return super().settings() | model | kind

    def dataset(self) -> TrainDataset:
        return self.kind.train_dataset(self.data.train, self._how, self.config)

    def restore(self, checkpoint: SavedCheckpoint) -> None:
        if self.ema is not None:
            load_model_tensors(self.ema.module, checkpoint.tensors("ema"))
        self.best = checkpoint.tensors(BEST) or None
        self.best_score = checkpoint.state["best"]
        if self.folder is not None:
            self._write_best(self.folder.paths.best)

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        how, device = self.resolved.images, self.resolved.world.device
        images = normalise(batch.images, how.mean, how.std, device, batch.valid)
        images = images.contiguous(memory_format=torch.channels_last)
        assert batch.targets is not None
        return self.kind.loss(forward, images, batch.targets_on(device))

    def after_step(self, step: int) -> None:
        if self.ema is not None:
            self.ema.update(self.model, step + EMA_AHEAD)

    def end_epoch(self, epoch: int, step: int, stop: Callable[[], bool]) -> dict[str, float]:
        """Measure the model and its average, and keep the best weights of all epochs so far.

        The scores of the averaged weights decide, if there are any.
        """
        epochs = self.resolved.plan.epochs
        if epoch % resolve_val_epochs(self.config, epochs) and epoch != epochs:
            return {}
        models = {"val": self.model}
        if self.ema is not None:
            models["ema"] = self.ema.module
        self.resolved.world.share(b for model in models.values() for b in model.buffers())
        self.model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):  # batches differ in size here
                measured = self._measure(models, stop)
        finally:
            set_training(self.model)
        name = [*models][-1]
        scores = {name: measurement.compute() for name, measurement in measured.items()}
        state = measured[name].state
        if self._keep_best(models[name], scores[name], state, epoch, step) and self.folder:
            kind = type(self.kind)(self.kind.names, state)
            figures = {
                "scores": measured[name].draw(),
                "predictions": draw_predictions(kind, self._examples.chosen),
                "worst": draw_predictions(kind, self._examples.worst()),
            }
            write_figures(figures, self.folder, step)
        self._warn_at_chance([*scores.values()], epoch)
        return {
            f"{name}_{key}": value for name, score in scores.items() for key, value in score.items()
        }

    def extra_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The average, and the best weights: a run that resumes from here forgets later ones."""
        ema = {} if self.ema is None else {"ema": self.ema.module.state_dict()}
        best = {} if self.best is None else {BEST: self.best}
        return ema | best

    def extra_state(self) -> dict[str, Any]:
        return {"best": self.best_score}

    def export(self, folder: RunFolder) -> None:
        best, out = self.best_score, folder.paths.exported
        self._write_best(out)
        if best is not None:
            scores = {key: value for key, value in best.items() if key not in NO_SCORES}
            shown = brief((f"{key} {value:.4g}" for key, value in scores.items()), 5)
            _log.info("best after epoch %d: %s", best["epoch"], shown)
            _log.info("the model for timm is in %s", out)

    @torch.no_grad()
    def _measure(
        self, models: dict[str, nn.Module], stop: Callable[[], bool]
    ) -> dict[str, Measurement]:
        """Measure each model on this process's share of the images, and keep some of the last
        model's predictions to show.

        Raises:
            Interrupted: the run has to stop.
            RunError: too many images, or all, can't be read.
        """
        run, split, device = self.resolved, self.data.val, self.resolved.world.device
        measured = {name: self.kind.measurement(run.world) for name in models}
        own = range(run.world.rank, len(split.source), run.world.size)
        even = [own[int(n)] for n in np.linspace(0, len(own) - 1, SHOWN)] if own else []
        self._examples = Examples(self.kind, self._how, even)
        bad: list[tuple[str, str]] = []
        dataset = self.kind.eval_dataset(split, self._how, self.config.max_pixels)
        size = dataset.batch_size(run.part)
        for batch, images in each_batch(dataset, device, size, run.workers, run.world):
            if stop():
                raise Interrupted
            bad += batch.bad
            if batch.targets is not None:  # else none of its images can be read
                targets = batch.targets_on(device)
                for name, model in models.items():
                    with run.autocast():
                        outputs = self.kind.infer(model, images, self._how)
                    losses = measured[name].update(outputs, targets)
                self._examples.add(batch, images, outputs, losses)
        if len(self.record_bad(bad)) == len(split.source):
            raise RunError("none of the validation images can be read: see bad_images.jsonl")
        return measured

    def _warn_at_chance(self, scores: list[dict[str, float]], epoch: int) -> None:
        """Warn once, from half of the epochs on, if the model has not begun to learn."""
        epochs = self.resolved.plan.epochs
        if self.folder is None or self._warned_at_chance or 2 * epoch < epochs:
            return
        chance = self.kind.chance(scores, self.data.val.labels)
        if chance is not None:
            self._warned_at_chance = True
            lower = self.config.optim.base_lr / LOWER_RATE
            _log.warning(
                f"the model has not learned after {epoch} of {epochs} epochs ({chance}): train it "
                f"again in another --out with --optim.base_lr {lower:g}"
            )

    def _keep_best(
        self,
        model: nn.Module,
        scores: dict[str, float],
        state: Mapping[str, Any],
        epoch: int,
        step: int,
    ) -> bool:
        """Keep these weights if they are the best so far, and return whether they are."""
        before, rank = self.best_score, self.kind.rank
        if before and rank(scores) <= rank(before):
            return False
        self.best_score = {"epoch": epoch, "step": step, STATE: dict(state), **scores}
        if self.folder is not None:
            weights = model.state_dict().items()
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
            self._write_best(self.folder.paths.best)
        return True

    def _write_best(self, out: Path) -> None:
        """Write the best weights as a timm folder; without any, remove the folder."""
        if self.best is None:
            shutil.rmtree(out, ignore_errors=True)
        else:
            assert self.best_score is not None
            kind = {TASK: self.kind.task, STATE: self.best_score.get(STATE, {})}
            self.kind.write(self.best, self._timm_config | kind, out)


NO_SCORES = {"epoch", "step", STATE}
"""Entries of the best scores in a checkpoint that are not scores."""

EMA_AHEAD = 2
"""Added to the completed steps t, so that timm's decay below is min(most, (1 + t) / (10 + t))."""


def make_ema(model: nn.Module, most: float) -> ModelEmaV3:
    """A running average of a model's weights and running statistics, in `module`.

    Args:
        model: on its device.
        most: the largest decay.
    """
    return ModelEmaV3(model, most, use_warmup=True, warmup_gamma=9, warmup_power=1)


def head_scale(config: FinetuneConfig) -> float:
    """The factor on the head's initial weights."""
    if config.head_init_scale is not None:
        return config.head_init_scale
    return 1.0 if config.weights == "none" else HEAD_SCALE


def resolve_val_epochs(config: FinetuneConfig, epochs: int) -> int:
    """Epochs between two measurements in a run of `epochs`."""
    return math.ceil(epochs / MEASUREMENTS) if config.val_epochs == "auto" else config.val_epochs
