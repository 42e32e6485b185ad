"""The families that can be audited; a new one is a file beside this and a line below."""

from __future__ import annotations

from spinal_jax.errors import UserError
from spinal_jax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from spinal_jax.models.families.gemma import GEMMA
from spinal_jax.models.families.gemma2 import GEMMA2
from spinal_jax.models.families.gemma3 import GEMMA3, GEMMA3_TEXT
from spinal_jax.models.families.gpt2 import GPT2
from spinal_jax.models.families.gpt_neox import GPT_NEOX
from spinal_jax.models.families.llama import LLAMA, MISTRAL
from spinal_jax.models.families.mixtral import MIXTRAL
from spinal_jax.models.families.olmo2 import OLMO2
from spinal_jax.models.families.phi import PHI
from spinal_jax.models.families.phi3 import PHI3
from spinal_jax.models.families.qwen import QWEN2, QWEN3
from spinal_jax.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from spinal_jax.models.families.stablelm import STABLELM
from spinal_jax.models.translate import Family

ALL = (
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
    MIXTRAL,
    QWEN3_MOE,
    QWEN2_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
)
FAMILIES: dict[str, Family] = {name: family for family in ALL for name in family.model_types}


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`; UserError lists the supported ones."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
