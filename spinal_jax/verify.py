"""Verifies that a checkpoint gives the same results here as with Hugging Face's PyTorch model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from spinal_jax import data
from spinal_jax.audit.measure import LENS_TOLERANCE
from spinal_jax.audit.pipeline import read_prompt_set
from spinal_jax.config import PromptsConfig, VerifyConfig
from spinal_jax.errors import UserError
from spinal_jax.metrics.transport import lens_stats
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.decoder import Decoder, collect
from spinal_jax.models.families import read_checkpoint
from spinal_jax.models.formats.adapter import AdapterFolder
from spinal_jax.models.formats.base import Checkpoint, sha256_of
from spinal_jax.models.formats.expert_tensors import ExpertsApart
from spinal_jax.models.formats.folders import read_record
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.formats.quantised import Dequantised
from spinal_jax.models.formats.safetensors import SafetensorsFolder
from spinal_jax.models.translate import load_decoder, parameter_shapes
from spinal_jax.progress import Bar, no_bar
from spinal_jax.torch_reference import Stream, Unreadable, torch_streams

# Random tiny models differ by 1e-6; mixtures with large router weights by more.
TOLERANCE, TOLERANCE_WITH_EXPERTS = 1e-4, 2e-4


class Check(NamedTuple):
    """One check. `passed` is None if it could not run."""

    what: str
    passed: bool | None
    found: str


class ForwardDifference(NamedTuple):
    """Difference of two models on the same prompts."""

    residual: np.ndarray  # [D + 1] largest difference of a boundary, over its largest value
    logits: float  # the same of the logits
    kl: np.ndarray  # [positions] nats, from theirs to ours


@dataclass(frozen=True)
class Verification:
    """The checks of a checkpoint; as text, a report that ends with PASS or FAIL."""

    title: str
    checks: tuple[Check, ...]
    difference: ForwardDifference | None = None  # from Hugging Face's model, where that could be run

    @property
    def passed(self) -> bool:
        """Whether no check has failed."""
        return all(check.passed is not False for check in self.checks)

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAIL", None: "?"}
        lines = [self.title]
        lines += [f"  {marks[check.passed]:<4}  {check.what}: {check.found}" for check in self.checks]
        if self.difference is not None:
            lines += ["", "  boundary  relative error"]
            lines += [f"  {i:>8}  {error:.1e}" for i, error in enumerate(self.difference.residual)]
            lines += [f"  {'logits':>8}  {self.difference.logits:.1e}"]
        wrong = [check.what for check in self.checks if check.passed is False]
        unknown = [check.what for check in self.checks if check.passed is None]
        verdict = f"FAIL: {', '.join(wrong)}" if wrong else "PASS"
        return "\n".join([*lines, "", verdict + (f"; not checked: {', '.join(unknown)}" if unknown else "")])


def verify(config: VerifyConfig, bar: Bar | None = None) -> Verification:
    """Checks names, shapes and hash of a checkpoint, runs it, and compares it with Hugging Face's model.

    Both run in float32 on the same prompts. The comparison needs PyTorch; without it, it is reported as not done.
    Hugging Face reads the source itself where it can: it dequantises FP8, MXFP4 and GGUF, and PEFT merges adapters.
    What it cannot read, and converted folders, are exported to a scratch folder first, and the report says so.

    Raises:
        UserError: the source or the prompts cannot be read.
    """
    bar = bar or no_bar
    checkpoint = open_checkpoint(config.model.source, config.model.revision, config.model.base)
    try:
        family, decoder = read_checkpoint(checkpoint, config.model.ignore_keys)
        title = f"{config.model.source}: {decoder.family}, {decoder.depth} blocks of {decoder.width}, float32"
        tokens = _tokens(config.prompts, checkpoint, decoder)
        checks = [_hash(checkpoint, bar)]
        total = sum(info.dtype.itemsize * int(np.prod(info.shape)) for info in checkpoint.names().values())
        try:
            with bar("load weights", total, "B") as advance:
                model = load_decoder(checkpoint, family, decoder, jnp.dtype(jnp.float32), advance)
        except UserError as error:
            return Verification(title, (*checks, Check("names and shapes", False, str(error))))
        parameters = sum(int(np.prod(shape.shape)) for shape in parameter_shapes(decoder).values())
        found = f"{len(checkpoint.names())} tensors fill {parameters:,} parameters, none is missing or left over"
        checks.append(Check("names and shapes", True, found))
        ours, gap = run(model, tokens)
        del model
        found = f"probabilities differ by {gap:.1e} at most, {LENS_TOLERANCE:.0e} are allowed"
        checks.append(Check("the lens at the last boundary is the output", gap <= LENS_TOLERANCE, found))
        if find_spec("torch") is None:
            missing = "residual stream and output were not compared, because torch is not installed (pip install torch)"
            return Verification(title, (*checks, Check("Hugging Face's model", None, missing)))
        notes: list[str] = []
        try:
            with bar("PyTorch", len(tokens), "prompt") as advance:
                theirs = list(torch_streams(checkpoint, config.model.ignore_keys, tokens, advance, notes))
        except Unreadable as error:
            return Verification(title, (*checks, Check("Hugging Face's model", None, str(error))))
    finally:
        checkpoint.close()
    checks += [Check("Hugging Face's reading of the file", None, note) for note in notes]
    difference = forward_difference(ours, theirs)
    tolerance = config.tolerance or (TOLERANCE if decoder.experts is None else TOLERANCE_WITH_EXPERTS)
    return Verification(title, (*checks, *judge(difference, tolerance, config.kl_tolerance)), difference)


def forward_difference(ours: Sequence[Stream], theirs: Sequence[Stream]) -> ForwardDifference:
    """The difference of two models over all prompts; NaN counts as infinite."""

    def relative(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:  # over all but the first axis
        gap = np.max([np.abs(a - b).reshape(len(a), -1).max(axis=1) for a, b in pairs], axis=0)
        size = np.max([np.abs(b).reshape(len(b), -1).max(axis=1) for _, b in pairs], axis=0)
        return np.nan_to_num(gap / np.maximum(size, np.finfo(np.float32).tiny), nan=np.inf)

    residual = relative([(a.residual, b.residual) for a, b in zip(ours, theirs, strict=True)])
    (logits,) = relative([(a.logits[None], b.logits[None]) for a, b in zip(ours, theirs, strict=True)])
    kl = []
    for a, b in zip(ours, theirs, strict=True):
        p, q = (log_softmax(stream.logits.astype(np.float64), axis=-1) for stream in (b, a))
        kl.append(np.sum(np.exp(p) * (p - q), axis=-1))
    return ForwardDifference(residual, float(logits), np.nan_to_num(np.concatenate(kl), nan=np.inf))


def judge(difference: ForwardDifference, tolerance: float, kl_tolerance: float) -> tuple[Check, Check]:
    """Whether residuals and logits agree within `tolerance`, and output distributions within `kl_tolerance` nats."""
    worst = int(np.argmax(difference.residual))
    stream = max(float(difference.residual.max()), difference.logits)
    where = f"boundary {worst}" if difference.residual[worst] >= difference.logits else "the logits"
    kl = difference.kl
    return (
        Check(
            "residual stream and logits",
            stream <= tolerance,
            f"relative error {stream:.1e} at most, at {where}; {tolerance:.0e} is allowed",
        ),
        Check(
            "output distribution",
            float(kl.max()) <= kl_tolerance,
            f"KL {kl.mean():.1e} nats on average over {len(kl)} positions, {kl.max():.1e} at most; {kl_tolerance:.0e} "
            "is allowed",
        ),
    )


def run(model: Decoder, tokens: Sequence[np.ndarray]) -> tuple[list[Stream], float]:
    """Runs all prompts in one right-padded batch. Also returns the largest difference in probability between the lens
    at the last boundary and the output."""
    batch, width = len(tokens), max(map(len, tokens))
    rows = {name: np.zeros((batch, width), np.int32) for name in ("tokens", "positions", "segments", "lengths")}
    for i, ids in enumerate(tokens):
        part = slice(0, len(ids))
        rows["tokens"][i, part], rows["positions"][i, part] = ids, np.arange(len(ids))
        rows["segments"][i, part], rows["lengths"][i, part] = 1, len(ids)
    residual, logits, by_lens = (np.asarray(x, np.float32) for x in _forward(model, **rows))
    streams = [Stream(residual[:, i, : len(ids)], logits[i, : len(ids)]) for i, ids in enumerate(tokens)]
    real = rows["segments"] > 0
    gap = np.abs(np.exp(log_softmax(logits, axis=-1)) - by_lens)[real].max()
    return streams, float(np.nan_to_num(gap, nan=np.inf))


@jax.jit
def _forward(
    model: Decoder, tokens: jax.Array, positions: jax.Array, segments: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual stream [D + 1, B, T, d], logits [B, T, V], and the probabilities of the lens at boundary D."""
    last, residual = model.forward(
        tokens, positions=positions, segments=segments, lengths=lengths, tap=collect(lambda h: h)
    )
    with model.precision():
        normed = model.final_norm(residual[-1:]).reshape(1, -1, model.config.width)
        stats = lens_stats((model.head(),), (normed,), ())
    logits = model.lens(residual[-1])
    by_lens = jnp.exp(logits - stats.log_normaliser[0].reshape(*tokens.shape, 1))
    return residual, model.lens(last), by_lens


