"""Parses a command's arguments and YAML files to its config; every mistake is one clear line.

Options are read as people type them (`--data A B`, `--json`, `PHOTOS`). jsonargparse converts and
checks each value by the type of its field.
"""

import argparse
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import MISSING, is_dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentParser

from fcmae.config.fields import GROUPS, RUNTIME, Leaf, leaves, own_leaves, title_of, to_text
from fcmae.config.files import asked, build, read_yaml, to_yaml
from fcmae.config.values import flatten, nearest
from sparse.errors import InputError

Kind = TypeVar("Kind")
Owner = Callable[[Collection[str]], str]

_SPECIAL = {"config": Leaf(str, MISSING), "print_config": Leaf(bool, False)}
_BOOLEANS = ("true", "false", "True", "False", "yes", "no", "on", "off", "1", "0")


def parse(
    kind: type[Kind], argv: Sequence[str], command: str, owner: Owner = lambda keys: ""
) -> Kind | None:
    """Build the config that `argv` requests, or return None if --help or --print_config printed.

    Args:
        kind: a config class; see fcmae/config/fields.py.
        argv: arguments after the command's name.
        command: the command as typed, such as `fcmae pretrain`.
        owner: returns, from the keys of a config file, which other command it belongs to, or ''.

    Raises:
        InputError: unknown key, wrong value, missing setting or unreadable config file.
    """
    known = leaves(kind)
    if "--help" in argv or "-h" in argv:
        _print_help(kind, command)
        return None
    values: dict[str, Any] = {}
    # Options take precedence over config files, in whatever order they are given.
    for key, value in sorted(read_arguments(argv, known), key=lambda given: given[0] != "config"):
        values |= read_file(value, known, owner) if key == "config" else {key: value}
    missing = [key for key, leaf in known.items() if leaf.default is MISSING and key not in values]
    show = values.pop("print_config", False)
    if missing and not show:
        names = " and ".join(_shown(key, known[key]) for key in missing)
        raise InputError(f"missing {names}: run {usage(kind, command)}")
    config = build(kind, values | dict.fromkeys(missing, ""))
    if not show:
        return config
    print(to_yaml({k: v for k, v in asked(config).items() if k not in missing}), end="")
    return None


def usage(kind: Any, command: str) -> str:
    """Return a command with its positional arguments and its required options."""
    places, options = [], []
    for key, leaf in leaves(kind).items():
        if leaf.positional:
            places.append(key.upper() + ("..." if _items(leaf.type) else ""))
        elif leaf.default is MISSING:
            options.append(f"--{key} {key.upper()}")
    return " ".join([command, *places, *options])


def _shown(key: str, leaf: Leaf) -> str:
    return key.upper() if leaf.positional else f"--{key}"


def read_arguments(argv: Sequence[str], known: dict[str, Leaf]) -> Iterator[tuple[str, Any]]:
    """Match options, flags and positional arguments; yield (key, value) pairs in order.

    Raises:
        InputError: an unknown option, a wrong or missing value, or a value without an option.
    """
    options = known | _SPECIAL
    found: list[tuple[str, list[str]]] = []
    positional: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        key = name.removeprefix("--")
        if not word.startswith("-"):
            positional.append(word)
        elif key in options:
            found.append((key, [value] if equals else _take(words, name, options[key])))
        elif inside := [full for full in known if full.startswith(f"{key}.")]:
            raise InputError(f"{name} is a group of settings: name one, such as --{inside[0]}")
        else:
            hint = nearest(key.lstrip("-"), [*known, *_SPECIAL], "--")
            raise InputError(f"unknown option {name}{hint or '; --help lists them'}")
    free = [key for key, leaf in known.items() if leaf.positional and key not in dict(found)]
    if positional and free and _items(known[free[0]].type):
        found.append((free[0], positional))
    elif len(positional) > len(free):
        rule = "settings are written --name value; --help lists them"
        raise InputError(f"unexpected {positional[-1]!r}: {rule}")
    else:
        found += [(key, [word]) for key, word in zip(free, positional, strict=False)]
    for key, values in found:
        leaf = options[key]
        if "" in values and leaf.default is MISSING:
            raise InputError(f"{_shown(key, leaf)} is empty: give a value")
        yield key, convert(_join(values, leaf.type), leaf, f"--{key}")


def _take(words: deque[str], name: str, leaf: Leaf) -> list[str]:
    """Remove an option's values from the words that follow it, and return them."""
    if leaf.type is bool:
        return [words.popleft()] if words and words[0] in _BOOLEANS else ["true"]
    if not words or words[0].startswith("--"):
        raise InputError(f"{name} needs a value{leaf.such_as()}")
    values, items = [words.popleft()], _items(leaf.type)
    further = r"[-+]?[.\d]" if items in (int, float) else "[^-]"
    while items and words and re.match(further, words[0]):
        values.append(words.popleft())
    return values


