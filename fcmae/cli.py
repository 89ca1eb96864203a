"""The command line: `fcmae COMMAND …`, the same as `python -m fcmae COMMAND …`.

Only the chosen command's config and code are imported, so `fcmae --help` needs neither torch nor
jsonargparse. A command's code is a function that takes its config object; it may return an exit
code, and anything else counts as done.

Exit codes: 0 done, 1 the run failed, 2 the command or config is wrong, 130 stopped by Ctrl-C,
143 stopped by SIGTERM.
"""

import os
import select
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from sparse.errors import InputError, RunError


@dataclass(frozen=True)
class Command:
    """Where a command's config and code live, as `module:name`, and what --help says of it."""

    summary: str
    usage: str
    config: str
    twin: str
    positional: str | None = None


COMMANDS = {
    "pretrain": Command(
        "learn from unlabeled images by reconstructing hidden patches",
        "fcmae pretrain --data DIR --out RUN",
        "fcmae.config.pretraining:PretrainConfig",
        "fcmae.train.pretraining:pretrain",
    ),
    "convert": Command(
        "turn a pretrained sparse model into a dense one that timm loads",
        "fcmae convert RUN|CHECKPOINT --out DIR",
        "fcmae.config.tools:ConvertConfig",
        "fcmae.weights.export:convert",
        "source",
    ),
    "finetune": Command(
        "train on labelled images, from pretrained weights or from scratch",
        "fcmae finetune --data DIR --weights DIR|RUN|none --out RUN",
        "finetune.config:FinetuneConfig",
        "finetune.train:finetune",
    ),
    "evaluate": Command(
        "measure top-1, top-5 and each class on labelled images",
        "fcmae evaluate RUN|WEIGHTS --data DIR",
        "finetune.tool_config:EvaluateConfig",
        "finetune.evaluate:evaluate",
        "source",
    ),
    "predict": Command(
        "write the best classes of each image to a CSV file",
        "fcmae predict RUN|WEIGHTS --images DIR --out FILE.csv",
        "finetune.tool_config:PredictConfig",
        "finetune.predict:predict",
        "source",
    ),
    "reconstruct": Command(
        "draw original, masked and reconstructed images side by side",
        "fcmae reconstruct RUN --images DIR --out FILE.png",
        "fcmae.config.tools:ReconstructConfig",
        "fcmae.inspect.reconstructing:reconstruct",
        "run",
    ),
    "probe": Command(
        "measure frozen features: nearest neighbours and a linear classifier",
        "fcmae probe RUN|WEIGHTS --data DIR",
        "fcmae.config.tools:ProbeConfig",
        "fcmae.inspect.probing:probe",
        "source",
    ),
    "embed": Command(
        "write the features of images to a file",
        "fcmae embed RUN|WEIGHTS --images DIR --out FILE.npz",
        "fcmae.config.tools:EmbedConfig",
        "fcmae.inspect.embedding:embed",
        "source",
    ),
    "diversity": Command(
        "measure whether the channels of a block have collapsed",
        "fcmae diversity RUN|WEIGHTS --images DIR",
        "fcmae.config.tools:DiversityConfig",
        "fcmae.inspect.diversity:diversity",
        "source",
    ),
    "report": Command(
        "write a page on one or several runs: curves, pictures, settings",
        "fcmae report RUN ...",
        "fcmae.config.tools:ReportConfig",
        "fcmae.inspect.reporting:report",
        "runs",
    ),
    "samples": Command(
        "write a small labelled set of images to try things on",
        "fcmae samples DIR",
        "fcmae.config.tools:SamplesConfig",
        "fcmae.data.samples:samples",
        "out",
    ),
    "doctor": Command(
        "show versions, engines, whether they agree, and how fast each is",
        "fcmae doctor",
        "fcmae.config.tools:DoctorConfig",
        "fcmae.inspect.diagnosis:doctor",
    ),
    "bench": Command(
        "time the engines side by side: images/s, peak memory, ratios",
        "fcmae bench",
        "fcmae.config.tools:BenchConfig",
        "fcmae.inspect.benchmark:bench",
    ),
}


ENVIRONMENT = {
    # Large tensors in huge pages: fewer page faults.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Threads that wait sleep instead of spinning: with anything else on the cores, be it our own
    # readers, spinning costs several times what sleeping does.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Read by torch and OpenMP when they are loaded; what the user has set stays."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(
            stream, "reconfigure"
        ):  # a name or sign that the locale lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        return 0
    except KeyboardInterrupt:  # while modules are imported
        _fail("fcmae", "interrupted")
        return 130
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        return _fail("fcmae", f"name a command: {', '.join(COMMANDS)}")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"fcmae {_version()}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        return _fail("fcmae", f"unknown command {name!r}; {hint}")
    command, prog = COMMANDS[name], f"fcmae {name}"
    try:
        config = _parse(name, rest)
    except InputError as error:
        # Every process of torchrun finds the same mistake: the first one tells.
        return 2 if _rank() else _fail(prog, str(error))
    if config is None:
        return 0
    try:
        _check_paths(config)
        result = _load(command.twin)(config)
    except InputError as error:
        return _fail(prog, str(error))
    except RunError as error:
        _fail(prog, str(error))
        return 1
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        _fail(prog, f"out of memory ({_first_line(error)}): {_LESS.get(name, _SMALLER)}")
        return 1
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        _fail(prog, "stdout was closed before the command was done")
        return 1
    except KeyboardInterrupt:
        _fail(prog, "interrupted")
        return 130
    return result if isinstance(result, int) else 0


_SMALLER = "give a smaller --batch_size or --img_size"
_LESS = {
    "pretrain": "--accumulate 2, or 4, 8 …, computes a batch in so many parts and learns the same; "
    "--recompute true needs less too",
    "finetune": "--accumulate 2, or 4, 8 …, computes a batch in so many parts",
}
"""What to do for want of memory, by command."""


def _out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more; torch, not imported here, says it so."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _parse(name: str, arguments: list[str]) -> Any:
    from fcmae.config.parsing import leaves, parse  # imports jsonargparse

    def owner(keys: Collection[str]) -> str:
        knowing = [
            other
            for other, command in COMMANDS.items()
            if set(keys) <= leaves(_load(command.config)).keys()
        ]
        whose = f"is a config of `fcmae {knowing[0]}`, not of `fcmae {name}`" if knowing else ""
        return whose if len(knowing) == 1 else ""

    command = COMMANDS[name]
    return parse(_load(command.config), arguments, command.usage, command.positional, owner)


def _check_paths(config: Any) -> None:
    from fcmae.config.values import check_paths

    check_paths(config)


def _load(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fcmae COMMAND ...",
            "",
            "Self-supervised pretraining of ConvNeXt V2 on your own images, and what follows.",
            "",
            *lines,
            "",
            "fcmae COMMAND --help explains the settings of a command; fcmae --version.",
        ]
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fcmae")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(prog: str, message: str) -> int:
    """Print one line on stderr and return 2."""
    rank = f" (rank {_rank()})" if _rank() else ""
    print(f"{prog}: error{rank}: {' '.join(message.splitlines())}", file=sys.stderr)
    return 2


def _rank() -> int:
    """Number of this process under torchrun, 0 without it."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _stdout_is_gone() -> bool:
    """Tell whether the reader of stdout has left, and if so, silence the flush at exit."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)  # asks for nothing; errors are always told
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
