"""Figures and page: they draw for any trace, give equal bytes for equal traces, and let nothing in or out."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from spinal_jax.audit.pipeline import model_name
from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.errors import UserError
from spinal_jax.metrics.columns import TRACE
from spinal_jax.report import (
    curve_figure,
    depth_figure,
    entropy_figure,
    render_report,
    sections,
    spectra_figure,
    write_report,
)
from spinal_jax.report.cells import describe_positions, name_boundaries
from spinal_jax.report.collect_page import collected_figure
from spinal_jax.report.figures import figures, hover_bands, png_bytes, save_figures, spread, svg_text, tail_line
from spinal_jax.report.page import trace_caveats, trace_headline
from spinal_jax.runs.find import Run

Maker = Callable[..., DepthTrace]
SCRIPTS = 3  # of each page; each chart has one more, that holds its data
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and whether every one that opens is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def undefined(trace: DepthTrace, *columns: str) -> DepthTrace:
    """The trace with whole columns, and the summary numbers of those names, NaN."""
    nothing = np.full(trace.boundaries, np.nan)
    names = {name for column in columns for name in (column, f"{column}_se")}
    summary = {key: np.nan if key in names else value for key, value in trace.summary.items()}
    kept = {key: nothing if key in names else values for key, values in trace.columns.items()}
    return replace(trace, columns=kept, summary=summary)


def edge(make_trace: Maker, kind: str) -> DepthTrace:
    if kind == "no contraction":
        return undefined(make_trace(), "contraction", "fit_r2", "fit_quadratic", "resolved")
    if kind == "nothing":
        trace = make_trace()
        return undefined(
            trace, *(name for name in trace.columns if not name.endswith("_se")), "coherence", "directness"
        )
    if kind == "one group":
        return make_trace(groups=1)
    return make_trace(depth=int(kind.removeprefix("D = ")))


@pytest.mark.parametrize("kind", ["D = 1", "D = 2", "D = 100", "no contraction", "nothing", "one group"])
def test_every_figure_and_the_page_draw_at_the_edges(kind: str, make_trace: Maker) -> None:
    trace = edge(make_trace, kind)
    for draw in (depth_figure, curve_figure, spectra_figure, entropy_figure):
        text = svg_text(draw(trace), draw.__name__)
        assert text.startswith("<?xml")
        assert "nan" not in re.sub(r"[\w-]*nan[a-z][\w-]*", "", text)
    page = Page(render_report(trace))
    assert not page.open
    assert len(page.find("figure")) == 4
    assert "nan" not in page.text.split()
    assert len(page.find("tr")) == trace.boundaries + 1


def test_figures_show_the_columns_they_name(make_trace: Maker) -> None:
    trace = make_trace()
    upper, lower = depth_figure(trace).axes
    for axes, column in ((upper, "contraction"), (lower, "transport")):
        (line,) = axes.lines
        np.testing.assert_array_equal(line.get_ydata(), trace.columns[column])
        band = np.asarray(axes.collections[0].get_paths()[0].vertices)
        low, high = trace.interval(column)
        assert band[:, 1].min() == pytest.approx(np.nanmin(low))
        assert band[:, 1].max() == pytest.approx(np.nanmax(high))
    first, last = trace.terminal
    assert f"terminal block {first}–{last}" in svg_text(depth_figure(trace), "depth")
    upper, lower = entropy_figure(trace).axes
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), trace.columns["entropy"])
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), trace.columns["curvature"])
    assert [axes.get_ylabel() for axes in (upper, lower)] == ["entropy (nats)", "curvature (rad)"]


def test_the_fit_line_has_the_slope_of_the_spectrum_and_leaves_the_window_as_it_was(make_trace: Maker) -> None:
    trace = make_trace(width=64)
    window = list(trace.settings["window"])
    for at in range(trace.boundaries):
        line = tail_line(trace.arrays["singular_values"][at], (7, 32))
        assert line is not None
        (low, high), (above, below) = line
        assert (low, high) == (7, 32)
        slope = np.log(above / below) / np.log(low / high)
        assert slope == pytest.approx(-trace.columns["contraction"][at], rel=1e-10)
    spectra_figure(trace)
    assert list(trace.settings["window"]) == window
    assert tail_line(np.ones(4), (1, 1)) is None


def test_spectra_of_chosen_boundaries(make_trace: Maker) -> None:
    trace = make_trace(depth=30)
    assert spread(trace) == [1, 7, 14, 21, 30]
    assert spread(make_trace(depth=1)) == [1]
    text = svg_text(spectra_figure(trace, [0, 5]), "spectra")
    for at in (0, 5):
        assert f"{at}:  α {trace.columns['contraction'][at]:.3f}" in text
    assert "30:" not in text
    with pytest.raises(UserError, match="no boundary 31; this trace has 0 to 30"):
        spectra_figure(trace, [31])
    with pytest.raises(UserError, match="no singular values"):
        spectra_figure(make_trace(spectra=False))


def test_every_file_is_byte_stable_whatever_the_caller_does_to_matplotlib(tmp_path: Path, make_trace: Maker) -> None:
    trace = make_trace()
    save_trace(trace, tmp_path / "a")
    save_trace(trace, tmp_path / "b")
    write_report(tmp_path / "a")
    with mpl.rc_context(
        {"font.size": 20, "lines.linewidth": 5, "axes.grid": True, "svg.hashsalt": "x", "savefig.dpi": 20}
    ):
        before = dict(mpl.rcParams)
        write_report(tmp_path / "b" / "trace.json")
        assert dict(mpl.rcParams) == before
    names = sorted(str(file.relative_to(tmp_path / "a")) for file in (tmp_path / "a").rglob("*") if file.is_file())
    drawn = [f"figures/{name}{kind}" for name in ("curve", "depth", "entropy", "spectra") for kind in (".png", ".svg")]
    assert names == [*drawn, "report.html", "spectra.safetensors", "trace.csv", "trace.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("depth", [2, 30, 100])
def test_figures_are_legible_and_nothing_is_cut_off(depth: int, make_trace: Maker) -> None:
    for name, figure in figures(make_trace(depth=depth)).items():
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", svg_text(figure, name))]
        assert len(sizes) >= 10, name
        assert min(sizes) >= 9, name
        image = imread(io.BytesIO(png_bytes(figure, dpi=72)))
        for border in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (border == 1).all(), name


def test_hover_strips_lie_over_their_boundaries(make_trace: Maker) -> None:
    trace = make_trace(depth=30)
    figure = depth_figure(trace)
    strips = hover_bands(figure, trace)
    axes = figure.axes[0]
    for at, x, _, width, _ in strips:
        point = figure.transFigure.inverted().transform(axes.transData.transform((at, 0)))[0] * 72 * 4.6
        assert x + width / 2 == pytest.approx(point, abs=1e-6)


def test_depth_is_told_by_lightness_too(make_trace: Maker) -> None:
    """Later boundaries are lighter, so that greyscale print keeps their order; none drowns in white or black."""
    figure = curve_figure(make_trace(depth=30))
    image = imread(io.BytesIO(png_bytes(figure, dpi=100)))
    bar = figure.axes[1].get_position()
    height, width, _ = image.shape
    row = image[round((1 - (bar.y0 + bar.y1) / 2) * height), :, :3] @ np.array([0.2126, 0.7152, 0.0722])
    lightness = row[round(bar.x0 * width) + 2 : round(bar.x1 * width) - 2]
    assert (np.diff(lightness) >= -1e-6).all()
    assert 0.25 < lightness[0] < 0.5 < lightness[-1] < 0.8


def test_without_singular_values_the_page_says_so(tmp_path: Path, make_trace: Maker) -> None:
    trace = make_trace(spectra=False)
    assert {path.stem for path in save_figures(trace, tmp_path)} == {"depth", "curve", "entropy"}
    page = Page(render_report(trace))
    assert len(page.find("figure")) == 3
    assert "singular values were not saved beside this trace" in page.text


def own(html: str) -> str:
    """The page without its scripts, whose text no browser reads as addresses."""
    return re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)


def assert_self_contained(html: str) -> Page:
    """No address but anchors, no style and no script that the policy does not name by its hash; ids are unique."""
    page = Page(html)
    assert not page.open
    policy = next(meta["content"] for meta in page.find("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        allowed = next(part.split()[1:] for part in policy.split("; ") if part.startswith(rule))
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert allowed == [f"'sha256-{digest}'" for digest in hashes]
    assert not re.search("https?://", own(html))
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    anchors = {f"#{name}" for name in ids}
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value in anchors, (tag, value)
            for target in re.findall(r"url\((.*?)\)", value or ""):
                assert target in anchors, (tag, target)
            assert not name.startswith("on"), (tag, name)
    for script in page.find("script"):
        assert script in ({}, {"type": "application/json", "id": script.get("id")})
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>.*?</style>", html, re.DOTALL)))
    return page


def test_the_page_is_self_contained_and_its_ids_are_unique(make_trace: Maker) -> None:
    assert_self_contained(render_report(make_trace()))


def test_the_charts_hold_the_columns_they_name(make_trace: Maker) -> None:
    trace = make_trace(name="</script><b>x</b>")
    html = render_report(trace)
    data = dict(re.findall(r'<script type="application/json" id="data-(\w+)">(.*?)</script>', html, re.DOTALL))
    assert data.keys() == {"depth", "curve"}
    for panel, column in zip(json.loads(data["depth"])["panels"], ("contraction", "transport"), strict=True):
        values = np.array(panel["lines"][0]["values"], float)
        np.testing.assert_allclose(values, trace.columns[column], rtol=1e-5)
        np.testing.assert_allclose(np.array(panel["lines"][0]["low"], float), trace.interval(column)[0], rtol=1e-5)
    curve = json.loads(data["curve"])
    assert curve["lines"][0]["label"] == "</script><b>x</b>"
    assert curve["first"] == trace.terminal[0]
    assert len(curve["lines"][0]["points"]) == trace.boundaries - 1  # transport has no value at boundary 0


def test_the_plotting_library_is_the_one_that_was_published() -> None:
    """uPlot 1.6.32, byte for byte, with its licence beside it."""
    folder = Path(sections.__file__).parent / "assets"
    digest = hashlib.sha256((folder / "uplot.min.js").read_bytes()).hexdigest()
    assert digest == "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f"
    assert "MIT License" in (folder / "uplot.LICENSE").read_text(encoding="utf-8")


def test_whatever_a_trace_says_is_only_ever_text(tmp_path: Path, make_trace: Maker) -> None:
    text = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}😀\udcff&amp;</style></title>"
    trace = make_trace()
    words = dict.fromkeys(("name", "source", "revision", "family", "dtype", "sha256"), text)
    trace = replace(
        trace,
        model={**trace.model, **words},
        prompts={**trace.prompts, "source": text, "format": text, "sha256": text},
        settings={**trace.settings, "positions": text},
        environment={text: text, "nested": {text: text}},
        warnings=(text,),
    )
    save_trace(trace, tmp_path)
    html = write_report(tmp_path).read_bytes().decode()
    page = Page(html)
    assert page.text.count(text.replace("\udcff", "\N{REPLACEMENT CHARACTER}")) >= 8
    assert [tag for tag, _ in page.elements].count("script") == SCRIPTS + 2
    assert not page.find("img")


def test_the_page_says_what_was_measured_and_what_to_beware_of(make_trace: Maker) -> None:
    trace = make_trace(depth=30, name="A model")
    page = Page(render_report(trace))
    assert page.text.strip().startswith("Depth trace of A model")
    low, high = trace.summary_interval("contraction")
    assert f"{trace.summary['contraction']:.3f} (95\N{NO-BREAK SPACE}% interval {low:.3f} to {high:.3f})".replace(
        "\N{NO-BREAK SPACE}", " "
    ) in page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "In the last 10 of 30 blocks",
        "By itself it is no evidence of alignment",
        "N = 200 against 4d = 128",
        "10 to 50 % of the ranks",
        "the last 4 tokens of each prompt",
        "Warning from the measurement: few rows: N = 200, 4d = 128",
        "its exponent is 2α",
        "The straight line fits worst at boundary",
        "spinal report DIR",
    ):
        assert words in page.text, words
    assert sum(row.get("class") == "terminal" for row in page.find("tr")) == 10
    assert [cell["data-key"] for cell in page.find("th") if "data-key" in cell] == [str(at) for at in range(31)]
    keys = [cell["data-key"] for cell in page.find("td")]
    assert keys[:2] == [repr(float(trace.columns[name][0])) for name in ("contraction", "fit_r2")]
    assert keys[[about.name for about in TRACE].index("transport")] == ""


def test_caveats_follow_the_trace(make_trace: Maker) -> None:
    trace = make_trace()
    assert "N = 200 rows are 6.2 per dimension of the residual stream; 4 are required" in trace_caveats(trace)[0]
    few = replace(trace, prompts={**trace.prompts, "rows": 100})
    assert (
        "Few rows for this width: N = 100 is 3.1 per dimension, and 4 (N = 128) are required" in trace_caveats(few)[0]
    )
    lost = undefined(trace, "contraction")
    assert "Contraction is not defined at boundaries 0–6" in trace_caveats(lost)[1]
    assert "contraction is not defined" in trace_headline(lost)
    assert trace_caveats(trace)[-1] == f"Warning from the measurement: {trace.warnings[0]}"


def test_words_for_positions_and_boundaries() -> None:
    assert describe_positions("last:1") == "the last token of each prompt"
    assert describe_positions("all") == "every token of each prompt"
    assert describe_positions("stride:8") == "every 8th token of each prompt"
    assert name_boundaries([3]) == "boundary 3"
    assert name_boundaries([12, 3, 13, 14]) == "boundaries 3, 12–14"


def test_the_weights_of_a_training_run_go_by_the_run(tmp_path: Path) -> None:
    run = tmp_path / "demo-dpo"
    (run / "model").mkdir(parents=True)
    assert model_name(str(run / "model")) == "model"
    (run / "settings.json").write_text("{}")
    assert model_name(str(run / "model")) == "demo-dpo"
    assert model_name(str(tmp_path / "some.gguf")) == "some"
    assert model_name("owner/name") == "owner/name"


def test_names_are_text_in_figures(make_trace: Maker) -> None:
    name, run = r"a$\frac{$b", Path("run")
    figure = collected_figure([Run(run, "audit", True, {}, {}, make_trace())], {run: name})
    assert name in svg_text(figure, "overlay")
