"""Figures and page of a training run: they draw for any run that saved something, and say what its files say."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spinal_jax.audit.trace import DepthTrace, save_trace
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.onset import detect
from spinal_jax.comparison.record import save_comparison
from spinal_jax.comparison.step_records import Rules, record_of
from spinal_jax.errors import UserError
from spinal_jax.report import draw_report, load_training_run, render_training_report, write_training_report
from spinal_jax.report.figures import png_bytes, svg_text
from spinal_jax.report.training import evidence, training_caveats, training_headline
from spinal_jax.report.training_figures import (
    DIVERGING,
    course_figure,
    gradients_figure,
    loss_figure,
    over_training_figure,
    record_bands,
    spans_of,
    trace_figure,
    training_figures,
)
from spinal_jax.runs.tensorboard import Events

from .planted import Truth, simulated
from .test_report import Page, assert_self_contained

Maker = Callable[..., DepthTrace]
CONFIG: dict[str, Any] = {
    "model": {"source": "a/base", "dtype": "float32"},
    "objective": {"kind": "dpo", "loss": "sigmoid", "beta": 0.1},
    "preferences": {"path": "pairs.jsonl", "format": "jsonl", "max_length": 64, "held_out": 8},
    "corpus": None,
    "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip": 1.0,
    },
    "lora": {"rank": 0, "alpha": 16.0},
    "batch_size": 8,
    "seed": 0,
}
DPO = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
TOLD = ("kl", "rewards/margins", "rewards/accuracies", "eval_rewards/margins", "eval_rewards/accuracies")
KINDS = ("sound", "destabilised", "quiet", "one record", "lm", "holes")


@pytest.fixture(scope="session")
def ends() -> tuple[DepthTrace, DepthTrace]:
    """The traces of a model after and before its training."""
    depth = 6
    rise = np.linspace(0, 0.3, depth + 1)
    return next(simulated(Truth(np.full(depth + 1, 1.0), rise, -rise / 2), 1, 0))


def between(ends: tuple[DepthTrace, DepthTrace], share: float) -> DepthTrace:
    """A trace on the way from the second to the first."""
    after, before = ends

    def mixed(name: str) -> Mapping[str, np.ndarray]:
        one, other = getattr(after, name), getattr(before, name)
        return {key: other[key] + share * (one[key] - other[key]) for key in other}

    return DepthTrace(
        **{name: getattr(before, name) for name in ("model", "prompts", "settings", "summary", "environment")},
        columns=mixed("columns"),
        warnings=("a warning of the trace",),
        arrays=mixed("arrays"),
    )


@pytest.fixture(scope="session")
def made(ends: tuple[DepthTrace, DepthTrace], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A run's folder of each kind."""
    way = {
        "sound": [0, 0.2, 0.5, 0.8, 0.9, 1.0, 1.0],
        "destabilised": [0, 0.5, 0.9, 1.0, 1.0, 0.2, 0.1, 0.0],
        "quiet": [0.0] * 5,
        "one record": [0.0],
        "lm": [0, 0.5, 1.0],
        "holes": [0, 0.5, 0.8, 1.0],
    }
    return {kind: write_run(tmp_path_factory.mktemp("run"), ends, way[kind], kind) for kind in KINDS}


def write_run(folder: Path, ends: tuple[DepthTrace, DepthTrace], way: list[float], kind: str) -> Path:
    first, every = between(ends, 0.0), 10
    records, beside = [], []
    for at, share in enumerate(way):
        trace = between(ends, share)
        target = folder / "traces" / f"step_{at * every:06}"
        save_trace(trace, target, at * every)
        comparison = compare_traces(trace, first)
        save_comparison(comparison, target)
        records.append(record_of(at * every, comparison))
        beside.append({name: 0.1 * at + 0.01 * n for n, name in enumerate(TOLD[: 1 if kind == "lm" else 5])})
    told = detect(records, beside, Rules())
    config = {**CONFIG, "objective": {**CONFIG["objective"], "kind": "lm" if kind == "lm" else "dpo"}}
    if kind == "lm":
        config |= {"corpus": CONFIG["preferences"], "preferences": None}
    if kind == "holes":
        del told["records"][2]["eval_rewards/margins"]
        told["records"][3]["kl"] = None
    lines = []
    for step in range(0 if kind == "one record" else every * (len(way) - 1)):
        line: dict[str, Any] = {"step": step, "loss": 1 / (1 + step), "grad_norm": 1.0, "num_tokens": 9 * step}
        if kind != "lm":
            line |= dict.fromkeys(DPO, 0.01 * step)
        else:
            line |= {"mean_token_accuracy": 0.01 * step}
        if step % 20 == 0:
            line |= {f"eval_{name}": value for name, value in line.items() if name != "step"}
        if kind != "holes" or step % 3:
            line["block_grad_norms"] = [0.1 * block + 0.01 * step for block in range(1, 7)]
        elif step % 2:
            line = {"step": step, "grad_norm": 0.5, "loss": None}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 99999, "lo' * (kind == "holes"))
    (folder / "settings.json").write_text(json.dumps({"config": config, "weights": "ab12"}))
    (folder / "onset.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quiet"])
