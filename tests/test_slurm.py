"""The script for Slurm in docs/distributed.md, run with stand-ins for Slurm's commands."""

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from fcmae.train.checkpoint import newest_good
from tests.cli import begin, family, has_steps, metrics, reaped, until, weights
from tests.faults.processes import assert_same, pretrain, undisturbed
from tests.test_processes import free_port

SRUN = """#!/bin/bash
# Run the command on each node; a step fails if one of its tasks does.
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_PROCID=$node "$@" &
    echo $! >> "$TASKS"
done
code=0
for task in $(cat "$TASKS"); do wait "$task" || code=$?; done
exit $code
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") echo localhost; echo localhost ;;
    requeue*) echo "$2" >> "$QUEUE" ;;
    *) exit 1 ;;
esac
"""


def job(tmp_path: Path, out: Path, name: str) -> subprocess.Popen[str]:
    """Start the script of the docs, with a process on each of two nodes."""
    docs = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    block = re.search(r"(?m)^    #!/bin/bash\n(?:(?:    .*)?\n)+", docs)
    assert block is not None
    script = re.sub("(?m)^    ", "", block[0])
    _, _, data, _, place, *options = pretrain(out)
    for there, here in (
        ("--nproc_per_node 8", "--nproc_per_node 1"),
        (":29500", f":{free_port()}"),
        ("--data /shared/photos", f"--data {data}"),
        ("--out /shared/runs/photos", f"--out {place} {shlex.join(options)}"),
    ):
        assert script.count(there) == 1, there
        script = script.replace(there, here)
    for tool, text in (("srun", SRUN), ("scontrol", SCONTROL), ("job.sh", script)):
        (tmp_path / tool).write_text(text)
        (tmp_path / tool).chmod(0o755)
    return begin(
        [str(tmp_path / "job.sh")], log=tmp_path / f"{name}.log",
        PATH=f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        SLURM_NNODES="2", SLURM_JOB_ID="17", SLURM_JOB_NODELIST="node[1-2]",
        TASKS=str(tmp_path / f"{name}.tasks"), QUEUE=str(tmp_path / "queue"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_saves_at_its_time_limit_and_requeues_itself_until_it_is_done(tmp_path: Path) -> None:
    out, queue = tmp_path / "run", tmp_path / "queue"
    with reaped():
        first = job(tmp_path, out, "first")
        assert until(partial(has_steps, out, 7), first), (tmp_path / "first.log").read_text()
        # Slurm signals every process of the step.
        for task in (tmp_path / "first.tasks").read_text().split():
            for pid in family(int(task)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        assert first.wait(timeout=90) == 0
        assert queue.read_text() == "17\n"
        good = newest_good(out / "checkpoints")
        assert good is not None
        assert int(good.name[5:]) == len(metrics(out)) < len(metrics(undisturbed(2)[0]))
        second = job(tmp_path, out, "second")
        assert second.wait(timeout=240) == 0
        assert_same(out, undisturbed(2)[0])
        assert f"resuming from step {int(good.name[5:])}" in (tmp_path / "second.log").read_text()
        before = weights(out)
        third = job(tmp_path, out, "third")
        assert third.wait(timeout=240) == 0
        assert "nothing to do" in (tmp_path / "third.log").read_text()
        assert weights(out) == before
        assert queue.read_text() == "17\n", "a finished job was queued again"
