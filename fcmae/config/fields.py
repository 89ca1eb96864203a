"""How a setting is declared: its default, and beside it the rules that it has to keep.

A config is a dataclass that inherits from `Config`; the string under a field is its `--help` text.
A subclass that overrides a field inherits the rules and the text that it does not replace.
"""

import json
import math
import operator
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from fcmae.config.values import height_width
from sparse.errors import InputError
from sparse.sizes import PATCH

DATA, MODEL, OPTIMISATION = "Data", "Model", "Optimisation"
RUNTIME = "Runtime: does not change the result"
"""Groups of `--help`, in this order."""

IMAGES = "a folder of images or a text file of paths"
WEIGHTS = "a run, a folder of weights or a weight file"
SIDES = "224 or '[96,160]'"


def setting(
    default: Any = MISSING,
    *,
    group: str | None = None,
    runtime: bool | None = None,
    positional: bool | None = None,
    path: str | None = None,
    words: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    length: int | None = None,
    ascending: bool | None = None,
    multiple: int | None = None,
    example: str | None = None,
) -> Any:
    """Declare a field of a config.

    Args:
        default: a value, a list (each config gets its own) or the class of a nested config.
        group: heading in `--help`.
        runtime: does not change the result, and may change when a run resumes.
        positional: may be given without its name.
        path: is read, so it has to exist; says what the path may be.
        words: what a path setting takes that is not a path.
        at_least, above, at_most, below: range of a number, or of each number in a list.
        length: how many numbers a list holds.
        ascending: whether a list begins with its smallest number.
        multiple: whether it is a size in pixels, and what its sides are multiples of.
        example: a value that works, where the default does not show one.
    """
    rules = {
        name: rule for name, rule in locals().items() if name != "default" and rule is not None
    }
    if isinstance(default, type):
        return field(default_factory=default, metadata=rules)
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata=rules)
    return field(default=default, metadata=rules)


runtime = partial(setting, runtime=True, group=RUNTIME)
"""A setting that does not change the result, and may change when a run resumes."""


class Leaf(NamedTuple):
    """A setting of a config: its type, its default or MISSING, and the arguments of `setting`."""

    type: Any
    default: Any
    rules: dict[str, Any]


def own_leaves(kind: Any) -> dict[str, Leaf]:
    """Return the fields of a config class; those that are configs themselves too."""
    found = {}
    for item in fields(kind):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        rules: dict[str, Any] = {}
        for base in reversed(kind.__mro__):
            declared = vars(base).get("__dataclass_fields__", {}).get(item.name)
            rules |= declared.metadata if declared else {}
        found[item.name] = Leaf(item.type, default, rules)
    return found


def leaves(kind: Any) -> dict[str, Leaf]:
    """Return all settings of a config class by dotted key."""
    found: dict[str, Leaf] = {}
    for name, leaf in own_leaves(kind).items():
        if is_dataclass(leaf.type):
            found |= {f"{name}.{key}": inner for key, inner in leaves(leaf.type).items()}
        else:
            found[name] = leaf
    return found


def runtime_keys(kind: Any) -> frozenset[str]:
    """Return the names of the fields that may change when a run resumes."""
    return frozenset(name for name, leaf in own_leaves(kind).items() if "runtime" in leaf.rules)


@dataclass
class Config:
    """A config whose numbers are in range: the rules of its fields are checked when it is made.

    Raises:
        InputError: names the setting, the value, the rule and a value that works.
    """

    PREFIX: ClassVar[str] = ""
    """What stands before a field's name where this config is part of another: `optim.`."""

    def __post_init__(self) -> None:
        for name, leaf in own_leaves(type(self)).items():
            _check(self.PREFIX + name, getattr(self, name), leaf)


_LIMITS = {
    "at_least": (operator.ge, "at least"),
    "above": (operator.gt, "above"),
    "at_most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def _check(name: str, value: Any, leaf: Leaf) -> None:
    """Check numbers; None and words pass. NaN is in no range."""
    rules = leaf.rules
    limits = {rule: rules[rule] for rule in _LIMITS if rule in rules}
    if value is None or isinstance(value, str):
        return
    if "multiple" in rules:
        height_width(value, rules["multiple"])
    if not limits:
        return
    values = value if isinstance(value, list) else [value]
    if (
        all(_LIMITS[rule][0](number, limit) for rule, limit in limits.items() for number in values)
        and rules.get("length", len(values)) == len(values) > 0
        and ("ascending" not in rules or values == sorted(values))
    ):
        return
    words = dict.fromkeys(
        "finite" if math.isinf(limit) else f"{_LIMITS[rule][1]} {limit}"
        for rule, limit in limits.items()
    )
    many = f"{rules['length']} numbers " if "length" in rules else ""
    rising = ", the smaller first" if "ascending" in rules else ""
    raise InputError(f"{name} {value} must be {many}{' and '.join(words)}{rising}{such_as(leaf)}")


def such_as(leaf: Leaf) -> str:
    """Return ', such as …' with a value that works, or '' where none is known."""
    if example := leaf.rules.get("example"):
        return f", such as {example}"
    if leaf.default is MISSING or leaf.default in ("", None, []):
        return ""
    text = leaf.default if isinstance(leaf.default, str) else compact(leaf.default)
    return f", such as {text}"


def compact(value: Any) -> str:
    """Return a value as JSON without spaces, as it is written on a command line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def check_paths(config: Any) -> None:
    """Raise InputError if a path that a command is to read does not exist.

    Words such as `none`, URLs and patterns pass. So does a run that has checkpoints: whether it
    still needs the files it started from is decided where it resumes.
    """
    if hasattr(config, "resume") and Path(config.out, "checkpoints").is_dir():
        return
    for key, path, rules in _paths(config):
        elsewhere = "://" in path or path.startswith("hf:") or "{" in path
        if not (elsewhere or path in rules.get("words", ()) or _exists(path)):
            raise InputError(f"{key} {path!r} does not exist: give {rules['path']}")


def _paths(config: Any, prefix: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, leaf in own_leaves(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            yield from _paths(value, f"{name}.")
        elif "path" in leaf.rules and value is not None:
            for path in [value] if isinstance(value, str) else value:
                yield prefix + name, path, leaf.rules


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, an unknown user
        return False


@dataclass(kw_only=True)
class DeviceConfig(Config):
    """Where tensors are computed."""

    device: str = runtime("auto")
    """cpu, cuda, cuda:1, mps or auto, which takes a GPU where there is one."""


@dataclass(kw_only=True)
class LoaderConfig(DeviceConfig):
    """How images are read and computed by commands that do not train."""

    batch_size: int = runtime(64, at_least=1)
    """Images per batch. Changes speed and memory only."""

    workers: Literal["auto"] | int = runtime("auto", at_least=0)
    """Processes that read images; 0 reads in the main process."""


@dataclass
class SourceConfig(LoaderConfig):
    """A command on trained weights."""

    source: str = setting(path=WEIGHTS, positional=True)
    """Run folder, checkpoint, converted folder or weight file of a ConvNeXt V1 or V2."""


@dataclass
class ImagesConfig(SourceConfig):
    """A command on trained weights and images."""

    images: str = setting(path=IMAGES)
    """Folder of images, flat or nested, or a text file of paths; labels are not needed."""


@dataclass(kw_only=True)
class ImageSizeConfig(Config):
    """The size at which weights see images."""

    img_size: int | list[int] | None = setting(None, multiple=PATCH, example=SIDES)
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null takes the size that the weights were
    trained with."""
