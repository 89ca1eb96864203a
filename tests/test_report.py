"""Pages about runs, and TensorBoard, in a real browser."""

import base64
import io
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcmae.commands.report import ReportConfig
from fcmae.inspect import figures
from fcmae.inspect.reporting import read_runs, render, report
from sparse.errors import InputError
from tests.browser import open_page
from tests.cli import TINY, begin, metrics, run, until
from tests.conftest import write_pictures

PHONE = """<html><body style="margin:0"><iframe id="page" src="{url}" style="border:0;width:390px;
height:2000px"></iframe><script>document.getElementById("page").onload = event => {{
const page = event.target.contentDocument;
document.title = page.documentElement.scrollWidth + " " +
    [...page.images].map(image => image.naturalWidth).join(",");
}}</script></body></html>"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, classes) -> Path:
    """Two epochs with held-out images and probes."""
    root = tmp_path_factory.mktemp("report")
    pictures = write_pictures(root / "pictures", 500, size=32)
    (pictures / "broken <b>.png").write_bytes(b"none")
    out = root / "run"
    run(
        "pretrain", "--data", pictures, "--out", out, *TINY, "--batch_size", 64, "--epochs", 2,
        "--picture_epochs", 1, "--probe.data", classes, "--probe.epochs", 1,
    )  # fmt: skip
    return out


def write_run(folder: Path, epochs: int, lines: list[str]) -> Path:
    """A run folder as fine-tuning writes it, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"data: d\nweights: none\nmodel: atto\nepochs: {epochs}\n")
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_a_page_shows_all_of_a_run_in_a_browser(trained, tmp_path):
    out = report(ReportConfig(str(trained)))
    assert out == trained / "report.html"
    page = open_page(out.as_uri(), tmp_path / "page.png")
    assert page.console == []
    for section in ("summary", "curves", "reconstructions", "diversity", "settings"):
        assert f'<section id="{section}">' in page.html
    for title in ("pretraining loss", "held-out loss", "linear probe, top-1 %", "images/s"):
        assert f"<figcaption>{title}</figcaption>" in page.html
    assert f"<td>{metrics(trained)[-1][1]:.4g}</td>" in page.html
    assert "Unreadable files: 1" in page.html
    assert "broken &lt;b&gt;.png" in page.html
    assert not re.search(r"(src|href)=\"(?!data:)", page.html), "the page wants a network"
    assert len(np.unique(Image.open(tmp_path / "page.png").convert("L"))) > 50


def test_a_page_fits_a_phone_and_its_figures_load(trained, tmp_path):
    out = report(ReportConfig(str(trained), out=str(tmp_path / "page.html")))
    (tmp_path / "phone.html").write_text(PHONE.format(url=out.as_uri()))
    page = open_page((tmp_path / "phone.html").as_uri(), tmp_path / "page.png", 500)
    width, images = re.search(r"<title>(\d+) ([\d,]+)</title>", page.html).groups()
    assert width == "390", "it scrolls sideways"
    assert len(images.split(",")) >= 9
    assert all(int(image) > 100 for image in images.split(","))


def test_reconstructions_are_those_that_the_run_drew(trained):
    html = render(read_runs([str(trained)]))
    found = re.findall(r'"data:image/jpeg;base64,([^"]+)"', html)
    assert len(found) == 2  # the last ones and the first
    width, height = Image.open(io.BytesIO(base64.b64decode(found[0]))).size
    assert width == 4 * 128 + 3 * 4  # images of 64 px are drawn at twice their size
    assert height == 18 + 8 * (128 + 4) - 4


