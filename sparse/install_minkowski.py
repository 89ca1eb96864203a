"""Build MinkowskiEngine for the torch that is installed: `python -m sparse.install_minkowski`.

The package registry has only its source, written for older Python and torch, and its own set-up
guesses wrong on current machines; so the options are given here, and nothing counts as installed
before a convolution has run. Only the standard library is used.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from shutil import which

VERSION = "0.5.4"
REQUIREMENT = f"MinkowskiEngine=={VERSION}"
BUILD_TOOLS = ("setuptools", "wheel", "ninja", "numpy")
INSTALLED, FAILED, GO_ON_WITHOUT = 0, 1, 3
"""Exit codes. GO_ON_WITHOUT: no MinkowskiEngine, and the patch engine gives the same numbers."""

BYTES_PER_COMPILER = 2 * 2**30
TAIL_LINES = 30

# A stale build (of another torch) fails at the import or crashes in the convolution, so it is tried
# in a process of its own. It imports `Sequence` from where Python had it before 3.10. Kernel and
# features are chosen so that the only output is 1 + 2 + 3 + 4.
PROBE = f"""
import collections, collections.abc, warnings
warnings.simplefilter("ignore")
collections.Sequence = collections.abc.Sequence
import torch
import MinkowskiEngine as ME
assert ME.__version__ == "{VERSION}", ME.__version__
sites = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.int32)
x = ME.SparseTensor(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), coordinates=sites)
convolution = ME.MinkowskiConvolution(1, 1, kernel_size=2, stride=2, dimension=2)
torch.nn.init.ones_(convolution.kernel)
y = convolution(x).F
y.sum().backward()
assert y.flatten().tolist() == [10.0], y
"""

CBLAS_PROGRAM = """
#include <cblas.h>
int main() { return cblas_sdot(0, nullptr, 1, nullptr, 1) != 0; }
"""


def default_log() -> Path:
    """Path of the build log: in the virtual environment where there is one."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "minkowski-build.log"
    return Path(tempfile.mkdtemp(prefix="fcmae-")) / "minkowski-build.log"


