"""Time and memory to list a folder of many files, and to read the list back.

    .venv/bin/python benchmarks/file_list.py [--files 1000000] [--folder DIR]

Creates empty files, a thousand per folder, and removes them at the end.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fcmae.data.file_list import FileList, find_images

PER_FOLDER = 1000


def make_files(root: Path, count: int) -> None:
    for start in range(0, count, PER_FOLDER):
        folder = root / f"folder{start // PER_FOLDER:06d}"
        folder.mkdir()
        for number in range(start, min(start + PER_FOLDER, count)):
            (folder / f"picture-{number:08d}.jpg").touch()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", default=None, help="where to create them (a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        make_files(root, options.files)
        before, began = resident_bytes(), time.perf_counter()
        files = find_images(name)
        took = time.perf_counter() - began
        per_file = (resident_bytes() - before) / options.files
        print(f"{len(files)} files listed in {took:.1f} s, {per_file:.0f} bytes per file")
        files.save(root / "list")
        began = time.perf_counter()
        assert len(FileList.load(root / "list")) == len(files)
        print(f"stored list read in {time.perf_counter() - began:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
