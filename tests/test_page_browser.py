"""The attribution's page in a real browser: desktop, phone and print, by keyboard, without a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from msif_core.attribution import Attribution
from msif_core.report import charts
from tests import browser
from tests.workspace_fixture import write_workspace

pytestmark = browser.needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    run = write_workspace(folder / "workspace") / "attributions" / "20260101-000000-aaaaaa"
    return Attribution.open(run).to_html(folder / "page.html")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = browser.pictures_folder(tmp_path_factory.mktemp("pictures"))
    print(f"pictures in {folder}")
    return folder


@pytest.mark.parametrize(("name", "width", "height"), [("desktop", 1280, 1600), ("phone", 390, 2400)])
def test_nothing_is_wider_than_the_window(page: Path, pictures: Path, name: str, width: int, height: int) -> None:
    browser.picture(page, pictures / f"page-{name}.png", width, height)
    assert (pictures / f"page-{name}.png").stat().st_size > 20_000
    found = browser.probe(page, """
        document.querySelectorAll("details").forEach((details) => (details.open = true));
        const wide = [...document.querySelectorAll("body *")].filter((e) =>
          !e.closest(".scroll, pre, svg, .skip") && e.getBoundingClientRect().right > innerWidth + 1);
        return {inner: innerWidth, scroll: document.scrollingElement.scrollWidth,
                wide: wide.map((e) => e.outerHTML.slice(0, 80))};
    """, width)  # fmt: skip
    assert found["inner"] == width
    assert found["wide"] == []
    assert found["scroll"] <= width


def test_it_is_walked_by_keyboard(page: Path) -> None:
    found = browser.probe(
        page,
        """
        const press = (key) => document.activeElement.dispatchEvent(
          new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
        const at = () => document.activeElement.id || document.activeElement.textContent.trim().split(/\s/)[0];
        const open = () => document.querySelectorAll("section details[open]").length;
        const seen = {first: document.querySelector("a, button, input").className};
        press("j"); seen.j = at(); press("j"); seen.jj = at(); press("k"); seen.k = at();
        press("n"); seen.n = at(); press("ArrowDown"); seen.down = at(); press("ArrowUp"); seen.up = at();
        const before = open();
        document.activeElement.parentElement.open = false;
        seen.closed = open() - before;
        press("x"); seen.all = [...document.querySelectorAll("#q1 details")].every((d) => d.open);
        press("/"); seen.find = at();
        document.activeElement.value = "red water";
        document.activeElement.dispatchEvent(new Event("input"));
        seen.found = [...document.querySelectorAll("section.query")].filter((s) => !s.hidden).map((s) => s.id);
        return seen;
    """,
    )
    assert found == {
        "first": "skip", "j": "q1", "jj": "q2", "k": "q1", "n": "1", "down": "3", "up": "1", "closed": -1,
        "all": True, "find": "find", "found": ["q2"],
    }  # fmt: skip


def test_near_duplicates_fold_under_the_first(page: Path) -> None:
    found = browser.probe(
        page,
        """
        const outer = [...document.querySelectorAll("#q1 > ol")][0];
        const twins = outer.querySelectorAll(".inside ol > li");
        return {shown: outer.children.length, twins: twins.length, hidden: !twins[0].checkVisibility() ||
                twins[0].closest(".inside").parentElement.open};
    """,
    )
    assert found == {"shown": 5, "twins": 1, "hidden": True}


def test_it_asks_the_network_for_nothing_and_reports_no_error(page: Path) -> None:
    found = browser.probe(
        page,
        """
        return {loaded: performance.getEntriesByType("resource").length, scripts: document.scripts.length};
    """,
    )
    assert found["loaded"] == 0


def test_a_print_shows_what_is_folded(page: Path, pictures: Path) -> None:
    path = browser.printed(page, pictures / "page.pdf")
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext: the print is made, but not read")
    text = re.sub(r"\s+", " ", subprocess.run(["pdftotext", path, "-"], capture_output=True, text=True).stdout)
    # Every document of the rankings, open or not, with its facts.
    rows = Attribution.open(page.parent / "workspace" / "attributions" / "20260101-000000-aaaaaa").table.to_pylist()
    assert text.count("Found by") == len(rows)
    assert all(row["document_id"] in text for row in rows)
    assert "Find a query" not in text
    if shutil.which("pdftoppm") is not None:
        subprocess.run(["pdftoppm", "-r", "60", "-png", path, pictures / "print"], check=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_every_colour(page: Path, scheme: str) -> None:
    """WCAG AA, 4.5 to 1, for text on each step of the scale and for the soft and the signed text."""
    css = page.read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, flags=re.S)
    values = dict(re.findall(r"--([\w-]+): ([^;]+);", blocks[scheme == "dark"]))

    def colour(text: str) -> list[float]:
        if text.startswith("#"):
            digits = text[1:] if len(text) == 7 else "".join(c * 2 for c in text[1:])
            return [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
        return [float(part) for part in text.split(",")]

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: list[float], b: list[float]) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    paper, ink = colour(values["paper"]), colour(values["ink"])
    for side in ("for", "against"):
        alphas = [float(a) for a in re.findall(rf"\.[pn]\d \{{ background: rgba\(var\(--{side}\), ([\d.]+)\)", css)]
        assert len(alphas) == charts.LEVELS
        for alpha in alphas:
            ground = [alpha * c + (1 - alpha) * p for c, p in zip(colour(values[side]), paper, strict=True)]
            assert contrast(ink, ground) >= 4.5, (side, alpha)
        assert contrast(colour(values[f"{side}-ink"]), paper) >= 4.5
    assert contrast(colour(values["soft"]), paper) >= 4.5
    assert contrast(colour(values["soft"]), colour(values["panel"])) >= 4.5
