"""`fcmae shard`: pack images into tar files."""

from dataclasses import dataclass

from fcmae.config.fields import IMAGES, Config, setting


@dataclass
class ShardConfig(Config):
    """Pack images into tar files in WebDataset's layout, with an index; resumes if interrupted."""

    data: str | list[str] = setting(path=IMAGES, positional=True)
    """Images: a folder, flat or nested, a text file of paths, or a dataset as hf:PATH_OR_NAME;
    several as A B or '[A,B]'."""

    out: str = setting()
    """Folder to write: shard-000000.tar, … and their index."""

    per_shard: int = setting(1000, at_least=1)
    """Images in a shard."""

    classes: bool = False
    """Also write each image's class, the first folder of its path, as KEY.cls, for fine-tuning."""


CONFIG = ShardConfig
RUN = "fcmae.data.sharding:shard"
