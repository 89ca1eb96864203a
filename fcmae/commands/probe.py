"""`fcmae probe`: how good frozen features are."""

from dataclasses import dataclass

from fcmae.config.fields import IMAGES, ImageSizeConfig, SourceConfig, setting


@dataclass
class ProbeConfig(ImageSizeConfig, SourceConfig):
    """Measure frozen features on labelled images: nearest neighbours and a linear classifier."""

    data: str = setting(path="a folder with train/CLASS and val/CLASS, or one folder of classes")
    """Labelled images: a folder with train/CLASS and val/CLASS, or one folder of classes together
    with val_fraction. The classifiers learn from train and are measured on val."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2")
    """Share of one folder of classes kept to measure on, chosen by a hash of the path. 0 expects
    the folders train and val."""

    json: bool = False
    """Print one JSON object, top1 in percent, and nothing else."""

    neighbours: list[int] = setting([5, 20], at_least=1)
    """Nearest neighbours that vote, one result for each number, '[5,20]'."""

    baseline: bool = False
    """Also measure random weights of the same architecture: what pretraining has to beat."""

    near_duplicates: str | None = setting(None, path=IMAGES)
    """Folder of images, such as the unlabeled ones of pretraining, to search for near-duplicates
    of val: they would flatter the result. null searches none."""

    other_classes: bool = False
    """Probe weights that were fine-tuned for other classes than those of data."""


CONFIG = ProbeConfig
RUN = "fcmae.inspect.probing:probe"
