"""`fcmae embed`: write features of images as arrays."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, ImageSizeConfig, setting


@dataclass
class EmbedConfig(ImageSizeConfig, ImagesConfig):
    """Write the features of images to a file of NumPy arrays."""

    out: str = setting()
    """NumPy file to write, .npz: features (N, C), float32, and paths (N)."""


CONFIG = EmbedConfig
RUN = "fcmae.inspect.embedding:embed"
