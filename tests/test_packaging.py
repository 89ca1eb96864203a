"""What `python -m build` makes: it is complete, and works without the rest of the tree."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fcmae

ROOT = Path(__file__).parent.parent
PACKAGES = ("fcmae", "sparse", "finetune")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "-o", out, ROOT)
    return out


def run(*command: object, cwd: Path = ROOT, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=env or None
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_metadata_pass_twines_checks(built):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())
    assert said.count("PASSED") == 2


def test_the_wheel_has_the_packages_and_their_types_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"fcmae-{fcmae.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == set(PACKAGES)
    modules = {str(p.relative_to(ROOT)) for name in PACKAGES for p in (ROOT / name).rglob("*.py")}
    assert modules | {f"{name}/py.typed" for name in PACKAGES} <= names
    templates = {"fcmae/inspect/templates/report.html", "finetune/templates/card.md"}
    assert templates <= names


def test_the_source_has_what_a_clone_has(built):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        found = {name.split("/", 1)[-1] for name in archive.getnames()}
    kept = run("git", "ls-files").splitlines()
    left_out = {name for name in kept if name not in found and not name.startswith(".")}
    assert left_out == set()


def test_an_installed_wheel_works_elsewhere(built, tmp_path):
    """Without the tree: the command line, the files it reads, and MinkowskiEngine's installer."""
    (wheel,) = built.glob("*.whl")
    place = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place, wheel)
    script = "import fcmae, finetune, sparse; print(fcmae.__file__, finetune.__file__)"
    found = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(place))
    assert [Path(path).parents[1] for path in found.split()] == [place, place]
    said = run(sys.executable, "-m", "fcmae", "--version", cwd=tmp_path, PYTHONPATH=str(place))
    assert fcmae.__version__ in said
    installer = [sys.executable, "-m", "sparse.install_minkowski", "--help"]
    assert "MinkowskiEngine" in run(*installer, cwd=tmp_path, PYTHONPATH=str(place))