def test_every_kind_of_run_is_drawn_legibly_and_nothing_is_cut_off(kind: str, made: Mapping[str, Path]) -> None:
    run = load_training_run(made[kind])
    drawn = training_figures(run)
    nothing_logged = kind == "one record"
    assert set(drawn) == {"course", "over_training"} | (set() if nothing_logged else {"gradients", "loss"})
    for name, figure in drawn.items():
        text = svg_text(figure, name)
        assert "nan" not in re.sub(r"[\w-]*nan[a-z][\w-]*", "", text), name
        assert min(float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", text)) >= 9, name
        image = imread(io.BytesIO(png_bytes(figure, dpi=72)))
        for border in (image[:2], image[-2:], image[:, :2], image[:, -2:]):
            assert (border == 1).all(), name
    page = Page(render_training_report(run))
    assert not page.open
    assert len(page.find("figure")) == len(drawn)
    assert "nan" not in page.text.lower().split()
    assert len(page.find("tr")) == len(run.traces) + 1
    marks = [rect for rect in page.find("rect") if rect.get("class") == "hit"]
    assert len(marks) == len(run.traces)


def test_the_verdict_comes_first_with_its_evidence(made: Mapping[str, Path]) -> None:
    said = {kind: training_headline(load_training_run(made[kind])) for kind in KINDS}
    assert said["sound"] == "A footprint of contraction began at step 10, and up to step 60 nothing destabilised."
    assert said["destabilised"] == (
        "A footprint of contraction began at step 10, and it destabilised at step 50; the last healthy trace is that "
        "of step 40."
    )
    assert said["quiet"].startswith(
        "No lasting onset by the 3-record rule in 5 traces up to step 40; Delta_align there is 0"
    )
    assert said["one record"] == "No onset can be detected in a single trace."
    run = load_training_run(made["destabilised"])
    page = Page(render_training_report(run))
    lead = page.text.index(said["destabilised"])
    for name, word in (("onset", "Onset"), ("destabilisation", "Destabilisation")):
        told = dict(evidence(run))[word]
        assert told[1:].startswith(f"{run.onset[name]['evidence'][1:]}. At that step: held-out margin")
        shown = told.replace("Delta_align", "\N{GREEK CAPITAL LETTER DELTA} align")
        assert page.text.index(f"{word}. {shown}") > lead
    assert sum(row.get("class") == "terminal" for row in page.find("tr")) == 2
    assert "a warning of the trace" in training_caveats(run)[-1]
    assert "optimizer.learning_rate" in page.text


def test_figures_show_what_they_name(made: Mapping[str, Path]) -> None:
    run = load_training_run(made["destabilised"])
    figure = course_figure(run)
    marks, alpha, transport, align, margin, accuracy, kl, *_ = figure.axes
    del accuracy
    for axes, column in ((alpha, "delta_contraction"), (transport, "delta_transport")):
        shown = np.ma.filled(axes.collections[0].get_array(), np.nan)
        np.testing.assert_array_equal(shown.T, np.stack([c.columns[column] for c in run.comparisons]))
        low, high = axes.collections[0].get_clim()
        assert -low == high == np.nanmax(np.abs(shown))
    np.testing.assert_array_equal(align.lines[1].get_ydata(), run.recorded("delta_align"))
    band = np.asarray(align.collections[0].get_paths()[0].vertices)[:, 1]
    assert band.max() == pytest.approx((run.recorded("delta_align") + 2 * run.recorded("delta_align_se")).max())
    np.testing.assert_array_equal(margin.lines[0].get_ydata(), run.series("rewards/margins")[1])
    np.testing.assert_array_equal(margin.lines[1].get_xdata(), [0, 20, 40, 60])
    np.testing.assert_array_equal(kl.lines[0].get_ydata(), run.recorded("kl"))
    assert [text.get_text() for text in marks.texts] == ["▾ onset, step 10", "destabilisation, step 50 ▾"]
    for axes in (alpha, transport, align, margin, kl):
        assert {line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1} == {10, 50}
        assert axes.get_xlim() == marks.get_xlim() == (-5, 75)
    over = over_training_figure(run)
    for axes, column in zip(over.axes, ("contraction", "transport"), strict=False):
        assert len(axes.lines) == len(run.traces)
        np.testing.assert_array_equal(axes.lines[-1].get_ydata(), run.traces[0].columns[column])
    gradients = gradients_figure(run)
    assert gradients is not None
    norms = run.block_norms()[1]
    share = norms[:, 4:].sum(axis=1) / norms.sum(axis=1)
    np.testing.assert_allclose(gradients.axes[1].lines[0].get_ydata(), share)
    assert gradients.axes[1].lines[1].get_ydata()[0] == pytest.approx(2 / 6)


def test_the_maps_tell_their_sign_without_colours(made: Mapping[str, Path]) -> None:
    """Both ends are dark, so that size shows in grey; what is less than at step 0 is hatched, and nothing else is."""
    grey = DIVERGING(np.linspace(0, 1, 47))[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(grey[:24]) > 0).all()
    assert (np.diff(grey[23:]) < 0).all()
    _, alpha, transport, *_ = course_figure(load_training_run(made["sound"])).axes
    assert not [part for part in alpha.collections if part.get_hatch() and np.nanmin(alpha.dataLim.y0) > 6]
    assert [part for part in transport.collections if part.get_hatch()]


def test_hover_strips_lie_over_their_records(made: Mapping[str, Path]) -> None:
    run = load_training_run(made["sound"])
    assert spans_of(run)[:2] == [(-5, 5), (5, 15)]
    figure = course_figure(run)
    strips = record_bands(figure, run)
    axes = figure.axes[1]
    for step, x, _, width, _ in strips:
        point = figure.transFigure.inverted().transform(axes.transData.transform((step, 0)))[0] * 72 * 4.6
        assert x + width / 2 == pytest.approx(point, abs=1e-6)


def test_files_are_byte_stable_and_the_page_is_self_contained(tmp_path: Path, made: Mapping[str, Path]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        shutil.copytree(made["sound"], folder)
    assert draw_report(one) == one / "report.html"
    with mpl.rc_context({"font.size": 20, "svg.hashsalt": "x", "hatch.linewidth": 4}):
        write_training_report(other)
    drawn = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    names = ("course", "gradients", "loss", "over_training")
    assert {f"figures/{name}{kind}" for name in names for kind in (".png", ".svg")} | {"report.html"} <= set(drawn)
    for name in drawn:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    html = (one / "report.html").read_text()
    assert_self_contained(html)


def test_whatever_a_run_says_is_only_ever_text(tmp_path: Path, made: Mapping[str, Path]) -> None:
    text = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}</style>"
    shutil.copytree(made["sound"], tmp_path / "run")
    for name, find in (("settings.json", "a/base"), ("settings.json", "pairs.jsonl"), ("onset.json", "Delta_align")):
        file = tmp_path / "run" / name
        file.write_text(file.read_text().replace(find, json.dumps(text)[1:-1]))
    page = Page(render_training_report(load_training_run(tmp_path / "run")))
    assert page.text.count(text) >= 3
    assert not page.find("img")


def test_what_cannot_be_drawn_is_said_in_one_sentence(tmp_path: Path, made: Mapping[str, Path]) -> None:
    with pytest.raises(UserError, match=r"no training run at .*onset\.json and traces"):
        write_training_report(tmp_path)
    shutil.copytree(made["sound"], tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(log.read_text().replace('{"step": 3,', '{"step": 3 3,'))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 4 is not valid JSON"):
        draw_report(tmp_path / "run")
    (tmp_path / "run" / "settings.json").unlink()
    log.unlink()
    with pytest.raises(UserError, match=r"settings\.json cannot be read"):
        draw_report(tmp_path / "run")


def test_a_run_without_losses_has_no_such_figure(made: Mapping[str, Path]) -> None:
    run = load_training_run(made["one record"])
    assert loss_figure(run) is None
    assert gradients_figure(run) is None


def test_the_picture_for_tensorboard_is_small_and_the_same_each_time(ends: tuple[DepthTrace, DepthTrace]) -> None:
    png = trace_figure(*ends)
    assert png == trace_figure(*ends) != trace_figure(ends[1], ends[1])
    assert len(png) < 60_000
    assert imread(io.BytesIO(png)).shape[:2] == (256, 368)


def test_tensorboard_reads_the_settings_of_a_sweep(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[attr-defined]

    events = Events(tmp_path)
    values = {"optimizer.learning_rate": 1e-3, "lora.rank": 8, "objective.loss": "ipo", "chat": True}
    events.hparams(values)
    events.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    tags = "_hparams_/session_start_info", "_hparams_/session_end_info"
    assert set(found.Tags()["tensors"]) == set(tags)
    data = [HParamsPluginData() for _ in tags]
    for tag, into in zip(tags, data, strict=True):
        metadata = found.SummaryMetadata(tag).plugin_data
        assert metadata.plugin_name == "hparams"
        into.ParseFromString(metadata.content)
    read = {name: getattr(v, v.WhichOneof("kind")) for name, v in data[0].session_start_info.hparams.items()}
    assert read == values
    assert data[1].session_end_info.end_time_secs >= data[0].session_start_info.start_time_secs > 0