@dataclass
class Machine:
    """What the installer finds around it and how it runs commands; replaced in tests."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: bool = field(default_factory=lambda: os.geteuid() == 0)
    log: Path = field(default_factory=default_log)

    def child_environment(self) -> dict[str, str]:
        """Environment of pip: finds its own `pip` again, and starts no more compilers than fit.

        The package's set-up calls `pip`, so the interpreter's folder comes first on PATH. A
        SETUPTOOLS_USE_DISTUTILS that is set would break the build on Python 3.12 and later.
        """
        environment = dict(self.environ)
        environment.pop("SETUPTOOLS_USE_DISTUTILS", None)
        scripts = sysconfig.get_path("scripts")
        environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", os.defpath)])
        environment.setdefault("MAX_JOBS", str(compiler_jobs()))
        return environment

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
        """Run a command with its output appended to the log; True if it exits with 0."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=dict(environment if environment is not None else self.environ),
                    check=False,
                )
            except FileNotFoundError as error:
                log.write(f"{error}\n")
                return False
            return done.returncode == 0

    def works(self) -> bool:
        """True if MinkowskiEngine imports in a fresh process and convolves rightly."""
        # A script in a folder of its own: nothing in the current folder can shadow an import.
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.py"
            path.write_text(PROBE, encoding="utf-8")
            return self.run([sys.executable, str(path)])

    def has_module(self, name: str) -> bool:
        """True if this interpreter would find a module of that name."""
        return find_spec(name) is not None

    def missing_system_packages(self) -> list[str]:
        """Debian names of what the build needs from the system and does not find."""
        compiler = self.environ.get("CXX", "g++")
        missing = []
        if which(shlex.split(compiler)[0]) is None:
            return ["g++", "libopenblas-dev", *self.missing_python_headers()]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "blas.cpp"
            source.write_text(CBLAS_PROGRAM, encoding="utf-8")
            program = str(Path(folder) / "blas")
            if not self.run([*shlex.split(compiler), str(source), "-o", program, "-lopenblas"]):
                missing.append("libopenblas-dev")
        return missing + self.missing_python_headers()

    def missing_python_headers(self) -> list[str]:
        """Debian name of the package with Python.h, if that is not there."""
        if (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            return []
        return [f"python{sys.version_info.major}.{sys.version_info.minor}-dev"]

    def has_apt(self) -> bool:
        """True on Debian and what descends from it."""
        return which("apt-get") is not None and Path("/etc/debian_version").is_file()

    def log_tail(self) -> str:
        """Last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def compiler_jobs() -> int:
    """Compilers to run at once: a core each, and memory for each."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_COMPILER))


def apt_commands(packages: Sequence[str]) -> list[list[str]]:
    """Return the commands that install system packages on Debian and what descends from it."""
    return [["apt-get", "update"], ["apt-get", "install", "-y", *packages]]


def pip_command(*, rebuild: bool) -> list[str]:
    """Return pip's command line.

    `--blas` is given because the package's own search for one needs numpy.distutils, which is gone.
    `rebuild` ignores a wheel that pip has kept, since it was built for another torch.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    command += ["--use-pep517", "--config-settings=--global-option=--blas=openblas --cpu_only"]
    if rebuild:
        command += ["--no-cache-dir", "--force-reinstall"]
    return [*command, REQUIREMENT]


def install(machine: Machine, say: Callable[[str], None] = print) -> int:
    """Make MinkowskiEngine work, as far as this machine allows; return an exit code.

    A working one is left alone. With CI=true in the environment a failure is FAILED, else
    GO_ON_WITHOUT, with one message that says what to do.
    """
    if machine.works():
        say(f"MinkowskiEngine {VERSION} works: nothing to do.")
        return INSTALLED
    problem = prepare(machine, say) or build(machine, say)
    if problem is None:
        say(f"MinkowskiEngine {VERSION} is installed, and a convolution with it gave what it must.")
        return INSTALLED
    if machine.environ.get("CI", "").lower() == "true":
        say(f"error: no MinkowskiEngine: {problem}")
        return FAILED
    say(f"No MinkowskiEngine: {problem}\nEverything goes on with the patch engine: same numbers.")
    return GO_ON_WITHOUT


def prepare(machine: Machine, say: Callable[[str], None]) -> str | None:
    """Provide what the build needs; return what is in the way, if anything is."""
    if not machine.has_module("torch"):
        return f"torch is missing from {sys.executable}; run `pip install torch` first."
    if not machine.has_module("pip"):
        return f"pip is missing; run `{sys.executable} -m ensurepip` first."
    missing = machine.missing_system_packages()
    commands = apt_commands(missing)
    if missing and machine.root and machine.has_apt():
        say(f"Installing what the build needs from the system: {' '.join(missing)}")
        quiet = {**machine.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in commands:  # the second may well succeed where the first only complained
            machine.run(command, quiet)
        missing = machine.missing_system_packages()
        if missing:
            say(machine.log_tail())
    if missing:
        sudo = "" if machine.root else "sudo "
        line = " && ".join(sudo + shlex.join(command) for command in commands)
        elsewhere = "" if machine.has_apt() else " (the names are Debian's; take your system's)"
        again = shlex.join([sys.executable, "-m", "sparse.install_minkowski"])
        return f"it needs {' and '.join(missing)}. Run{elsewhere}:\n    {line} && {again}"
    tools = [tool for tool in BUILD_TOOLS if not machine.has_module(tool)]
    pip_install = [sys.executable, "-m", "pip", "install", *tools]
    if tools and not machine.run(pip_install, machine.child_environment()):
        return f"could not install {' '.join(tools)}; {machine.log} says why."
    return None


def build(machine: Machine, say: Callable[[str], None]) -> str | None:
    """Install from pip's own cache or by building; return what went wrong, if anything did."""
    environment = machine.child_environment()
    patience = f"building takes 4 to 8 minutes. Log: {machine.log}"
    if not machine.has_module("MinkowskiEngine"):
        say(f"Installing MinkowskiEngine {VERSION}; {patience}")
        if not machine.run(pip_command(rebuild=False), environment):
            return failure(machine)
        if machine.works():
            return None
    # Most likely a wheel of another torch, which pip or the environment has kept.
    say(f"The MinkowskiEngine that was found does not work with this torch; {patience}")
    if machine.run(pip_command(rebuild=True), environment) and machine.works():
        return None
    return failure(machine)


def failure(machine: Machine) -> str:
    """Say where the build log is, and how it ends."""
    return f"its build failed. {machine.log} ends with:\n{machine.log_tail()}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the installer; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse.install_minkowski",
        description=f"Install MinkowskiEngine {VERSION} for the torch of this Python.",
        epilog="Exit codes: 0 it works; 3 it does not, go on with the patch engine; "
        "1 it does not and CI=true.",
        allow_abbrev=False,
    )
    parser.parse_args(arguments)
    machine = Machine()
    machine.log.write_text("", encoding="utf-8")
    return install(machine, say=lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
