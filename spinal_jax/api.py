"""What a notebook calls. Each function builds a settings record and calls what the commands call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spinal_jax.audit.pipeline import bars, load, opened, run_audit
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.config import AuditConfig, ModelConfig, build
from spinal_jax.models.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def audit(
    model: str | os.PathLike[str],
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    format: str = "jsonl",
    limit: int | None = None,
    max_length: int = 256,
    chat_template: bool = False,
    window: tuple[float, float] = (0.10, 0.50),
    skip: int = 1,
    center: bool = False,
    positions: str = "last:4",
    temperature: float = 1.0,
    top_k: int | None = None,
    groups: int = 16,
    progress: bool = True,
) -> DepthTrace:
    """The depth trace of one checkpoint.

    Args:
        model: hub id, folder with config.json and safetensors, or .gguf file.
        prompts: a file, a list of texts, or None for the pool that ships with the package.
        format, limit, max_length, chat_template: as the `prompts.` settings of `spinal audit`.
        window, skip, center: as its `metrics.contraction.` settings.
        positions, temperature, top_k: as its `metrics.transport.` settings.
        groups: of prompts, for the jackknife.
        progress: show progress bars.

    Returns:
        A `DepthTrace`; its columns are arrays over the D + 1 boundaries. `save_trace(trace, folder)` keeps it.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
    """
    named = isinstance(prompts, (str, os.PathLike))
    settings = {
        "model": {"source": os.fspath(model), "revision": revision, "dtype": dtype},
        "prompts": {
            "path": os.fspath(prompts) if named else None,
            "format": format,
            "limit": limit,
            "max_length": max_length,
            "chat_template": chat_template,
        },
        "metrics": {
            "contraction": {"window": window, "skip": skip, "center": center},
            "transport": {"positions": positions, "temperature": temperature, "top_k": top_k},
            "groups": groups,
        },
    }
    texts = None if named or prompts is None else list(prompts)
    return run_audit(build(AuditConfig, settings), texts, bars(progress))


def load_model(
    source: str | os.PathLike[str], *, revision: str | None = None, dtype: str = "float32"
) -> tuple[Decoder, PreTrainedTokenizerBase]:
    """The checkpoint as a `Decoder`, whose `forward` takes taps, and its tokenizer. Arguments and errors as `audit`."""
    asked = build(ModelConfig, {"source": os.fspath(source), "revision": revision, "dtype": dtype}, "model")
    with opened(asked) as (checkpoint, family, decoder):
        return load(checkpoint, family, decoder, asked.dtype), checkpoint.tokenizer()
