"""Robustness: Delta_align under other windows, positions and centring, from the arrays of saved traces."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.comparison.paired import replicates, resampled
from spinal_jax.jsontypes import Json
from spinal_jax.metrics.tail import tail_slopes
from spinal_jax.stats.jackknife import Estimate, Replicates

WINDOWS = ((0.05, 0.50), (0.10, 0.40), (0.10, 0.50), (0.10, 0.70), (0.20, 0.60))


def robustness_grid(aligned: DepthTrace, reference: DepthTrace) -> list[Json]:
    """Delta_align for each window of the fit x each way in which contraction was measured x each of transport.

    A trace measures in more than one way when it holds `variants/NAME/singular_values` [D+1, d] (with
    `variants/NAME/rows` and `variants/NAME/groups/rows` [G] where other rows count), or `variants/NAME/transport`
    [D+1] (with `variants/NAME/groups/positions` [G] where there are other positions). Replicates beside them,
    `variants/NAME/groups/singular_values` [G, D+1, d] and `variants/NAME/groups/transport` [G, D+1], give intervals.
    What only one of the traces holds is left out.

    Returns:
        Records with window, contraction (NAME, or "as measured"), transport (likewise), delta_align, low, high (95 %
        interval), p_value, delta_contraction and delta_transport; the setting of the traces themselves is first.
    """
    first, last = aligned.terminal

    def change(a: Replicates, b: Replicates, name: str) -> Estimate:
        return (a.estimate - resampled(b, aligned.depth, name).estimate).mean(first, last)

    gained = []
    for (how, window, a), (_, _, b) in zip(
        _contractions(aligned, reference), _contractions(reference, aligned), strict=True
    ):
        gained.append((how, window, change(a, b, "contraction")))
    moved = []
    for (how, a), (_, b) in zip(_transports(aligned, reference), _transports(reference, aligned), strict=True):
        moved.append((how, change(a, b, "transport")))
    return [
        _record(window, how_contraction, how_transport, contraction, transport)
        for how_transport, transport in moved
        for how_contraction, window, contraction in gained
    ]


def sign_counts(settings: list[Json]) -> Json:
    """How far the sign of the first setting holds over the grid.

    Returns:
        of, holds: how many settings there are, and in how many the sign is that of the first. bounded: how many have an
        interval; sure: in how many it excludes 0 with that sign, opposite: with the other sign, just as firmly.
        sentence: the same in words. settings: as given.
    """
    headline, of = settings[0]["delta_align"], len(settings)
    sign = 0.0 if np.isnan(headline) else float(np.sign(headline))
    bounded = [found for found in settings if not np.isnan(found["low"])]
    holds = sure = opposite = 0
    if sign == 0:
        sentence = "Delta_align has no sign whose robustness could be told."
    else:
        holds = sum(bool(sign * found["delta_align"] > 0) for found in settings)
        sure = sum(bool(min(sign * found["low"], sign * found["high"]) > 0) for found in bounded)
        opposite = sum(bool(max(sign * found["low"], sign * found["high"]) < 0) for found in bounded)
        sentence = (
            f"The sign holds in {holds} of {of} settings of the measurement; of the {len(bounded)} with an interval, "
            f"{sure} exclude 0 with this sign and {opposite} with the opposite sign."
        )
    return {
        "sentence": sentence,
        "holds": holds,
        "of": of,
        "sure": sure,
        "opposite": opposite,
        "bounded": len(bounded),
        "settings": settings,
    }


def _record(window: tuple[float, float], contraction: str, transport: str, gained: Estimate, moved: Estimate) -> Json:
    total = gained - moved
    value, half = float(total.value), float(total.half)
    return {
        "window": list(window),
        "contraction": contraction,
        "transport": transport,
        "delta_align": value,
        "low": value - half,
        "high": value + half,
        "p_value": float(total.p_value),
        "delta_contraction": float(gained.value),
        "delta_transport": float(moved.value),
    }


MEASURED = "as measured"


def _contractions(trace: DepthTrace, other: DepthTrace) -> Iterator[tuple[str, tuple[float, float], Replicates]]:
    """(name, window, alpha) of `trace` for every setting that both traces have."""
    low, high = trace.settings["window"]
    own = (float(low), float(high))
    yield MEASURED, own, replicates(trace, "contraction")
    for name in ("", *_variants("singular_values", trace, other)):
        prefix = f"variants/{name}/" if name else ""
        if not all(f"{prefix}singular_values" in t.arrays for t in (trace, other)):
            continue  # a trace without spectra
        sizes = trace.arrays.get(f"{prefix}groups/rows", trace.arrays["groups/rows"]).astype(np.float64)
        total = np.asarray(trace.arrays.get(f"{prefix}rows", trace.prompts["rows"]))
        rest = [window for window in WINDOWS if window != own]
        windows = [own, *rest] if name else rest
        count, resolution = int(total.item()), trace.settings["resolution"]
        alphas = tail_slopes(trace.arrays[f"{prefix}singular_values"], count, windows, resolution)
        without = _replicates(f"{prefix}groups/singular_values", sizes, trace, other)
        if without is None:
            sizes, refitted = np.ones_like(sizes), np.full((len(windows), len(sizes), trace.boundaries), np.nan)
        else:
            refitted = tail_slopes(without, count, windows, resolution)
            alphas[np.isnan(refitted).any(axis=1)] = np.nan
        for window, alpha, each in zip(windows, alphas, refitted, strict=True):
            yield name or MEASURED, window, Replicates(alpha, each, sizes)


def _transports(trace: DepthTrace, other: DepthTrace) -> Iterator[tuple[str, Replicates]]:
    """(name, L) of `trace` for every setting that both traces have."""
    yield MEASURED, replicates(trace, "transport")
    for name in _variants("transport", trace, other):
        prefix = f"variants/{name}/"
        sizes = trace.arrays.get(f"{prefix}groups/positions", trace.arrays["groups/positions"]).astype(np.float64)
        without = _replicates(f"{prefix}groups/transport", sizes, trace, other)
        if without is None:
            sizes, without = np.ones_like(sizes), np.full((len(sizes), trace.boundaries), np.nan)
        full = trace.arrays[f"{prefix}transport"].astype(np.float64)
        yield name, Replicates(full, without.astype(np.float64), sizes)


def _variants(of: str, trace: DepthTrace, other: DepthTrace) -> list[str]:
    """Names of the variants with `of` in both traces, sorted."""
    names = {key.split("/")[1] for key in trace.arrays if key.startswith("variants/")}
    return sorted(name for name in names if all(f"variants/{name}/{of}" in t.arrays for t in (trace, other)))


def _replicates(key: str, sizes: np.ndarray, trace: DepthTrace, other: DepthTrace) -> np.ndarray | None:
    """The replicates [G, ...] of a variant. None if a trace lacks them, or a group has no rows under this setting."""
    held = all(len(t.arrays.get(key, ())) == len(sizes) for t in (trace, other))
    return trace.arrays[key] if held and np.all(sizes > 0) else None
