"""The layout of a run folder, defined here only."""

from pathlib import Path

BAD_IMAGES = "bad_images.jsonl"
"""Name of a list of images that could not be read: a JSON object with path and reason a line."""

WHOLE_MODEL = "task"
"""Folder in an exported backbone that holds the whole model, where that is more than a head."""


class RunPaths:
    """The paths in a run folder.

    Attributes:
        root: the folder itself.
        config: what was asked for, usable with `--config`.
        metrics: a JSON object for each logged step.
        log: the log messages.
        tensorboard: event files.
        trackers: the names by which trackers know the run.
        checkpoints: a folder for each checkpoint.
        exported: the model for timm, written when the run ends.
        best: the best weights of fine-tuning so far, as a timm folder.
        bad_images: each image that could not be read, and why.
        bad_labels: each object whose label was changed or left out, and why.
        nonfinite: each batch whose loss or gradient was not finite, with its images.
        near_duplicates: images that nearly equal one of the validation set.
        figures: plots of the validation images' scores and predictions, as .png.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.metrics = root / "metrics.jsonl"
        self.log = root / "train.log"
        self.tensorboard = root / "tb"
        self.trackers = root / "trackers.json"
        self.checkpoints = root / "checkpoints"
        self.exported = root / "exported"
        self.best = root / "best"
        self.bad_images = root / BAD_IMAGES
        self.bad_labels = root / "bad_labels.jsonl"
        self.nonfinite = root / "nonfinite.jsonl"
        self.near_duplicates = root / "near_duplicates.jsonl"
        self.figures = root / "figures"

    def images(self, part: str) -> Path:
        """The list of the images of one part of the run: `all`, `train` or `val`."""
        return self.root / f"images-{part}.npz"

    def labels(self, part: str) -> Path:
        """The labels of these images, an array (N, …) or the arrays of objects."""
        return self.root / f"labels-{part}.npy"
