"""Pairs of traces: whether they are comparable, and their columns with jackknife replicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from spinal_jax.audit.trace import DepthTrace
from spinal_jax.errors import UserError
from spinal_jax.metrics.columns import column
from spinal_jax.stats.jackknife import Replicates

Align = Literal["equal", "relative"]


def replicates(trace: DepthTrace, name: str) -> Replicates:
    """A column of a trace with its replicates. Raises UserError for a trace without arrays."""
    sizes = _array(trace, f"groups/{column(name).counted_by}")
    without = _array(trace, f"groups/{name}")
    if len(without) != len(sizes):  # a single group has no replicates
        without = np.full((len(sizes), trace.boundaries), np.nan)
    return Replicates(trace.columns[name], without.astype(np.float64), sizes.astype(np.float64))


def _array(trace: DepthTrace, name: str) -> np.ndarray:
    if name not in trace.arrays:
        raise UserError(
            f"the trace of {trace.model['name']} has no array {name!r}, so nothing can be said of its error; it needs "
            f"the spectra.safetensors of its audit beside trace.json"
        )
    return trace.arrays[name]


def resampled(original: Replicates, depth: int, name: str) -> Replicates:
    """A column interpolated at the relative depths l / D of a model with `depth` blocks.

    States (contraction, entropy, effective rank) are interpolated linearly. For transport, the cumulative path length
    is interpolated and differenced, so that the total is kept and models of different depth are comparable. Curvature
    depends on the spacing of the boundaries, so it is NaN.
    """
    if len(original.full) == depth + 1:
        return original
    if column(name).kind == "turn":
        nothing = np.full(depth + 1, np.nan)
        return Replicates(nothing, np.full((len(original.sizes), depth + 1), np.nan), original.sizes)
    at = np.arange(depth + 1) * ((len(original.full) - 1) / depth)
    low = np.minimum(np.floor(at + 1e-9).astype(int), len(original.full) - 2)
    part = np.clip(at - low, 0.0, 1.0)

    def interpolate(values: np.ndarray) -> np.ndarray:  # [..., D' + 1] -> [..., D + 1]
        if column(name).kind == "step":
            values = np.concatenate([np.zeros_like(values[..., :1]), np.cumsum(values[..., 1:], axis=-1)], axis=-1)
        between = (1 - part) * values[..., low] + part * values[..., low + 1]
        # An undefined neighbour that has no weight must not spoil a boundary that both models have.
        between = np.where(part == 0, values[..., low], np.where(part == 1, values[..., low + 1], between))
        if column(name).kind == "step":
            return np.concatenate([np.full_like(between[..., :1], np.nan), np.diff(between, axis=-1)], axis=-1)
        return between

    return Replicates(interpolate(original.full), interpolate(original.without), original.sizes)


def paired_difference(aligned: Replicates, reference: Replicates) -> Replicates:
    """Aligned minus reference, with paired replicates. Swapping them only flips the sign."""
    share = (aligned.sizes / aligned.sizes.sum() + reference.sizes / reference.sizes.sum()) / 2
    return Replicates(aligned.full - reference.full, aligned.without - reference.without, share)


def check(aligned: DepthTrace, reference: DepthTrace, align: Align, same_prompts: bool) -> list[str]:
    """Warnings about a pair of traces, one sentence each.

    Raises:
        UserError: the settings or the inputs of the two traces differ.
    """

    def same(what: str, of: Callable[[DepthTrace], object], remedy: str) -> None:
        a, b = of(aligned), of(reference)
        if a != b:
            raise UserError(
                f"{what} is {_shown(a)} in {aligned.model['name']} and {_shown(b)} in {reference.model['name']}; "
                f"{remedy}"
            )

    for name in ("window", "skip", "center", "positions", "top_k", "temperature", "groups", "terminal"):
        same(f"the setting {name}", lambda trace, name=name: _plain(trace.settings[name]), "audit both alike")
    for name in ("max_length", "chat_template"):
        same(f"prompts.{name}", lambda trace, name=name: trace.prompts[name], "audit both alike")
    hashed = all("tokens_sha256" in trace.prompts for trace in (aligned, reference))
    remedy = (
        "distributions over different vocabularies cannot be compared; spinal compare model.source=ALIGNED "
        "reference.source=BASE measures both over the tokens that they share"
    )
    for name in ("tokens", "sha256"):
        same(f"the vocabulary's {name}", lambda trace, name=name: trace.model[f"vocabulary_{name}"], remedy)
    if same_prompts:
        remedy = "audit both on the same prompts (same_prompts=false compares different ones, as a control)"
        for name in ("sha256", "count"):
            same(f"the prompts' {name}", lambda trace, name=name: trace.prompts[name], remedy)
        remedy = "on equal prompts that means different tokenizers, and only checkpoints that share one can be compared"
        for name in ("tokens", "rows", "positions"):
            same(f"the number of {name}", lambda trace, name=name: trace.prompts[name], remedy)
        if hashed:
            same("the tokens' sha256", lambda trace: trace.prompts["tokens_sha256"], remedy)
        for name in ("rows", "positions"):
            same(f"the number of {name} by group", lambda t, name=name: _plain(_array(t, f"groups/{name}")), remedy)
    remedy = "give both more prompts, or fewer metrics.groups"
    same("the number of groups with prompts", lambda trace: len(_array(trace, "groups/rows")), remedy)
    if align == "equal":
        remedy = "align=relative compares models of different depth by relative position"
        same("the number of blocks", lambda trace: trace.depth, remedy)
    return _warnings(aligned, reference)


def _warnings(aligned: DepthTrace, reference: DepthTrace) -> list[str]:
    a, b = aligned.model, reference.model
    lines = []
    if a["sha256"] == b["sha256"] and aligned.prompts["sha256"] == reference.prompts["sha256"]:
        lines.append(f"Both are the same weights ({_shown(a['sha256'])}) on the same prompts.")
    if a["dtype"] != b["dtype"]:
        lines.append(f"{a['name']} was measured in {a['dtype']} and {b['name']} in {b['dtype']}.")
    if aligned.depth != reference.depth:
        lines.append(
            f"{b['name']} has {reference.depth} blocks and {a['name']} {aligned.depth}: it is interpolated by relative "
            f"depth."
        )
    if a["width"] != b["width"]:
        lines.append(
            f"The widths are {a['width']} and {b['width']}: how high contraction reads depends on rows by width."
        )
    if aligned.prompts["rows"] != reference.prompts["rows"]:
        lines.append(
            f"Contraction is from {aligned.prompts['rows']} and from {reference.prompts['rows']} rows, and reads "
            f"higher the fewer there are."
        )
    common = [line for line in aligned.warnings if line in reference.warnings]
    lines += [f"Both: {line}" for line in common]
    for trace in (aligned, reference):
        lines += [f"{trace.model['name']}: {line}" for line in trace.warnings if line not in common]
    return lines


def _plain(value: object) -> object:
    return np.asarray(value).tolist() if isinstance(value, (list, tuple, np.ndarray)) else value


def _shown(value: object) -> str:
    """A value as text; hashes and long lists are shortened."""
    if isinstance(value, str) and len(value) > 16 and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}..."
    if isinstance(value, list) and len(value) > 16:
        return f"[{', '.join(map(str, value[:16]))}, ...]"
    return "null" if value is None else repr(value)
