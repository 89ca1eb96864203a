"""Configs to and from dicts and YAML files. Does not import torch."""

import re
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fcmae.atomic import atomic_write
from fcmae.config.fields import own_leaves, runtime_keys
from sparse.errors import InputError


class _PlainLoader(yaml.SafeLoader):
    """YAML as people expect it: 6e-3 is a number, a date is a string, aliases are rejected.

    A few lines of aliases can expand to gigabytes.
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
    """Quotes strings that _PlainLoader would read as numbers, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape the line breaks that PyYAML writes unescaped and reads back as spaces."""
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
    """Read a YAML file of `key: value` lines; an empty file returns {}.

    Raises:
        InputError: missing, not text, not YAML, or with tags (`!!python/…`) or aliases.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _PlainLoader)  # noqa: S506
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{str(path)!r} is nested too deeply for a config") from error
    except ValueError as error:  # not UTF-8, a NUL byte in the name, or an invalid number or date
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
    """Return nested settings as YAML that read_yaml reads back unchanged."""
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def build(kind: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Build a config; omitted settings have their defaults.

    Args:
        kind: its class.
        values: settings by dotted key; keys without `prefix` are ignored.
        prefix: of the keys of this config if it is part of another: `optim.`.

    Raises:
        InputError: a number is out of range.
    """
    own: dict[str, Any] = {}
    for name, leaf in own_leaves(kind).items():
        if is_dataclass(leaf.type):
            own[name] = build(leaf.type, values, f"{prefix}{name}.")
        elif prefix + name in values:
            own[name] = values[prefix + name]
    return kind(**own)


def asked(config: Any) -> dict[str, Any]:
    """Return the config as nested dicts, settings that change the result first."""
    values, last = asdict(config), runtime_keys(type(config))
    return {key: values[key] for key in sorted(values, key=last.__contains__)}


def save_yaml(config: Any, path: str | Path) -> None:
    """Write the config as requested (`auto` stays `auto`), as YAML for `--config`."""
    with atomic_write(Path(path)) as partial:
        partial.write_text(to_yaml(asked(config)), encoding="utf-8")
