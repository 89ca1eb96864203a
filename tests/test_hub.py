"""The Hugging Face Hub, played by a small server on this machine."""

import base64
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from fcmae.commands.convert import ConvertConfig
from fcmae.data.statistics import Preprocessing
from fcmae.weights.export import convert, export_folder
from fcmae.weights.hub import license_of
from fcmae.weights.load import find_weights
from sparse import SparseConvNeXtV2
from sparse.layouts import infer_architecture
from tests.cli import run
from tests.test_convert import official_dense

COMMIT = "0123456789" * 4
HOW = Preprocessing((64, 64), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def name_of(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """Keeps repositories as files by name; requests need the token `good`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.broken = False


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer good":
            return self._send(401, {"error": "Invalid credentials"})
        if self.server.broken:
            return self._send(500, {"error": "the Hub is down"})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            address = {"url": f"{self.server.address}/{name}"}
            if name in self.server.repos:
                return self._send(409, {"error": "You already created this model repo", **address})
            self.server.repos[name] = {}
            self.server.private[name] = asked["visibility"] == "private"
            return self._send(200, address)
        *_, user, repo, action, _ = ["", *self.path.split("/")]
        if action == "preupload":
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": file["path"], **mode} for file in json.loads(body)["files"]]
            return self._send(200, {"files": files})
        if action != "commit":
            return self._send(200, {})
        name = f"{user}/{repo}"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[name][line["value"]["path"]] = content
            elif line["key"] == "deletedFile":
                del self.server.repos[name][line["value"]["path"]]
        place = f"{self.server.address}/{name}/commit/{COMMIT}"
        return self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": place})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            name = "/".join(self.path.split("/")[3:5])
            if name not in self.server.repos:
                return self._send(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
            files = self.server.repos[name]
            if "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": name_of(content)}
                    for file, content in files.items()
                ]
                return self._send(200, tree)
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, {"id": name, "sha": COMMIT, "siblings": siblings})
        if "/resolve/" not in self.path:
            return self._send(404, {"error": "not found"})
        user, repo, _, _, file = self.path.strip("/").split("/", 4)
        content = self.server.repos[f"{user}/{repo}"][file]
        tag = f'"{name_of(content)}"'
        return self._send(200, content, {"ETag": tag, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _send(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A timm folder of random weights."""
    torch.manual_seed(0)
    encoder = SparseConvNeXtV2([1, 1, 1, 1], [8, 16, 24, 32], engine="patch")
    state = encoder.state_dict()
    return export_folder(state, infer_architecture(state), tmp_path / "weights", HOW)


def test_what_is_pushed_comes_back(hub: Hub, folder: Path, pictures: Path, tmp_path: Path) -> None:
    command = ["push", folder, "me/cells", "--license", "mit", "--data_source", "Photographs."]
    said = run(*command).stdout
    assert "hf:me/cells" in said
    assert hub.private == {"me/cells": True}
    files = hub.repos["me/cells"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    for words in ("pretrained without labels", "Photographs.", 'hf-hub:me/cells"', "licence: mit"):
        assert words in text
    out = tmp_path / "features.npz"
    run("embed", "hf:me/cells", "--images", pictures, "--out", out)
    assert out.is_file()
    again = ["pretrain", pictures, "--out", tmp_path / "run", "--init_from", "hf:me/cells"]
    small = ["--depths", "1", "1", "1", "1", "--dims", "8", "16", "24", "32", "--img_size", "64"]
    rest = ["--epochs", "1", "--batch_size", "8", "--workers", "0"]
    run(*again, *small, *rest)
    run(*again, *small, *rest)  # a run that began from the Hub is found again
    first = load_file(folder / "model.safetensors")
    exported: Any = timm.create_model(f"local-dir:{tmp_path / 'run' / 'exported'}", pretrained=True)
    assert exported.state_dict().keys() == first.keys()
    assert "exists: give another name" in run(*command, code=2).stderr
    run(*command, "--update", "true")
    hub.broken = True
    assert "500 Internal Server Error" in run(*command, "--update", "true", code=1).stderr


def test_an_official_release_keeps_its_licence(hub: Hub, pictures: Path, tmp_path: Path) -> None:
    encoder = SparseConvNeXtV2([1, 1, 1, 1], [8, 16, 24, 32], engine="patch")
    release = tmp_path / "release.safetensors"
    save_file(official_dense(encoder.state_dict()), release)
    out = tmp_path / "run"
    run(
        "pretrain", pictures, "--out", out, "--init_from", release, "--depths", "1", "1", "1", "1",
        "--dims", "8", "16", "24", "32", "--img_size", "64", "--epochs", "1", "--batch_size", "8",
        "--workers", "0",
    )  # fmt: skip
    folder = convert(ConvertConfig(str(release), out=str(tmp_path / "folder")))
    alone = shutil.copytree(out / "exported", tmp_path / "alone")
    for source in (release, out, folder, alone):
        assert license_of(find_weights(source)) == "cc-by-nc-4.0"
        said = run("push", source, "me/x", "--license", "mit", code=2).stderr
        assert "use --license cc-by-nc-4.0" in said
    run("push", out, "me/x", "--license", "cc-by-nc-4.0")
    card = hub.repos["me/x"]["README.md"].decode()
    assert "cc-by-nc-4.0, that of the official release" in card
    assert "It has 24 images." in card
    assert "started from: release.safetensors" in card
    assert json.loads(hub.repos["me/x"]["config.json"])["pretrained_cfg"]["license"]


def test_what_a_run_started_from_must_be_there(
    hub: Hub, folder: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative path, which means nothing elsewhere
    encoder = SparseConvNeXtV2([1, 1, 1, 1], [8, 16, 24, 32], engine="patch")
    save_file(official_dense(encoder.state_dict()), "release.safetensors")
    run(
        "pretrain", pictures, "--out", "run", "--init_from", "release.safetensors", "--depths", "1",
        "1", "1", "1", "--dims", "8", "16", "24", "32", "--img_size", "64", "--epochs", "1",
        "--batch_size", "8", "--workers", "0",
    )  # fmt: skip
    command = ["push", tmp_path / "run", "me/x", "--license", "mit"]
    monkeypatch.chdir("/")
    assert "use --license cc-by-nc-4.0" in run(*command, code=2).stderr
    (tmp_path / "release.safetensors").unlink()
    assert "release.safetensors: no such file" in run(*command, code=2).stderr
    (folder.parent / "config.yaml").write_text("api: {key: SECRET}\nweights: nowhere\n")
    run("push", folder, "me/y", "--license", "mit")
    assert "SECRET" not in hub.repos["me/y"]["README.md"].decode()


def test_a_licence_travels_and_old_files_go(hub: Hub, folder: Path, tmp_path: Path) -> None:
    run("push", folder, "me/x", "--license", "cc-by-4.0")
    hub.repos["me/x"]["task/model.safetensors"] = b"of an earlier model"
    assert (
        "use --license cc-by-4.0"
        in run("push", "hf:me/x", "me/y", "--license", "mit", code=2).stderr
    )
    run("push", folder, "me/x", "--license", "cc-by-4.0", "--update", "true")
    assert sorted(hub.repos["me/x"]) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("words", "variables", "expected"),
    [
        (["push", "F", "cells", "--license", "mit"], {}, "use USER/NAME"),
        (["push", "F", "me/my--cells", "--license", "mit"], {}, "use USER/NAME"),
        (["push", "F", "me/cells", "--license", "mit"], {"HF_TOKEN": ""}, "not logged in"),
        (["push", "F", "me/cells"], {}, "license"),
        (["embed", "hf:cells", "--images", "F", "--out", "x.npz"], {}, "use hf:USER/NAME"),
        (["embed", "hf:me/none", "--images", "P", "--out", "x.npz"], {}, "do not exist"),
        (["push", "F", "me/cells", "--license", "mit"], {"HF_TOKEN": "bad"}, "401 Unauthorized"),
        (
            ["push", "F", "me/cells", "--license", "mit"],
            {"HF_ENDPOINT": "http://127.0.0.1:9"}, "could not be reached",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    hub: Hub, folder: Path, pictures: Path, words: list[str], variables: dict[str, str],
    expected: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    given = [{"F": folder, "P": pictures}.get(word, word) for word in words]
    code = 1 if "bad" in variables.values() or "HF_ENDPOINT" in variables else 2
    said = run(*given, code=code).stderr
    assert expected in said
    assert said.strip().count("\n") == 0
