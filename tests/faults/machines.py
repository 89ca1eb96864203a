"""Two machines that lose each other: network namespaces on one host, behind a switch.

Each has its own address, host name and agent of torchrun, which starts two processes. The disk is
shared. Cutting the network takes the switch down: packets vanish and no connection is closed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from fcmae.train.checkpoint import damage, list_checkpoints
from tests.cli import begin, has_steps, metrics, until
from tests.faults.campaign import Generator, Row, Unavailable
from tests.faults.processes import STEPS, assert_same, is_rank, pretrain, undisturbed

HOSTS = {"machine-a": "10.77.0.1", "machine-b": "10.77.0.2"}
A, B = HOSTS
BOOT = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
MEET = {
    "static": ["--master_addr", A, "--master_port", "29500"],
    "c10d": [
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{A}:29500", "--rdzv_id", "run",
        "--rdzv_conf", "join_timeout=45,keep_alive_interval=1",
    ],
}  # fmt: skip
"""How agents find each other, as docs/distributed.md has it."""

Agent = subprocess.Popen[str]


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@cache
def check_possible() -> None:
    """Raise Unavailable where namespaces are not allowed."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise Unavailable("network namespaces require root and iproute2")
    name = f"fcmae-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "switch", "type", "bridge")
        ip("netns", "exec", name, "unshare", "--uts", "--mount", "true")
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"network namespaces are not allowed: {error.stderr.strip()}") from None
    finally:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)


class Machines:
    """Both machines and the switch.

    Args:
        folder: for logs.
        patience: seconds that processes wait for each other.
    """

    def __init__(self, folder: Path, patience: int) -> None:
        self.folder, self._patience, self._starts = folder, patience, 0
        self._switch = f"fcmae-{os.getpid()}-switch"
        self.spaces = {host: f"fcmae-{os.getpid()}-{host}" for host in HOSTS}
        self._hosts = folder / "hosts"
        names = "".join(f"{address} {host}\n" for host, address in HOSTS.items())
        self._hosts.write_text(f"127.0.0.1 localhost\n{names}")

    def connect(self) -> None:
        for space in (self._switch, *self.spaces.values()):
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        for host, space in self.spaces.items():
            ends = ["type", "veth", "peer", "name", host, "netns", self._switch]
            ip("link", "add", "eth0", "netns", space, *ends)
            ip("-n", self._switch, "link", "set", host, "master", "switch", "up")
            ip("-n", space, "addr", "add", f"{HOSTS[host]}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
        self.set_network("up")

    def set_network(self, state: str) -> None:
        ip("-n", self._switch, "link", "set", "switch", state)

    def remove(self) -> None:
        for space in (*self.spaces.values(), self._switch):
            with suppress(subprocess.CalledProcessError):
                self._kill(space)
                ip("netns", "del", space)

    def give_up_early(self) -> None:
        """Let connections end after seconds without an answer; 15 minutes are Linux's default."""
        for space in self.spaces.values():
            ip("netns", "exec", space, "sh", "-c", "echo 5 >/proc/sys/net/ipv4/tcp_retries2")

    def start(self, host: str, command: list[str], meet: str, restarts: int) -> Agent:
        """Start a machine's agent with the run's command."""
        self._starts += 1
        logs = self.folder / f"{self._starts}-{host}"
        rank = ["--node_rank", str([*HOSTS].index(host))] if meet == "static" else []
        torchrun = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes", "2",
            "--nproc_per_node", "2", "--max_restarts", str(restarts), *MEET[meet], *rank,
            "--redirects", "3", "--log_dir", str(logs), "-m", "fcmae", *command,
        ]  # fmt: skip
        boot = ["unshare", "--uts", "--mount", "sh", "-c", BOOT, "sh", host, str(self._hosts)]
        return begin(
            ["ip", "netns", "exec", self.spaces[host], *boot, *torchrun],
            log=self.folder / f"{self._starts}-{host}.log", FCMAE_PATIENCE=str(self._patience),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    def start_both(self, command: list[str], meet: str, restarts: int) -> tuple[Agent, Agent]:
        return self.start(A, command, meet, restarts), self.start(B, command, meet, restarts)

    def processes(self, host: str) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.spaces[host]).split()]

    def kill(self, host: str) -> None:
        """Kill everything on a machine."""
        self._kill(self.spaces[host])

    def _kill(self, space: str) -> None:
        while pids := ip("netns", "pids", space).split():
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)

    def wait(self, *agents: Agent, seconds: float = 240) -> bool:
        """Wait for agents; return whether all succeeded. No process may have shown a traceback."""
        deadline = time.monotonic() + seconds
        for agent in agents:
            agent.wait(timeout=max(deadline - time.monotonic(), 0.1))
        for path in self.folder.rglob("stderr.log"):
            said = path.read_text()
            assert "Traceback" not in said, f"{path}: {said[-1500:]}"
            lines = [line for line in said.splitlines() if "error" in line]
            assert len(lines) <= 1, f"{path}: {lines}"
        return all(agent.returncode == 0 for agent in agents)

    def said(self) -> str:
        """The last lines of all logs, for messages about failures."""
        logs = sorted([*self.folder.glob("*.log"), *self.folder.rglob("stderr.log")])
        tails = (f"{log.relative_to(self.folder)}: {log.read_text()[-700:]}" for log in logs)
        return "\n".join(tails)[-6000:]


