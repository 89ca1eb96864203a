"""Malicious checkpoints and configs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import torch

from tests.cli import run
from tests.faults.campaign import Generator, Row
from tests.faults.processes import pretrain, undisturbed


class _Harm:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.write_text, (self.mark, "run"))


def harmful(number: int, random: Generator, folder: Path) -> str:
    """Nothing is executed, nothing is written outside the run folder, exit 2."""
    mark = folder / "mark"
    kinds = (
        "pickle",
        "zip pickle",
        "header",
        "length",
        "manifest",
        "yaml tag",
        "config key",
        "state",
    )
    kind = kinds[number % len(kinds)]
    file = folder / "weights.pth"
    command: list[object] = ["convert", file, "--out", folder / "out"]
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"model": _Harm(mark)}))
    elif kind == "zip pickle":
        torch.save({"model": {"weight": _Harm(mark)}}, file)
    elif kind in ("header", "length"):
        file = folder / "weights.safetensors"
        header = {"w": {"dtype": "F32", "shape": [2**40, 2**30], "data_offsets": [0, 2**60]}}
        text = json.dumps(header).encode() if kind == "header" else b"{}"
        length = len(text) if kind == "header" else int(random.integers(2**40, 2**62))
        file.write_bytes(length.to_bytes(8, "little") + text)
        command = ["convert", file, "--out", folder / "out"]
    elif kind in ("manifest", "state"):
        source = sorted((undisturbed()[0] / "checkpoints").glob("step-*"))[-1]
        copy = folder / source.name
        shutil.copytree(source, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        if kind == "manifest":
            outside = ["../../mark", "/etc/passwd", "..", "a/../../mark"][number // len(kinds) % 4]
            manifest["files"][outside] = {"size": 1, "sha256": "0" * 64}
        else:
            (copy / "state.json").write_text("[" * 100_000)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        command = [*pretrain(folder / "out", "--resume", copy)]
    else:
        config = folder / "config.yaml"
        lines = {
            "yaml tag": f"data: !!python/object/apply:os.system ['touch {mark}']\nout: x\n",
            "config key": f"data: {folder}\nout: {folder}/out\nclass_path: os.system\n",
        }[kind]
        config.write_text(lines)
        command = ["pretrain", "--config", config]
    before = sorted(path.name for path in folder.iterdir())
    done = run(*command, code=2)
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before, "something was written"
    assert not mark.exists(), "code was run"
    return kind


ROWS = (
    Row("malice", "pickles that run code, safetensors with false headers, paths outside the "
        "folder in manifests, YAML tags, unknown keys: nothing executed, nothing written, exit 2",
        40, harmful, short=8),
)  # fmt: skip
