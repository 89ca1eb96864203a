"""What the commands on a trained classifier can be asked for. Free of torch; see config.py."""

from dataclasses import dataclass
from typing import Literal

from fcmae.config.values import check_range, height_width


@dataclass
class EvaluateConfig:
    """Measure top-1, top-5 and each class on labelled images."""

    source: str
    """Run folder of fine-tuning (its best weights) or folder of weights. May be given as the first
    argument."""

    data: str
    """Labelled images: a folder with one folder a split, or one folder of classes."""

    split: str = "val"
    """Folder inside data to measure on."""

    json: bool = False
    """Print one JSON object, top1 and top5 in percent, and nothing else."""

    batch_size: int = 64
    """Images at a time. Changes speed and memory only."""

    img_size: int | list[int] | None = None
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null takes what the model was trained
    with."""

    out: str | None = None
    """File for the confusion matrix, .png or .csv. null writes none."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images; 0 reads in the main process."""

    def __post_init__(self) -> None:
        check_range(self, ["batch_size"], at_least=1)
        check_range(self, ["workers"], at_least=0)
        if self.img_size is not None:
            height_width(self.img_size, multiple=1)


@dataclass
class PredictConfig:
    """Write the best classes of each image to a CSV file."""

    source: str
    """Run folder of fine-tuning (its best weights) or folder of weights. May be given as the first
    argument."""

    images: str
    """Folder of images, flat or nested, or a text file of paths; labels are not needed."""

    out: str
    """CSV file to write: path,label,score and then the next best classes."""

    top: int = 5
    """Classes per image, best first; fewer where the model knows fewer."""

    batch_size: int = 64
    """Images at a time. Changes speed and memory only."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""

    workers: Literal["auto"] | int = "auto"
    """Processes that read images; 0 reads in the main process."""

    def __post_init__(self) -> None:
        check_range(self, ["top", "batch_size"], at_least=1)
        check_range(self, ["workers"], at_least=0)
