"""The documentation site: `make docs` builds it into docs/_build/html."""

import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from fcmae import __version__  # noqa: E402  # found through the line above
from fcmae.cli import COMMANDS, code_of, config_of  # noqa: E402
from fcmae.config.fields import RUNTIME, leaves, title_of, to_text  # noqa: E402
from fcmae.config.parsing import rule_of, texts, usage  # noqa: E402

project = "fcmae"
author = "fcmae contributors"
copyright = "fcmae contributors, MIT licence"  # noqa: A001  # Sphinx's name
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "experiments/*"]
templates_path: list[str] = []
default_role = "code"
highlight_language = "text"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are kept with their outputs: see docs/notebooks

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
add_module_names = False

html_theme = "furo"
html_title = f"fcmae {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def options_page() -> str:
    """Every command and its settings, from the classes that `--help` is made of, as MyST."""
    lines = [
        "# Commands",
        "",
        "Settings are options, `--optim.base_lr 3e-3`, or keys of a YAML file, "
        "`--config FILE.yaml`; `--print_config` prints all of them. This page is made from the "
        "classes that also check them and write `--help`.",
    ]
    for name, summary in COMMANDS.items():
        kind = config_of(name)
        lines += ["", f"## {name}", "", f"    {usage(kind, f'fcmae {name}')} [options]", ""]
        code = code_of(name)
        lines += [f"{summary[0].upper()}{summary[1:]}. {_more(kind)}", ""]
        lines += [f"In Python: `{code.__module__}.{code.__name__}(…)`, given a"]
        lines += [f"`{kind.__module__}.{kind.__name__}`."]
        known, said = leaves(kind), texts(kind)
        for title in sorted({leaf.group: None for leaf in known.values()}, key=RUNTIME.__eq__):
            lines += ["", f"**{title}**", ""]
            for key, leaf in known.items():
                if leaf.group == title:
                    lines += [f"`--{key}`", f": {_text(said[key])} *{_values(leaf)}*", ""]
    return "\n".join(lines) + "\n"


def _more(kind: Any) -> str:
    """What the class says after the first line, if anything."""
    _, *rest = (kind.__doc__ or title_of(kind)).strip().split("\n\n", 1)
    return " ".join(" ".join(rest).split())


def _values(leaf: Any) -> str:
    if leaf.default is MISSING:
        return f"({rule_of(leaf.type)}; required)"
    return f"({rule_of(leaf.type)}; default: `{to_text(leaf.default) or repr('')}`)"


def _text(said: str) -> str:
    """The text of a setting with Markdown's characters taken literally."""
    for character in "\\*_<[$":
        said = said.replace(character, f"\\{character}")
    return " ".join(said.split())


(DOCS / "commands.md").write_text(options_page(), encoding="utf-8")
