"""`fcmae predict`: predict the labels of new images."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, setting


@dataclass
class PredictConfig(ImagesConfig):
    """Write the predictions of a fine-tuned model for each image to a CSV file."""

    source: str
    """Fine-tuning run (its best weights) or folder of weights."""

    out: str = setting()
    """CSV file to write: path, then label,score and the next most likely classes; or, where an
    image can have several, the probability of each class; or each number."""

    top: int = setting(5, at_least=1)
    """Classes per image, most likely first; fewer if the model has fewer. Only with one class
    per image."""


CONFIG = PredictConfig
RUN = "finetune.predict:predict"
