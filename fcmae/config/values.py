"""Checks of config values, and configs to and from YAML. Free of torch."""

import math
import operator
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fcmae.atomic import atomic_write
from sparse.errors import InputError
from sparse.sizes import PATCH

Config = TypeVar("Config")

EXAMPLES = {
    "img_size": "224 or '[96,160]'", "depths": "'[2,2,6,2]'", "dims": "'[40,80,160,320]'",
    "val_fraction": "0.2", "head_init_scale": "1", "layer_scale": "1e-6", "clip_grad": "1.0",
    "crop_scale": "'[0.2,1.0]'", "crop_ratio": "'[0.75,1.3333]'", "betas": "'[0.9,0.95]'",
}  # fmt: skip
"""Values that work, by the last part of a setting's name, where its default is none to go by."""

MAX_PIXELS = 179_000_000
"""Largest picture that is decoded, in pixels, where no setting says otherwise."""


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


def check_range(
    config: object,
    names: Iterable[str],
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    prefix: str = "",
) -> None:
    """Raise InputError if a number named in `names` is out of range; None and words pass."""
    wanted = [
        (limit, word, holds)
        for limit, word, holds in (
            (at_least, "at least", operator.ge),
            (above, "above", operator.gt),
            (at_most, "at most", operator.le),
            (below, "below", operator.lt),
        )
        if limit is not None
    ]
    for name in names:
        value = getattr(config, name)
        if value is None or isinstance(value, str):
            continue
        if not all(holds(value, limit) for limit, _, holds in wanted):  # catches NaN too
            rule = " and ".join(
                "finite" if limit == float("inf") else f"{word} {limit}"
                for limit, word, _ in wanted
            )
            default = EXAMPLES.get(name) or getattr(type(config), name, None)
            example = "" if default is None else f", such as {default}"
            raise InputError(f"{prefix}{name} {value} must be {rule}{example}")


def check_optim(optim: Any) -> None:
    """Check what the optimizer settings of pretraining and fine-tuning have in common."""
    infinity = float("inf")
    check_range(optim, ["base_lr", "clip_grad"], above=0, below=infinity, prefix="optim.")
    check_range(
        optim, ["weight_decay", "warmup_epochs"], at_least=0, below=infinity, prefix="optim."
    )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise InputError(
            f"optim.betas {optim.betas} must be two numbers from 0 to below 1, such as [0.9,0.95]"
        )


def check_crop(augment: Any) -> None:
    """Check `crop_scale`, `crop_ratio`, and `mean` and `std` that are given by hand."""
    scale, ratio, std = augment.crop_scale, augment.crop_ratio, augment.std
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise InputError(
            f"augment.crop_scale {scale} must be two shares above 0 and up to 1, the smaller "
            "first, such as [0.2,1.0]"
        )
    if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < float("inf"):
        raise InputError(
            f"augment.crop_ratio {ratio} must be two positive numbers, the smaller first, "
            "such as [0.75,1.3333]"
        )
    if not isinstance(augment.mean, str) and not all(map(math.isfinite, augment.mean)):
        raise InputError(f"augment.mean {augment.mean} must be finite, such as [0.485,0.456,0.406]")
    if not isinstance(std, str) and not all(0 < value < math.inf for value in std):
        raise InputError(
            f"augment.std {std} must be positive and finite, such as [0.229,0.224,0.225]"
        )


def check_channels(augment: Any, in_chans: int) -> None:
    """Check that a mean or std given by hand has one number a channel."""
    for name in ("mean", "std"):
        values = getattr(augment, name)
        if not isinstance(values, str) and len(values) != in_chans:
            example = "[" + ",".join(["0.5"] * in_chans) + "]"
            raise InputError(
                f"augment.{name} {values} must have one number for each of the "
                f"{in_chans} channels (in_chans), such as {example}"
            )


def check_runtime(config: Any) -> None:
    """Check the settings that do not change results, which every training command has."""
    check_range(config, ["checkpoint_steps", "log_steps", "max_pixels"], at_least=1)
    check_range(config, ["checkpoint_minutes", "workers", "max_nonfinite"], at_least=0)
    check_range(config, ["keep_checkpoints"], at_least=2)


_IMAGES = "a folder of images or a text file of paths"
_WEIGHTS = "a run, a folder of weights or a weight file"

_PATHS = {
    "data": _IMAGES, "images": _IMAGES, "near_duplicates": _IMAGES, "probe.data": _IMAGES,
    "source": _WEIGHTS, "init_from": _WEIGHTS, "weights": f"none, {_WEIGHTS}",
    "run": "the folder of a run", "runs": "the folder of a run",
    "resume": "auto, never or the folder of a checkpoint",
}  # fmt: skip
"""Settings that hold a path to read, by dotted key, and what they take."""

_WORDS = {"weights": ("none",), "resume": ("auto", "never")}
"""What some of them take that is not a path."""


def check_paths(config: Any) -> None:
    """Raise InputError if a path that a command is to read does not exist.

    Words such as `none`, URLs and patterns pass. So does a run that has checkpoints: whether it
    still needs the files it started from is decided where it resumes.
    """
    values = flatten(to_dict(config))
    if "resume" in values and Path(values["out"], "checkpoints").is_dir():
        return
    for key, rule in _PATHS.items():
        value = values.get(key)
        for path in [value] if isinstance(value, str) else value or []:
            elsewhere = "://" in path or path.startswith("hf:") or "{" in path
            if not (elsewhere or path in _WORDS.get(key, ()) or _exists(path)):
                raise InputError(f"{key} {path!r} does not exist: give {rule}")


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, an unknown user
        return False


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as plain nested dicts, in the order of its fields."""
    return asdict(config)


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
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


class _PlainLoader(yaml.SafeLoader):
    """YAML as people mean it: 6e-3 is a number, a date is a text, and there are no aliases.

    A few lines of aliases can stand for gigabytes.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own attribute
        first: [(tag, rule) for tag, rule in rules if not tag.endswith(":timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)


class _PlainDumper(yaml.SafeDumper):
    """Quotes each text that _PlainLoader would take for a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape the line breaks that PyYAML writes as they are and reads back as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_PlainDumper.add_representer(str, _quoted)

for _side in (_PlainLoader, _PlainDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of `key: value` lines; an empty one gives {}.

    Raises:
        InputError: missing, not text, not YAML, or with tags (`!!python/…`) or aliases.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{str(path)!r} is nested too deeply for a config") from error
    except ValueError as error:  # not UTF-8, a NUL byte in the name, a number or date that is none
        raise InputError(f"{str(path)!r} is not a YAML text file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{str(path)!r} is not plain YAML{place}: {reason}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{str(path)!r} must hold 'key: value' lines, such as 'epochs: 100'")
    return {str(key): value for key, value in values.items()}


def to_yaml(values: dict[str, Any]) -> str:
    """Write nested settings as YAML that read_yaml takes back unchanged."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def save_yaml(config: Any, path: str | Path) -> None:
    """Write what was asked (`auto` stays `auto`) as YAML that `--config` reads."""
    with atomic_write(Path(path)) as partial:
        partial.write_text(to_yaml(to_dict(config)), encoding="utf-8")


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
