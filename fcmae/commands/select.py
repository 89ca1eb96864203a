"""`fcmae select`: choose the images to label next."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, ImageSizeConfig, setting


@dataclass
class SelectConfig(ImageSizeConfig, ImagesConfig):
    """Choose the images to label next: typical ones first, then ones unlike those before."""

    count: int = setting(at_least=1, example="100")
    """Number of images to choose."""

    out: str = setting()
    """CSV file to write, .csv: path, relative to images, and rank, 1 for the image to label
    first."""

    labelled: str | None = setting(None, path="a folder of images or a CSV file with a column path")
    """Images that have labels already: a folder, or a CSV file whose column path is relative to the
    file, absolute, or relative to images. Neither they nor their near-duplicates are chosen, and
    images similar to them come late. null means none."""

    contact: str | None = None
    """Contact sheet to write, .png: the chosen images row by row, ten in a row, in the order of
    their ranks. null writes none."""


CONFIG = SelectConfig
RUN = "fcmae.inspect.selecting:select"
