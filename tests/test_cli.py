"""The command line: the configs it passes on, its answers to mistakes, and its speed."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import torch

from fcmae import cli
from fcmae.commands.doctor import DoctorConfig
from fcmae.config.fields import leaves
from fcmae.config.files import save_yaml
from fcmae.config.parsing import usage
from fcmae.config.pretraining import PretrainConfig
from sparse.errors import InputError, RunError

ROOT = Path(__file__).parent.parent
GIVEN = ["--data", "photos", "--out", "run"]
Twin = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder where the inputs that the tests name exist."""
    for name in ("photos", "A", "B, C", "r"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace every command by a function that records its config."""
    configs: list[Any] = []
    use_twin(monkeypatch, configs.append)
    return configs


def use_twin(monkeypatch: pytest.MonkeyPatch, twin: Twin) -> None:
    monkeypatch.setattr(cli, "code_of", lambda name: twin)


def run(
    *arguments: str, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fcmae", *arguments],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output="stdout" not in options,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


MISTAKES = {
    "no command": ([], ["fcmae: error: ", "pretrain", "bench"]),
    "unknown command": (["pretrian"], ["fcmae: error: ", "'pretrian'; did you mean pretrain?"]),
    "nothing like it": (["zzz"], ["'zzz'", "pretrain, convert, finetune"]),
    "missing settings": (
        ["pretrain"],
        ["missing DATA and --out", "fcmae pretrain DATA... --out OUT"],
    ),
    "missing positional": (
        ["convert", "--out", "x"],
        ["missing SOURCE:", "fcmae convert SOURCE --out OUT"],
    ),
    "unknown option": (["pretrain", *GIVEN, "--epoch", "3"], ["--epoch;", "--epochs?"]),
    "no abbreviation": (["pretrain", *GIVEN, "--see", "3"], ["unknown option --see", "--seed?"]),
    "dashes": (["pretrain", *GIVEN, "--batch-size=3"], ["--batch-size;", "--batch_size?"]),
    "nested dashes": (
        ["pretrain", *GIVEN, "--optim.base-lr", "3"],
        ["--optim.base-lr;", "--optim.base_lr?"],
    ),
    "without its group": (["pretrain", *GIVEN, "--hflip", "no"], ["--augment.hflip?"]),
    "part of a name": (["finetune", *GIVEN, "--lr", "1"], ["--optim.base_lr?"]),
    "single dash": (["pretrain", *GIVEN, "-x"], ["unknown option -x", "--help"]),
    "group": (["pretrain", *GIVEN, "--optim", "x.yaml"], ["--optim is a group", "--optim.base_lr"]),
    "integer": (
        ["pretrain", *GIVEN, "--epochs", "abc"],
        ["--epochs 'abc'", "auto or an integer", "such as auto"],
    ),
    "not an integer": (["pretrain", *GIVEN, "--seed", "1.5"], ["--seed '1.5'", "an integer"]),
    "number": (
        ["pretrain", *GIVEN, "--optim.base_lr=fast"],
        ["--optim.base_lr 'fast'", "a number", "such as 0.006"],
    ),
    "list": (
        ["pretrain", *GIVEN, "--optim.betas", "0.9"],
        ["optim.betas [0.9]", "2 numbers", "[0.9,0.95]"],
    ),
    "list of words": (
        ["pretrain", *GIVEN, "--optim.betas", "x"],
        ["--optim.betas '[x]'", "a list of numbers", "[0.9,0.95]"],
    ),
    "null or": (["pretrain", *GIVEN, "--depths=[2,x]"], ["'[2,x]'", "a list of integers or null"]),
    "near choice": (
        ["pretrain", *GIVEN, "--precision", "bf17"],
        ["--precision 'bf17'", "auto, fp32, bf16", "'bf16'?"],
    ),
    "choice": (["pretrain", *GIVEN, "--precision", "x"], ["'x'", "fp32, bf16", "such as auto"]),
    "word or number": (["pretrain", *GIVEN, "--workers", "x"], ["auto or an integer"]),
    "no value": (["pretrain", *GIVEN, "--epochs"], ["--epochs needs a value, such as auto"]),
    "next option": (["pretrain", "--data", "--out", "b"], ["--data needs a value"]),
    "empty": (["pretrain", "--data=", "--out", "b"], ["DATA is empty"]),
    "empty positional": (["samples", ""], ["OUT is empty"]),
    "stray": (["convert", "A", "B", "--out", "C"], ["unexpected 'B'"]),
    "not a flag": (
        ["pretrain", *GIVEN, "--use_grn", "0"],
        ["--use_grn '0'", "true or false"],
    ),
    "range": (["pretrain", *GIVEN, "--epochs", "0"], ["epochs 0", "at least 1", "such as auto"]),
    "not of 32": (["pretrain", *GIVEN, "--img_size=225"], ["225", "32", "224 or 256"]),
    "config missing": (["pretrain", *GIVEN, "--config", "no.yaml"], ["'no.yaml'", "No such file"]),
    "config folder": (["pretrain", *GIVEN, "--config", "/"], ["'/'", "directory"]),
    "config empty": (["pretrain", *GIVEN, "--config="], ["--config is empty"]),
    "config NUL": (["pretrain", *GIVEN, "--config", "a\0b"], ["not a YAML text file"]),
}

FILES = {
    "unknown key": ("epoch: 3", ["unknown key 'epoch'", "epochs?"]),
    "nested key": ("optim:\n  base_rl: 3", ["'optim.base_rl'", "optim.base_lr?"]),
    "dashed key": ("optim:\n  base-lr: 3", ["'optim.base-lr'", "optim.base_lr?"]),
    "group": ("optim: 3", ["optim must hold settings", "3"]),
    "value": ("optim:\n  base_lr: fast", ["optim.base_lr 'fast'", "a number", "0.006"]),
    "choice": ("precision: bf17", ["precision 'bf17'", "'bf16'?"]),
    "number as string": ("model: 7", ["model must be a string, not 7", "quotes"]),
    "mapping as value": ("epochs:\n  a: 1", ["unknown key 'epochs.a'"]),
    "not YAML": ("a: [1\nb: 2", ["line 2"]),
    "no mapping": ("- a", ["'key: value'"]),
    "tag": ("out: !!python/object/apply:os.mkdir [pwned]", ["python/object", "line 1"]),
    "name tag": ("out: !!python/name:os.system", ["python/name"]),
    "own tag": ("out: !x y", ["!x"]),
    "aliases": ("a: &a [1]\nb: [*a, *a]", ["line 2", "aliases"]),
    "too deep": ("[" * 50_000, ["nested too deeply"]),
    "two documents": ("a: 1\n---\nb: 1", ["line 2"]),
}


def assert_one_line(capsys: pytest.CaptureFixture[str], prog: str, named: list[str]) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(prog)
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert "usage:" not in err
    for part in named:
        assert part in err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_2(
    name: str, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    argv, named = MISTAKES[name]
    assert cli.main(argv) == 2
    assert seen == []
    known = bool(argv) and argv[0] in cli.COMMANDS
    assert_one_line(capsys, f"fcmae {argv[0]}: error: " if known else "fcmae: error: ", named)


@pytest.mark.parametrize("name", FILES)
def test_a_mistake_in_a_file_names_the_file(
    name: str,
    seen: list[Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    text, named = FILES[name]
    (tmp_path / "my.yaml").write_text(text)
    assert cli.main(["pretrain", "--data", "photos", "--config", "my.yaml", "--out", "x"]) == 2
    assert seen == []
    assert_one_line(capsys, "fcmae pretrain: error: ", ["my.yaml", *named])
    assert {path.name for path in tmp_path.iterdir()} == {"my.yaml", "photos", "A", "B, C", "r"}


def test_the_config_of_another_command_is_named(
    seen: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    save_yaml(PretrainConfig("photos", "run"), path)
    recipe = ROOT / "configs" / "pretrain" / "tiny.yaml"
    for name, file in (("finetune", path), ("report", path), ("finetune", recipe)):
        assert cli.main([name, "--config", str(file), "--out", "new"]) == 2
        whose = f"is a config of `fcmae pretrain`, not of `fcmae {name}`"
        assert_one_line(capsys, f"fcmae {name}: error: {file} {whose}", [])
    assert seen == []


def test_a_binary_config_is_refused(
    seen: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert cli.main(["pretrain", *GIVEN, "--config", str(path)]) == 2
    assert seen == []
    assert_one_line(capsys, "fcmae pretrain: error: ", ["my.yaml", "not a YAML text file"])


def test_settings_can_be_given_in_every_form(seen: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "data: null\nepochs: 7\noptim:\n  base_lr: 3e-4\n  betas: [9e-1, 0.95]\nseed: 1"
    )
    more = tmp_path / "more.yaml"
    more.write_text("augment.hflip: false\nseed: 2\n")
    argv = [
        "pretrain", "--epochs", "8", "--data", "[A,'B, C']", "--out=-x=y", "--config", str(path),
        "--img_size", "[96,160]", "--augment.vflip", "--use_grn", "no", "--workers=2",
        "--layer_scale", "1e-6", "--optim.clip_grad=null", f"--config={more}",
    ]  # fmt: skip
    assert cli.main(argv) == 0
    wanted = PretrainConfig(
        ["A", "B, C"], "-x=y", img_size=[96, 160], epochs=8, use_grn=False, layer_scale=1e-6,
        workers=2, seed=2,
    )  # fmt: skip
    wanted.optim.base_lr = 3e-4
    wanted.augment.hflip, wanted.augment.vflip = False, True
    assert seen == [wanted]
    assert isinstance(seen[0].seed, int)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["convert", "r", "--out", "x"], {"source": "r", "out": "x"}),
        (["convert", "--out", "x", "r"], {"source": "r", "out": "x"}),
        (["convert", "--out", "x", "--source", "r"], {"source": "r", "out": "x"}),
        (["evaluate", "--json", "r", "--data", "photos"], {"json": True, "source": "r"}),
        (["evaluate", "r", "--data", "photos", "--img_size=96"], {"json": False, "img_size": 96}),
        (["finetune", "--data", "A", "--out", "o", "--weights", "r"], {"weights": "r"}),
        (["predict", "r", "--images", "A", "--out", "p.csv"], {"images": "A", "top": 5}),
        (["reconstruct", "r", "--images", "A", "--out", "p.png"], {"run": "r", "count": 8}),
        (["samples", "dir", "--size", "96"], {"out": "dir", "size": 96}),
        (["doctor"], {}),
        (["pretrain", "A", "--out", "o"], {"data": "A"}),
        (["pretrain", "--out", "o", "A", "r"], {"data": ["A", "r"]}),
        (["pretrain", "--data", "A", "r", "--out", "o", "--epochs=3"], {"data": ["A", "r"]}),
        (["pretrain", "--img_size", "96", "160", "A", "--out=o"], {"img_size": [96, 160]}),
        (["pretrain", "--img_size", "96", "A", "--out=o"], {"img_size": 96, "data": "A"}),
        (["finetune", "A", "--out", "o"], {"data": "A"}),
        (["report", "A", "r"], {"runs": ["A", "r"]}),
        (["bench", "--models", "atto", "tiny"], {"models": ["atto", "tiny"]}),
        (["bench", "--models", "atto"], {"models": ["atto"]}),
        (
            ["bench", "--json", "--models", "[atto,tiny]"],
            {"json": True, "models": ["atto", "tiny"]},
        ),
    ],
)
def test_every_command_gets_its_config(
    argv: list[str], expected: dict[str, Any], seen: list[Any]
) -> None:
    assert cli.main(argv) == 0
    assert expected.items() <= vars(seen[0]).items()
    assert type(seen[0]) is cli.config_of(argv[0])


def test_print_config_reads_back(
    seen: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["pretrain", "--print_config", "--optim.base_lr", "1e-8"]) == 0
    assert seen == []
    path = tmp_path / "my.yaml"
    path.write_text(capsys.readouterr().out)
    assert cli.main(["pretrain", "--config", str(path), *GIVEN]) == 0
    wanted = PretrainConfig("photos", "run")
    wanted.optim.base_lr = 1e-8
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("argv", "key"),
    [
        (["pretrain", "--data", "no", "--out", "o"], "data"),
        (["pretrain", "--data", "[A,no]", "--out", "o"], "data"),
        (["pretrain", *GIVEN, "--init_from", "no"], "init_from"),
        (["pretrain", *GIVEN, "--resume", "no"], "resume"),
        (["pretrain", *GIVEN, "--probe.data", "no"], "probe.data"),
        (["convert", "no", "--out", "o"], "source"),
        (["finetune", *GIVEN, "--weights", "no"], "weights"),
        (["finetune", *GIVEN, "--near_duplicates", "no"], "near_duplicates"),
        (["evaluate", "r", "--data", "no"], "data"),
        (["predict", "r", "--images", "no", "--out", "p.csv"], "images"),
        (["reconstruct", "no", "--images", "A", "--out", "p.png"], "run"),
        (["diversity", "[r,no]", "--images", "A"], "source"),
        (["report", "r", "no"], "runs"),
    ],
)
def test_a_missing_path_is_reported_before_the_command_is_loaded(
    argv: list[str], key: str, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    assert seen == []
    assert_one_line(capsys, f"fcmae {argv[0]}: error: {key} 'no' does not exist: give ", [])


def test_words_urls_patterns_and_resumed_runs_need_no_existing_path(
    seen: list[Any], folder: Path
) -> None:
    """A run that resumes may no longer need the files it started from."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    for data in ("s3://bucket/photos", "hf:name", "shards/{0000..0127}.tar"):
        assert cli.main(["pretrain", "--data", data, "--out", "new", "--resume", "never"]) == 0
    assert cli.main(["finetune", *GIVEN, "--weights", "none"]) == 0
    assert cli.main(["pretrain", *GIVEN, "--init_from", "gone"]) == 0
    assert len(seen) == 5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_names_its_code(name: str) -> None:
    assert callable(cli.code_of(name))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (130, 130), (143, 143), ({}, 0)])
