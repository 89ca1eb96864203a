"""`fcmae predict`: the classes of new images."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, setting


@dataclass
class PredictConfig(ImagesConfig):
    """Write the best classes of each image to a CSV file."""

    source: str
    """Run folder of fine-tuning (its best weights) or folder of weights."""

    out: str = setting()
    """CSV file to write: path,label,score and then the next best classes."""

    top: int = setting(5, at_least=1)
    """Classes per image, best first; fewer where the model knows fewer."""


CONFIG = PredictConfig
RUN = "finetune.predict:predict"
