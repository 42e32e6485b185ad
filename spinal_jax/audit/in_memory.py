"""The audit of a model that lies in memory, with no checkpoint behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spinal_jax.audit.measure import measure
from spinal_jax.audit.pipeline import depth_trace, model_record, plan_prompts, prompts_record, read_prompt_set
from spinal_jax.audit.trace import DepthTrace
from spinal_jax.config import AuditConfig, AuditParallelConfig
from spinal_jax.errors import UserError
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.parts import take_apart
from spinal_jax.progress import Bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "model in memory"


def audit_decoder(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    config: AuditConfig,
    texts: Sequence[str] | None = None,
    bar: Bar | None = None,
) -> DepthTrace:
    """The depth trace of a decoder, measured in its own dtype on the device that holds it.

    Args:
        model: what is measured.
        tokenizer: of its vocabulary.
        config: the settings of an audit; of `config.model` only the name is used.
        texts: replaces `config.prompts.path`.
        bar: opens progress bars.

    Raises:
        UserError: for anything the caller can mend, such as settings that a model in memory cannot follow.
    """
    dtype = str(model.dtype)
    asked = config.model
    if asked.revision is not None or asked.base is not None or asked.ignore_keys:
        raise UserError("a model in memory has no revision, base or config.json; leave them out")
    if asked.dtype != dtype:
        raise UserError(f"the model in memory is {dtype}; convert it, or leave dtype={asked.dtype} out")
    if config.parallel != AuditParallelConfig():
        raise UserError("a model in memory is measured on the device that holds it; leave settings parallel out")
    prompts = read_prompt_set(config.prompts, texts)
    work = plan_prompts(prompts, tokenizer, model.config, config.prompts, config.metrics, config.batch_tokens)
    found = measure(model, work, config.metrics, bar)
    name = asked.name or NAME
    about = model_record(name, name, None, dtype, parameters_sha256(model))
    return depth_trace(about, prompts_record(prompts, config.prompts), model.config, config.metrics, work, found)


def parameters_sha256(model: Decoder) -> str:
    """Hex digest over the name, dtype, shape and bytes of every parameter. One at a time passes through the host."""
    digest = hashlib.sha256()
    for name, array in sorted(take_apart(model)[1].items()):
        values = np.ascontiguousarray(array)
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
