"""What a model reads: prompts, preference pairs and documents, from files or from the controlled world."""

from __future__ import annotations

from spinal_jax.data.documents import DocumentSet, read_documents, tokenise_documents
from spinal_jax.data.order import examples_of, order, split
from spinal_jax.data.pairs import Completion, PairSet, PreferencePair, TokenPair, read_pairs, tokenise_pairs
from spinal_jax.data.prompts import SHIPPED, Prompt, PromptSet, read_prompts, token_ids
from spinal_jax.data.world import World

__all__ = [
    "SHIPPED",
    "Completion",
    "DocumentSet",
    "PairSet",
    "PreferencePair",
    "Prompt",
    "PromptSet",
    "TokenPair",
    "World",
    "examples_of",
    "order",
    "read_documents",
    "read_pairs",
    "read_prompts",
    "split",
    "token_ids",
    "tokenise_documents",
    "tokenise_pairs",
]
