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
    "olmo": ("olmo",),
    "olmo2": ("olmo2", "olmo3"),
    "olmoe": ("olmoe",),
    "smollm3": ("smollm3",),
    "granite": ("granite",),
    "glm4": ("glm4",),
    "seed_oss": ("seed_oss",),
    "ernie4_5": ("ernie4_5",),
    "apertus": ("apertus",),
    "exaone4": ("exaone4",),
    "mistral3": ("ministral3", "mistral"),
    "arcee": ("arcee",),
    "hunyuan-dense": ("hunyuan_v1_dense",),
    "gpt-oss": ("gpt_oss",),
}