def _items(kind: Any) -> Any:
    """Return the item type of a setting that accepts a list, else None."""
    lists = [part for part in (kind, *get_args(kind)) if get_origin(part) is list]
    return get_args(lists[0])[0] if lists else None


def _join(values: list[str], kind: Any) -> str:
    """Join the values of an option to one: `A B` to `["A","B"]`."""
    if len(values) == 1 and (get_origin(kind) is not list or values[0].startswith("[")):
        return values[0]
    return to_text(values) if _items(kind) is str else f"[{','.join(values)}]"


def read_file(path: str, known: dict[str, Leaf], owner: Owner = lambda keys: "") -> dict[str, Any]:
    """Read a YAML config file, nested or with dotted keys, as settings by dotted key.

    null for a required setting means that it is not given.

    Raises:
        InputError: an unreadable file, an unknown key, a wrong value, a number instead of a string,
            or the config of another command.
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
            raise InputError(f"{path}: {key} must be a string, not {value}: put it in quotes")
        if value is not None or known[key].default is not MISSING:
            given[key] = convert(to_text(value), known[key], f"{path}: {key}")
    return given


def convert(text: str, leaf: Leaf, where: str) -> Any:
    """Convert a string to the type of a setting.

    Args:
        text: the value as written on a command line.
        leaf: the setting.
        where: its name in messages: `--epochs`, or a key in a file.

    Raises:
        InputError: not a value of this type; names the rule and a value that works.
    """
    parts = [leaf.type, *get_args(leaf.type)]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=_paths if leaf.type == str | list[str] else leaf.type)
    try:
        return parser.parse_args([f"--value={text}"], env=False).value
    except argparse.ArgumentError as error:
        choices = [str(c) for part in parts if get_origin(part) is Literal for c in get_args(part)]
        near = get_close_matches(text, choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else leaf.such_as()
        raise InputError(f"{where} {text!r} must be {rule_of(leaf.type)}{hint}") from error


def _paths(text: str | list[str]) -> str | list[str]:
    """Read `[A,B]` as a list of strings, even if they are numbers; anything else is one string.

    jsonargparse would read `- A` as a list, and `[2021,2022]` as one string. It also validates the
    list with this function.
    """
    if isinstance(text, list) or not text.startswith("["):
        return text
    try:
        values = yaml.load(text, yaml.BaseLoader)  # noqa: S506 - builds only strings
    except yaml.YAMLError:
        return text
    if not values or not all(isinstance(value, str) and value for value in values):
        raise ValueError("not a list of strings")
    return values


_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
}


def rule_of(kind: Any) -> str:
    """Describe in words the values of a type."""
    if kind in _WORDS:
        return _WORDS[kind]
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is list:
        return f"a list of {_WORDS[get_args(kind)[0]].split(' ', 1)[1]}s"
    return " or ".join(map(rule_of, get_args(kind)))


def _print_help(kind: Any, command: str) -> None:
    """Print every setting in its group; those that do not change the result come last."""
    parser = argparse.ArgumentParser(
        usage=f"{usage(kind, command)} [options]", description=title_of(kind)
    )
    file = "YAML file of settings; options on the command line take precedence. Can be repeated."
    parser.add_argument("--config", metavar="FILE.yaml", help=file)
    parser.add_argument("--print_config", action="store_true", help="Print all settings as YAML.")
    known, said = leaves(kind), texts(kind)
    titles = [*GROUPS, *(leaf.group for leaf in known.values())]
    titles = sorted(dict.fromkeys(titles), key=RUNTIME.__eq__)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for key, leaf in known.items():
        shown = "" if leaf.default is MISSING else to_text(leaf.default) or "''"
        default = f"default: {shown}" if shown else "required"
        unnamed = " Can be given as a positional argument." if leaf.positional else ""
        text = f"{said[key]}{unnamed} ({rule_of(leaf.type)}; {default})"
        groups[leaf.group].add_argument(
            f"--{key}", metavar=key.split(".")[-1].upper(), help=text.replace("%", "%%")
        )
    parser.print_help()


def texts(kind: Any, prefix: str = "") -> dict[str, str]:
    """Return the string under each field, from the class or its nearest base that has one."""
    found = {
        prefix + item.arg_name: item.description or ""
        for base in filter(is_dataclass, reversed(kind.__mro__))
        for item in parse_from_object(base).params
    }
    for name, leaf in own_leaves(kind).items():
        found |= texts(leaf.type, f"{name}.") if is_dataclass(leaf.type) else {}
    return found