@contextmanager
def machines(folder: Path, patience: int = 20) -> Iterator[Machines]:
    check_possible()
    both = Machines(folder, patience)
    try:
        both.connect()
        yield both
    finally:
        both.remove()


def restart_count(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(v.decode() for v in variables if v.startswith(b"TORCHELASTIC_RESTART_COUNT="))


def together(number: int, random: Generator, folder: Path) -> str:
    """The same numbers as on one machine; in the last trial with unequal restart counts."""
    reference, _ = undisturbed(4)
    out, meet = folder / "run", ("static", "c10d", "static")[number]
    with machines(folder) as both:
        agents = both.start_both(pretrain(out), meet, 3)
        if number == 2:  # as its processes wait, or come: agents do not tell each other
            until(lambda: len([*filter(is_rank, both.processes(B))]) == 2, agents[1])
            os.kill(next(filter(is_rank, both.processes(B))), signal.SIGKILL)
            assert until(partial(has_steps, out, 1), agents[0]), both.said()
            counts = [restart_count(next(filter(is_rank, both.processes(h)))) for h in HOSTS]
            assert counts[0] != counts[1], counts
        assert both.wait(*agents), both.said()
    assert_same(out, reference)
    return f"{meet}{', unequal restart counts' if number == 2 else ''}"


def node_lost(number: int, random: Generator, folder: Path) -> str:
    """A machine is killed, or loses its power unnoticed, and is brought back: the job finishes."""
    reference, seconds = undisturbed(4)
    out, meet, power = folder / "run", ("static", "c10d")[number % 2], number % 4 > 1
    command = pretrain(out)
    with machines(folder, 40) as both:  # long enough for a slow start of the other
        first, second = both.start_both(command, meet, 5)
        moment, deadline = int(random.integers(1, STEPS - 8)), time.monotonic() + 120
        if random.random() < 0.25:  # most likely while it starts
            moment, deadline = STEPS - 8, time.monotonic() + float(random.uniform(1, seconds))
        until(lambda: has_steps(out, moment) or time.monotonic() > deadline, second)
        done = len(metrics(out))
        if power:
            both.set_network("down")
        both.kill(B)
        assert all(damage(path) is None for path in list_checkpoints(out / "checkpoints"))
        time.sleep(float(random.uniform(0, 4)))
        both.set_network("up")
        second = both.start(B, command, meet, 5)
        assert both.wait(first, second), both.said()
    assert_same(out, reference)
    return f"{meet}, {'power lost' if power else 'killed'} after step {done}"


def network_cut(number: int, random: Generator, folder: Path) -> str:
    """The network is cut, or the rendezvous host lost: it finishes, or ends and resumes."""
    reference, _ = undisturbed(4)
    out, meet = folder / "run", ("static", "c10d")[number % 2]
    fault = ("cut for 30 s", "cut for good", "host lost")[number % 3]
    command = pretrain(out)
    with machines(folder, 120 if fault == "cut for 30 s" else 20) as both:
        if fault == "cut for good":  # torchrun waits until the system gives up
            both.give_up_early()
        agents = both.start_both(command, meet, 1)
        assert until(partial(has_steps, out, int(random.integers(1, STEPS - 8))), agents[0])
        began, done = time.monotonic(), len(metrics(out))
        if fault == "host lost":
            both.kill(A)
        else:
            both.set_network("down")
        if fault == "cut for 30 s":
            time.sleep(30)
            both.set_network("up")
        finished = both.wait(*agents)
        seconds = time.monotonic() - began
        both.set_network("up")
        kept = list_checkpoints(out / "checkpoints")
        assert len(kept) >= min(2, max(done - 1, 0) // 2), f"{kept} after {done}"
        assert all(damage(path) is None for path in kept)
        if not finished:
            assert both.wait(*both.start_both(command, meet, 1)), both.said()
    assert_same(out, reference)
    how = "finished" if finished else "ended, then resumed"
    return f"{meet}, {fault} after step {done}: {how} after {seconds:.0f} s"


ROWS = (
    Row("nodes", "two machines with two processes each: the numbers of one machine with four, also "
        "if torchrun's agents count restarts differently", 3, together),
    Row("node", "a machine killed, or lost without closing its connections, and brought back: the "
        "job finishes, bit-equal", 20, node_lost),
    Row("cut", "the network cut for 30 s or for good, or the rendezvous host lost: the run "
        "finishes, or each process ends with one line and the same command resumes; bit-equal", 10,
        network_cut),
)  # fmt: skip
