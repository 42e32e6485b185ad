"""Which model types the files of each GGUF architecture become."""

from __future__ import annotations

MODEL_TYPES: dict[str, tuple[str, ...]] = {
    "llama": ("llama", "mistral"),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "gemma": ("gemma",),
    "gemma2": ("gemma2",),
    "gemma3": ("gemma3_text",),
    "phi2": ("phi",),
    "phi3": ("phi3",),
    "gpt2": ("gpt2",),
}
