"""The MinkowskiEngine installer's decisions, on a simulated machine."""

import os
import shlex
import subprocess
import sys
import sysconfig
from types import SimpleNamespace

import pytest

from sparse import install_minkowski
from sparse.install_minkowski import main, run, works

TOOLS = "python -m pip install setuptools wheel ninja numpy"
BUILD = (
    "python -m pip install --no-build-isolation --no-deps --use-pep517 "
    "'--config-settings=--global-option=--blas=openblas --cpu_only' MinkowskiEngine==0.5.4"
)
REBUILD = f"{BUILD} --no-cache-dir --force-reinstall"
APT = ["apt-get update", "apt-get install -y libopenblas-dev"]


class Machine:
    """Answers the installer's commands. By default it can build, and the user is not root."""

    def __init__(self) -> None:
        self.working = False
        self.cached_wheel_is_stale = False
        self.build_fails = False
        self.apt_fails = False
        self.lacks: set[str] = set()
        self.root = False
        self.commands: list[str] = []  # without probes and trial compilations
        self.environment: dict[str, str] = {}

    def run(self, command, *, env, stdout, **_options):
        if command[1] == "-c":
            return SimpleNamespace(returncode=not self.working)
        if "-lopenblas" in command:
            return SimpleNamespace(returncode="libopenblas-dev" in self.lacks)
        line = shlex.join(command).replace(sys.executable, "python")
        self.commands.append(line)
        self.environment = env
        failed = False
        if command[0] == "apt-get":
            failed = self.apt_fails
            self.lacks = self.lacks if failed or command[1] != "install" else set()
        elif "MinkowskiEngine" in line:
            failed = self.build_fails
            self.working = not failed and (not self.cached_wheel_is_stale or line == REBUILD)
        print(f"{command[0]} failed" if failed else "done", file=stdout)
        return SimpleNamespace(returncode=int(failed))

    def which(self, program):
        return None if program in self.lacks else f"/usr/bin/{program}"

    def find_spec(self, module):
        return None if module in self.lacks else module


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    machine = Machine()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(subprocess, "run", machine.run)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    monkeypatch.setattr(install_minkowski, "which", machine.which)
    monkeypatch.setattr(install_minkowski, "find_spec", machine.find_spec)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if machine.root else 1000)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name in ("CI", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return machine


def test_a_working_installation_is_not_rebuilt(machine):
    machine.working = True
    assert main([]) == 0
    assert machine.commands == []


def test_it_builds(machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    monkeypatch.setenv("PATH", "/bin")
    assert main([]) == 0
    assert machine.commands == [TOOLS, BUILD]
    assert "SETUPTOOLS_USE_DISTUTILS" not in machine.environment
    assert machine.environment["PATH"] == f"{tmp_path}:/bin"
    assert str(tmp_path / "minkowski-build.log") in capsys.readouterr().out


def test_a_cached_wheel_for_another_torch_is_rebuilt(machine):
    machine.cached_wheel_is_stale = True
    assert main([]) == 0
    assert machine.commands == [TOOLS, BUILD, REBUILD]


@pytest.mark.parametrize(("ci", "code"), [("", 3), ("true", 1)])
def test_a_failed_build_prints_the_end_of_its_log(machine, monkeypatch, capsys, ci, code):
    monkeypatch.setenv("CI", ci)
    machine.build_fails = True
    assert main([]) == code
    assert machine.commands == [TOOLS, BUILD]
    assert f"{sys.executable} failed\nMinkowskiEngine does not work" in capsys.readouterr().out


def test_root_installs_system_packages(machine):
    machine.root, machine.lacks = True, {"libopenblas-dev"}
    assert main([]) == 0
    assert machine.commands == [*APT, TOOLS, BUILD]
    assert machine.environment["DEBIAN_FRONTEND"] == "noninteractive"


@pytest.mark.parametrize(
    ("root", "lacks", "attempts", "advice"),
    [
        (False, "libopenblas-dev", [], "sudo apt-get install -y libopenblas-dev"),
        (False, "g++", [], "sudo apt-get install -y g++ libopenblas-dev"),
        (True, "libopenblas-dev", APT, "apt-get update && apt-get install -y libopenblas-dev"),
        (False, "torch", [], "-m pip install torch"),
        (False, "pip", [], "-m ensurepip"),
    ],
)
def test_missing_packages_are_named_with_the_command_that_installs_them(
    machine, capsys, root, lacks, attempts, advice
):
    machine.root, machine.lacks, machine.apt_fails = root, {lacks}, True
    assert main([]) == 3
    assert machine.commands == attempts
    assert advice in capsys.readouterr().out


def test_missing_python_headers_are_named(machine, tmp_path, capsys):
    (tmp_path / "Python.h").unlink()
    assert main([]) == 3
    assert f"python3.{sys.version_info.minor}-dev" in capsys.readouterr().out


@pytest.mark.parametrize(("gigabytes", "jobs"), [(1, "1"), (9, "4"), (1000, "8")])
def test_compilers_fit_in_memory(machine, monkeypatch, gigabytes, jobs):
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": gigabytes * 2**30 // 4096}
    monkeypatch.setattr(os, "sysconf", memory.get)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert main([]) == 0
    assert machine.environment["MAX_JOBS"] == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    machine.working = False
    assert main([]) == 0
    assert machine.environment["MAX_JOBS"] == "3"


def test_commands_and_their_output_are_logged(tmp_path):
    log = tmp_path / "log"
    assert run([sys.executable, "-c", "print('from the child')"], log)
    assert not run([sys.executable, "-c", "raise SystemExit(3)"], log)
    assert "\nfrom the child\n" in log.read_text()


def test_a_module_that_does_not_convolve_counts_as_not_working(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("def tensor(*_args, **_options): ...\nint32 = None")
    (tmp_path / "MinkowskiEngine.py").write_text("__version__ = '0.5.4'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not works(tmp_path / "log")
    assert "no attribute 'SparseTensor'" in (tmp_path / "log").read_text()


def test_help_explains_the_exit_codes(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Exit codes" in capsys.readouterr().out
