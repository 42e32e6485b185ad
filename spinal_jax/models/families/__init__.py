"""The supported model families. A new family is a file in this package and a line below."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from spinal_jax.errors import UserError
from spinal_jax.jsontypes import ReadJson
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families.apertus import APERTUS
from spinal_jax.models.families.arcee import ARCEE
from spinal_jax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from spinal_jax.models.families.ernie4_5 import ERNIE4_5
from spinal_jax.models.families.exaone4 import EXAONE4
from spinal_jax.models.families.gemma import GEMMA
from spinal_jax.models.families.gemma2 import GEMMA2
from spinal_jax.models.families.gemma3 import GEMMA3, GEMMA3_TEXT
from spinal_jax.models.families.glm4 import GLM4
from spinal_jax.models.families.gpt2 import GPT2
from spinal_jax.models.families.gpt_neox import GPT_NEOX
from spinal_jax.models.families.gpt_oss import GPT_OSS
from spinal_jax.models.families.granite import GRANITE
from spinal_jax.models.families.hunyuan import HUNYUAN
from spinal_jax.models.families.llama import LLAMA, MISTRAL
from spinal_jax.models.families.ministral3 import MINISTRAL3
from spinal_jax.models.families.mistral3 import MISTRAL3
from spinal_jax.models.families.mixtral import MIXTRAL
from spinal_jax.models.families.olmo import OLMO, OLMOE
from spinal_jax.models.families.olmo2 import OLMO2
from spinal_jax.models.families.olmo3 import OLMO3
from spinal_jax.models.families.phi import PHI
from spinal_jax.models.families.phi3 import PHI3
from spinal_jax.models.families.qwen import QWEN2, QWEN3
from spinal_jax.models.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
from spinal_jax.models.families.qwen3_next import QWEN3_NEXT
from spinal_jax.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from spinal_jax.models.families.seed_oss import SEED_OSS
from spinal_jax.models.families.smollm3 import SMOLLM3
from spinal_jax.models.families.stablelm import STABLELM
from spinal_jax.models.hf_config import HFConfig, shorten_middle
from spinal_jax.models.translate import Family

if TYPE_CHECKING:
    from spinal_jax.models.formats.base import Checkpoint

ALL_FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3_TEXT,
    GEMMA3,
    PHI,
    PHI3,
    GPT2,
    GPT_NEOX,
    OLMO2,
    STABLELM,
    OLMO3,
    SMOLLM3,
    OLMO,
    OLMOE,
    GRANITE,
    GLM4,
    SEED_OSS,
    ERNIE4_5,
    APERTUS,
    EXAONE4,
    MINISTRAL3,
    MISTRAL3,
    ARCEE,
    HUNYUAN,
    MIXTRAL,
    GPT_OSS,
    QWEN3_MOE,
    QWEN2_MOE,
    QWEN3_NEXT,
    QWEN3_5_TEXT,
    QWEN3_5_MOE_TEXT,
    QWEN3_5,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)
FAMILIES: dict[str, Family] = {name: family for family in ALL_FAMILIES for name in family.model_types}

_GEMMA4 = (
    "its blocks have heads of two sizes, values that are normed or are the keys, keys and values of earlier blocks, "
    "embeddings of their own and a second, sparse MLP beside the dense one"
)
REFUSED = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), _GEMMA4)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises UserError, with the supported ones, if it is unknown."""
    if model_type in REFUSED:
        raise UserError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {shorten_middle(model_type)!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def read_model(config: ReadJson, ignore: Iterable[str] = ()) -> tuple[Family, DecoderConfig]:
    """Family and decoder configuration of a config.json. Raises UserError for unknown keys, except `ignore`."""
    hf = HFConfig(config, ignore)
    family = family_of(hf.model_type)
    decoder = family.decoder_config(hf)
    hf.done()
    return family, decoder


def read_checkpoint(checkpoint: Checkpoint, ignore: Iterable[str] = ()) -> tuple[Family, DecoderConfig]:
    """`read_model` of a checkpoint, with a check of the number of blocks against its tensors.

    Raises UserError before anything is allocated in the size of the config.
    """
    family, decoder = read_model(checkpoint.config, ignore)
    numbers = (int(match[1]) for name in checkpoint.names() if (match := _BLOCK.search(name)))
    if (there := max(numbers, default=-1) + 1) < decoder.depth:
        raise UserError(
            f"{checkpoint.source} has tensors of {there} blocks, but its config.json says that there are "
            f"{decoder.depth}: num_hidden_layers is wrong or a file is missing"
        )
    if decoder.family == "mistral3" and checkpoint.config.get("tie_word_embeddings") is None:
        # Not in published files; Hugging Face ties the two unless there is a separate lm_head.
        decoder = replace(decoder, tied=not any(name.endswith("lm_head.weight") for name in checkpoint.names()))
    return family, decoder


_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
