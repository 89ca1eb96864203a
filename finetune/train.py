"""Fine-tuning as a job for the training script: from labelled images to a trained model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fcmae import rng
from fcmae.config.values import height_width
from fcmae.data.duplicates import Duplicate, report_duplicates, write_duplicates
from fcmae.data.evaluation import EvalDataset, batches_of
from fcmae.data.loader import make_loader
from fcmae.data.statistics import MeanStd, Preprocessing, imagenet_mean_std
from fcmae.train.checkpoint import SavedCheckpoint
from fcmae.train.optimizer import make_optimizer
from fcmae.train.plan import AutoEpochs, Plan
from fcmae.train.run_folder import RunFolder
from fcmae.train.script import Images, Resolved, train
from fcmae.weights.export import timm_config
from finetune.augment import TrainDataset, recolouring
from finetune.blocks import speed_up
from finetune.config import FinetuneConfig
from finetune.model import (
    Start,
    build_model,
    check_part,
    classifier_names,
    find_model,
    freeze_backbone,
    init_convnext,
    scale_classifier,
)
from finetune.optim import layer_depths
from finetune.task import FinetuneTask
from finetune.tasks import TASKS
from finetune.tasks.base import LabelKind
from sparse.encoder import check_compiler

HEAD_SCALE = 0.001
"""What `head_init_scale: null` takes with pretrained weights (P Tables 9 to 11)."""

LEAST_WARMUP = 100
"""Steps of warm-up, unless it is asked for or half of the run is shorter. A steeper rise can take
away what tells images apart: see docs/experiments.md, Short runs."""

MEASUREMENTS = 30
"""On the validation images, with `val_epochs: auto`."""

_log = logging.getLogger(__name__)


def finetune(config: FinetuneConfig) -> int:
    """Fine-tune, or resume the run in `config.out`; see `fcmae.train.script.train`."""
    return train(Finetuning(config, TASKS["classify"](config)))


class Finetuning:
    """See `fcmae.train.script.Job`.

    Args:
        config: what was asked.
        kind: the kind of label.
    """

    command = "finetune"
    auto_epochs = AutoEpochs(crops=60_000, fewest=20, most=200)

    def __init__(self, config: FinetuneConfig, kind: LabelKind) -> None:
        self.config, self.kind = config, kind
        self.least_warmup = LEAST_WARMUP if config.freeze == "none" else 0
        self.weight_copies = 1 + (config.ema_decay is not None)  # the best ones, and the average
        self._duplicates: list[Duplicate] | None = None

    def check(self, device: torch.device) -> tuple[int, int]:
        img_size = height_width(self.config.img_size, multiple=1)
        recolouring(self.config.augment, img_size, [0.5])
        if self.config.compile:
            check_compiler()
        return img_size

    def find_images(self, start: SavedCheckpoint | None) -> Images:
        """Find the images and the model, whose weights a run that resumes no longer needs."""
        config = self.config
        if start is None:
            self._origin = find_model(config.model, config.weights, config.in_chans)
        else:
            settings = start.state["settings"]
            self._origin = Start(settings["model"], settings["model_args"], origin=str(start.path))
        data = self.kind.find(start)
        return Images(data.train.source, {"train": data.train.source, "val": data.val.source})

    def named_mean_std(self) -> Mapping[str, MeanStd]:
        images = self._origin.images
        if images is None or len(images.mean) != self.config.in_chans:
            return {"weights": imagenet_mean_std(self.config.in_chans)}
        return {"weights": (list(images.mean), list(images.std))}

    def build_model(self, resolved: Resolved) -> nn.Module:
        config = self.config
        self.kind.check(resolved.part)
        torch.manual_seed(rng.seed_for(config.seed, rng.FINETUNE, 0, 0))
        model, self._args = build_model(
            self._origin, self.kind.outputs, config.in_chans, resolved.images.img_size,
            config.drop_path,
        )  # fmt: skip
        if config.weights == "none" and config.init == "fan_in":
            init_convnext(model)
        scale_classifier(model, head_scale(config))
        if config.freeze == "backbone":
            freeze_backbone(model)
        model = model.to(resolved.world.device)
        speed_up(model, config.compile)
        check_part(model, resolved.part)
        self._model = model
        return model

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optim = self.config.optim
        depths = None if optim.layer_decay == 1 else layer_depths(model, optim.layer_group)
        return make_optimizer(model, optim, depths)

    def prepare(self, resolved: Resolved) -> None:
        config = self.config
        if config.near_duplicates is not None:
            self._duplicates = report_duplicates(
                config.near_duplicates, self.kind.data, config.workers, resolved.world
            )

    def make_task(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        resolved: Resolved,
        plan: Plan,
        folder: RunFolder | None,
    ) -> FinetuneTask:
        config, world, val = self.config, resolved.world, self.kind.data.val
        dataset = EvalDataset(val, self._images(resolved), config.max_pixels)
        batches = batches_of(len(dataset), resolved.part, world.rank, world.size)
        validation = make_loader(dataset, batches, resolved.workers, world.device.type == "cuda")
        self._task = FinetuneTask(
            config, self.kind, model, optimizer, resolved,
            plan.epochs, resolve_val_epochs(config, plan.epochs), validation,
            self._timm_config(resolved), folder,
        )  # fmt: skip
        if config.compile:
            model.compile()  # in place: the average was copied before, and stays as it is
        if folder is not None and self._duplicates is not None:
            write_duplicates(self._duplicates, folder.paths.near_duplicates)
        if folder is not None and resolved.start is None:
            self._task.write_best(folder.paths.best)  # removes what a run that never saved wrote
        return self._task

    def settings(self) -> dict[str, Any]:
        return {
            "model": self._origin.name, "model_args": self._args, **self.kind.describe()
        }  # fmt: skip

    def announcement(self, resolved: Resolved, plan: Plan) -> list[str]:
        config, origin, parameters = self.config, self._origin, list(self._model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
        share = f", of which the head is trained ({trained:.3g} M)"
        lines = [
            f"{origin.name} from {origin.origin}: {sum(p.numel() for p in parameters) / 1e6:.1f} M "
            f"weights{'' if config.freeze == 'none' else share}",
            f"layer decay {config.optim.layer_decay:g}",
        ]
        recoloured = config.augment.color_jitter or config.augment.randaugment
        if recoloured and config.in_chans not in (1, 3):
            lines.append("randaugment and color_jitter need 1 or 3 channels and are not used")
        if origin.images is not None and origin.images.img_size != resolved.images.img_size:
            height, width = origin.images.img_size
            lines.append(
                f"the weights saw images of {height}×{width}: --img_size '[{height},{width}]' "
                "gives the same"
            )
        return lines

    def dataset(self, resolved: Resolved) -> TrainDataset:
        return TrainDataset(self.kind.data.train, self._images(resolved), self.config)

    def export(self, folder: RunFolder) -> None:
        self._task.write_best(folder.paths.exported)
        best = self._task.best_score
        if best is not None:
            _log.info(
                "best after epoch %d: %s; the model for timm is in %s", best["epoch"],
                self.kind.summary(best), folder.paths.exported,
            )  # fmt: skip

    def _timm_config(self, resolved: Resolved) -> dict[str, Any]:
        """The config.json of the model that the run exports."""
        model: Any = self._model
        classifier = classifier_names(model)
        return timm_config(
            self._origin.name,
            self._args,
            int(model.num_features),
            self._images(resolved),
            self.kind.describe().get("label_names", ()),
            classifier[0] if len(classifier) == 1 else list(classifier),
            model.pretrained_cfg.get("first_conv"),
        )

    def _images(self, resolved: Resolved) -> Preprocessing:
        """How images are prepared for evaluation."""
        augment = self.config.augment
        return replace(
            resolved.images, crop_pct=augment.crop_pct, interpolation=augment.interpolation
        )


def head_scale(config: FinetuneConfig) -> float:
    """The factor on the head's initial weights."""
    if config.head_init_scale is not None:
        return config.head_init_scale
    return 1.0 if config.weights == "none" else HEAD_SCALE


def resolve_val_epochs(config: FinetuneConfig, epochs: int) -> int:
    """Epochs between two measurements, of a run of so many."""
    if config.val_epochs != "auto":
        return int(config.val_epochs)
    return math.ceil(epochs / MEASUREMENTS)