def test_several_runs_are_shown_side_by_side(tmp_path):
    line = '{"step": 3, "loss": 1.5, "val_top1": 40.0}'
    a = write_run(tmp_path / "first" / "run", 3, [line, '{"step": 6, "val_top1": 35.0}'])
    b = write_run(tmp_path / "second" / "run", 5, [line, '{"step": 4, "lo'])
    (b / "nonfinite.jsonl").write_text('{"step": 4, "loss": "nan", "paths": ["x"]}\n')
    html = render(read_runs([str(a), str(b)]))
    assert "<h1>first/run, second/run</h1>" in html
    row = re.search(r"<th>validation top-1 %, (best)</th>(.*)</tr>", html)
    assert re.findall(r"<td>(.*?)</td>", row[2]) == ["40", "40"]
    row = re.search(r"<th>validation top-1 %, (last)</th>(.*)</tr>", html)
    assert re.findall(r"<td>(.*?)</td>", row[2]) == ["35", "40"]
    assert '<tr class="differs"><th>epochs</th><td>3</td><td>5</td></tr>' in html
    assert "<tr><th>model</th><td>atto</td><td>atto</td></tr>" in html
    assert "Updates that were not applied in second/run: 1" in html
    assert "pretraining loss" not in html


def test_a_run_that_logged_nothing_has_a_page(tmp_path):
    html = render(read_runs([str(write_run(tmp_path / "new", 3, []))]))
    assert "Nothing has been logged yet." in html


def test_runs_are_given_as_several_arguments(tmp_path):
    runs = [write_run(tmp_path / f"run, {i}", 3, []) for i in range(3)]
    run("report", *runs, "--out", tmp_path / "page.html")
    assert "<h1>run, 0, run, 1, run, 2</h1>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        (["here"], None, "is not a run: it has no config.yaml"),
        (["run", "run"], None, "one is given twice"),
        (["run"], "page.txt", "must be a file ending in .html"),
    ],
)
def test_wrong_runs_and_pages_are_refused(tmp_path, runs, out, message):
    write_run(tmp_path / "run", 3, [])
    paths = [str(tmp_path / name) for name in runs]
    with pytest.raises(InputError, match=message):
        report(ReportConfig(paths, None if out is None else str(tmp_path / out)))


@pytest.mark.slow
def test_tensorboard_shows_the_curves_and_the_figures(trained, tmp_path):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    board = begin(
        [sys.executable, "-W", "ignore", "-m", "tensorboard.main", "--logdir", str(trained / "tb"),
         "--port", str(port), "--load_fast=false"]
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"

    def loaded() -> bool:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/images/tags") as answer:
                return "reconstructions" in json.dumps(json.load(answer))
        except (urllib.error.URLError, ConnectionError):
            return False

    assert until(loaded, board)
    wanted = "^(loss|holdout_loss|reconstructions|probe_linear)$"
    url = f"{address}/?tagFilter={urllib.request.quote(wanted)}#timeseries"
    for wait_ms in (20_000, 60_000, 180_000):  # of virtual time: a busy machine needs more
        page = open_page(url, tmp_path / "board.png", 1600, wait_ms)
        if image := re.search(r'<img [^>]*alt="Image at step \d+" src="(data/[^"]+)', page.html):
            break
    assert image, "the reconstructions are not shown"
    with urllib.request.urlopen(f"{address}/{image[1]}") as answer:
        assert Image.open(io.BytesIO(answer.read())).size[0] == 4 * 128 + 3 * 4
    for name in ("loss", "holdout_loss", "probe_linear", "reconstructions"):
        assert f'title="{name}"' in page.html, name
    assert not [line for line in page.console if "error" in line.lower()]


def test_blocks_of_encoders_of_other_depths_are_side_by_side(tmp_path):
    """Three blocks in the first stage beside two: the second stages are aligned."""
    deep = {f"stages.{stage}.blocks.{block}": 0.4 for stage in (0, 1) for block in range(3)}
    flat = {name: 0.3 for name in deep if not name.endswith("2")}
    figure = figures.diversity({"deep": deep, "none": {}, "flat": flat})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "0.0", "0.1", "0.2", "1.0", "1.1", "1.2"
    ]  # fmt: skip
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[*range(6)], [0, 1, 3, 4]]
    assert [line.get_color() for line in axes.get_lines()] == ["C0", "C2"]
