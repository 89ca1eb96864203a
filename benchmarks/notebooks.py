"""Execute the notebooks of the documentation, and keep them with their outputs.

    .venv/bin/python -m benchmarks.notebooks [docs/notebooks/images_to_masks.ipynb …]

About a quarter of an hour on two cores. Progress bars are left out: pages have no live widgets.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"


def execute(notebook: Any, seconds: int = 1800) -> Any:
    """Run all cells with this Python and its commands; return the notebook with their outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    commands = Path(sys.executable).parent  # for lines that begin with !
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{commands}{os.pathsep}{before}"
    try:
        NotebookClient(notebook, timeout=seconds, kernel_name="python3").execute()
    finally:
        os.environ["PATH"] = before
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            kept = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
            cell.outputs = [out for out in kept if out.get("text", "-").strip()]
    return notebook


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", type=Path, nargs="*", default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().paths:
        nbformat.write(execute(nbformat.read(path, as_version=4)), path)
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
