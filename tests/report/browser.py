"""Pages in headless Chromium. No tests here."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


def chromium(page, *words):
    """Open a page; return what Chromium prints."""
    profile = page.parent / "profile"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command = [CHROMIUM, *options, *words, page.as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode("utf-8", "replace")


def dom_after(page, script, tmp_path):
    """The DOM after a script, which a copy of the page without its policy runs."""
    text, count = _POLICY.subn("", page.read_text(encoding="utf-8"))
    assert count == 1
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return chromium(copy, "--dump-dom")


def framed(page, width, height):
    """A page with another page in a frame: windows of Chromium are not narrower than about 500 pixels."""
    frame = page.with_name(f"frame{width}.html")
    style = f"width:{width}px;height:{height}px;border:0"
    frame.write_text(f'<!doctype html><body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe>')
    return frame