def test_the_exit_code_is_what_the_command_returns(
    returned: object, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_twin(monkeypatch, lambda _: returned)
    assert cli.main(["doctor"]) == code


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("no images in\n'photos'"), 2, "no images in 'photos'"),
        (RunError("the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_a_command_are_one_line_and_an_exit_code(
    error: BaseException,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twin(_: Any) -> None:
        raise error

    use_twin(monkeypatch, twin)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"fcmae doctor: error: {text}\n"
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"fcmae doctor: error (rank 1): {text}\n"


@pytest.mark.parametrize(
    ("name", "error", "fix"),
    [
        (
            "pretrain",
            torch.OutOfMemoryError("out of memory, 1 GiB\nmore"),
            "--recompute",
        ),
        ("finetune", RuntimeError("[enforce fail] can't allocate memory: 9 bytes"), "--accumulate"),
        ("embed", MemoryError(), "--batch_size"),
    ],
)
def test_out_of_memory_is_one_line_with_a_fix(
    name: str,
    error: Exception,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twin(_: Any) -> None:
        raise error

    use_twin(monkeypatch, twin)
    monkeypatch.setattr(cli, "_parse", lambda *_: DoctorConfig())
    assert cli.main([name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"fcmae {name}: error: out of memory (")
    assert fix in line


def test_ctrl_c_while_modules_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fcmae doctor: error: interrupted\n"


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(_: Any) -> None:
        raise ZeroDivisionError

    use_twin(monkeypatch, twin)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_under_torchrun_only_one_process_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["pretrain", "--epoch", "3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["-h"]):
        assert cli.main(argv) == 0
        text = capsys.readouterr().out
        for name, summary in cli.COMMANDS.items():
            assert f"{name} " in text
            assert summary in text
        assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_a_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every setting shows its text, its type and its default, in lines that fit the terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    kind = cli.config_of(name)
    assert " ".join(text.split()).startswith(f"usage: {usage(kind, f'fcmae {name}')} ")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "--config FILE.yaml" in text
    assert "--print_config" in text
    assert re.search(r"--\S+\+", text) is None
    words = " ".join(text.split())
    for key, leaf in leaves(kind).items():
        metavar = key.split(".")[-1].upper()
        default = "required" if leaf.default is MISSING else "default: "
        assert re.search(rf"--{re.escape(key)} {metavar} [A-Za-z'].{{20,}}?; {default}", words), key


def test_help_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    places = [
        text.index(f"\n{title}") for title in ("Data:", "Model:", "Optimisation:", "Runtime: ")
    ]
    assert places == sorted(places)
    assert places[0] < text.index("--holdout") < places[1] < text.index("--mask_ratio") < places[2]
    assert places[3] < text.index("--checkpoint_steps")


def test_help_imports_neither_torch_nor_timm() -> None:
    program = (
        "import sys; from fcmae.cli import main; main({}); "
        "print(sorted({{'torch', 'timm', 'numpy', 'MinkowskiEngine'}} & set(sys.modules)))"
    )
    for argv in (["pretrain", "--help"], ["finetune", "--help"], ["pretrain", "no", "--out", "x"]):
        done = subprocess.run(
            [sys.executable, "-c", program.format(argv)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout.splitlines()[-1] == "[]", argv


@pytest.mark.parametrize(
    ("argv", "code", "limit"), [(["--help"], 0, 0.2), (["pretrain", "no", "--out", "x"], 2, 0.5)]
)
def test_help_and_a_wrong_path_are_answered_quickly(
    argv: list[str], code: int, limit: float
) -> None:
    """Processor time counts, so that a busy machine does not fail it."""
    spent = []
    for _ in range(3):
        before = os.times()
        assert run(*argv).returncode == code
        after = os.times()
        spent.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(spent) <= limit


def test_python_m_fcmae_is_the_same_program() -> None:
    done = run("pretrain", *GIVEN, "--epoch", "3")
    assert (done.returncode, done.stdout) == (2, "")
    wanted = "fcmae pretrain: error: unknown option --epoch; did you mean --epochs?\n"
    assert done.stderr == wanted


def test_a_closed_pipe_is_not_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for argv in (["--help"], ["pretrain", "--help"], ["pretrain", "--print_config"]):
        done = run(*argv, stdout=writer, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writer)


def test_a_locale_without_utf8_and_a_closed_stdout_are_not_errors(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": str(tmp_path)}
    done = run("pretrain", *GIVEN, "--engine", "ü", env=plain)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    closed = subprocess.run(
        ["sh", "-c", f"'{sys.executable}' -m fcmae --help >&-"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (closed.returncode, closed.stderr) == (0, b"")
