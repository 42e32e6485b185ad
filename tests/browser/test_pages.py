"""Every kind of page in a real browser: it loads nothing, complains of nothing and fits every window.

These tests need a Chromium, which no Python package carries, so `make test` leaves them out and `make test-browser`
runs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from spinal_jax.audit.trace import save_trace
from spinal_jax.comparison.attribution import attributed, save_attribution
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from spinal_jax.report import draw_report
from spinal_jax.report.collect import collect_runs
from tests.laws.planted import both_models, flat, simulated
from tests.laws.test_attribution import arms
from tests.laws.test_collect import finish
from tests.laws.test_training_report import CONFIG, write_run

from .chromium import NAMES, Chromium, find

pytestmark = pytest.mark.browser
PAPER = 688  # CSS pixels between the margins of an A4 page
KINDS = ("audit", "training", "comparison")  # of one run
PAGES = (*KINDS, "attribution", "index")  # and those of many


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find()
    if path is None:
        pytest.fail(f"no browser: install one of {', '.join(NAMES)}, or name one by the variable CHROMIUM")
    with Chromium(path, tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A page of each kind, of models of 6 blocks; that of many runs is of these three and one that was cut off."""
    folder = tmp_path_factory.mktemp("pages")
    truth = flat(6)
    truth.delta_alpha[-1:], truth.delta_transport[-1:] = 0.4, -0.1
    ((aligned, reference),) = simulated(truth, 1, seed=1)
    save_trace(aligned, folder / "audit")
    (folder / "training").mkdir()
    write_run(folder / "training", (aligned, reference), [0, 0.5, 0.9, 1.0, 1.0], "sound")
    save_comparison(compare_traces(aligned, reference, both_models(6)), folder / "comparison")
    save_comparison(compare_traces(reference, aligned), folder / "comparison" / "others" / "1")
    drawn = {kind: draw_report(folder / kind) for kind in KINDS}
    finish(folder / "audit", "audit", {"model": {"source": "m"}})
    finish(folder / "training", "train", CONFIG)
    finish(folder / "comparison", "compare", {"model": {"source": "m"}})
    (folder / "cut off").mkdir()
    (folder / "cut off" / "settings.json").write_text(json.dumps({"config": CONFIG | {"seed": 1}}))
    judged = tmp_path_factory.mktemp("attribution")
    save_attribution(attributed(arms(np.random.default_rng(15), 6.0)), judged)
    drawn["attribution"] = draw_report(judged)
    return {**drawn, "index": collect_runs([folder]).files[-1]}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("kind", PAGES)
def test_a_page_loads_only_itself_and_fits(
    kind: str, width: int, dark: bool, browser: Chromium, pages: Mapping[str, Path]
) -> None:
    browser.open(pages[kind], width, dark=dark)
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    lit = browser.value("Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number))")
    assert (lit < 64) == dark
    assert browser.complaints() == []
    assert browser.requests() == [pages[kind].resolve().as_uri()]


OPEN = "document.querySelectorAll('details.section').forEach((section) => { section.open = true; })"


def drawn(browser: Chromium, name: str) -> bool:
    """Scrolls to a chart and says whether it is drawn: charts are, when they are first seen."""
    browser.value(f"document.getElementById('figure-{name}').scrollIntoView()")
    script = f"""new Promise((resolve) => {{
      const figure = document.getElementById('figure-{name}');
      const look = (left) => figure.classList.contains('drawn') || !left ? resolve(figure.classList.contains('drawn'))
        : requestAnimationFrame(() => look(left - 1));
      look(2000);
    }})"""
    return bool(browser.value(script, wait=True))


@pytest.mark.parametrize("kind", PAGES)
def test_pointing_reads_values_and_a_column_sorts(kind: str, browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages[kind], 1600)
    browser.value(OPEN)
    if kind in KINDS:
        browser.value("document.querySelector('figure > svg .hit').dispatchEvent(new PointerEvent('pointerenter'))")
        said = browser.value("document.querySelector('.read-out.on').textContent").split()[0]
        assert said in ("boundary", "step", "block")
    table = "[...document.querySelectorAll('table.sortable')].at(-1)"
    first = f"{table}.tBodies[0].rows[0].cells[0].textContent"
    before = browser.value(first)
    browser.value(f"{table}.tHead.querySelector('[role=button]').click()")
    if before == browser.value(first):  # the rows were not in the order of their keys
        browser.value(f"{table}.tHead.querySelector('[role=button]').click()")
    assert browser.value(first) != before
    assert browser.complaints() == []


