"""A page in headless Chromium: its picture at a width, its print, and what a script finds in it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: the page is not looked at")

PICTURES = "MSIF_TEST_PICTURES"
"""Environment variable: a folder that keeps the pictures which the tests take."""

PROBE = """<script>
addEventListener("load", () => {
  const out = document.createElement("script");
  out.type = "application/json";
  out.id = "probe";
  const found = (() => { %s })();
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>"""


def run(page: Path, *arguments: str) -> str:
    """Chromium on a page, with a profile of its own; returns what it printed."""
    assert CHROMIUM is not None
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--hide-scrollbars", "--virtual-time-budget=4000", f"--user-data-dir={profile}", *arguments,
             page.resolve().as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_frame(page: Path, width: int, height: int) -> Path:
    """A page that shows `page` in a frame of that width: a headless window is never narrower than 500 pixels."""
    framed = page.with_name(f"{page.stem}-{width}.html")
    inner = html.escape(page.read_text(encoding="utf-8"))
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    framed.write_text(
        f'<!DOCTYPE html><body style="margin:0"><iframe style="{style}" srcdoc="{inner}"></iframe></body>'
    )
    return framed


def picture(page: Path, path: Path, width: int, height: int) -> Path:
    """A picture of the page's first `height` pixels in a window of that width."""
    shown = page if width >= 500 else in_frame(page, width, height)
    run(shown, f"--window-size={width},{height}", f"--screenshot={path}")
    return path


def printed(page: Path, path: Path) -> Path:
    """The page as it prints, a PDF."""
    run(page, "--no-pdf-header-footer", f"--print-to-pdf={path}")
    return path


def probe(page: Path, script: str, width: int = 1280, height: int = 900) -> Any:
    """What the body of a function returns in the loaded page, in a window of that width."""
    probed = page.with_name(f"{page.stem}-probe.html")
    probed.write_text(page.read_text(encoding="utf-8") + PROBE % script, encoding="utf-8")
    if width >= 500:
        dom = run(probed, f"--window-size={width},{height}", "--dump-dom")
    else:
        framed = in_frame(probed, width, height)
        outer = """<script>addEventListener("load", () => setTimeout(() => {
          document.body.append(document.querySelector("iframe").contentDocument.getElementById("probe"));
          document.querySelector("iframe").remove();
        }, 500));</script>"""
        framed.write_text(framed.read_text(encoding="utf-8") + outer, encoding="utf-8")
        dom = run(framed, "--window-size=800,900", "--dump-dom")
    (found,) = re.findall(r'<script type="application/json" id="probe">(.*?)</script>', dom, flags=re.S)
    return json.loads(found)


def pictures_folder(default: Path) -> Path:
    """Where pictures go: the folder that MSIF_TEST_PICTURES names, or the test's own."""
    folder = Path(os.environ.get(PICTURES, default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
