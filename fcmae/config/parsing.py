"""From a command's arguments and YAML files to its config; every mistake is one clear line.

jsonargparse declares the options, converts and checks their values by the types of the config's
fields, and writes `--help`. Before that, arguments as people type them (`--data A B`, `--json`,
`PHOTOS`) and the settings of files become `--key=value`.
"""

import argparse
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from fcmae.config.fields import (
    DATA,
    MODEL,
    OPTIMISATION,
    RUNTIME,
    Leaf,
    compact,
    leaves,
    own_leaves,
    such_as,
)
from fcmae.config.files import asked, read_yaml, to_yaml
from fcmae.config.values import flatten, from_dict, nearest
from sparse.errors import InputError

Kind = TypeVar("Kind")
Owner = Callable[[Collection[str]], str]

_SPECIAL = {"config": Leaf(str, MISSING, {}), "print_config": Leaf(bool, False, {})}
_BOOLEANS = ("true", "false", "True", "False", "yes", "no", "on", "off", "1", "0")


class Given(NamedTuple):
    """A value as the user wrote it, and where: `--epochs`, or a key in a file."""

    text: str
    where: str


class _Parser(ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(" ".join(message.split())) from ex


def parse(
    kind: type[Kind], argv: Sequence[str], usage: str, owner: Owner = lambda keys: ""
) -> Kind | None:
    """Build the config that `argv` asks for, or None where --help or --print_config printed.

    Args:
        kind: a config class; see fcmae/config/fields.py.
        argv: what follows the command's name.
        usage: one line that works, for --help and for "missing" errors.
        owner: says, from the keys of a config file, whose it is if not this command's, or ''.

    Raises:
        InputError: unknown key, wrong value, missing setting or unreadable config file.
    """
    known = leaves(kind)
    if "--help" in argv or "-h" in argv:
        _parser(kind, usage).print_help()
        return None
    options = read_arguments(argv, known)
    given: dict[str, Given] = {}
    for key, text in options:
        if key == "config":
            given |= read_file(text, known, owner)
    given |= {key: Given(text, f"--{key}") for key, text in options if key in known}
    show = dict(options).get("print_config", "false") != "false"
    missing = _missing(known, given)
    if missing and not show:
        names = " and ".join(_shown(key, known[key]) for key in missing)
        raise InputError(f"{names} missing, as in: {usage}")
    config = from_dict(kind, _convert(kind, given) | dict.fromkeys(missing, ""))
    if not show:
        return config
    print(to_yaml({k: v for k, v in asked(config).items() if k not in missing}), end="")
    return None


def _missing(known: dict[str, Leaf], given: dict[str, Given]) -> list[str]:
    return [key for key, leaf in known.items() if leaf.default is MISSING and key not in given]


def _shown(key: str, leaf: Leaf) -> str:
    return key.upper() if "positional" in leaf.rules else f"--{key}"


def read_arguments(argv: Sequence[str], known: dict[str, Leaf]) -> list[tuple[str, str]]:
    """Match options, flags and positional values; return (key, value) in order.

    Raises:
        InputError: an unknown option, one without a value, or a value without an option.
    """
    options = known | _SPECIAL
    found: list[tuple[str, list[str]]] = []
    positional: list[str] = []
    words = deque(argv)
    while words:
        name, equals, value = words[0].partition("=")
        key = name.removeprefix("--")
        if not name.startswith("-"):
            positional.append(words.popleft())
        elif key in options:
            words.popleft()
            found.append((key, [value] if equals else _take(words, name, options[key])))
        else:
            raise InputError(_unknown(name, key, known))
    if positional:
        main = next((key for key, leaf in known.items() if "positional" in leaf.rules), None)
        several = main is not None and _items(known[main].type) is not None
        if main is None or main in dict(found) or (len(positional) > 1 and not several):
            rule = "settings are written --name value; --help lists them"
            raise InputError(f"unexpected {positional[-1]!r}: {rule}")
        found.append((main, positional))
    for key, values in found:
        if "" in values and options[key].default is MISSING:
            raise InputError(f"{_shown(key, options[key])} is empty: it needs a value")
    return [(key, _join(values, options[key].type)) for key, values in found]


def _take(words: deque[str], name: str, leaf: Leaf) -> list[str]:
    """Take the values of an option off the words that follow it."""
    if leaf.type is bool:
        return [words.popleft()] if words and words[0] in _BOOLEANS else ["true"]
    if not words or words[0].startswith("--"):
        raise InputError(f"{name} needs a value{such_as(leaf)}")
    values, items = [words.popleft()], _items(leaf.type)
    further = _NUMBER if items in (int, float) else _NOT_AN_OPTION
    while items and words and further.match(words[0]):
        values.append(words.popleft())
    return values


_NUMBER = re.compile(r"[-+]?[.\d]")
_NOT_AN_OPTION = re.compile(r"[^-]")


def _items(kind: Any) -> Any:
    """Return the type of the items of a setting that takes a list, else None."""
    lists = [part for part in (kind, *get_args(kind)) if get_origin(part) is list]
    return get_args(lists[0])[0] if lists else None


def _join(values: list[str], kind: Any) -> str:
    """Write the values of an option as one: `A B` as `["A","B"]`."""
    if len(values) == 1 and (get_origin(kind) is not list or values[0].startswith("[")):
        return values[0]
    return compact(values) if _items(kind) is str else f"[{','.join(values)}]"


def _unknown(name: str, key: str, known: dict[str, Leaf]) -> str:
    if group := [full for full in known if full.startswith(f"{key}.")]:
        return f"{name} is a group of settings: name one, such as --{group[0]}"
    hint = nearest(key.lstrip("-"), [*known, *_SPECIAL], "--")
    return f"unknown option {name}{hint or '; --help lists them'}"


def read_file(
    path: str, known: dict[str, Leaf], owner: Owner = lambda keys: ""
) -> dict[str, Given]:
    """Read a YAML config file, nested or with dotted keys, as settings by dotted key.

    null for a setting without a default counts as not given.

    Raises:
        InputError: unreadable file, unknown key, a number where a text belongs, or the config of
            another command.
    """
    found = flatten(read_yaml(path))
    if not found.keys() <= known.keys() and (message := owner(found.keys())):
        raise InputError(f"{path} {message}")
    given = {}
    for key, value in found.items():
        if any(full.startswith(f"{key}.") for full in known):
            raise InputError(f"{path}: {key} must hold settings, not {value!r}")
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{nearest(key, known)}")
        kind = known[key].type
        if str in (kind, *get_args(kind)) and isinstance(value, bool | int | float):
            raise InputError(f"{path}: {key} must be a text, not {value}: write it in quotes")
        if value is not None or known[key].default is not MISSING:
            text = value if isinstance(value, str) else compact(value)
            given[key] = Given(text, f"{path}: {key}")
    return given


def _convert(kind: Any, given: dict[str, Given]) -> dict[str, Any]:
    """Let jsonargparse convert each text to its setting's type; return nested values.

    Where that fails, the settings are parsed one by one to find which is wrong.
    """
    parser = _parser(kind)
    arguments = {key: f"--{key}={value.text}" for key, value in given.items()}
    try:
        values: dict[str, Any] = parser.parse_args([*arguments.values()], env=False).as_dict()
    except InputError:
        for key, argument in arguments.items():
            try:
                parser.parse_args([argument], env=False)
            except InputError as error:
                raise InputError(_wrong(given[key], leaves(kind)[key])) from error
        raise
    missing = _missing(leaves(kind), given)
    return {key: values[key] for key in own_leaves(kind) if key not in missing}


def _parser(kind: Any, usage: str = "") -> _Parser:
    """Declare every setting of a config, in groups: those that do not change the result last.

    Args:
        kind: a config class.
        usage: for `--help`; without it the settings have no descriptions, which take time to read.
    """
    parser = _Parser(
        usage=f"{usage} [options]",
        description=_title(kind),
        formatter_class=argparse.HelpFormatter,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Read settings from a YAML file; options given beside it win. May be repeated.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Print all settings as YAML and exit."
    )
    titles: dict[str, list[tuple[str, Leaf, str]]] = {DATA: [], MODEL: [], OPTIMISATION: []}
    for prefix, part in [("", kind), *_parts(kind)]:
        texts = _texts(part) if usage else {}
        for name, leaf in own_leaves(part).items():
            title = _title(part) if prefix else leaf.rules.get("group", "Settings")
            if not is_dataclass(leaf.type):
                titles.setdefault(title, []).append((prefix + name, leaf, texts.get(name, "")))
    for title in sorted(titles, key=RUNTIME.__eq__):
        group = parser.add_argument_group(title)
        for key, leaf, text in titles[title]:
            action = group.add_argument(
                f"--{key}",
                type=_text_or_list if leaf.type == str | list[str] else leaf.type,
                default=None if leaf.default is MISSING else leaf.default,
                metavar=key.split(".")[-1].upper(),
                help=_described(text, leaf).replace("%", "%%"),
            )
            action.option_strings = [f"--{key}"]  # without --KEY+, which would add to a list
    return parser


def _parts(kind: Any) -> list[tuple[str, Any]]:
    """Return prefix and class of the configs that are part of another."""
    found = own_leaves(kind).items()
    return [(f"{name}.", leaf.type) for name, leaf in found if is_dataclass(leaf.type)]


def _described(text: str, leaf: Leaf) -> str:
    value = leaf.default
    shown = value if value and isinstance(value, str) else None
    default = "required" if value is MISSING else f"default: {shown or compact(value)}"
    unnamed = " May be given without its name." if "positional" in leaf.rules else ""
    return f"{text}{unnamed} ({_rule(leaf.type)}; {default})"


def _title(kind: Any) -> str:
    return (kind.__doc__ or "").split("\n")[0].rstrip(".")


def _texts(kind: Any) -> dict[str, str]:
    """Return the string under each field, of the class or of the nearest one it inherits from."""
    return {
        item.arg_name: item.description or ""
        for base in reversed(kind.__mro__)
        if is_dataclass(base)
        for item in parse_from_object(base).params
    }


def _text_or_list(value: str | list[str]) -> str | list[str]:
    """Read `[A,B]` as a list of texts, numbers too; anything else, even `- A`, is one text.

    jsonargparse would read `- A` as a list, and `[2021,2022]` as one text.
    """
    if isinstance(value, list) or not value.startswith("["):
        return value
    try:
        values = yaml.load(value, yaml.BaseLoader)  # noqa: S506 - builds texts alone
    except yaml.YAMLError:
        return value
    if not values or not all(isinstance(item, str) and item for item in values):
        raise ValueError("not a list of texts")
    return [*values]


def _wrong(given: Given, leaf: Leaf) -> str:
    choices = [
        str(choice)
        for part in (leaf.type, *get_args(leaf.type))
        if get_origin(part) is Literal
        for choice in get_args(part)
    ]
    near = get_close_matches(given.text, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else such_as(leaf)
    return f"{given.where} {given.text!r} must be {_rule(leaf.type)}{hint}"


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
