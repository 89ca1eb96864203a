"""The published ConvNeXt V2 sizes (arXiv 2301.00808, section 4 and appendix A). Free of torch."""

from dataclasses import dataclass
from difflib import get_close_matches

from sparse.errors import InputError

PATCH = 32
"""Side of a masking patch in pixels: the encoder's total stride, so that no patch is ever cut."""

STRIDES = (4, 8, 16, 32)
"""Pixels between neighbouring sites in each of the four stages."""


@dataclass(frozen=True)
class Size:
    """Widths and block counts of the four stages; `name` is None for a size given by hand."""

    name: str | None
    depths: tuple[int, ...]
    dims: tuple[int, ...]


def _size(name: str, width: int, depths: tuple[int, int, int, int]) -> Size:
    return Size(name, depths, (width, 2 * width, 4 * width, 8 * width))


SIZES: dict[str, Size] = {
    str(size.name): size
    for size in (
        _size("atto", 40, (2, 2, 6, 2)),
        _size("femto", 48, (2, 2, 6, 2)),
        _size("pico", 64, (2, 2, 6, 2)),
        _size("nano", 80, (2, 2, 8, 2)),
        _size("tiny", 96, (3, 3, 9, 3)),
        _size("base", 128, (3, 3, 27, 3)),
        _size("large", 192, (3, 3, 27, 3)),
        _size("huge", 352, (3, 3, 27, 3)),
    )
}


def resolve_size(
    model: str, depths: list[int] | None = None, dims: list[int] | None = None
) -> Size:
    """Return the size called `model` (`atto` or `convnextv2_atto`), or one given by hand.

    Depths or dims that are given replace the named size's; where both equal a published size, the
    result carries its name.

    Raises:
        InputError: unknown name, or not four positive whole numbers.
    """
    name = model.removeprefix("convnextv2_")
    if name not in SIZES:
        near = get_close_matches(name, SIZES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"model {model!r} is not a size: {hint}use one of {', '.join(SIZES)}")
    size = SIZES[name]
    if depths is None and dims is None:
        return size
    for key, value in (("depths", depths), ("dims", dims)):
        if value is not None and (len(value) != 4 or any(int(v) != v or v < 1 for v in value)):
            raise InputError(
                f"{key} {list(value)} must be four positive whole numbers, "
                f"such as {list(getattr(size, key))}"
            )
    chosen = (tuple(depths or size.depths), tuple(dims or size.dims))
    for known in SIZES.values():
        if (known.depths, known.dims) == chosen:
            return known
    return Size(None, *chosen)
