"""`fcmae bench`: compare the speed of the engines."""

from dataclasses import dataclass

from fcmae.config.fields import DeviceConfig, setting
from sparse.sizes import PATCH


@dataclass
class BenchConfig(DeviceConfig):
    """Benchmark the engines on this machine: images/s, peak memory, ratios."""

    json: bool = False
    """Print only one JSON object."""

    models: list[str] = setting(["atto"])
    """Sizes to time, such as atto tiny or '[atto,tiny]'."""

    batch_size: int = setting(16, at_least=1)
    """Images per step."""

    img_size: int | list[int] = setting(224, multiple=PATCH)
    """Side of the images in pixels, or '[HEIGHT,WIDTH]'. Multiples of 32."""

    mask_ratio: float = 0.6
    """Fraction of the patches to hide, between 0 and 1."""

    rounds: int = setting(5, at_least=1)
    """Timed steps of each engine, in turn; the median is reported."""


CONFIG = BenchConfig
RUN = "fcmae.inspect.benchmark:bench"
