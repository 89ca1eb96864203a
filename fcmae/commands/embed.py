"""`fcmae embed`: write features of images as arrays."""

from dataclasses import dataclass

from fcmae.config.fields import ImagesConfig, ImageSizeConfig, setting


@dataclass
class EmbedConfig(ImageSizeConfig, ImagesConfig):
    """Write the features of images to a file of NumPy arrays."""

    out: str = setting()
    """NumPy file to write, .npz: features (N, C), float32, and paths (N)."""

    tensorboard: str | None = None
    """Folder to write for TensorBoard's projector, a map of the images: features, names, the first
    folder of each path as the label, and thumbnails; of more than 16,384 images, a sample. null
    writes none."""


CONFIG = EmbedConfig
RUN = "fcmae.inspect.embedding:embed"
