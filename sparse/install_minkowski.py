"""Build MinkowskiEngine for the installed torch.

Exit codes: 0 it works; 3 it does not, use the patch engine; 1 it does not and CI=true.
"""

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from sparse.errors import RunError

BYTES_PER_COMPILER = 2 * 2**30
PIP_INSTALL = [sys.executable, "-m", "pip", "install"]
# Without `--blas` setup.py searches for a BLAS with numpy.distutils, which no longer exists.
BUILD = [*PIP_INSTALL, "--no-build-isolation", "--no-deps", "--use-pep517"]
BUILD += ["--config-settings=--global-option=--blas=openblas --cpu_only", "MinkowskiEngine==0.5.4"]

# MinkowskiEngine imports `Sequence` from `collections`, where Python had it before 3.10. Kernel and
# features are such that the only output is 1 + 2 + 3 + 4.
PROBE = """
import collections, collections.abc
collections.Sequence = collections.abc.Sequence
import torch
import MinkowskiEngine as ME
assert ME.__version__ == "0.5.4", ME.__version__
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Make MinkowskiEngine work; return an exit code. A working installation is left alone."""
    parser = argparse.ArgumentParser("python -m sparse.install_minkowski", description=__doc__)
    parser.parse_args(arguments)
    folder = sys.prefix if os.access(sys.prefix, os.W_OK) else tempfile.mkdtemp(prefix="fcmae-")
    log = Path(folder) / "minkowski-build.log"
    log.write_text("", encoding="utf-8")
    try:
        if not works(log):
            prepare(log)
            build(log)
    except RunError as error:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print(f"{log} ends with:", *lines[-30:], sep="\n")
        print(f"MinkowskiEngine does not work: {error}")
        if os.environ.get("CI", "").lower() == "true":
            return 1
        print("The patch engine gives the same numbers without it.")
        return 3
    print("MinkowskiEngine works.")
    return 0


def works(log: Path) -> bool:
    """Return True if MinkowskiEngine imports and convolves correctly in a fresh process.

    A build for another torch fails on import or crashes in the convolution.
    """
    return run([sys.executable, "-c", PROBE], log)


def prepare(log: Path) -> None:
    """Install what the build needs; raise RunError if that is impossible from here."""
    for module, installer in (("torch", "pip install torch"), ("pip", "ensurepip")):
        if find_spec(module) is None:
            raise RunError(f"{module} is missing. Run first: {sys.executable} -m {installer}")
    missing, root = missing_packages(log), os.geteuid() == 0
    commands = [["apt-get", "update"], ["apt-get", "install", "-y", *missing]]
    if missing and root and which("apt-get"):
        print(f"Installing system packages: {' '.join(missing)}", flush=True)
        for command in commands:  # if `update` fails, `install` may still succeed
            run(command, log)
        missing = missing_packages(log)
    if missing:
        sudo = "" if root else "sudo "
        line = " && ".join(sudo + shlex.join(command) for command in commands)
        raise RunError(f"it needs {' and '.join(missing)}. On Debian or Ubuntu, run:\n    {line}")
    if not run([*PIP_INSTALL, "setuptools", "wheel", "ninja", "numpy"], log):
        raise RunError("pip could not install its build tools.")


def missing_packages(log: Path) -> list[str]:
    """Return the names, on Debian, of the packages that the build needs and the system lacks."""
    missing = []
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    link = [*compiler, "-x", "c++", "-", "-o", os.devnull, "-lopenblas"]
    if which(compiler[0]) is None:
        missing = ["g++", "libopenblas-dev"]
    elif not run(link, log, CBLAS_PROGRAM):
        missing = ["libopenblas-dev"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-dev")
    return missing


def build(log: Path) -> None:
    """Install from pip's cache or build from source; raise RunError if the result fails."""
    print(f"Installing MinkowskiEngine takes 4 to 8 minutes. Log: {log}", flush=True)
    # The first command keeps an installed or cached build, which may be for another torch.
    rebuild = [*BUILD, "--no-cache-dir", "--force-reinstall"]
    if not (run(BUILD, log) and (works(log) or (run(rebuild, log) and works(log)))):
        raise RunError("its build failed.")


def run(command: Sequence[str], log: Path, text: str = "") -> bool:
    """Run a command on `text`, append its output to the log; return True if it exits with 0."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_COMPILER))
    environment = {"MAX_JOBS": str(jobs), "DEBIAN_FRONTEND": "noninteractive", **os.environ}
    # setup.py runs `pip`, which must be this interpreter's.
    path = environment.get("PATH", os.defpath)
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), path])
    environment.pop("SETUPTOOLS_USE_DISTUTILS", None)  # breaks the build on Python 3.12 and later
    with log.open("a", encoding="utf-8") as file:
        print("$", shlex.join(command), file=file, flush=True)
        # Python searches the current folder first, and a clone of MinkowskiEngine may be there.
        done = subprocess.run(
            command, input=text, text=True, stdout=file, stderr=file, env=environment, cwd="/"
        )
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
