"""Output files: checked before any work, complete or absent."""

import os
from pathlib import Path

import pytest

from fcmae.atomic import check_out_file, check_out_folder, out_file
from fcmae.cli import main
from sparse.errors import InputError, RunError

COMMANDS = {
    "pretrain": ["--data", "x"],
    "finetune": ["--data", "x"],
    "convert": ["x"],
    "evaluate": ["x", "--data", "x"],
    "predict": ["x", "--images", "x"],
    "reconstruct": ["x", "--images", "x"],
    "embed": ["x", "--images", "x"],
    "select": ["x", "--images", "x", "--count", "1"],
    "diversity": ["x", "--images", "x"],
    "report": ["{run}"],
}
ENDINGS = {
    "evaluate": ".csv", "predict": ".csv", "reconstruct": ".png", "embed": ".npz",
    "select": ".csv", "diversity": ".png", "report": ".html",
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unwritable_out_is_reported_before_any_work(command, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data: x\n")  # enough of a run for a page
    (tmp_path / "x").mkdir()
    given = [
        str(tmp_path / "x") if word == "x" else word.format(run=tmp_path)
        for word in COMMANDS[command]
    ]
    out = str(tmp_path / "config.yaml" / "new" / f"it{ENDINGS.get(command, '')}")
    assert main([command, *given, "--out", out]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'config.yaml'} is a file, not a folder" in line


def test_samples_report_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["samples", str(tmp_path / "file" / "new")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=f"no write permission for {tmp_path}"):
        check_out_folder(tmp_path / "a" / "b")


def test_the_suffix_may_be_upper_case_and_the_folder_new(tmp_path):
    assert check_out_file(tmp_path / "a" / "X.PNG", ".png", ".svg").name == "X.PNG"
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match=r"must be a file ending in \.png or \.svg"):
        check_out_file("x.jpg", ".png", ".svg")
    with pytest.raises(InputError, match=r"must be a file$"):
        check_out_file(tmp_path)


def test_a_later_failure_names_the_file_and_leaves_none(tmp_path):
    out = tmp_path / "new" / "x.txt"

    def write() -> None:
        with out_file(out) as path:
            path.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"x\.txt' could not be written: .*No space"):
        write()
    assert [*out.parent.iterdir()] == []
