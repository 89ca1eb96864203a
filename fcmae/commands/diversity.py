"""`fcmae diversity`: measure whether features have collapsed."""

from dataclasses import KW_ONLY, dataclass

from fcmae.config.fields import IMAGES, WEIGHTS, ImageSizeConfig, LoaderConfig, setting


@dataclass
class DiversityConfig(ImageSizeConfig, LoaderConfig):
    """Measure how different the channels of every block are; collapsed channels are similar."""

    source: str | list[str] = setting(path=WEIGHTS, positional=True)
    """Run folder, checkpoint, converted folder or weight file of a ConvNeXt V1 or V2; several as
    A B or '[A,B]'."""

    images: str = setting(path=IMAGES)
    """Folder of images, flat or nested, or a text file of paths."""

    out: str | None = None
    """Figure to write, .png or .svg. null writes none."""

    maps: str | None = None
    """Figure to write, .png: maps of 64 channels of a block on the first three images. null writes
    none."""

    block: str | None = None
    """Block that maps draws, such as stages.2.blocks.5. null takes the last one of the third
    stage."""

    json: bool = False
    """Print only one JSON object."""

    count: int = setting(256, at_least=1)
    """Number of images to use, chosen by a hash of their paths; the paper uses 1000."""

    _: KW_ONLY

    batch_size: int = 32


CONFIG = DiversityConfig
RUN = "fcmae.inspect.diversity:diversity"
