"""`fcmae reconstruct`: draw how a pretrained model fills hidden patches."""

from dataclasses import dataclass

from fcmae.config.fields import DeviceConfig, setting


@dataclass
class ReconstructConfig(DeviceConfig):
    """Draw original, masked and reconstructed images side by side, with the mean of each patch."""

    run: str = setting(path="the folder of a run", positional=True)
    """Run folder of a pretraining run."""

    images: str = setting(path="a folder of images, or one image")
    """Folder of images, or one image."""

    out: str = setting()
    """Figure to write, such as reconstruction.png."""

    count: int = setting(8, at_least=1)
    """Number of images to draw, one per row: the first in the order of their paths."""

    seed: int = setting(0, at_least=0)
    """Seed of the masks."""


CONFIG = ReconstructConfig
RUN = "fcmae.inspect.reconstructing:reconstruct"
