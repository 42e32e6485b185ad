"""What a model reads: prompts, preference pairs and documents, from files or from the controlled world."""

from __future__ import annotations

from spinal_jax.data.prompts import SHIPPED, Prompt, PromptSet, group_of, read_prompts, token_ids

__all__ = ["SHIPPED", "Prompt", "PromptSet", "group_of", "read_prompts", "token_ids"]
