"""Rules for the whole source, checked with `ast`: import order, safe loading."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sparse", "fcmae", "finetune")
"""Lowest first: a package imports only itself and those before it."""

SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
FILES = sorted([*SOURCES, *(ROOT / "benchmarks").rglob("*.py")])
LIGHT = ("config", "commands")
TORCH_FREE = (
    "sparse/errors.py",
    "sparse/sizes.py",
    "fcmae/cli.py",
    *(f"fcmae/{path.parent.name}/{path.name}" for path in SOURCES if path.parent.name in LIGHT),
    "finetune/config.py",
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Names of all modules that these nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that run when the module is imported: those outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    higher = PACKAGES[PACKAGES.index(package) + 1 :]
    tree = parse(path)
    # Only the command line and the facade may import upwards, inside functions, for a fast --help.
    lazy = relative(path) in ("fcmae/cli.py", "fcmae/__init__.py") or "commands" in path.parts
    nodes = at_import(tree) if lazy else ast.walk(tree)
    assert [name for name in imported(nodes) if name.split(".")[0] in higher] == []


@pytest.mark.parametrize("module", ["sparse.encoder", "fcmae.model.fcmae", "fcmae.train.loop"])
def test_encoder_model_and_loop_import_little(module: str) -> None:
    """A GPU machine without a package index has torch, numpy, timm, safetensors and Pillow."""
    heavy = {"jsonargparse", "yaml", "rich", "tensorboard", "torchmetrics", "torchvision", "jinja2"}
    script = f"import sys, {module}; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_script_for_a_gpu_machine_imports_little() -> None:
    """It has timm, which brings torchvision, but neither a command line nor pretty output."""
    absent = ("jsonargparse", "yaml", "rich", "tensorboard", "torchmetrics", "jinja2", "matplotlib")
    script = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.gpu"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_only_the_installed_packages_are_imported(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(ast.walk(parse(path)))}
    assert names & {"tests", "benchmarks", "configs"} == set()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_pickles_are_read_with_weights_only(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("torch.load", "load_state_dict_from_url"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            place = f"{relative(path)}:{node.lineno}"
            assert keywords.get("weights_only") == "True", f"{place} lacks weights_only=True"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_else_unpickles(path: Path) -> None:
    readers = ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func).split(".")
            unpickles = function[0] in readers and function[-1] in ("load", "loads", "Unpickler")
            assert not unpickles, f"{relative(path)}:{node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module in ("torch.serialization", "torch"):
            assert "load" not in {alias.name for alias in node.names}, "call it torch.load"
        if isinstance(node, ast.ImportFrom) and node.module in readers:
            names = {alias.name for alias in node.names}
            assert names & {"load", "loads", "Unpickler"} == set()
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert ast.unparse(node.value) == "False"


@pytest.mark.parametrize("name", TORCH_FREE)
def test_modules_for_help_do_not_import_torch(name: str) -> None:
    names = {module.split(".")[0] for module in imported(at_import(parse(ROOT / name)))}
    assert names & {"torch", "torchvision", "timm", "numpy"} == set()


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_are_marked_as_typed(name: str) -> None:
    assert (ROOT / name / "py.typed").is_file()
    assert (ROOT / name / "__init__.py").is_file()


@pytest.mark.parametrize("where", ["same folder", "earlier on the path"])
def test_another_package_named_sparse_is_noticed(tmp_path, where):
    """PyData's, installed after ours or before it on the path."""
    for package in ("fcmae", "sparse"):
        (tmp_path / "site" / package).mkdir(parents=True)
        shutil.copy(ROOT / package / "__init__.py", tmp_path / "site" / package)
    earlier = tmp_path / ("site" if where == "same folder" else "other")
    script = f"import sys; sys.path[:0] = [{str(earlier)!r}, {str(tmp_path / 'site')!r}]\n"
    command = [sys.executable, "-S", "-c", f"{script}import fcmae"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    (earlier / "sparse").mkdir(parents=True, exist_ok=True)
    (earlier / "sparse" / "__init__.py").write_text("from ._coo import COO\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"'sparse' is {earlier / 'sparse' / '__init__.py'}, not fcmae's own" in done.stderr
    assert "pip uninstall sparse" in done.stderr
