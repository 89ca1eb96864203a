"""The documentation site: built as `make docs` does, and opened at two widths."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from benchmarks.notebooks import execute
from fcmae.cli import COMMANDS, config_of
from fcmae.config.fields import leaves
from tests.browser import open_page

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
FRAME = """<html><body style="margin:0"><iframe id="page" src="{url}"
style="border:0;width:{width}px;height:2000px"></iframe>
<script>document.getElementById("page").onload = event => {{
const page = event.target.contentDocument;
document.title = page.documentElement.scrollWidth + " " +
    [...page.images].filter(image => !image.naturalWidth).length;
}}</script></body></html>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E"]
    done = subprocess.run(
        [*command, "-d", out / "doctrees", DOCS, out / "html"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_setting_of_every_command_is_in_the_reference(site):
    page = (site / "commands.html").read_text()
    for name in COMMANDS:
        section = page[page.index(f'<section id="{name}">') :].split("</section>")[0]
        for key in leaves(config_of(name)):
            assert re.search(rf">--{re.escape(key)}<", section), f"{name} --{key}"


def test_links_between_pages_work(site):
    pages = {path.relative_to(site): path.read_text() for path in site.rglob("*.html")}
    for path, text in pages.items():
        for link in re.findall(r'href="([^"#:?]+\.html)(#[^"]*)?"', text):
            target = (site / path.parent / link[0]).resolve().relative_to(site.resolve())
            assert target in pages, f"{path} links to {target}"
            if link[1]:
                assert f'id="{link[1][1:]}"' in pages[target], f"{path} links to {target}{link[1]}"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize(
    "name",
    ["index", "tutorial", "how_it_works", "commands", "python", "experiments", "performance"],
)
def test_a_page_fits_a_phone_and_a_desktop(site, tmp_path, name, width):
    url = (site / f"{name}.html").as_uri()
    (tmp_path / "frame.html").write_text(FRAME.format(url=url, width=width))
    page = open_page((tmp_path / "frame.html").as_uri(), tmp_path / "page.png", max(width, 500))
    found, missing = re.search(r"<title>(\d+) (\d+)</title>", page.html).groups()
    assert int(found) <= width, "it scrolls sideways"
    assert missing == "0", "an image does not load"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_outputs_and_without_errors(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells)
    assert not any(output.output_type == "error" for output in outputs)
    said = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in said  # of a command, which does not stop a notebook
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert path.stat().st_size < 500_000


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    """With one epoch each: what it computes is of no interest here."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = re.sub(r"epochs=\d+", "epochs=1", cell.source)
    outputs = [out for cell in execute(notebook).cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in outputs) >= 2
    assert "error:" not in "".join(out.get("text", "") for out in outputs)
