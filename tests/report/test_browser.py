"""The page in a browser: sorting, hostile names, widths and print."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lpt_peft.report import classes as classes_module
from lpt_peft.report import write_report
from tests.report.browser import chromium, dom_after, framed, needs_chromium
from tests.report.sample import write_run

pytestmark = [needs_chromium, pytest.mark.slow]

HOSTILE = [
    "</script><img src=x onerror=\"document.title='hacked'\">",
    "<script>document.title='hacked'</script>",
    "\u202egnp.exe\u202c \u200f\u05d0",
    "x" * 10_000,
    "'\"><svg onload=document.title='hacked'>",
    "{{ 7 * 7 }} $a$ \\frac",
]


class Cells(HTMLParser):
    """Texts of a column of a table, and its heading's aria-sort."""

    def __init__(self, table, column):
        super().__init__()
        self.texts, self.sorts = [], []
        self._table, self._column, self._inside, self._place, self._body = table, column, False, -1, False

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "table":
            self._inside = given.get("id") == self._table
        if not self._inside:
            return
        if tag == "tr":
            self._place = -1
        if tag == "tbody":
            self._body = True
        if tag == "thead":
            self._body = False
        if tag in ("td", "th"):
            self._place += 1
            if not self._body:
                self.sorts.append(given.get("aria-sort"))
            elif self._place == self._column:
                self.texts.append("")

    def handle_data(self, data):
        if self._inside and self._body and self._place == self._column and self.texts:
            self.texts[-1] += data.strip()

    def handle_endtag(self, tag):
        if tag == "table":
            self._inside = False


def column(dom, number, table="class-table"):
    cells = Cells(table, number)
    cells.feed(dom)
    return cells


def click(number, times=1):
    return f"const b = document.querySelectorAll('#class-table thead button')[{number}];" + "b.click();" * times


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    analysis, images = write_run(folder, classes=8, images=200)
    return write_report(folder, images=images, command=["lpt-peft", "train", "photos"]).path, analysis


def test_a_click_sorts_a_column_and_a_second_click_reverses_it(page, tmp_path):
    path, analysis = page
    accuracy = [f"{100 * value:.1f}\xa0%" for value in sorted(analysis["classes"]["accuracy"])]
    once = column(dom_after(path, click(3), tmp_path), 3)
    assert once.texts == accuracy
    assert once.sorts == ["none", "none", "none", "ascending", "none", "none", "none"]
    twice = column(dom_after(path, click(3, 2), tmp_path), 3)
    assert twice.texts == accuracy[::-1]
    assert twice.sorts[3] == "descending"


def test_the_policy_of_the_page_allows_its_own_script(page):
    dom = chromium(page[0], "--dump-dom")
    assert dom.count("<button") >= 7
    assert 'aria-sort="none"' in dom


def test_long_tables_are_sorted_filtered_and_shown_in_steps(tmp_path):
    folder = tmp_path / "run"
    analysis, _ = write_run(folder, classes=450, images=900)
    path = write_report(folder).path
    found = column(dom_after(path, click(1), tmp_path), 1)
    counts = sorted(analysis["classes"]["train_images"])
    assert found.texts == [f"{count:,}" for count in counts[:200]]
    more = "[...document.querySelectorAll('.tools button')].find((b) => b.textContent.includes('more')).click();"
    assert len(column(dom_after(path, click(1) + more, tmp_path), 1).texts) == 400
    search = (
        "const f = document.querySelector('.tools input'); f.value = 'SPECIES 44'; f.dispatchEvent(new Event('input'));"
    )
    found = column(dom_after(path, search + click(0), tmp_path), 0)
    assert found.texts == ["species 44", *(f"species 44{digit}" for digit in range(10))]


def test_hostile_names_are_text(tmp_path):
    folder = tmp_path / "run"
    _, images = write_run(folder, classes=6, images=120, names=HOSTILE)
    path = write_report(folder, images=images, command=["lpt-peft", "train", HOSTILE[0]]).path
    for script in ("", click(0)):  # without the policy: the text alone must be safe
        dom = dom_after(path, script, tmp_path)
        assert re.search("<title>Report on run</title>", dom)
        assert "onerror=" not in re.sub(r"&lt;.*?&gt;", "", dom)
        cells = column(dom, 0).texts
        assert sorted(cells) == sorted(classes_module.clip(name).strip() for name in HOSTILE)


def test_long_tables_with_hostile_names_are_text(tmp_path):
    folder = tmp_path / "run"
    names = [f"{HOSTILE[label % len(HOSTILE)][:50]}{label}" for label in range(320)]
    write_run(folder, classes=320, images=640, names=names)
    dom = dom_after(write_report(folder).path, click(0), tmp_path)
    assert "<title>Report on run</title>" in dom
    assert len(column(dom, 0).texts) == 200


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page, width, tmp_path):
    text = page[0].read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    report = "parent.postMessage(`${innerWidth} ${document.documentElement.scrollWidth}`, '*')"
    (tmp_path / "inner.html").write_text(text.replace("</body>", f"<script>{report}</script></body>"), encoding="utf-8")
    frame = framed(tmp_path / "inner.html", width, 900)
    listen = "<script>onmessage = (event) => { document.title = event.data; };</script>"
    frame.write_text(frame.read_text().replace("<iframe", f"{listen}<iframe"))
    dom = chromium(frame, "--dump-dom", "--virtual-time-budget=5000")
    assert f"<title>{width} {width}</title>" in dom


@pytest.mark.parametrize("width", [390, 1280])
def test_screenshots_are_dark_on_white(page, width, tmp_path):
    copy = tmp_path / "page.html"
    copy.write_bytes(page[0].read_bytes())
    picture = tmp_path / "shot.png"
    chromium(framed(copy, width, 900), f"--screenshot={picture}", f"--window-size={max(width, 500)},900")
    pixels = np.asarray(Image.open(picture).convert("L").crop((0, 0, width, 900)))
    assert (pixels > 200).mean() > 0.8
    assert 0.005 < (pixels < 100).mean() < 0.3


def test_it_prints(page, tmp_path):
    copy, pdf = tmp_path / "page.html", tmp_path / "page.pdf"
    copy.write_bytes(page[0].read_bytes())
    chromium(copy, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    content = pdf.read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type /Page\b", content)) <= 15