def _tokens(config: PromptsConfig, checkpoint: Checkpoint, decoder: DecoderConfig) -> list[np.ndarray]:
    """The prompts' token ids, shortest first."""
    prompts = read_prompt_set(config)
    limit = min(config.max_length, decoder.max_positions) if decoder.learned_positions else config.max_length
    tokenizer = checkpoint.tokenizer()
    ids = sorted(data.tokenise_prompts(prompts, tokenizer, limit, config.chat_template).ids, key=len)
    if (top := max(int(i.max()) for i in ids)) >= decoder.vocab_size:
        raise UserError(f"the tokenizer makes token {top}, but the model has {decoder.vocab_size}: they do not fit")
    return ids


def _hash(checkpoint: Checkpoint, bar: Bar) -> Check:
    """Compares the hash of the weights with a recorded one, if it exists."""
    with bar("hash", 1, "source") as advance:
        digest = checkpoint.sha256()
        advance(1)
    folder = getattr(checkpoint, "folder", None)
    if folder is not None and checkpoint.kind != "adapter" and (record := read_record(folder)) is not None:
        same = digest == record["sha256"]
        return Check("hash", same, f"sha256 {digest} is {'' if same else 'not '}what spinal.json recorded")
    folders = _weight_folders(checkpoint)
    wrong = [_wrong_blobs(each) for each in folders]
    if folders and not any(names is None for names in wrong):
        if bad := [name for names in wrong for name in names or ()]:
            return Check("hash", False, f"{bad[0]} is not the file that the hub sent")
        return Check("hash", True, f"sha256 {digest}; each file is the one that the hub sent")
    return Check("hash", None, f"sha256 {digest}, and nothing here says what it should be")


def _weight_folders(checkpoint: Checkpoint) -> list[Path]:
    """The folders whose safetensors are read as they were downloaded."""
    match checkpoint:
        case ExpertsApart():
            return _weight_folders(checkpoint.inner)
        case AdapterFolder():
            base = _weight_folders(checkpoint.base)
            return [checkpoint.path, *base] if base else []
        case SafetensorsFolder() | Dequantised():
            return [checkpoint.folder]
        case _:
            return []


def _wrong_blobs(folder: Path) -> list[str] | None:
    """Names of weight files that differ from their hash in the hub cache; None outside the cache."""
    blobs = {path.name: path.resolve() for path in sorted(folder.glob("*.safetensors")) if path.is_symlink()}
    if not blobs or not all(re.fullmatch(r"[0-9a-f]{64}", blob.name) for blob in blobs.values()):
        return None
    return [name for name, blob in blobs.items() if sha256_of([blob]) != blob.name]
