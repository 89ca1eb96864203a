"""Declaration of settings: a default and the rules that a value must satisfy.

A config is a dataclass that inherits from `Config`; the string under a field is its `--help` text.
A subclass that overrides a field inherits the rules and the text that it does not replace.
"""

import json
import math
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, ClassVar, Literal

from fcmae.config.values import flatten, height_width
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError
from sparse.sizes import PATCH

GROUPS = DATA, MODEL, OPTIMISATION = "Data", "Model", "Optimisation"
RUNTIME = "Runtime: does not change the result"
"""Last group of `--help`; nested configs come between the first three and this one."""

IMAGES = "a folder of images or a text file of paths"
ELSEWHERE = "://|^hf:"
"""Pattern of paths that are not on this machine."""
WEIGHTS = "a run, a folder of weights, a weight file or hf:USER/NAME"


@dataclass(frozen=True)
class Leaf:
    """A setting of a config: its type, its default and the rules that a value must satisfy.

    Attributes:
        type: type of its values.
        default: its default; MISSING if the setting is required.
        group: heading in `--help`.
        runtime: whether it leaves the result unchanged; it may then differ when a run resumes.
        positional: whether it can be given as a positional argument.
        path: description of the path for messages; if not empty, the path must exist.
        words: values of a path setting that are not paths.
        at_least, above, at_most, below: range of a number, or of each number in a list.
        length: number of items in a list.
        ascending: whether the numbers of a list must ascend.
        multiple: for a size in pixels, the number that its sides must be multiples of.
        example: a value that works, if the default does not show one.
    """

    type: Any
    default: Any
    group: str = "Settings"
    runtime: bool = False
    positional: bool = False
    path: str = ""
    words: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    length: int | None = None
    ascending: bool = False
    multiple: int | None = None
    example: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise InputError if a number breaks a rule. None and strings pass; NaN fails."""
        if value is None or isinstance(value, str):
            return
        if self.multiple:
            height_width(value, self.multiple, name)
        limits = {rule: getattr(self, rule) for rule in _HOLDS if getattr(self, rule) is not None}
        values = value if isinstance(value, list) else [value]
        fits = all(_HOLDS[rule](number, limits[rule]) for rule in limits for number in values)
        fits &= 0 < len(values) == (self.length or len(values))
        fits &= not self.ascending or values == sorted(values)
        if fits or not limits:
            return
        words = dict.fromkeys(
            "finite" if math.isinf(limit) else f"{rule.replace('_', ' ')} {limit}"
            for rule, limit in limits.items()
        )
        many = f"{self.length} numbers " if self.length else ""
        rising = ", the smaller first" if self.ascending else ""
        rule = f"{many}{' and '.join(words)}{rising}{self.such_as()}"
        raise InputError(f"{name} {value} must be {rule}")

    def paths(self, value: Any) -> list[str]:
        """Return the paths in a value, with `~` expanded."""
        given = value if isinstance(value, list) else [value]
        not_paths = (None, *self.words)
        return [os.path.expanduser(path) for path in given if self.path and path not in not_paths]

    def such_as(self) -> str:
        """Return ', such as …' with a value that works, or '' if none is known."""
        if self.multiple:
            return ", such as 224 or '[96,160]'"
        known = "" if self.default in (MISSING, None, []) else to_text(self.default)
        return f", such as {self.example or known}" if self.example or known else ""


_HOLDS = {"at_least": ge, "above": gt, "at_most": le, "below": lt}


def setting(default: Any = MISSING, **rules: Any) -> Any:
    """Declare a field of a config.

    Args:
        default: a value, a list (each config gets its own) or the class of a nested config.
        rules: attributes of `Leaf`.
    """
    if isinstance(default, type | list):
        factory = default if isinstance(default, type) else default.copy
        return field(default_factory=factory, metadata=rules)
    return field(default=default, metadata=rules)


runtime = partial(setting, runtime=True, group=RUNTIME)
"""Declare a setting that does not change the result and may differ when a run resumes."""


def own_leaves(kind: Any) -> dict[str, Leaf]:
    """Return the fields of a config class, including nested configs."""
    found = {}
    for item in fields(kind):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        rules: dict[str, Any] = {}
        for base in filter(is_dataclass, reversed(kind.__mro__)):
            if item.name in base.__dataclass_fields__:
                rules |= base.__dataclass_fields__[item.name].metadata
        found[item.name] = Leaf(item.type, default, **rules)
    return found


def leaves(kind: Any) -> dict[str, Leaf]:
    """Return all settings of a config class by dotted key."""
    found: dict[str, Leaf] = {}
    for name, leaf in own_leaves(kind).items():
        if not is_dataclass(leaf.type):
            found[name] = leaf
            continue
        for key, inner in leaves(leaf.type).items():
            found[f"{name}.{key}"] = replace(inner, group=title_of(leaf.type))
    return found


def title_of(kind: Any) -> str:
    """Return the first line of a config's docstring, for `--help`."""
    return (kind.__doc__ or "").split("\n")[0].rstrip(".")


