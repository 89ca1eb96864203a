"""`fcmae doctor`: check that this machine computes correctly, what fits, and what images are."""

from dataclasses import dataclass
from typing import Literal

from fcmae.config.fields import IMAGES, DeviceConfig, setting
from fcmae.config.values import MAX_PIXELS
from sparse.sizes import PATCH


@dataclass
class DoctorConfig(DeviceConfig):
    """Show versions, check the engines, time each, forecast memory, and look at images."""

    models: list[str] = setting(["atto", "tiny", "base"])
    """Sizes whose memory to forecast, such as atto huge or '[atto,huge]'."""

    img_size: int | list[int] = setting(224, multiple=PATCH)
    """Side of the images of the forecast in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    data: str | list[str] | None = setting(None, path=IMAGES)
    """Images to look at: formats, sizes, and how fast they are read against how fast a model
    trains. null looks at none."""

    in_chans: int = setting(3, at_least=1)
    """Input channels, as for `fcmae pretrain`."""

    bands: list[int] | None = setting(None, at_least=1, example="'[4,3,2]'")
    """Bands of the images, as for `fcmae pretrain`."""

    nodata: Literal["auto", "none", "alpha"] | float = setting("auto")
    """Pixels without a value, as for `fcmae pretrain`."""

    window: int | None = setting(None, at_least=32, example="1024")
    """Side of the part of an image that is read, as for `fcmae pretrain`."""

    max_pixels: int = setting(MAX_PIXELS, at_least=1)
    """Largest image to decode, in pixels."""


CONFIG = DoctorConfig
RUN = "fcmae.inspect.diagnosis:doctor"
