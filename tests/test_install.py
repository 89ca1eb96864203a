"""The MinkowskiEngine installer's decisions, on machines that are made up."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from sparse import install_minkowski
from sparse.install_minkowski import (
    FAILED,
    GO_ON_WITHOUT,
    INSTALLED,
    Machine,
    install,
    pip_command,
)


class FakeMachine(Machine):
    """A machine on which commands do what the test says, and are written down."""

    def __init__(
        self,
        log: Path,
        *,
        works: Sequence[bool],
        modules: str = "torch pip setuptools wheel ninja numpy",
        missing: Sequence[str] = (),
        root: bool = False,
        apt: bool = True,
        failing: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> None:
        log.write_text("old line\nlast line\n")
        super().__init__(environ=environ or {}, root=root, log=log)
        self._works, self._modules, self._missing = list(works), modules.split(), list(missing)
        self._apt, self._failing = apt, failing
        self.commands: list[str] = []
        self.environments: list[Mapping[str, str] | None] = []

    def run(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
        line = " ".join(command).replace(sys.executable, "python")
        self.commands.append(line)
        self.environments.append(environment)
        failed = bool(self._failing) and self._failing in line
        if line.startswith("apt-get install") and not failed:
            self._missing = []
        return not failed

    def works(self) -> bool:
        return self._works.pop(0)

    def has_module(self, name: str) -> bool:
        return name in self._modules

    def missing_system_packages(self) -> list[str]:
        return self._missing

    def has_apt(self) -> bool:
        return self._apt


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "build.log"


@pytest.fixture
def said() -> list[str]:
    return []


BUILD = (
    "python -m pip install --no-build-isolation --no-deps --use-pep517 "
    "--config-settings=--global-option=--blas=openblas --cpu_only"
)
PLAIN = f"{BUILD} MinkowskiEngine==0.5.4"
REBUILD = f"{BUILD} --no-cache-dir --force-reinstall MinkowskiEngine==0.5.4"


def test_pip_command() -> None:
    plain = pip_command(rebuild=False)
    assert " ".join(plain).replace(sys.executable, "python") == PLAIN
    assert "--config-settings=--global-option=--blas=openblas --cpu_only" in plain
    assert " ".join(pip_command(rebuild=True)).replace(sys.executable, "python") == REBUILD


def test_a_working_one_is_left_alone(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[True])
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == []


def test_builds_when_all_is_there(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False, True])
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == [PLAIN]
    assert "4 to 8 minutes" in said[0]
    assert str(log) in said[0]


def test_a_kept_wheel_of_another_torch_is_rebuilt(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False, False, True])
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == [PLAIN, REBUILD]


def test_an_installed_one_of_another_torch_is_rebuilt(log: Path, said: list[str]) -> None:
    modules = "torch pip setuptools wheel ninja numpy MinkowskiEngine"
    machine = FakeMachine(log, works=[False, True], modules=modules)
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == [REBUILD]


def test_a_failed_build_shows_how_its_log_ends(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False], failing="MinkowskiEngine")
    assert install(machine, said.append) == GO_ON_WITHOUT
    assert machine.commands == [PLAIN]
    assert said[-1].startswith("No MinkowskiEngine: its build failed")
    assert "last line" in said[-1]
    assert "patch engine" in said[-1]


def test_a_rebuild_that_does_not_help_fails(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False, False, False])
    assert install(machine, said.append) == GO_ON_WITHOUT
    assert machine.commands == [PLAIN, REBUILD]


def test_root_on_debian_installs_what_is_missing(log: Path, said: list[str]) -> None:
    missing = ["g++", "libopenblas-dev"]
    machine = FakeMachine(log, works=[False, True], missing=missing, root=True)
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == ["apt-get update", "apt-get install -y g++ libopenblas-dev", PLAIN]
    apt, build = machine.environments[1], machine.environments[2]
    assert apt is not None
    assert build is not None
    assert apt["DEBIAN_FRONTEND"] == "noninteractive"
    assert "MAX_JOBS" in build


@pytest.mark.parametrize(("root", "apt"), [(False, True), (False, False), (True, False)])
def test_others_are_told_the_line_to_run(root: bool, apt: bool, log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False], missing=["libopenblas-dev"], root=root, apt=apt)
    assert install(machine, said.append) == GO_ON_WITHOUT
    assert machine.commands == []
    sudo = "" if root else "sudo "
    line = f"{sudo}apt-get update && {sudo}apt-get install -y libopenblas-dev && {sys.executable}"
    assert line in said[-1]
    assert ("Debian's" in said[-1]) is not apt


def test_root_whose_apt_fails_is_told_too(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False], missing=["g++"], root=True, failing="apt-get")
    assert install(machine, said.append) == GO_ON_WITHOUT
    assert "apt-get install -y g++" in said[-1]
    assert "last line" in said[-2]


@pytest.mark.parametrize(
    ("modules", "remedy"), [("pip", "pip install torch"), ("torch", "ensurepip")]
)
def test_missing_torch_or_pip_is_named(
    modules: str, remedy: str, log: Path, said: list[str]
) -> None:
    machine = FakeMachine(log, works=[False], modules=modules)
    assert install(machine, said.append) == GO_ON_WITHOUT
    assert machine.commands == []
    assert remedy in said[-1]


def test_missing_build_tools_are_installed(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False, True], modules="torch pip numpy setuptools")
    assert install(machine, said.append) == INSTALLED
    assert machine.commands == ["python -m pip install wheel ninja", PLAIN]


def test_in_ci_going_on_without_is_a_failure(log: Path, said: list[str]) -> None:
    machine = FakeMachine(log, works=[False], missing=["g++"], environ={"CI": "true"})
    assert install(machine, said.append) == FAILED
    assert said[-1].startswith("error: ")


def test_children_find_pip_and_start_no_more_compilers_than_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install_minkowski, "compiler_jobs", lambda: 3)
    given = {"PATH": "/bin", "SETUPTOOLS_USE_DISTUTILS": "stdlib"}
    child = Machine(environ=given, log=tmp_path / "log").child_environment()
    assert child["PATH"].endswith(":/bin")
    assert (Path(child["PATH"].split(":")[0]) / Path(sys.executable).name).exists()
    assert child["MAX_JOBS"] == "3"
    assert "SETUPTOOLS_USE_DISTUTILS" not in child
    chosen = Machine(environ={"MAX_JOBS": "1"}, log=tmp_path / "log").child_environment()
    assert chosen["MAX_JOBS"] == "1"


def test_commands_and_their_output_are_logged(tmp_path: Path) -> None:
    machine = Machine(log=tmp_path / "log")
    assert machine.run([sys.executable, "-c", "print('from the child')"])
    assert not machine.run([sys.executable, "-c", "raise SystemExit(3)"])
    assert not machine.run(["no-such-program"])
    tail = machine.log_tail()
    assert "from the child" in tail
    assert "no-such-program" in tail


def test_a_compiler_that_is_missing_is_named(tmp_path: Path) -> None:
    machine = Machine(environ={"CXX": "no-such-compiler"}, log=tmp_path / "log")
    assert machine.missing_system_packages()[:2] == ["g++", "libopenblas-dev"]


def test_help_explains_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        install_minkowski.main(["--help"])
    assert stop.value.code == 0
    assert "Exit codes" in capsys.readouterr().out
