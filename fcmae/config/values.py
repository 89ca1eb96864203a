"""Configs as plain dicts: made, flattened, compared. Free of torch."""

from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from sparse.errors import InputError
from sparse.sizes import PATCH

Kind = TypeVar("Kind")

MAX_PIXELS = 179_000_000
"""Largest image that is decoded, in pixels, where no setting says otherwise."""


def height_width(img_size: int | list[int], multiple: int = PATCH) -> tuple[int, int]:
    """Return (height, width) in pixels of a side or a pair.

    Raises:
        InputError: not one or two positive multiples of `multiple`; names the nearest two.
    """
    sides = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
    if len(sides) != 2:
        raise InputError(f"img_size {sides} must be one side or [height,width], such as [96,160]")
    for side in sides:
        if side < multiple or side % multiple:
            low = max(side // multiple, 1) * multiple
            rule = f"must be a multiple of {multiple}: take {low} or {low + multiple}"
            raise InputError(
                f"img_size {side} {rule if multiple > 1 else 'must be positive: take 224'}"
            )
    return sides[0], sides[1]


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain nested dicts, in the order of its fields."""
    return asdict(config)


def from_dict(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Build a config of type `kind` from nested dicts; keys left out take their defaults.

    Raises:
        InputError: unknown key (names the nearest), missing one, or a number out of range.
    """
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise InputError(f"unknown key {key!r}{nearest(key, known)}")
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{name} is missing")
    return kind(
        **{
            key: from_dict(known[key].type, value)  # type: ignore[arg-type]
            if is_dataclass(known[key].type)
            else value
            for key, value in values.items()
        }
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def nearest(key: str, known: Iterable[str], dashes: str = "") -> str:
    """Return '; did you mean …?' for a misspelt key, or '' where none is near.

    A key without its group, or one word of a longer name, counts as near: `lr` is `optim.base_lr`.
    """
    names = list(known)
    wanted = key.replace("-", "_")
    last = wanted.split(".")[-1]
    near = (
        [name for name in names if name.split(".")[-1] == last]
        or get_close_matches(wanted, names, n=1)
        or get_close_matches(last, [name.split(".")[-1] for name in names], n=1)
        or [name for name in names if last in name.split(".")[-1].split("_")]
    )
    if not near:
        return ""
    full = next(name for name in names if name == near[0] or name.split(".")[-1] == near[0])
    return f"; did you mean {dashes}{full}?"


def differences(
    asked: dict[str, Any], stored: dict[str, Any], runtime_keys: frozenset[str]
) -> list[tuple[str, Any, Any]]:
    """List (key, was, now) of the settings that change results and differ; nested keys dotted."""
    was, now = flatten(stored), flatten(asked)
    return [
        (key, was.get(key), now.get(key))
        for key in dict.fromkeys([*was, *now])
        if key.split(".")[0] not in runtime_keys and was.get(key) != now.get(key)
    ]
