"""From a command's arguments and YAML files to its config object; every mistake is one clear line.

Keys are matched here, so that a misspelt one is answered with the nearest; jsonargparse checks and
converts the values by the types of the dataclass and writes `--help`. Free of torch.
"""

import argparse
import json
import re
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from fcmae.config.values import EXAMPLES, flatten, from_dict, nearest, read_yaml, to_yaml
from sparse.errors import InputError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Leaf:
    """One setting of a config: its type, and its default or MISSING."""

    type: Any
    default: Any


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and where: `--epochs`, or a key in a file."""

    text: str
    where: str


class _Parser(ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(message) from ex


def leaves(kind: Any, prefix: str = "") -> dict[str, Leaf]:
    """Return every setting of a config dataclass by its dotted key."""
    found: dict[str, Leaf] = {}
    for item in fields(kind):
        key = prefix + item.name
        if is_dataclass(item.type):
            found.update(leaves(item.type, f"{key}."))
        elif item.default_factory is not MISSING:
            found[key] = Leaf(item.type, item.default_factory())
        else:
            found[key] = Leaf(item.type, item.default)
    return found


def parse(
    kind: type[Config],
    argv: Sequence[str],
    usage: str,
    positional: str | None = None,
    owner: Callable[[Collection[str]], str] = lambda keys: "",
) -> Config | None:
    """Build the config that `argv` asks for, or None where --help or --print_config printed.

    Args:
        kind: config dataclass; see fcmae/config.py.
        argv: what stands after the command's name.
        usage: one line that works, for --help and for "missing" errors.
        positional: key of the setting that may be given without its name.
        owner: says, from the keys of a config file, whose it is if not this command's, or ''.

    Raises:
        InputError: unknown key, wrong value, missing setting or unreadable config file.
    """
    if "--help" in argv or "-h" in argv:
        _parser(kind, usage).print_help()
        return None
    known = leaves(kind)
    given, files = read_arguments(argv, known, positional)
    wanted = given.pop("print_config", Given("false", "")).text
    if wanted not in ("true", "false"):
        raise InputError(f"--print_config {wanted!r} takes no value: write --print_config alone")
    merged: dict[str, Given] = {}
    for file in files:
        merged.update(read_file(file, known, owner))
    merged.update(given)
    missing = _missing(known, merged)
    if missing and wanted == "false":
        names = " and ".join(_shown(key, positional) for key in missing)
        raise InputError(f"{names} missing, as in: {usage}")
    values = _convert(kind, known, merged, missing)
    config = from_dict(kind, values)
    if wanted == "false":
        return config
    print(to_yaml({key: value for key, value in values.items() if key not in missing}), end="")
    return None


def read_arguments(
    argv: Sequence[str], known: dict[str, Leaf], positional: str | None
) -> tuple[dict[str, Given], list[str]]:
    """Match `--key value`, `--key=value` and flags; return settings by key, and config files."""
    given: dict[str, Given] = {}
    files: list[str] = []
    several: list[str] = []
    rest = list(argv)
    previous = ""
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            more = bool(several) and previous == positional and _takes_list(known[previous].type)
            if positional is None or (positional in given and not more):
                raise InputError(_stray(token, previous, given, known))
            several.append(token)
            key, value = positional, json.dumps(several) if more else token
        else:
            name, separator, value = token.partition("=")
            key = name.removeprefix("--")
            flag = key == "print_config" or (key in known and known[key].type is bool)
            if key not in known and key not in ("config", "print_config"):
                raise InputError(_unknown(name, key, known))
            if flag and not separator:
                value = rest.pop(0) if rest and rest[0] in _BOOLEANS else "true"
            elif not separator:
                if not rest or rest[0].startswith("--"):
                    raise InputError(f"{name} needs a value{_such_as(known.get(key), name)}")
                value = rest.pop(0)
        if not value and (key == "config" or known[key].default is MISSING):
            raise InputError(f"{_shown(key, positional)} is empty: it needs a value")
        if key == "config":
            files.append(value)
        else:
            given[key] = Given(value, f"--{key}")
        previous = key
    return given, files


def _shown(key: str, positional: str | None) -> str:
    return key.upper() if key == positional else f"--{key}"


def _unknown(name: str, key: str, known: dict[str, Leaf]) -> str:
    if key in _groups(known):
        example = next(full for full in known if full.startswith(f"{key}."))
        return f"{name} is a group of settings: name one, such as --{example}"
    hint = nearest(key.lstrip("-"), [*known, "config", "print_config"], "--")
    return f"unknown option {name}{hint or '; --help lists them'}"


def _groups(known: dict[str, Leaf]) -> set[str]:
    return {key.split(".")[0] for key in known if "." in key}


def _stray(token: str, previous: str, given: dict[str, Given], known: dict[str, Leaf]) -> str:
    if previous in known and _takes_list(known[previous].type):
        first = given[previous].text
        return f"unexpected {token!r}: write several values as --{previous} '[{first},{token}]'"
    if previous in known and known[previous].type is bool:
        return f"unexpected {token!r}: --{previous} takes true or false"
    return f"unexpected {token!r}: settings are written --name value; --help lists them"


def read_file(
    path: str, known: dict[str, Leaf], owner: Callable[[Collection[str]], str] = lambda keys: ""
) -> dict[str, Given]:
    """Read a YAML config file, nested or with dotted keys, as settings by dotted key.

    null for a setting without a default counts as not given.

    Raises:
        InputError: unreadable file, unknown key, or a number where a text belongs.
    """
    given: dict[str, Given] = {}
    found = flatten(read_yaml(path))
    if not found.keys() <= known.keys() and (message := owner(found.keys())):
        raise InputError(f"{path} {message}")
    for key, value in found.items():
        if key in _groups(known):
            raise InputError(f"{path}: {key} must hold settings, not {value!r}")
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, known)}")
        kind = known[key].type
        if str in (kind, *get_args(kind)) and isinstance(value, bool | int | float):
            raise InputError(f"{path}: {key} must be a text, not {value}: write it in quotes")
        if value is None and known[key].default is MISSING:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        given[key] = Given(text, f"{path}: {key}")
    return given


def load_config(kind: type[Config], path: str | Path) -> Config:
    """Read a whole config, such as a run's config.yaml.

    Raises:
        InputError: unreadable file, unknown key, wrong value or missing setting.
    """
    known = leaves(kind)
    given = read_file(str(path), known)
    missing = _missing(known, given)
    if missing:
        raise InputError(f"{path}: {' and '.join(missing)} missing")
    values = _convert(kind, known, given, [])
    try:
        return from_dict(kind, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _missing(known: dict[str, Leaf], given: dict[str, Given]) -> list[str]:
    return [key for key, leaf in known.items() if leaf.default is MISSING and key not in given]


def _parser(kind: Any, usage: str = "") -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(usage=f"{usage} [--option value ...]", allow_abbrev=False, print_config=None)
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Read settings from a YAML file; options given beside it win. May be repeated.",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print all settings as YAML, ready for --config, and exit.",
    )
    parser.add_class_arguments(kind)
    groups = {item.name for item in fields(kind) if is_dataclass(item.type)}
    for action in parser._actions:
        if action.dest in groups:  # jsonargparse would take a file for the group alone
            action.help = argparse.SUPPRESS
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
    return parser


def _convert(
    kind: Any, known: dict[str, Leaf], given: dict[str, Given], missing: list[str]
) -> dict[str, Any]:
    """Let jsonargparse convert each text to its setting's type; return nested values."""
    texts = {
        key: _text_or_list(value, known[key])
        for key, value in given.items()
        if known[key].type == str | list[str]
    }
    arguments = [f"--{key}={value.text}" for key, value in given.items() if key not in texts]
    arguments += [f"--{key}=placeholder" for key in [*missing, *texts]]
    try:
        namespace = _parser(kind).parse_args(arguments, env=False)
    except InputError as error:
        match = re.search(r'key "([\w.]+)"', str(error))
        if match and match[1] in given:
            message = _wrong(given[match[1]], known[match[1]])
        else:
            message = " ".join(str(error).split())
        raise InputError(message) from error
    for key, text in texts.items():
        namespace[key] = text
    values: dict[str, Any] = namespace.as_dict()
    return {key: value for key, value in values.items() if key not in ("config", "print_config")}


