"""The page of a report in a real browser: nothing goes wrong, nothing is fetched, light and dark, wide and narrow."""

import pytest

import browser
from graftwork.report import write_report
from report_support import made_run

pytestmark = [pytest.mark.full, pytest.mark.skipif(browser.PROGRAM is None, reason=browser.MISSING)]

#: what of the page sticks out to the right, and does not scroll by itself
STICKS_OUT = """[...document.querySelectorAll("body *")].filter((each) => !each.closest(".scroll") && !each.closest("svg")
    && each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.tagName + " " + each.textContent.slice(0, 40))"""
#: height of the smallest text of the figures that are in view
LETTERS = """Math.min(...[...document.querySelectorAll("svg text")].map((each) => each.getBoundingClientRect())
    .filter((box) => box.width).map((box) => box.height))"""
#: backgrounds of figures that would hide the page's
OPAQUE = """[...document.querySelectorAll("svg path")].filter((each) => getComputedStyle(each).fill === "rgb(255, 255, 255)")
    .map((each) => each.getAttribute("d"))"""
#: contrast of the text with the page, of the small print, and of the first text of a figure (1 to 21)
CONTRAST = """(() => {
    const light = (color) => { const c = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; };
    let back = getComputedStyle(document.documentElement).backgroundColor;
    if (back.endsWith(", 0)")) back = "rgb(255, 255, 255)";
    const shown = [...document.querySelectorAll("svg text")].find((each) => each.getClientRects().length);
    const inks = [getComputedStyle(document.body).color, getComputedStyle(document.querySelector("figcaption")).color,
                  getComputedStyle(shown).fill];
    return inks.map((ink) => { const [a, b] = [light(ink), light(back)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); });
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    long = "a-run-with-a-name-that-is-longer-than-any-phone-is-wide-and-has-no-space-in-it"
    runs = [made_run(root / "first"), made_run(root / long, scale=2.0, recipe={"model": "x" * 120})]
    write_report(runs, root / "report.html")
    return (root / "report.html").as_uri()


def test_page_in_a_browser(page):
    tab = browser.Browser()
    try:
        shots = {}
        for width in (1280, 360):
            for dark in (False, True):
                tab.view(width, 900, dark=dark)
                tab.open(page)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.evaluate(STICKS_OUT) == []
                assert min(tab.evaluate(CONTRAST)) > 4.5
                assert tab.evaluate(OPAQUE) == []
                assert tab.evaluate(LETTERS) >= 8
                wide, narrow = (tab.evaluate(f"[...document.querySelectorAll('{kind} svg')].every((each) => each.getClientRects().length)")
                                for kind in (".wide", ".narrow"))
                assert (wide, narrow) == ((True, False) if width > 700 else (False, True))
                shots[width, dark] = tab.screenshot()
        assert len(set(shots.values())) == 4
        tab.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")  # tables scroll by themselves
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360 and tab.evaluate(STICKS_OUT) == []
        tab.evaluate("document.querySelector('nav a:last-child').click()")
        assert tab.evaluate("document.querySelector('section:last-of-type').getBoundingClientRect().top") < 900
        assert not tab.problems() and {url for url in tab.requested() if not url.startswith("data:")} == {page}
    finally:
        tab.close()
