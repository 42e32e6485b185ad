"""Fuzzed files of finished runs: pages are drawn again, tables and comparisons are made of them."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from spinal_jax.audit.trace import load_trace, save_trace
from spinal_jax.comparison.attribution import attributed, save_attribution
from spinal_jax.comparison.attribution_runs import read_attributed_run
from spinal_jax.comparison.compare import compare_traces
from spinal_jax.comparison.record import save_comparison
from spinal_jax.errors import UserError
from spinal_jax.files import malformed
from spinal_jax.report import draw_report
from spinal_jax.report.collect import collect_runs

from ..laws.planted import Truth, simulated
from ..laws.test_attribution import arms
from ..laws.test_training_report import CONFIG, write_run
from .mutations import changed_bytes

FILES = {
    "audit": ("trace.json", "manifest.json"),
    "compare": ("comparison.json", "manifest.json", "aligned/trace.json"),
    "train": (
        *("onset.json", "settings.json", "metrics.jsonl", "manifest.json"),
        *("traces/step_000010/trace.json", "traces/step_000010/comparison.json"),
    ),
    "attribute": ("attribution.json", "manifest.json"),
}
VALUES: tuple[Any, ...] = (
    *(None, "x", "", -1, 0, 1e999, float("nan"), [], {}, True, 10**30, 10**400, [[1]], [None] * 3, 1e308, -1e308),
    *("\ud800", "<b>$\\frac{$", 0.5, 2**31, 1e-320, "spinal-trace/1", "spinal-comparison/1", "spinal-onset/1"),
    *([1, 10**9], [0, 0], [3, 1], [1.5, 2.5], ["1", "6"]),
)
SHOWN = re.compile(r"(?<![\w.])(nan|NaN|inf|Infinity)(?![\w.])")  # a number that is none, in a page


def sound_runs(folder: Path) -> Path:
    """A run of each command, named after it."""
    depth = 6
    rise = np.linspace(0, 0.3, depth + 1)
    after, before = next(simulated(Truth(np.full(depth + 1, 1.0), rise, -rise / 2), 1, 0))
    save_trace(after, folder / "audit")
    comparison = compare_traces(after, before)
    save_comparison(comparison, folder / "compare")
    save_trace(after, folder / "compare" / "aligned")
    save_trace(before, folder / "compare" / "reference")
    (folder / "train").mkdir()
    write_run(folder / "train", (after, before), [0, 0.4, 1.0], "sound")
    save_attribution(attributed(arms(np.random.default_rng(0), 6.0), settings={"base": None}), folder / "attribute")
    for command in FILES:
        manifest = {"schema": "spinal-manifest/1", "command": command, "config": CONFIG, "files": []}
        (folder / command / "manifest.json").write_text(json.dumps(manifest))
    return folder


def saved(sound: Path, folder: Path, rng: random.Random) -> None:
    """One place of one file is changed; whatever then reads it does so, or refuses it in a sentence."""
    command = rng.choice(list(FILES))
    run = folder / "runs" / command
    shutil.copytree(sound / command, run)
    arrays = [path for path in run.rglob("*.safetensors") if path.parent == run]
    if arrays and rng.random() < 0.2:
        _other_arrays(arrays[0], rng)
    else:
        _other_value(run / rng.choice(FILES[command]), rng)

    def draw() -> None:
        page = re.sub(r"<script.*?</script>", "", draw_report(run).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not SHOWN.search(re.sub("<[^>]*>", " ", page))

    for read in (
        draw,
        lambda: collect_runs([folder / "runs"], folder / "table"),
        lambda: compare_traces(load_trace(run), load_trace(sound / "audit")),
        lambda: read_attributed_run(str(run), "aligned", None, None),
    ):
        with contextlib.suppress(UserError), malformed(run):
            read()


def _other_value(file: Path, rng: random.Random) -> None:
    lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else []
    at = rng.randrange(len(lines)) if lines else 0
    document = json.loads(lines[at] if lines else file.read_text(encoding="utf-8"))
    holder, key = rng.choice(list(_places(document)))
    if rng.random() < 0.1:
        del holder[key]
    else:
        holder[key] = rng.choice(VALUES)
    lines[at : at + 1] = [json.dumps(document)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _places(document: Any) -> Any:
    """(holder, key) of the values in a document; of a list, of the first two and the last."""
    every = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in every if isinstance(document, dict) else sorted({*every[:2], *every[-1:]}):
        yield document, key
        yield from _places(document[key])


def _other_arrays(file: Path, rng: random.Random) -> None:
    arrays = load_file(file)
    name = rng.choice(sorted(arrays))
    whole = arrays[name]
    action = rng.randrange(6)
    if action == 0:
        arrays[name] = np.ascontiguousarray(whole[..., :-1])
    elif action == 1:
        arrays[name] = np.full_like(whole, rng.choice((np.nan, np.inf, 0.0, -1.0)))
    elif action == 2:
        arrays[name] = whole.astype(rng.choice((np.int32, np.float16, np.bool_)))
    elif action == 3:
        del arrays[name]
    save_file(arrays, file)
    if action > 3:
        file.write_bytes(changed_bytes(rng, file.read_bytes()))
