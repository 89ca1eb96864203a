"""What the commands around training can be asked for. Free of torch; see fcmae/config.py."""

from dataclasses import dataclass, field
from typing import Literal

from fcmae.settings import check_range, height_width
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
