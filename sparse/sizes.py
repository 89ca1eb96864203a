"""The published ConvNeXt V2 sizes (arXiv 2301.00808, section 4 and appendix A), without torch."""

from dataclasses import dataclass

from sparse.errors import InputError, did_you_mean

PATCH = 32
"""The paper's side of a masking patch in pixels: the encoder's total stride, so no patch is ever
split."""

SIDES = (8, 4, 2, 1)
"""Sites along a patch's side in each of the four stages, whatever its side in pixels."""


@dataclass(frozen=True)
class Size:
    """Widths and block counts of the four stages; `name` is None for a custom size."""

    name: str | None
    depths: tuple[int, ...]
    dims: tuple[int, ...]


SIZES = {
    name: Size(name, depths, (width, 2 * width, 4 * width, 8 * width))
    for name, width, depths in (
        ("atto", 40, (2, 2, 6, 2)),
        ("femto", 48, (2, 2, 6, 2)),
        ("pico", 64, (2, 2, 6, 2)),
        ("nano", 80, (2, 2, 8, 2)),
        ("tiny", 96, (3, 3, 9, 3)),
        ("base", 128, (3, 3, 27, 3)),
        ("large", 192, (3, 3, 27, 3)),
        ("huge", 352, (3, 3, 27, 3)),
    )
}


def resolve_size(
    model: str, depths: list[int] | None = None, dims: list[int] | None = None
) -> Size:
    """Return the size named `model` (`atto` or `convnextv2_atto`), or a custom one.

    Given depths or dims replace those of the named size. If both equal a published size, the result
    has its name.

    Raises:
        InputError: unknown name, or not four positive integers.
    """
    name = model.removeprefix("convnextv2_")
    if name not in SIZES:
        raise InputError(f"model {model!r} is not a size: {did_you_mean(name, SIZES)}")
    size = SIZES[name]
    for key, value in (("depths", depths), ("dims", dims)):
        if value is not None and (len(value) != 4 or any(int(v) != v or v < 1 for v in value)):
            own = list(getattr(size, key))
            raise InputError(f"{key} {value} must be four positive integers, such as {own}")
    chosen = (tuple(depths or size.depths), tuple(dims or size.dims))
    known = (size for size in SIZES.values() if (size.depths, size.dims) == chosen)
    return next(known, Size(None, *chosen))
