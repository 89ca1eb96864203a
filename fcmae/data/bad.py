"""Files that can't be used: what Pillow and numpy raise on them becomes one exception."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError


class BadImage(Exception):
    """An image that can't be used; `reason` says why, in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def reading(max_pixels: int) -> Iterator[None]:
    """Turn what a broken file raises into BadImage; hold Pillow to `max_pixels` in the meantime."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more pixels than max_pixels {max_pixels}") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image of a known format") from error
    except Exception as error:  # decoders raise nearly anything, MemoryError included
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        raise BadImage(" ".join(f"{type(error).__name__}: {text}".split())) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
