"""Weights & Biases."""

import os
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers.base import remembered
from sparse.errors import InputError

PROJECT = "fcmae"


class WandB:
    """A run of Weights & Biases, in the project `WANDB_PROJECT`, else fcmae; a resumed run
    continues it. With WANDB_MODE=offline it stays in the run's folder, for `wandb sync`. If the
    process is killed, so is the one that W&B writes with, and what that had not written is missing.

    Args:
        paths: of the run.
        settings: of the run.
    """

    overwrites = False

    @staticmethod
    def check() -> None:
        import wandb

        if os.environ.get("WANDB_MODE", "online") != "online":
            return
        try:
            known = wandb.login(prompt=False, verify=False)
        except wandb.errors.Error:
            known = False
        if not known:
            raise InputError(
                "trackers 'wandb' is not logged in: run `wandb login`, or set WANDB_MODE=offline"
            )

    def __init__(self, paths: RunPaths, _first_step: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self._image = wandb.Image
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=remembered(paths, "wandb", lambda: uuid.uuid4().hex[:12]),
            name=paths.root.absolute().name,
            dir=paths.root,
            config=dict(settings),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self._run.log({name: self._image(image_HWC)}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def finish(self) -> None:
        self._run.finish()
