"""What the commands around training can be asked for. Free of torch; see fcmae/config.py."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fcmae.config.values import check_range, height_width
from sparse.errors import InputError
from sparse.sizes import PATCH


@dataclass
class ConvertConfig:
    """Turn a pretrained sparse model into a dense one that timm loads."""

    source: str
    """Run folder, checkpoint folder or weight file: ours, the official dense releases or those of
    the official pretraining script. May be given as the first argument."""

    out: str
    """Folder to write: model.safetensors and config.json. With layout minkowski, a .pth or
    .safetensors file."""

    layout: Literal["timm", "minkowski"] = "timm"
    """timm writes a folder that timm loads; minkowski one file as the official pretraining script
    stores it, decoder included."""


@dataclass
class ReconstructConfig:
    """Draw original, masked, reconstructed and pasted pictures side by side."""

    run: str
    """Run folder of pretraining. May be given as the first argument."""

    images: str
    """Folder of images, or one image."""

    out: str
    """Picture to write, such as reconstruction.png."""

    count: int = 8
    """Images to draw, one a row; the first in the order of their paths."""

    seed: int = 0
    """Decides which patches are hidden."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_range(self, ["count"], at_least=1)
        check_range(self, ["seed"], at_least=0)


@dataclass
class SamplesConfig:
    """Write a labelled set of small images, cut offline from scikit-image's photographs."""

    out: str
    """Folder to write: train/CLASS and val/CLASS. May be given as the first argument."""

    per_class_train: int = 120
    """Training images of each class, one class a photograph."""

    per_class_val: int = 40
    """Validation images of each class, from parts of the photograph that training never sees."""

    size: int = 128
    """Side of the square images in pixels."""

    seed: int = 0
    """Decides where the crops lie."""

    def __post_init__(self) -> None:
        check_range(self, ["per_class_train", "per_class_val"], at_least=1)
        check_range(self, ["size"], at_least=PATCH)
        check_range(self, ["seed"], at_least=0)


@dataclass
class DoctorConfig:
    """Show versions and engines, check that the engines agree, and time each."""


@dataclass
class BenchConfig:
    """Time the engines side by side on this machine: images/s, peak memory, ratios."""

    json: bool = False
    """Print one JSON object and nothing else."""

    models: list[str] = field(default_factory=lambda: ["atto"])
    """Sizes to time, '[atto,tiny]'."""

    batch_size: int = 16
    """Images per step."""

    img_size: int | list[int] = 224
    """Side of the images in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    mask_ratio: float = 0.6
    """Share of the patches that is hidden, between 0 and 1."""

    rounds: int = 5
    """Timed steps of each engine, in turns; the median counts."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_range(self, ["batch_size", "rounds"], at_least=1)
        height_width(self.img_size)


@dataclass
class ProbeConfig:
    """Measure frozen features on labelled images: nearest neighbours and a linear classifier."""

    source: str
    """Run folder, checkpoint, converted folder or weight file of a ConvNeXt V1 or V2. May be
    given as the first argument."""

    data: str
    """Labelled images: a folder with train/CLASS and val/CLASS, or one folder of classes together
    with val_fraction. The classifiers learn from train and are measured on val."""

    val_fraction: float = 0.0
    """Share of one folder of classes kept to measure on, chosen by a hash of the path. 0 expects
    the folders train and val."""

    json: bool = False
    """Print one JSON object, top1 in percent, and nothing else."""

    neighbours: list[int] = field(default_factory=lambda: [5, 20])
    """Nearest neighbours that vote, one result for each number, '[5,20]'."""

    baseline: bool = False
    """Also measure random weights of the same architecture: what pretraining has to beat."""

    near_duplicates: str | None = None
    """Folder of pictures, such as the unlabeled ones of pretraining, to search for near-duplicates
    of val: they would flatter the result. null searches none."""

    other_classes: bool = False
    """Probe weights that were fine-tuned for other classes than those of data."""

    img_size: int | list[int] | None = None
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null takes what the weights were trained
    with."""

    batch_size: int = 64
    """Images at a time. Changes speed and memory only."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images; 0 reads in the main process."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_range(self, ["val_fraction"], at_least=0, below=1)
        check_range(self, ["batch_size"], at_least=1)
        if not self.neighbours or min(self.neighbours) < 1:
            raise InputError(f"neighbours {self.neighbours} must be numbers from 1, such as [5,20]")
        check_features(self)


@dataclass
class EmbedConfig:
    """Write the features of images to a file of numpy arrays."""

    source: str
    """Run folder, checkpoint, converted folder or weight file of a ConvNeXt V1 or V2. May be
    given as the first argument."""

    images: str
    """Folder of images, flat or nested, or a text file of paths."""

    out: str
    """File to write, .npz: features (N, C) float32 and paths (N)."""

    img_size: int | list[int] | None = None
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null takes what the weights were trained
    with."""

    batch_size: int = 64
    """Images at a time. Changes speed and memory only."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images; 0 reads in the main process."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_range(self, ["batch_size"], at_least=1)
        check_features(self)


@dataclass
class DiversityConfig:
    """Measure how different the channels of every block are: features that collapsed are alike."""

    source: str | list[str]
    """Run folder, checkpoint, converted folder or weight file of a ConvNeXt V1 or V2; several as
    '[A,B]'. May be given as the first argument."""

    images: str
    """Folder of images, flat or nested, or a text file of paths."""

    out: str | None = None
    """Plot to write, .png or .svg. null draws none."""

    json: bool = False
    """Print one JSON object and nothing else."""

    count: int = 256
    """Images to measure on, chosen by a hash of their paths; the paper takes 1000."""

    img_size: int | list[int] | None = None
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null takes what the weights were trained
    with."""

    batch_size: int = 32
    """Images at a time. Changes speed and memory only."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images; 0 reads in the main process."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    def __post_init__(self) -> None:
        check_range(self, ["count", "batch_size"], at_least=1)
        check_features(self)


@dataclass
class ReportConfig:
    """Write one static HTML page on a run, or on several side by side."""

    runs: str | list[str]
    """Run folder of pretraining or fine-tuning; several as '[A,B]'. May be given as the first
    arguments."""

    out: str | None = None
    """Page to write, .html. null writes report.html into the first run."""


def check_features(config: Any) -> None:
    """What all commands on frozen features share.

    Raises:
        InputError: names the setting and a value that works.
    """
    check_range(config, ["workers"], at_least=0)
    if config.img_size is not None:
        height_width(config.img_size)