@pytest.mark.parametrize(
    ("kind", "name", "lines"),
    [("audit", "depth", 2), ("comparison", "traces", 4), ("attribution", "depth", 2), ("index", "overlay", 4)],
)
def test_depth_curves_are_interactive(
    kind: str, name: str, lines: int, browser: Chromium, pages: Mapping[str, Path]
) -> None:
    browser.open(pages[kind], 1400)
    assert drawn(browser, name)
    entries = f"#figure-{name} .u-legend .u-series:not(.u-hidden)"
    assert browser.value(f"document.querySelectorAll('{entries}').length") == lines + 2  # and the axis of each panel
    browser.value(f"document.querySelectorAll('{entries}')[1].querySelector('th').click()")
    assert browser.value(f"document.querySelectorAll('{entries}')[1].classList.contains('u-off')")
    assert browser.value(f"getComputedStyle(document.querySelector('#figure-{name} .still')).display") == "none"
    assert browser.complaints() == []
    assert browser.requests() == [pages[kind].resolve().as_uri()]


def test_the_depth_curve_turns(browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages["audit"], 1400)
    browser.value(OPEN)
    assert drawn(browser, "curve")
    path = "document.querySelector('.turn .path').getAttribute('points')"
    before = browser.value(path)
    browser.value("document.querySelector('.turn').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
    assert browser.value(path) != before
    browser.value("document.querySelector('.turn circle').dispatchEvent(new PointerEvent('pointerenter'))")
    assert browser.value("document.querySelector('#figure-curve .read-out').textContent").startswith("boundary 1, ")
    assert browser.complaints() == []


@pytest.mark.parametrize("kind", PAGES)
def test_contents_open_their_sections_and_the_first_screen_answers(
    kind: str, browser: Chromium, pages: Mapping[str, Path]
) -> None:
    browser.open(pages[kind], 1400)
    top = "document.querySelector('nav').getBoundingClientRect().top"
    loaded = browser.value(top)
    assert loaded < 900
    seen = f"new Promise((resolve) => setTimeout(() => requestAnimationFrame(() => resolve({top})), 100))"
    assert browser.value(seen, wait=True) == loaded  # charts of the first screen move nothing when they are drawn
    links = browser.value("document.querySelectorAll('nav a').length")
    assert links == browser.value("document.querySelectorAll('details.section').length") > 0
    browser.value("[...document.querySelectorAll('nav a')].at(-1).click()")
    assert browser.value("[...document.querySelectorAll('details.section')].at(-1).open")


def test_a_wide_table_says_that_columns_wait(browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages["index"], 400)
    frame = "document.querySelector('.frame')"
    assert browser.value(f"{frame}.classList.contains('after')")
    assert browser.value(f"getComputedStyle({frame}, '::after').content") == '"›"'
    browser.value("document.querySelector('.scroll').scrollTo(100, 0)")
    head, frame = (
        f"document.querySelector('{name}').getBoundingClientRect().left" for name in (".frame tbody th", ".scroll")
    )
    assert abs(browser.value(f"{head} - {frame}")) <= 1  # the first column stays


def test_runs_are_filtered(browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages["index"], 1400)
    assert drawn(browser, "overlay")
    browser.value(
        "(() => { const field = document.querySelector('.filter input'); field.value = 'audit';"
        " field.dispatchEvent(new Event('input')); })()"
    )
    assert browser.value("[...document.querySelectorAll('.frame tbody tr')].filter((row) => !row.hidden).length") == 1
    assert browser.value("document.querySelector('.filter output').textContent") == "1 of 4"
    off = "document.querySelectorAll('#figure-overlay .u-series.u-off').length"
    assert browser.value(off) == 2  # the other run, in both panels


@pytest.mark.parametrize("kind", PAGES)
def test_a_page_reads_without_scripts_and_prints(kind: str, browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages[kind], 1600, scripts=False)
    assert browser.complaints() == []
    browser.open(pages[kind], PAPER, media="print")
    assert browser.value("document.documentElement.scrollWidth") <= PAPER
    assert browser.paper().startswith(b"%PDF")


def test_the_page_of_many_runs_leads_to_theirs(browser: Chromium, pages: Mapping[str, Path]) -> None:
    browser.open(pages["index"], 1600)
    links = browser.value("JSON.stringify([...document.querySelectorAll('tbody a')].map(link => link.href))")
    assert sorted(json.loads(links)) == sorted(pages[kind].resolve().as_uri() for kind in KINDS)


def test_what_these_tests_look_for_is_found(browser: Chromium, tmp_path: Path) -> None:
    """A page with every fault: a script that fails, a message, a request and something too wide."""
    page = tmp_path / "faults.html"
    page.write_text(
        "<!doctype html><img src='missing.png'><p style='width: 3000px'>x</p>"
        "<script>console.error('a message'); throw new Error('a fault')</script>"
    )
    browser.open(page, 400)
    assert browser.value("document.documentElement.scrollWidth") > 400
    assert any(url.endswith("missing.png") for url in browser.requests())
    assert len(browser.complaints()) >= 3
