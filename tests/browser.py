"""A headless browser: the content of a page and its console messages."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page(NamedTuple):
    """A loaded page: its content and its console messages."""

    html: str
    console: list[str]


def open_page(url: str, picture: Path, width: int = 1200, wait_ms: int = 0) -> Page:
    """Open a page, wait until it is idle, and save a screenshot; skip without a browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={picture.with_suffix('.profile')}", f"--window-size={width},1400",
        f"--screenshot={picture}", *([f"--virtual-time-budget={wait_ms}"] if wait_ms else []), url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Page(done.stdout, re.findall(r":CONSOLE:\d+\] (.*)", done.stderr))
