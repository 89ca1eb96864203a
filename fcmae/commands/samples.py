"""`fcmae samples`: a small labelled data set."""

from dataclasses import dataclass

from fcmae.config.fields import Config, setting
from sparse.sizes import PATCH


@dataclass
class SamplesConfig(Config):
    """Write a labelled set of small images, cut offline from scikit-image's photographs."""

    out: str = setting(positional=True)
    """Folder to write: train/CLASS and val/CLASS."""

    per_class_train: int = setting(120, at_least=1)
    """Training images of each class, one class per photograph."""

    per_class_val: int = setting(40, at_least=1)
    """Validation images of each class, from parts of the photograph that training never sees."""

    size: int = setting(128, at_least=PATCH)
    """Side of the square images in pixels."""

    seed: int = setting(0, at_least=0)
    """Decides where the crops lie."""


CONFIG = SamplesConfig
RUN = "fcmae.data.samples:samples"
