"""`fcmae predict`: predict the labels of new images."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, setting
from sparse.sizes import PATCH


@dataclass
class PredictConfig(ImagesConfig):
    """Write the predictions of a fine-tuned model for each image."""

    source: str
    """Fine-tuning run (its best weights) or folder of weights."""

    out: str = setting()
    """Folder to write masks to; JSON file of COCO's results, for boxes and objects; or CSV file:
    path, then label,score and the next most likely classes; or, where an image can have several,
    the probability of each class; or each number."""

    overlay: str | None = None
    """Folder to write the images to, as PNG, with their predictions drawn on them."""

    tile: int | None = setting(None, multiple=PATCH)
    """Side in pixels of the windows in which masks or objects of large images are computed, to
    bound the memory; they overlap by a third. null computes images whole, but masks of those more
    than twice the size of the crops in training in windows of that size."""

    top: int = setting(5, at_least=1)
    """Classes per image, most likely first; fewer if the model has fewer. Only with one class
    per image."""


CONFIG = PredictConfig
RUN = "finetune.predict:predict"