def _text_or_list(given: Given, leaf: Leaf) -> str | list[str]:
    """Read `[A,B]` as a list of texts, numbers too; whatever else, even `- A`, is one text."""
    if not given.text.startswith("["):
        return given.text
    try:
        values = yaml.load(given.text, yaml.BaseLoader)  # noqa: S506 - builds texts alone
    except yaml.YAMLError:
        return given.text
    if not values or not all(isinstance(value, str) and value for value in values):
        raise InputError(_wrong(given, leaf))
    return [*values]


def _wrong(given: Given, leaf: Leaf) -> str:
    choices = [
        str(choice)
        for part in [leaf.type, *get_args(leaf.type)]
        if get_origin(part) is Literal
        for choice in get_args(part)
    ]
    near = get_close_matches(given.text, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else _such_as(leaf, given.where)
    return f"{given.where} {given.text!r} must be {_rule(leaf.type)}{hint}"


_BOOLEANS = ("true", "false", "True", "False", "yes", "no", "on", "off")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def _rule(kind: Any) -> str:
    """Say in words what a type takes."""
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is list:
        return f"a list of {_WORDS[get_args(kind)[0]].split(' ', 1)[1]}s"
    return " or ".join(_rule(part) for part in get_args(kind))


def _takes_list(kind: Any) -> bool:
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return any(get_origin(part) is list for part in parts)


def _such_as(leaf: Leaf | None, where: str) -> str:
    if example := EXAMPLES.get(re.split(r"[.\s-]", where)[-1]):
        return f", such as {example}"
    if leaf is None or leaf.default is MISSING or leaf.default in ("", None):
        return ""
    if isinstance(leaf.default, str):
        return f", such as {leaf.default}"
    return f", such as {json.dumps(leaf.default, separators=(',', ':'))}"
