"""What a notebook calls. Each function builds a settings record and calls what the commands call."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinal_jax.audit.pipeline import load, opened, run_audit
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.config import AuditConfig, ModelConfig, build, merged
from spinal_jax.config.training import TrainConfig
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.progress import bars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spinal_jax.train.run import Trained
# Settings of the command that say what becomes of a run folder.
OF_THE_COMMAND = ("overwrite", "checkpoint_every", "logging")
# Of the keywords of `audit`, by which it is told whether one was given.
DEFAULTS = {
    "dtype": "float32",
    "format": "jsonl",
    "max_length": 256,
    "chat_template": False,
    "groups": 16,
    "window": (0.10, 0.50),
    "skip": 1,
    "center": False,
    "positions": "last:4",
    "temperature": 1.0,
}


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
    settings: Mapping[str, object] | None = None,
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
        settings: more, as `spinal audit` takes them: {"parallel": {"data": 2}, "metrics": {"terminal": "last:4"}}. A
            setting that is also given by keyword must agree with it.
        progress: show progress bars.

    Returns:
        A `DepthTrace`; its columns are arrays over the D + 1 boundaries. `save_trace(trace, folder)` keeps it.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
    """
    given = copy.deepcopy(dict(settings or {}))
    if kept := [name for name in OF_THE_COMMAND if name in given]:
        raise UserError(
            f"settings has {kept[0]}, which belongs to the command spinal audit; spinal_jax.audit writes no run folder"
        )
    named = isinstance(prompts, (str, os.PathLike))
    asked = {
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
    return run_audit(build(AuditConfig, merged(given, asked, DEFAULTS)), texts, bars(progress))


def train(
    folder: str | os.PathLike[str], config: TrainConfig | None = None, *, progress: bool = True, **settings: Any
) -> Trained:
    """Trains a checkpoint, records its depth traces on the way, and leaves all in a run folder, as `spinal train`. A
    run that was cut off goes on when it is called again with the same settings.

    >>> spinal_jax.train(
    ...     "runs/dpo",
    ...     model={"source": "FOLDER"},
    ...     preferences={"format": "hh", "path": "pairs.jsonl"},
    ...     optimizer={"learning_rate": 5e-6},
    ...     steps=100,
    ... )  # doctest: +SKIP

    Args:
        folder: of the run.
        config: the settings as a record; None: from `settings`.
        progress: show progress bars.
        settings: the settings of `spinal train`, those of a part as a mapping.

    Returns:
        A `Trained`: the step whose weights are in `folder/model`, the last metrics, the last trace and the onset.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
        spinal_jax.train.loop.Diverged: the loss or a gradient is not finite. The state before that step is saved.
    """
    from spinal_jax.runs.folder import held
    from spinal_jax.train.run import run_train

    if config is not None and settings:
        raise UserError(f"a config is given, and {next(iter(settings))} too; give one of them")
    asked = build(TrainConfig, settings) if config is None else config
    out = Path(folder).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be made: {error.strerror or error}") from error
    with held(out):
        return run_train(asked, out, bars(progress))


def load_model(
    source: str | os.PathLike[str], *, revision: str | None = None, dtype: str = "float32"
) -> tuple[Decoder, PreTrainedTokenizerBase]:
    """The checkpoint as a `Decoder`, whose `forward` takes taps, and its tokenizer. Arguments and errors as `audit`."""
    asked = build(ModelConfig, {"source": os.fspath(source), "revision": revision, "dtype": dtype}, "model")
    with opened(asked) as (checkpoint, family, decoder):
        return load(checkpoint, family, decoder, asked.dtype), checkpoint.tokenizer()
