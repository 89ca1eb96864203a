"""`fcmae doctor`: check that this machine computes correctly, and what fits into its memory."""

from dataclasses import dataclass

from fcmae.config.fields import DeviceConfig, setting
from sparse.sizes import PATCH


@dataclass
class DoctorConfig(DeviceConfig):
    """Show versions, check that the engines agree, time each, and forecast memory."""

    models: list[str] = setting(["atto", "tiny", "base"])
    """Sizes whose memory to forecast, such as atto huge or '[atto,huge]'."""

    img_size: int | list[int] = setting(224, multiple=PATCH)
    """Side of the images of the forecast in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""


CONFIG = DoctorConfig
RUN = "fcmae.inspect.diagnosis:doctor"
