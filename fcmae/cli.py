"""The command line: `fcmae COMMAND …`, the same as `python -m fcmae COMMAND …`.

To add a command, add a file to `fcmae/commands/` and a line to the table below. Only the chosen
command is imported, and its implementation only after the arguments are checked: `fcmae --help`
needs neither torch nor jsonargparse. A command may return an exit code; anything else means 0.

Exit codes: 0 success, 1 the run failed, 2 the command or config is wrong, 130 stopped by Ctrl-C,
143 stopped by SIGTERM.
"""

import os
import platform
import select
import sys
from collections.abc import Callable, Collection, Sequence
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

from fcmae import __version__
from fcmae.config.fields import check_paths, leaves
from sparse.errors import InputError, RunError, did_you_mean

COMMANDS = {
    "pretrain": "learn from unlabelled images by reconstructing hidden patches",
    "convert": "convert a pretrained sparse model to a dense one that timm loads",
    "finetune": "train on labelled images, from pretrained weights or from scratch",
    "evaluate": "measure a fine-tuned model on labelled images, overall and per class",
    "predict": "predict the classes, numbers or masks of new images",
    "export": "write a model for other programs: ONNX, torch.export, transformers",
    "push": "publish a model on the Hugging Face Hub",
    "reconstruct": "draw original, masked and reconstructed images side by side",
    "probe": "evaluate frozen features by nearest neighbours and a linear classifier",
    "embed": "write the features of images to a file",
    "select": "choose the images to label next",
    "diversity": "measure whether the channels of a block have collapsed",
    "report": "write an HTML page about one or more runs: curves, figures, settings",
    "shard": "pack images into tar files, for large collections",
    "samples": "write a small labelled data set for a first try",
    "doctor": "show versions, check that the engines agree, time each, and forecast memory",
    "bench": "benchmark the engines: images/s, peak memory, ratios",
}
"""Summary of each command in --help. Its module in fcmae/commands/ holds the rest."""

HELP = """usage: fcmae COMMAND ...

Self-supervised pretraining of ConvNeXt V2 on your own images, fine-tuning and evaluation.

{commands}

fcmae COMMAND --help explains the settings of a command; fcmae --version prints the version."""

ENVIRONMENT = {
    # Large tensors in huge pages: fewer page faults.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Waiting threads sleep instead of spinning: if anything else uses the cores, such as our own
    # data workers, spinning costs several times as much.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Read by torch and OpenMP when they are loaded. Variables that the user has set are kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    prog = f"fcmae {name}" if name in COMMANDS else "fcmae"
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the locale lacks must not end a run
            stream.reconfigure(errors="backslashreplace")
    config = result = None  # config is not None while the command runs
    try:
        if (config := _parse(name, arguments)) is not None:
            if not _rank():  # other ranks report it through `World.prepare`
                check_paths(config)
            result = code_of(name)(config)
        config = None
        if sys.stdout is not None:
            sys.stdout.flush()
    except InputError as error:
        # Every process of torchrun finds the same mistake in its arguments; only rank 0 reports it.
        return 2 if config is None and _rank() else _fail(prog, str(error), 2)
    except RunError as error:
        return _fail(prog, str(error), 1)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        advice = _LESS.get(name, "use a smaller --batch_size or --img_size")
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        return _fail(prog, f"out of memory ({reason}): {advice}", 1)
    except BrokenPipeError:
        if not _stdout_is_gone():
            raise
        closed = "stdout was closed before the command finished"
        return 0 if config is None else _fail(prog, closed, 1)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", 130)
    return result if isinstance(result, int) else 0


_LESS = {
    "pretrain": "use --accumulate 2 (or 4, 8 …) or --recompute true, with the same results",
    "finetune": "use --accumulate 2 (or 4, 8 …)",
    "predict": "use a smaller --batch_size, or for masks --tile 512 or less",
}
"""What to do when memory runs out, by command."""


def _out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory, without importing torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _parse(name: str, arguments: list[str]) -> Any:
    """Return the command's config, or None if only help, a version or a config was printed."""
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {command:<{width}}  {summary}" for command, summary in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)))
        return None
    if name == "--version":
        print(f"fcmae {__version__}")
        return None
    if name not in COMMANDS:
        what = f"unknown command {name!r}" if name else "no command given"
        raise InputError(f"{what}; {did_you_mean(name, COMMANDS)}")
    from fcmae.config.parsing import parse  # imports jsonargparse

    def owner(keys: Collection[str]) -> str:
        fits = [other for other in COMMANDS if set(keys) <= leaves(config_of(other)).keys()]
        return f"is a config of `fcmae {fits[0]}`, not of `fcmae {name}`" if len(fits) == 1 else ""

    return parse(config_of(name), arguments, f"fcmae {name}", owner)


def config_of(name: str) -> Any:
    """Return the config class of a command."""
    config = import_module(f"fcmae.commands.{name}").CONFIG
    return resolve_name(config) if isinstance(config, str) else config


def code_of(name: str) -> Callable[[Any], Any]:
    """Return the function that runs a command."""
    return resolve_name(import_module(f"fcmae.commands.{name}").RUN)


def _fail(prog: str, message: str, code: int) -> int:
    """Print one line on stderr and return the exit code."""
    machine = f" on {platform.node()}" if os.environ.get("GROUP_WORLD_SIZE", "1") != "1" else ""
    rank = f" (rank {_rank()}{machine})" if _rank() or machine else ""
    print(f"{prog}: error{rank}: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _rank() -> int:
    """Rank of this process under torchrun, 0 without it."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdigit() else 0


def _stdout_is_gone() -> bool:
    """Return whether the reader of stdout has closed it; if so, silence the flush at exit."""
    stdout = sys.stdout.fileno()
    poll = select.poll()
    poll.register(stdout, 0)  # no events; errors are always reported
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
