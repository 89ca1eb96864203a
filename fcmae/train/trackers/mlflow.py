"""MLflow."""

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fcmae.train.run_paths import RunPaths
from fcmae.train.trackers.base import remembered

EXPERIMENT = "fcmae"
FILE_STORE = "MLFLOW_ALLOW_FILE_STORE"
"""Without it MLflow refuses folders."""


class MLflow:
    """A run of MLflow, in the experiment `MLFLOW_EXPERIMENT_NAME`, else fcmae; a resumed run
    continues it. Records go to MLFLOW_TRACKING_URI, else to `mlruns` in the run's folder.

    Args:
        paths: of the run.
        settings: of the run.
    """

    overwrites = False

    @staticmethod
    def check() -> None:
        import mlflow  # noqa: F401

    def __init__(self, paths: RunPaths, _first_step: int, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault(FILE_STORE, "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        folder = (paths.root.absolute() / "mlruns").as_uri()
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", folder))
        self._client: Any = client

        def begin() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            known = client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else client.create_experiment(name)
            run = client.create_run(experiment, run_name=paths.root.absolute().name).info.run_id
            params = [Param(_allowed(key), str(value)) for key, value in settings.items()]
            client.log_batch(run, params=params)
            return str(run)

        self._run = remembered(paths, "mlflow", begin)
        client.update_run(self._run, "RUNNING")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        entries = [self._metric(_allowed(k), v, now, step) for k, v in metrics.items()]
        self._client.log_batch(self._run, metrics=entries)

    def image(self, name: str, image_HWC: np.ndarray, step: int) -> None:
        self._client.log_image(self._run, image_HWC, key=_allowed(name), step=step)

    def flush(self) -> None:
        """It writes each record at once."""

    def finish(self) -> None:
        self._client.set_terminated(self._run)


def _allowed(name: str) -> str:
    """A name without characters that MLflow refuses."""
    return re.sub(r"[^\w/.\- :]", "_", name, flags=re.ASCII)
