"""Settings as plain dicts: flattening, comparison, suggestions for keys. Does not import torch."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from sparse.errors import InputError
from sparse.sizes import PATCH

MAX_PIXELS = 179_000_000
"""Default size, in pixels, of the largest image that is decoded."""


def height_width(
    img_size: int | list[int], multiple: int = PATCH, name: str = "img_size"
) -> tuple[int, int]:
    """Return (height, width) in pixels for one side or a pair.

    Raises:
        InputError: not one or two positive multiples of `multiple`; names the nearest two.
    """
    sides = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    if len(sides) != 2:
        raise InputError(f"{name} {sides} must be one side or [height,width], such as [96,160]")
    for side in sides:
        if side < multiple or side % multiple:
            low = max(side // multiple, 1) * multiple
            rule = f"a multiple of {multiple}: use {low} or {low + multiple}"
            rule = rule if multiple > 1 else "positive: use 224"
            raise InputError(f"{name} {side} must be {rule}")
    return sides[0], sides[1]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{prefix}{key}"
        flat |= flatten(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return flat


def nearest(key: str, known: Iterable[str], dashes: str = "") -> str:
    """Return '; did you mean …?' for a misspelt key, or '' if no key is close.

    A key without its group or one word of a longer name is close: `lr` means `optim.base_lr`.
    """
    names = list(known)
    wanted = key.replace("-", "_")
    last = wanted.split(".")[-1]
    full = {name.split(".")[-1]: name for name in reversed(names)}
    near = [
        *([full[last]] if last in full else []),
        *get_close_matches(wanted, names, n=1),
        *(full[short] for short in get_close_matches(last, full, n=1)),
        *(name for name in names if last in name.split(".")[-1].split("_")),
    ]
    return f"; did you mean {dashes}{near[0]}?" if near else ""


def differences(
    asked: dict[str, Any], stored: dict[str, Any], runtime_keys: frozenset[str]
) -> list[tuple[str, Any, Any]]:
    """List (key, was, now) for settings that change results and differ; nested keys are dotted."""
    was, now = flatten(stored), flatten(asked)
    return [
        (key, was.get(key), now.get(key))
        for key in dict.fromkeys([*was, *now])
        if key.split(".")[0] not in runtime_keys and was.get(key) != now.get(key)
    ]