def runtime_keys(kind: Any) -> frozenset[str]:
    """Return the names of the fields that may differ when a run resumes."""
    return frozenset(name for name, leaf in own_leaves(kind).items() if leaf.runtime)


def to_text(value: Any) -> str:
    """Return a value as written on a command line: a string as is, others as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def asked_settings(config: Any) -> dict[str, Any]:
    """The config as JSON, its paths absolute, so that it compares from any folder."""
    asked = asdict(config)
    for key, leaf in own_leaves(type(config)).items():
        if paths := [_absolute(path) for path in leaf.paths(asked[key])]:
            asked[key] = paths if key == "data" else paths[0]
    return asked


def check_paths(config: Any) -> None:
    """Raise InputError if a path that a command reads does not exist.

    Words such as `none`, URLs and patterns pass. A run that has checkpoints passes too: whether it
    still needs the files it started from is decided when it resumes.
    """
    if hasattr(config, "resume") and RunPaths(Path(config.out)).checkpoints.is_dir():
        return
    values = flatten(asdict(config))
    for key, leaf in leaves(type(config)).items():
        for path in leaf.paths(values[key]):
            if _is_local(path) and not os.path.exists(path):
                raise InputError(f"{key} {path!r} does not exist: give {leaf.path}")


def _is_local(path: str) -> bool:
    """Whether it names a file or a folder of this machine, and no pattern."""
    return not re.search(f"{ELSEWHERE}|{{", path)


def _absolute(path: str) -> str:
    return path if re.search(ELSEWHERE, path) else os.path.abspath(path)


@dataclass
class Config:
    """Base class of configs: checks the rules of its fields when it is created.

    Raises:
        InputError: names the setting, the value, the rule and a value that works.
    """

    PREFIX: ClassVar[str] = ""
    """Prefix of field names in messages if this config is part of another: `optim.`."""

    def __post_init__(self) -> None:
        for name, leaf in own_leaves(type(self)).items():
            leaf.check(self.PREFIX + name, getattr(self, name))


@dataclass(kw_only=True)
class DeviceConfig(Config):
    """A command that computes on a device."""

    device: str = runtime("auto")
    """cpu, cuda, cuda:1, mps or auto, which uses a GPU if there is one."""


@dataclass(kw_only=True)
class LabelsConfig(Config):
    """A command that reads labels."""

    labels: str | None = setting(None, path="a CSV file", group=DATA)
    """CSV file of labels with a row for each image: path, relative to the file or absolute; perhaps
    split, train or val; and label (a class), labels (classes separated by ;) or columns of numbers.
    A file given as data means the same. null takes the folders in data."""


@dataclass(kw_only=True)
class LoaderConfig(DeviceConfig):
    """A command that reads images but does not train."""

    batch_size: int = runtime(64, at_least=1)
    """Images per batch. Affects only speed and memory."""

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
    """Folder of images, flat or nested, a text file of paths, tar shards, or a dataset as
    hf:PATH_OR_NAME; labels are not needed."""


@dataclass(kw_only=True)
class ImageSizeConfig(Config):
    """A command that resizes images for the weights."""

    img_size: int | list[int] | None = setting(None, multiple=PATCH)
    """Side of the crops in pixels, or '[HEIGHT,WIDTH]'. null uses the size that the weights were
    trained with."""
