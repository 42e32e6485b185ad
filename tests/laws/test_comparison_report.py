"""Figures, page and summary of a comparison: they draw for any comparison and say what its files say."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import METRICS, Comparison, save_comparison
from spinal_jax.errors import UserError
from spinal_jax.report import draw_report, render_comparison_report, write_comparison_report
from spinal_jax.report.cells import name_boundaries
from spinal_jax.report.comparison import lead
from spinal_jax.report.comparison_figures import (
    comparison_figures,
    deltas_figure,
    mass_shares,
    robustness_figure,
    setting_bands,
    short_name,
    traces_figure,
    where_figure,
)
from spinal_jax.report.comparison_words import comparison_caveats, missing, summary_markdown
from spinal_jax.report.figures import png_bytes, svg_text
from spinal_jax.wording import number

from .planted import both_models, flat, simulated
from .test_report import Page, assert_self_contained

KINDS = ("full", "traces only", "itself", "undefined", "one group", "D = 1", "D = 100")


def pair(depth: int) -> tuple[DepthTrace, DepthTrace]:
    truth = flat(depth)
    truth.delta_alpha[-1:], truth.delta_transport[-1:] = 0.4, -0.1
    (found,) = simulated(truth, 1, seed=1)
    return found


@pytest.fixture(scope="module")
def made() -> Mapping[str, Comparison]:
    """A comparison of each kind."""
    aligned, reference = pair(6)
    nothing = {name: np.full_like(values, np.nan) for name, values in aligned.columns.items()}
    single = {
        name: values[:1] if name in ("groups/rows", "groups/positions") else values[:0]
        for name, values in aligned.arrays.items()
        if name.startswith("groups/")
    }
    one = [
        replace(
            trace,
            prompts={**trace.prompts, "groups": 1},
            arrays={"singular_values": trace.arrays["singular_values"], **single},
        )
        for trace in (aligned, reference)
    ]
    return {
        "full": compare_traces(aligned, reference, both_models(6)),
        "traces only": compare_traces(aligned, reference),
        "itself": compare_traces(aligned, aligned),
        "undefined": compare_traces(*(replace(trace, columns=nothing) for trace in (aligned, reference))),
        "one group": compare_traces(*one),
        "D = 1": compare_traces(*pair(1), both_models(1)),
        "D = 100": compare_traces(*pair(100), both_models(100)),
    }


@pytest.fixture(scope="module")
def others(made: Mapping[str, Comparison]) -> tuple[Comparison, ...]:
    long = {
        **made["D = 100"].aligned,
        "name": "a-model/whose-name-is-much-longer-than-a-figure-is-wide-$x$-\N{SNOWMAN}",
    }
    return replace(made["D = 100"], aligned=long), made["itself"], made["undefined"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_drawn_legibly_and_nothing_is_cut_off(
    kind: str, made: Mapping[str, Comparison], others: tuple[Comparison, ...]
) -> None:
    found = made[kind]
    drawn = comparison_figures(found, (found, *others) if kind == "full" else ())
    measured = kind in ("full", "D = 1", "D = 100")
    assert {"policy", "gradient"} & set(drawn) == ({"policy", "gradient"} if measured else set())
    assert ("ranking" in drawn) == (kind == "full")
    for name, figure in drawn.items():
        text = svg_text(figure, name)
        assert "nan" not in re.sub(r"[\w-]*nan[a-z][\w-]*", "", text), name
        assert min(float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", text)) >= 9, name
        image = imread(io.BytesIO(png_bytes(figure, dpi=72)))
        for border in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (border == 1).all(), name
    page = Page(render_comparison_report(found))
    assert not page.open
    assert "nan" not in page.text.lower().split()
    effect = " ".join(lead(found, name_boundaries(range(found.terminal[0], found.terminal[1] + 1))).split())
    assert "not defined" in effect or number(found.summary["delta_align"]) in effect
    counts = found.robustness["sentence"].replace("Delta_align", "Δ align")
    said = [found.verdict[1:], effect, counts, "The score and its parts"]
    assert sorted(said, key=page.text.index) == said
    assert "nan" not in re.split(r"\W+", summary_markdown(found).lower())


def test_figures_show_what_they_name(made: Mapping[str, Comparison]) -> None:
    found = made["full"]
    for axes, name in zip(traces_figure(found).axes, ("contraction", "transport"), strict=True):
        for line, band, side in zip(axes.lines, axes.collections, ("aligned", "reference"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), found.columns[f"{side}_{name}"])
            edge = np.asarray(band.get_paths()[0].vertices)[:, 1]
            assert edge.max() == pytest.approx(np.nanmax(found.columns[f"{side}_{name}_high"]))
        assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    for axes, name in zip(deltas_figure(found).axes, METRICS, strict=True):
        if name not in ("contraction", "transport"):
            continue
        sure = found.columns[f"delta_{name}_p_holm"] < 0.05
        *_, still, marked = axes.lines
        np.testing.assert_array_equal(marked.get_xdata(), np.flatnonzero(sure))
        np.testing.assert_array_equal(marked.get_ydata(), found.columns[f"delta_{name}"][sure])
        assert 6 in marked.get_xdata()
        assert still.get_markerfacecolor() != marked.get_markerfacecolor()
    shares = mass_shares(found, "delta_contraction")
    assert shares is not None
    mass = np.array(found.summary["localisation"]["delta_contraction"]["mass"])
    np.testing.assert_allclose(shares, mass / mass.sum())
    bars = where_figure(found).axes[0].patches[-6:]
    np.testing.assert_allclose([bar.get_height() for bar in bars], shares)
    assert shares[4:].sum() == pytest.approx(found.summary["localisation"]["delta_contraction"]["share"])


def test_the_grid_shows_every_setting_where_its_words_are(made: Mapping[str, Comparison]) -> None:
    found = made["full"]
    figure = robustness_figure(found)
    axes, settings = figure.axes[0], found.robustness["settings"]
    dots = [line for line in axes.lines if line.get_marker() not in ("None", None, "") and len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in dots] == [setting["delta_align"] for setting in settings]
    bands = setting_bands(figure, found)
    height = 72 * figure.get_size_inches()[1]
    for dot, (_, (_, y, _, tall)) in zip(dots, bands, strict=True):
        at = height - axes.transData.transform((0, dot.get_ydata()[0]))[1] * 72 / figure.dpi
        assert y + tall / 2 == pytest.approx(at, abs=0.01)
    assert dots[0].get_markersize() > dots[1].get_markersize()


def test_what_was_not_measured_is_said_with_the_command_that_measures_it(made: Mapping[str, Comparison]) -> None:
    assert missing(made["full"]) == []
    page = Page(render_comparison_report(made["traces only"]))
    for words, command in missing(made["traces only"]):
        assert f"{words} {command}" in page.text
        assert f"{words} `{command}`" in summary_markdown(made["traces only"])
    assert len(missing(made["traces only"])) == 2
    assert "it is undefined here: " in page.text


def test_caveats_follow_the_comparison(made: Mapping[str, Comparison]) -> None:
    found = made["full"]
    assert not any("can be marked significant" in line for line in comparison_caveats(found))
    few = replace(found, prompts={**found.prompts, "groups": 6})
    assert "With 6 groups of prompts no p-value can be below 0.031" in comparison_caveats(few)[len(found.warnings)]
    control = replace(found, settings={**found.settings, "same_prompts": False})
    assert any("this is a control" in line for line in comparison_caveats(control))


def test_every_file_is_byte_stable_and_a_ranking_is_found_in_the_folder(
    tmp_path: Path, made: Mapping[str, Comparison]
) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        save_comparison(made["full"], folder)
        save_comparison(made["itself"], folder / "others" / "1")
    assert draw_report(tmp_path / "a") == tmp_path / "a" / "report.html"
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "svg.hashsalt": "x", "savefig.dpi": 20}):
        write_comparison_report(tmp_path / "b" / "comparison.json")
    names = {path.stem for path in (tmp_path / "a" / "figures").iterdir()}
    assert names == {"traces", "deltas", "where", "policy", "gradient", "robustness", "ranking", "overlay"}
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) == 2 * 8 + 2 + 2 * 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    page = Page((tmp_path / "a" / "report.html").read_text(encoding="utf-8"))
    assert "More than two checkpoints" in page.text
    summary = (tmp_path / "a" / "summary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (\S+)", summary, re.MULTILINE)
    assert [place for place, _ in rows] == ["1", "2"]
    with pytest.raises(UserError, match="no run at"):
        draw_report(tmp_path)


def test_the_page_is_self_contained_and_what_it_is_told_is_only_ever_text(
    made: Mapping[str, Comparison], others: tuple[Comparison, ...]
) -> None:
    text = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}|*_`&amp;</style></title>"
    found = made["full"]
    model = {**found.aligned, **dict.fromkeys(("name", "source", "revision", "family", "dtype", "sha256"), text)}
    found = replace(
        found,
        aligned=model,
        prompts={**found.prompts, "source": text, "sha256": text},
        summary={**found.summary, "sentence": text, "headline": text},
        warnings=(text,),
    )
    html = render_comparison_report(found, others)
    page = Page(html)
    assert page.text.count(text) >= 8
    assert_self_contained(html)
    table = [line for line in summary_markdown(found, others).splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5, 7}


def test_long_and_strange_names_fit_in_figures() -> None:
    assert short_name("a" * 30 + "b" * 30, 20) == "aaaaaaaaa…bbbbbbbbbb"
    assert short_name("cost $5\n\N{SNOWMAN}", 50) == "cost $5 ?"
