"""Processes of several machines: how they meet, agree, and notice that others are gone."""

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from fcmae import cli
from fcmae.config.pretraining import PretrainConfig
from fcmae.train import resume
from fcmae.train.checkpoint import list_checkpoints, newest_checkpoint
from fcmae.train.processes import World, agree_on_prefix, join_world, patience
from fcmae.train.run_paths import RunPaths
from sparse.errors import InputError, RunError
from tests.cli import TINY, kill_all, reaped, run, start, wait_for_steps
from tests.conftest import write_pictures
from tests.faults.processes import assert_same, finish, launch, pretrain, undisturbed

LIMIT = timedelta(seconds=20)
HERE = socket.gethostname()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def connect() -> Callable[[], TCPStore]:
    """Returns new connections to a store, which like torchrun's outlives its users."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: TCPStore("127.0.0.1", server.port, wait_for_workers=False)


def meet(connect: Callable[[], TCPStore], size: int = 3) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        join = [pool.submit(agree_on_prefix, connect(), r, size, LIMIT) for r in range(size)]
        return [each.result() for each in join]


def test_processes_agree_on_a_new_prefix_at_every_start(connect: Callable[[], TCPStore]) -> None:
    starts = [meet(connect), meet(connect), meet(connect, 2)]
    assert [len(set(start)) for start in starts] == [1, 1, 1]
    assert len({start[0] for start in starts}) == 3


def test_processes_that_died_are_not_waited_for(connect: Callable[[], TCPStore]) -> None:
    """Process 1 died after it asked, and an earlier main one after it answered process 2."""
    store = connect()
    store.set("request/1", "dead")
    with ThreadPoolExecutor(3) as pool:
        second = pool.submit(agree_on_prefix, connect(), 2, 3, LIMIT)
        store.set(f"answer/{store.get('request/2').decode()}", "of the dead")
        store.wait(["of the dead/2"], LIMIT)
        main = pool.submit(agree_on_prefix, connect(), 0, 3, LIMIT)
        store.wait(["answer/dead"], LIMIT)
        assert not second.done()
        assert not main.done()
        first = pool.submit(agree_on_prefix, connect(), 1, 3, LIMIT)
        assert first.result() == second.result() == main.result() != "of the dead"


def test_the_wait_for_others_ends(connect: Callable[[], TCPStore]) -> None:
    with ThreadPoolExecutor(2) as pool:
        limit = timedelta(seconds=1)
        main = pool.submit(agree_on_prefix, connect(), 0, 4, limit)
        first = pool.submit(agree_on_prefix, connect(), 1, 4, limit)
        with pytest.raises(RunError, match=r"^process 2, 3 of 4 did not come within 1 s: see what"):
            main.result()
        with pytest.raises(
            RunError, match=r"^process 0 did not find all of 4 processes within 1 s"
        ):
            first.result()


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, port: int, **more: object) -> None:
    for name, value in as_rank(rank, port, **more).items():
        monkeypatch.setenv(name, value)


def as_rank(rank: int, port: int, **more: object) -> dict[str, str]:
    """The environment of one of two processes on two machines, as torchrun sets it."""
    given = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, **more}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_WORLD_SIZE": 2}
    return {name: str(value) for name, value in given.items()}


def test_an_unreachable_main_machine_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, 1, free_port(), FCMAE_PATIENCE=1)
    with (
        pytest.raises(RunError, match=r"^lost the other processes \(.*127\.0\.0\.1.*\): see what"),
        join_world(torch.device("cpu")),
    ):
        raise AssertionError("joined nobody")


def test_other_errors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0, free_port(), WORLD_SIZE=1)
    with pytest.raises(RuntimeError, match=r"^shapes"), join_world(torch.device("cpu")):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize("given", ["0", "-3", "1.5", "soon", ""])
def test_patience_is_checked(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert patience() == timedelta(minutes=10)
    monkeypatch.setenv("FCMAE_PATIENCE", given)
    with pytest.raises(InputError, match=f"^FCMAE_PATIENCE '{given}' is not a number of seconds"):
        patience()


def refuse(message: str) -> None:
    raise InputError(message)


def test_what_fails_on_one_machine_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from the first of two processes, with what the second found."""
    there: tuple[str | None, str] = ("no images", "far")
    monkeypatch.setattr(World, "gather", lambda _, item: [item, there])
    world = World(size=2)
    with pytest.raises(InputError, match=r"^process 1 on far: no images$"):
        world.prepare(lambda: 3)
    with pytest.raises(InputError, match=f"^process 0 on {HERE}: no disk$"):
        world.prepare(lambda: refuse("no disk"))
    with pytest.raises(InputError, match=r"^no images$"):  # on both
        world.prepare(lambda: refuse("no images"))
    there = (None, "far")
    assert world.prepare(lambda: 3) == 3
    with pytest.raises(InputError, match=r"^alone$"):
        World().prepare(lambda: refuse("alone"))


def test_errors_name_the_machine_if_there_are_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise RunError("disk full")

    monkeypatch.setattr(cli, "code_of", lambda _: fail)
    pretend(monkeypatch, 1, 1)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == f"fcmae doctor: error (rank 1 on {HERE}): disk full\n"


