"""`fcmae predict`: classify new images."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, setting


@dataclass
class PredictConfig(ImagesConfig):
    """Write the most likely classes of each image to a CSV file."""

    source: str
    """Fine-tuning run (its best weights) or folder of weights."""

    out: str = setting()
    """CSV file to write: path,label,score, followed by the next most likely classes."""

    top: int = setting(5, at_least=1)
    """Classes per image, most likely first; fewer if the model has fewer."""


CONFIG = PredictConfig
RUN = "finetune.predict:predict"
