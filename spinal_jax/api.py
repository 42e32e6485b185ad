"""What a notebook calls. Each function builds a settings record and calls what the commands call."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spinal_jax.audit.in_memory import audit_decoder
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
IN_MEMORY = "(a model in memory)"  # what the settings say in place of a source
# Settings of the command that say what becomes of a run folder.
OF_THE_COMMAND = ("overwrite", "checkpoint_every", "logging")


def audit(
    model: str | os.PathLike[str] | Decoder,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    format: str | None = None,
    limit: int | None = None,
    offset: int | None = None,
    max_length: int | None = None,
    chat_template: bool | None = None,
    window: tuple[float, float] | None = None,
    skip: int | None = None,
    center: bool | None = None,
    positions: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    groups: int | None = None,
    variants: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
    progress: bool = True,
) -> DepthTrace:
    """The depth trace of one checkpoint, or of a model in memory.

    >>> trace = spinal_jax.audit("FOLDER", window=(0.2, 0.6))  # doctest: +SKIP
    >>> decoder, tokenizer = spinal_jax.load_model("FOLDER")  # doctest: +SKIP
    >>> trace = spinal_jax.audit(decoder, tokenizer=tokenizer)  # doctest: +SKIP

    Every keyword that is None has the default of the setting.

    Args:
        model: hub id, folder with config.json and safetensors, .gguf file, or a `Decoder`, which is measured in its own
            dtype on the device that holds it.
        prompts: a file, a list of texts, or None for the prompt set that ships with the package.
        tokenizer: of a `Decoder`, and of nothing else.
        name, revision, dtype: as the `model.` settings of `spinal audit`.
        format, limit, offset, max_length, chat_template: as its `prompts.` settings.
        window, skip, center: as its `metrics.contraction.` settings.
        positions, temperature, top_k: as its `metrics.transport.` settings.
        groups: of prompts, for the jackknife.
        variants: as its `metrics.variants.` settings, such as {"skip": (0, 4)}.
        settings: more, as `spinal audit` takes them: {"parallel": {"data": 2}, "metrics": {"terminal": "last:4"}}. A
            setting that is also given by keyword must agree with it.
        progress: show progress bars.

    Returns:
        A `DepthTrace`; its columns are arrays over the D + 1 boundaries. `trace.save(folder)` keeps it.

    Raises:
        UserError: for anything the caller can mend, in one sentence.
    """
    given = copy.deepcopy(dict(settings or {}))
    if kept := [name for name in OF_THE_COMMAND if name in given]:
        raise UserError(
            f"settings has {kept[0]}, which belongs to the command spinal audit; spinal_jax.audit writes no run folder"
        )
    if isinstance(model, Decoder):
        source, dtype = IN_MEMORY, dtype or str(model.dtype)
        if tokenizer is None:
            raise UserError("a model in memory needs its tokenizer: audit(model, tokenizer=...)")
    elif not isinstance(model, (str, os.PathLike)):
        raise UserError(
            f"model is a {type(model).__name__}; it takes a hub id, a folder, a .gguf file, or a decoder that "
            "spinal_jax.load_model returned"
        )
    else:
        source = os.fspath(model)
        if tokenizer is not None:
            raise UserError(f"{source} has a tokenizer of its own; leave tokenizer out")
    named = isinstance(prompts, (str, os.PathLike))
    asked = {
        "model": {"source": source, "name": name, "revision": revision, "dtype": dtype},
        "prompts": {
            "path": os.fspath(prompts) if named else None,
            "format": format,
            "limit": limit,
            "offset": offset,
            "max_length": max_length,
            "chat_template": chat_template,
        },
        "metrics": {
            "contraction": {"window": window, "skip": skip, "center": center},
            "transport": {"positions": positions, "temperature": temperature, "top_k": top_k},
            "groups": groups,
            "variants": variants,
        },
    }
    config = build(AuditConfig, merged(given, asked))
    texts = None if named or prompts is None else list(prompts)
    if isinstance(model, Decoder) and tokenizer is not None:
        return audit_decoder(model, tokenizer, config, texts, bars(progress))
    return run_audit(config, texts, bars(progress))


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
