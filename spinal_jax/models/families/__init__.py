"""The families that can be audited; a new one is a file beside this and a line below."""

from __future__ import annotations

from spinal_jax.errors import UserError
from spinal_jax.models.families.llama import LLAMA, MISTRAL
from spinal_jax.models.translate import Family

FAMILIES: dict[str, Family] = {name: family for family in (LLAMA, MISTRAL) for name in family.model_types}


def family_of(model_type: str) -> Family:
    """The family of a config.json's `model_type`; UserError lists the supported ones."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