SMALL = [*TINY, "--epochs", "2"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A run that did not finish."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    run("pretrain", "--data", pictures, "--out", out, *SMALL, "--checkpoint_steps", 1)
    shutil.rmtree(list_checkpoints(out / "checkpoints")[0])
    return out


@pytest.fixture
def late(stopped: Path, pictures: Path, tmp_path: Path) -> tuple[PretrainConfig, Any, Path]:
    """A config of another machine, the place of a checkpoint, and that machine's empty folder."""
    found = newest_checkpoint(stopped / "checkpoints")
    assert found is not None
    place = resume._Place.of(found, RunPaths(stopped))
    return PretrainConfig(str(pictures), str(tmp_path / "run")), place, tmp_path / "run"


def show_late(stopped: Path, out: Path) -> None:
    """Show one file after the other, the largest in two halves."""
    files = sorted(path for path in stopped.rglob("*") if path.is_file())
    for path in files:
        target = out / path.relative_to(stopped)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        target.write_bytes(content[: len(content) // 2])
        time.sleep(0.02)
        target.write_bytes(content)


def test_a_checkpoint_that_is_shown_late_is_waited_for(
    late: tuple[PretrainConfig, Any, Path], stopped: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, place, out = late
    shown = threading.Timer(0.3, partial(show_late, stopped, out))
    shown.start()
    found = place.wait(config)
    shown.join()
    assert found.path == list_checkpoints(out / "checkpoints")[0]
    assert found.state["step"] == 5
    assert [record.message.split("(")[1] for record in caplog.records] == [
        "manifest.json: No such file or directory): waiting for it, at most 120 s"
    ]


def test_a_checkpoint_that_is_never_shown_or_another_is_refused(
    late: tuple[PretrainConfig, Any, Path], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, place, out = late
    monkeypatch.setattr(resume, "SHOWN_WITHIN", 0.0)
    with pytest.raises(InputError, match=r"00000005' of process 0 is not here \(manifest.json: No"):
        place.wait(config)
    shutil.copytree(stopped, out)
    place.wait(config)
    (out / "images-all.npz").unlink()
    with pytest.raises(InputError, match=r"\(images-all.npz is missing\): put --out on a disk"):
        place.wait(config)
    (list_checkpoints(out / "checkpoints")[0] / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match=r"\(its manifest.json is another\): put --out on a disk"):
        place.wait(config)


def two(*commands: list[object]) -> list[Popen[str]]:
    port = free_port()
    return [start("pretrain", *c, **as_rank(r, port)) for r, c in enumerate(commands)]


@pytest.mark.slow
def test_a_run_resumes_from_what_the_main_process_sees(
    stopped: Path, pictures: Path, tmp_path: Path
) -> None:
    """The second machine mounts the disk elsewhere, and at first it seems empty."""
    main, other = tmp_path / "main" / "run", tmp_path / "other" / "run"
    shutil.copytree(stopped, main)
    with reaped():
        first, second = two(
            ["--data", pictures, "--out", main, *SMALL],
            ["--data", pictures, "--out", other, *SMALL],
        )
        assert second.stderr is not None
        assert "waiting for it" in second.stderr.readline()
        show_late(stopped, other)
        said = first.communicate(timeout=120)[1]
        assert first.returncode == 0, said
        assert "resuming from step 5" in said
        assert second.communicate(timeout=120)[1] == ""
        assert second.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "process 1 on {}: data '{}' can't be read (No such file or directory): give a reada"),
        (23, "process 1 on {} has a number of images (list 1) of 23 and process 0 on {0} 24: all"),
        (24, "process 1 on {} has names of images (list 1) with the SHA-256 '"),
    ],
)
def test_machines_that_see_other_images_are_named(
    count: int, said: str, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    if count:
        write_pictures(data, count)
        (data / min(os.listdir(data))).rename(data / "another.png")
    with reaped():
        rest = ["--out", tmp_path / "run", *SMALL]
        for process in two(["--data", pictures, *rest], ["--data", data, *rest]):
            *_, line = process.communicate(timeout=120)[1].strip().splitlines()
            assert process.returncode == 2
            expected = said.replace("{}", HERE, 1).replace("{0}", HERE).replace("{}", str(data))
            assert f" on {HERE}): {expected}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_other_with_one_line(
    victim: int, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["--data", pictures, "--out", out, *TINY, "--epochs", 500]
    with reaped():
        processes = two(command, command)
        wait_for_steps(out, 7, processes[0])
        kill_all(processes[victim])
        left = processes[1 - victim]
        said = left.communicate(timeout=60)[1]
        assert left.returncode == 1, said
        *_, line = said.strip().splitlines()
        assert f" on {HERE}): lost the other processes (" in line
        assert "resumes from the last checkpoint" in line
        assert "Traceback" not in said


@pytest.mark.slow
def test_four_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """With more than two, the order of sums matters: it must be that of a run never stopped."""
    command = pretrain(tmp_path / "run")
    with reaped():
        killed = launch(command, 4)
        wait_for_steps(tmp_path / "run", 3, killed)
        kill_all(killed)
        finish(command, 4)
        assert_same(tmp_path / "run", undisturbed(4)[0])
