"""What a model reads: prompts, preference pairs and documents, from files or from the controlled world."""

from __future__ import annotations

from spinal_jax.data.documents import DocumentSet, read_documents, tokenise_documents
from spinal_jax.data.order import examples_of, order, split_examples
from spinal_jax.data.pair_tokens import Completion, TokenPair, tokenise_pairs
from spinal_jax.data.pairs import PairSet, PreferencePair, read_pairs
from spinal_jax.data.prompts import SHIPPED, Prompt, PromptSet, prompts_of, read_prompts
from spinal_jax.data.sources import Source, source_of, stem
from spinal_jax.data.tokens import TokenisedPrompts, token_ids, tokenise_prompts
from spinal_jax.data.world import World

__all__ = [
    "SHIPPED",
    "Completion",
    "DocumentSet",
    "PairSet",
    "PreferencePair",
    "Prompt",
    "PromptSet",
    "Source",
    "TokenPair",
    "TokenisedPrompts",
    "World",
    "examples_of",
    "order",
    "prompts_of",
    "read_documents",
    "read_pairs",
    "read_prompts",
    "source_of",
    "split_examples",
    "stem",
    "token_ids",
    "tokenise_documents",
    "tokenise_pairs",
    "tokenise_prompts",
]
