"""The commands as Python functions: settings are keyword arguments, results are objects.

    import fcmae

    run = fcmae.pretrain(data="PHOTOS", out="runs/photos", optim={"base_lr": 3e-3})
    run.figure()
    tuned = fcmae.finetune(data="LABELLED", weights=run, out="runs/classes", epochs=30)
    model = fcmae.load(tuned)
    model(["new.jpg"])

The names and values are those of the command line: a dot is a nested dict or two underscores,
`optim__base_lr=3e-3`, and `config="FILE.yaml"` reads settings from a file.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from fcmae.cli import ENVIRONMENT, code_of, config_of
from fcmae.config.fields import check_paths, leaves, to_text
from fcmae.config.files import build
from fcmae.config.parsing import convert, read_file
from fcmae.config.values import flatten, height_width, nearest
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError

for _variable, _value in ENVIRONMENT.items():  # read when torch is loaded
    os.environ.setdefault(_variable, _value)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fcmae.data.statistics import Preprocessing


@dataclass(frozen=True)
class Run:
    """A run of pretraining or fine-tuning. It can be given wherever a path of a run can.

    Attributes:
        path: the folder.
        finished: whether it was trained to the end; if it was interrupted, the same call resumes.
    """

    path: Path
    finished: bool

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict for each logged step, as `pandas.DataFrame(run.metrics)` takes it."""
        from fcmae.train.run_folder import read_lines

        return read_lines(RunPaths(self.path).metrics)

    def figure(self, *keys: str) -> "Figure":
        """Draw numbers over the steps.

        Args:
            keys: names in `metrics`; none takes all losses.

        Raises:
            InputError: no step has one.
        """
        from matplotlib import pyplot  # a notebook shows its figures

        lines = self.metrics
        known = {key for line in lines for key, value in line.items() if isinstance(value, float)}
        if unknown := [key for key in keys if key not in known]:
            raise InputError(f"no step has {unknown[0]!r}{nearest(unknown[0], known)}")
        shown = keys or sorted(key for key in known if "loss" in key)
        figure = pyplot.figure(figsize=(7, 4), layout="constrained")
        pyplot.close(figure)  # it is kept by whoever asked for it
        axes = figure.add_subplot(xlabel="step")
        for key in shown:
            points = [(line["step"], line[key]) for line in lines if key in line]
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else "")
        axes.grid(alpha=0.3)
        if shown:
            axes.legend()
        return figure


class Model:
    """Trained weights, for images.

    Args:
        loaded: of `load_backbone` or `load_tuned`.

    Attributes:
        module: the torch module, in evaluation mode, for normalised images (B, C, H, W).
        images: how images are prepared.
        task: what it predicts; None for a backbone.
        names: of its outputs; empty for a backbone.
    """

    def __init__(self, loaded: Any) -> None:
        self.images: Preprocessing = loaded.images
        self._kind = getattr(loaded, "kind", None)
        self.module = loaded.encoder if self._kind is None else loaded.model
        self.task = None if self._kind is None else self._kind.task
        self.names: tuple[str, ...] = () if self._kind is None else self._kind.names

    def __call__(self, images: Sequence[str | os.PathLike[str]]) -> list[Any]:
        """Return what is predicted for image files, in order.

        A backbone's features (C,); logits (K,) for classes and several labels; standardised numbers
        (K,); classes (H, W) for masks; boxes, labels, scores and masks for objects.

        Raises:
            InputError: an image can't be read.
        """
        import torch

        from fcmae.config.values import MAX_PIXELS
        from fcmae.data.evaluation import EvalDataset, each_batch
        from fcmae.data.file_list import FileList
        from fcmae.data.labelled import Split
        from fcmae.inspect.embedding import pooled

        names = [os.fsencode(os.path.abspath(path)) for path in images]
        split, kind, found = Split(FileList.of("", names)), self._kind, list[Any]()
        dataset = (
            EvalDataset(split, self.images)
            if kind is None
            else kind.eval_dataset(split, self.images, MAX_PIXELS)
        )
        device = next(self.module.parameters()).device
        with torch.no_grad():
            for batch, normalised in each_batch(dataset, device, dataset.batch_size(16), 0):
                if batch.bad:
                    raise InputError(f"image {batch.bad[0][0]!r} can't be read: {batch.bad[0][1]}")
                if kind is None:
                    found += pooled(self.module, normalised)
                else:
                    found += kind.predictions(self.module, batch, normalised, self.images)
        return found


def pretrain(**settings: Any) -> Run:
    """Pretrain as `fcmae pretrain` does, with progress in a terminal or a notebook.

    Args:
        settings: see `fcmae pretrain --help`; `data` and `out` are required.

    Raises:
        InputError: a setting, the data or the folder is wrong.
        RunError: the run could not continue.
    """
    return _train("pretrain", settings)


def finetune(**settings: Any) -> Run:
    """Fine-tune as `fcmae finetune` does; see `pretrain`."""
    return _train("finetune", settings)


def load(
    source: str | os.PathLike[str],
    device: str = "auto",
    img_size: int | tuple[int, int] | None = None,
) -> Model:
    """Load a run, a folder of weights, a weight file or `hf:USER/NAME`.

    Args:
        source: what fine-tuning trained is loaded with its head; everything else as a backbone.
        device: see `--device`.
        img_size: a side or (height, width); None takes what the weights were trained with.

    Raises:
        InputError: missing, damaged or unsuitable.
    """
    from fcmae.train.processes import resolve_device
    from fcmae.weights.load import is_tuned, load_backbone

    place, on = os.fspath(source), resolve_device(device)
    reader = resolve_name("finetune.tuned:load_tuned") if is_tuned(place) else load_backbone
    sides = [*img_size] if isinstance(img_size, tuple) else img_size
    size = None if sides is None else height_width(sides, multiple=1)
    return Model(reader(place, on, size))


def _train(command: str, settings: Mapping[str, Any]) -> Run:
    config: Any = make_config(config_of(command), settings)
    check_paths(config)
    code = code_of(command)(config)
    return Run(Path(config.out), finished=code == 0)


def make_config(kind: Any, settings: Mapping[str, Any]) -> Any:
    """Build a config from keyword arguments.

    Raises:
        InputError: unknown, missing or wrong settings.
    """
    known, values = leaves(kind), dict[str, Any]()
    given = dict(settings)
    if "config" in given:
        values |= read_file(os.fspath(given.pop("config")), known)
    for name, value in flatten(given).items():
        key = name.replace("__", ".")
        if key not in known:
            raise InputError(f"unknown setting {name!r}{nearest(key, known)}")
        if isinstance(value, list | tuple):
            value = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in value]
        elif isinstance(value, os.PathLike):
            value = os.fspath(value)
        values[key] = convert(to_text(value), known[key], key)
    missing = [key for key, leaf in known.items() if leaf.default is MISSING and key not in values]
    if missing:
        raise InputError(f"missing {' and '.join(missing)}")
    return build(kind, values)
