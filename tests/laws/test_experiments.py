"""The studies: their analysis finds what was planted, on runs that were made up."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.cli.help import conf_folder
from spinal_jax.comparison.compare import BothModels, compare_traces
from spinal_jax.comparison.record import save_comparison

from .planted import GROUPS, Truth, simulated
from .test_collect import finish
from .test_training_report import CONFIG, ends, write_run

__all__ = ["ends"]  # a fixture
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SIZES = {"a": 1e6, "b": 3e6, "c": 1e7, "d": 3e7}


def load(study: str) -> ModuleType:
    """The analysis script of a study."""
    spec = importlib.util.spec_from_file_location(f"{study}_analyse", EXPERIMENTS / study / "analyse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load("scaling")


def planted(exponent: float, bend: float = 0.0, noise: float = 0.3, trial: int = 0) -> list[dict[str, Any]]:
    """Runs of five seeds whose |Delta_align| is a power of the parameters; the largest is off by `bend`."""
    rng = np.random.default_rng(trial)
    rows = []
    for size, parameters in SIZES.items():
        for seed in range(5):
            value = 0.1 * (parameters / 1e6) ** exponent * np.exp(noise * rng.normal() + bend * (size == "d"))
            signed = value * (-1) ** seed
            rows.append({"arm": "dpo", "parameters": parameters, "seed": seed, "abs_delta_align": value})
            rows[-1] |= {"delta_align": signed, **dict.fromkeys(("gradient_density", "coherence", "kl"), np.nan)}
            rows[-1] |= {"policy_distance_centroid": np.nan}
    return rows


def law_of(scaling: ModuleType, rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {line["quantity"]: line for line in scaling.fits(rows)}
    assert found.keys() == {"abs_delta_align", "delta_align"}  # of what is not known there is no law
    return found["abs_delta_align"]


def test_intervals_hold_what_was_planted(scaling: ModuleType) -> None:
    """In 95 % of trials: the exponent, and the largest size where it keeps to the law of the others."""
    laws = [law_of(scaling, planted(0.3, trial=trial)) for trial in range(300)]
    held = np.mean([law["slope_low"] < 0.3 < law["slope_high"] for law in laws])
    predicted = np.mean([law["largest_predicted"] for law in laws])
    # Three standard errors of 300 trials are 4 %.
    assert held == pytest.approx(0.95, abs=0.04)
    assert predicted == pytest.approx(0.95, abs=0.04)


def test_a_largest_size_that_leaves_the_law_is_told(scaling: ModuleType) -> None:
    law = law_of(scaling, planted(0.3, bend=0.7, noise=0.1))
    assert not law["largest_predicted"]
    assert law["largest_off"] == pytest.approx(0.7, abs=0.25)


def test_two_seeds_make_no_interval(scaling: ModuleType) -> None:
    rows = [row for row in planted(0.3) if row["seed"] < 2]
    for law in scaling.fits(rows):
        assert np.isnan(law["slope_low"])
        assert law["largest_predicted"] == ""


def test_a_mean_that_is_not_zero_is_told_from_one_that_is(scaling: ModuleType) -> None:
    rng = np.random.default_rng(1)
    rows = [
        {"arm": arm, "parameters": size, "delta_align": shift + 0.01 * rng.normal()}
        | dict.fromkeys(("delta_contraction_excess", "delta_transport_excess", "policy_distance_excess"), np.nan)
        for arm, shift in (("dpo", 0.1), ("shuffled", 0.0))
        for size in (1, 2, 3)
        for _ in range(5)
    ]
    lines = scaling.against_zero(rows)
    assert all(line["p_holm"] < 0.05 for line in lines if line["arm"] == "dpo")
    assert all(line["p_holm"] > 0.05 for line in lines if line["arm"] == "shuffled")
    assert all(line["p"] <= line["p_holm"] <= 1 for line in lines)


def test_what_all_arms_show_is_no_difference_between_them(scaling: ModuleType) -> None:
    """Each seed has its own level, shared by the arms; DPO adds to one quantity alone."""
    rng = np.random.default_rng(2)
    rows = []
    for size, seed in itertools.product((1, 2), range(5)):
        level = 5 + rng.normal()
        for arm in ("dpo", "sft", "shuffled"):
            row = {name: level + 0.01 * rng.normal() for name in scaling.COMPARED}
            row["abs_delta_align"] += 0.1 * (arm == "dpo")
            rows.append({"arm": arm, "parameters": size, "seed": seed, **row})
    lines = scaling.against_zero(scaling.less_null(rows), scaling.COMPARED)
    assert {line["arm"] for line in lines} == {"dpo less sft", "dpo less shuffled"}
    together = scaling.pooled(scaling.less_null(rows), scaling.COMPARED)
    assert len(together) == 2 * len(scaling.COMPARED)
    for line in [*lines, *together]:
        assert (line["p_holm"] < 0.01) == (line["quantity"] == "abs_delta_align"), line
    for line in together:
        assert line["low"] < line["mean"] < line["high"]
        assert (line["low"] > 0 or line["high"] < 0) == (line["p"] < 0.05)
    halved = [row for row in rows if (row["parameters"], row["seed"]) != (2, 4)]  # a seed that lacks a size is left out
    assert {line["seeds"] for line in scaling.pooled(scaling.less_null(halved), scaling.COMPARED)} == {4}


def sweep_of(folder: Path, ends: tuple[DepthTrace, DepthTrace]) -> Path:
    """A sweep of two seeds and three sizes with every arm."""
    for seed in range(2):
        for size in ("a", "b", "c"):
            grown = tuple(replace(each, model={**each.model, "parameters": SIZES[size]}) for each in ends)
            for arm in ("base", "dpo", "sft", "shuffled"):
                run = folder / f"{arm}-{size}-{seed}"
                run.mkdir(parents=True)
                write_run(run, grown, [0, 0.2, 0.5, 0.8, 0.9, 1.0], "lm" if arm == "base" else "sound")  # type: ignore[arg-type]
                kind = {"base": "lm", "shuffled": "dpo"}.get(arm, arm)
                config: Mapping[str, Any] = CONFIG | {
                    "model": {"source": "m", "name": size},
                    "objective": {"kind": kind, "beta": 0.1},
                    "preferences": {"shuffle_labels": arm == "shuffled"},
                    "until_eval_loss": 0.4 if arm == "base" else None,
                    "seed": seed,
                }
                if arm == "base":
                    line = json.dumps({"step": 50, "eval_loss": 0.39 if (size, seed) != ("a", 1) else 0.5})
                    (run / "metrics.jsonl").write_text(line + "\n")
                finish(run, "train", config)
    return folder


def test_the_scaling_study_from_runs_to_tables_and_figures(
    scaling: ModuleType, ends: tuple[DepthTrace, DepthTrace], tmp_path: Path
) -> None:
    sweep = sweep_of(tmp_path / "sweep", ends)
    out = tmp_path / "out"
    scaling.analyse(sweep, out)
    with (out / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows if row["matched"] == "False"] == ["dpo-a-1", "sft-a-1", "shuffled-a-1"]
    assert len(rows) == 18
    with (out / "means.csv").open(newline="") as file:
        means = {(row["arm"], row["size"]): row for row in csv.DictReader(file)}
    assert [means["dpo", size]["seeds"] for size in "abc"] == ["1", "2", "2"]  # what is not matched is in no mean
    drawn = {"against_size", "delta_align", "against_kl", "against_accuracy", "onset", "where"}
    assert {path.stem for path in out.glob("*.png")} == drawn
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    scaling.analyse(sweep, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (sweep / "sft-b-0" / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="not complete, so nothing is analysed: sft-b-0"):
        scaling.analyse(sweep, tmp_path / "other")


@pytest.fixture(scope="module")
def dynamics() -> ModuleType:
    return load("dynamics")


def test_rewards_collapse_where_the_loss_stays_above_that_of_nothing_learnt(dynamics: ModuleType) -> None:
    steps = [0, 5, 10, 15, 20]
    assert dynamics.collapse(steps, [0.6932, 0.6, 0.5, 0.4, 0.4]) is None
    assert dynamics.collapse(steps, [0.6932, 0.6, 0.8, 0.9, 2.0]) == 10
    assert dynamics.collapse(steps, [0.6932, 0.8, 0.6, np.inf, np.nan]) == 15
    assert dynamics.collapse(steps, [0.6932, 0.8, 0.9, 0.9, 0.5]) is None  # it came back
    assert dynamics.collapse(steps, [0.6932, 0.8, 0.9, 0.9, 0.9]) == 5


def test_the_dynamics_study_from_runs_to_table_and_figure(
    dynamics: ModuleType, ends: tuple[DepthTrace, DepthTrace], tmp_path: Path
) -> None:
    """A sound run, and one whose rewards collapse ten steps after the onset of its footprint."""
    way = [0, 0.5, 0.8, 0.9, 1.0, 1.0, 1.0]
    for rate, losses in ((1e-5, [0.69, 0.6, 0.5, 0.5, 0.5, 0.4, 0.4]), (1e-3, [0.69, 0.6, 0.9, 2, 2, 2, 2])):
        run = tmp_path / "sweep" / f"rate-{rate}"
        run.mkdir(parents=True)
        write_run(run, ends, way, "sound")
        lines = [json.dumps({"step": 10 * at, "eval_loss": loss}) for at, loss in enumerate(losses)]
        (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
        config = CONFIG | {"optimizer": {"learning_rate": rate}}
        (run / "settings.json").write_text(json.dumps({"config": config, "weights": "ab12"}))
        finish(run, "train", config)
    dynamics.analyse(tmp_path / "sweep", tmp_path / "out")
    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        sound, hot = csv.DictReader(file)
    assert (sound["onset"], sound["collapse"], sound["onset_ahead"]) == ("10", "", "")
    assert (hot["onset"], hot["collapse"], hot["onset_ahead"]) == ("10", "20", "10")
    with (tmp_path / "out" / "records.csv").open(newline="") as file:
        assert [row["eval_loss"] for row in csv.DictReader(file) if row["step"] == "30"] == ["0.5", "2.0"]
    assert {path.name for path in (tmp_path / "out").glob("courses.*")} == {"courses.png"}
    (tmp_path / "sweep" / "rate-0.001" / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="nothing is analysed: rate-0"):
        dynamics.analyse(tmp_path / "sweep", tmp_path / "other")


@pytest.fixture(scope="module")
def families() -> ModuleType:
    return load("families")


def test_a_pair_is_a_checkpoint_and_what_it_was_trained_from(families: ModuleType) -> None:
    """And both the sweep and the analysis know every pair, and which of them are DPO and nothing else."""
    texts = {file.stem: file.read_text() for file in (conf_folder() / "pair").glob("*.yaml")}
    for name, text in texts.items():
        chosen = dict(re.findall(r"^  - override /(model|model@reference): (\S+)$", text, re.MULTILINE))
        assert (conf_folder() / "model" / f"{chosen['model@reference']}.yaml").exists(), name
        if "model" in chosen:
            before = chosen["model"]
            while before != chosen["model@reference"]:  # there may be steps between the two
                said = (conf_folder() / "model" / f"{before}.yaml").read_text()
                further = re.search(r"^# Trained further from ([\w.-]*[\w-])", said, re.MULTILINE)
                assert further, f"{name}: {before} does not say what it was trained from"
                before = further[1]
    assert {name for name, text in texts.items() if "lies DPO alone" in text} == families.DPO_ALONE
    study = OmegaConf.load(conf_folder() / "study" / "families.yaml")
    assert sorted(study.hydra.sweeper.params.pair.split(",")) == sorted(texts)


def compared(folder: Path, depth: int, rise: float, last: bool) -> None:
    """A comparison in which contraction rises by so much in the terminal block, and the policies part in the last block
    alone or in all alike."""
    late = np.where(np.arange(depth + 1) > 2 * depth / 3, rise, 0.0)
    traces = next(simulated(Truth(np.full(depth + 1, 1.0), late, np.zeros(depth + 1)), 1, depth))
    apart = np.array([0.0, *[0.0 if last else 0.2] * (depth - 1), 0.2])
    save_comparison(compare_traces(*traces, BothModels(apart, np.stack([apart] * GROUPS))), folder)
    finish(folder, "compare", {"model": {"source": "m"}})


def test_the_families_from_comparisons_to_table_and_figure(families: ModuleType, tmp_path: Path) -> None:
    sweep, out = tmp_path / "sweep", tmp_path / "out"
    planted = {"zephyr-7b": (6, 0.3, True), "olmo-2-1b": (9, 0.3, True), "gemma-2b": (5, -0.3, False)}
    for pair, (depth, rise, last) in planted.items():
        compared(sweep / pair, depth, rise, last)
    families.analyse(sweep, out)
    with (out / "families.csv").open(newline="") as file:
        rows = {row["pair"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["olmo-2-1b", "zephyr-7b", "gemma-2b"]  # DPO alone first
    for pair, (depth, rise, last) in planted.items():
        row = rows[pair]
        assert row["verdict"] == ("toward contraction" if rise > 0 else "toward expansion")
        assert float(row["delta_align_low"]) < float(row["delta_align"]) < float(row["delta_align_high"])
        even = math.ceil(depth / 3) / depth
        assert float(row["share_even"]) == pytest.approx(even)
        assert float(row["policy_distance_share"]) == pytest.approx(1.0 if last else even)
        assert float(row["p_value"]) <= float(row["p_holm"]) <= 3 * float(row["p_value"])
    with (out / "signs.csv").open(newline="") as file:
        signs = {row["among"]: row for row in csv.DictReader(file)}
    assert [signs["DPO alone"][name] for name in ("pairs", "above_0", "toward contraction", "toward expansion")] == [
        "2",
        "2",
        "2",
        "0",
    ]
    assert [signs["all"][name] for name in ("pairs", "above_0", "policy_beyond_even")] == ["3", "2", "2"]
    assert [float(signs[among]["p_value"]) for among in ("DPO alone", "all")] == [0.5, 1.0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.keys() == {"families.csv", "families.png", "signs.csv"}
    families.analyse(sweep, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (sweep / "gemma-2b" / "manifest.json").unlink()
    (sweep / "gemma-2b" / ".writing-1").mkdir()
    with pytest.raises(SystemExit, match="not complete, so nothing is analysed: gemma-2b"):
        families.analyse(sweep, out)
