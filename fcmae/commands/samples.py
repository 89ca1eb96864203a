"""`fcmae samples`: write a small labelled data set."""

from dataclasses import dataclass

from fcmae.config.fields import Config, setting
from sparse.sizes import PATCH


@dataclass
class SamplesConfig(Config):
    """Write a labelled set of small images, cropped from scikit-image's photographs, offline."""

    out: str = setting(positional=True)
    """Folder to write: train/CLASS and val/CLASS."""

    per_class_train: int = setting(120, at_least=1)
    """Training images per class; each photograph is a class."""

    per_class_val: int = setting(40, at_least=1)
    """Validation images per class, from parts of the photograph that training never sees."""

    size: int = setting(128, at_least=PATCH)
    """Side of the square images in pixels."""

    seed: int = setting(0, at_least=0)
    """Seed of the crops' positions."""


CONFIG = SamplesConfig
RUN = "fcmae.data.samples:samples"
