"""Files that can't be used: what Pillow and numpy raise on them, made one exception."""

import struct
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, UnidentifiedImageError

DECODE_ERRORS = (
    OSError,  # missing, cut short, of no known format, refused by a codec
    SyntaxError,  # Pillow's word for a malformed header or chunk
    RuntimeError,  # AVIF's refusals
    ValueError,  # bad sizes, bands, text chunks over a limit; .npy headers
    TypeError,  # tags of an unexpected type (TIFF, EXIF)
    KeyError,  # tags or modes that are not there
    IndexError,  # directories and palettes cut short
    AttributeError,  # decoders that a malformed file left unset
    ArithmeticError,  # sizes that overflow C integers, rationals over zero
    EOFError,  # no frame
    AssertionError,  # what Pillow thought can't be
    struct.error,  # fields cut short
    tokenize.TokenError,  # numpy, on a .npy header that is no Python literal
    zlib.error,  # broken deflate streams outside PNG's pixels
    MemoryError,  # sizes that a lying header promises
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow and numpy raise on broken files: found by fuzzing, or raised in their source."""


class BadImage(Exception):
    """A picture that can't be used; `reason` says why, in one line."""

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
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"more pixels than max_pixels {max_pixels}") from error
    except UnidentifiedImageError as error:
        raise BadImage("not a picture of a known format") from error
    except DECODE_ERRORS as error:
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        raise BadImage(" ".join(f"{type(error).__name__}: {text}".split())) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit
