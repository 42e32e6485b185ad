"""Mistral Small 3.1, 3.2 and Ministral 3 with images: their text part, which is a Mistral or a Ministral 3."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama, ministral3
from spinal_jax.models.families.gemma3 import TEXT_PART, VISION_PART
from spinal_jax.models.hf_config import HFConfig, value_text
from spinal_jax.models.translate import Family

# What its class takes where config.json has no text_config at all.
TEXT = {
    "model_type": "mistral",
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}
KINDS = {"mistral": llama.mistral_config, "ministral3": ministral3.decoder_config}


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `mistral3` model: its text part."""
    if hf.get("text_config") is None:
        hf.values["text_config"] = dict(TEXT)
    hf.ignore("vision_config", "image_token_index", "image_token_id", "spatial_merge_size", "vision_feature_layer")
    hf.ignore("multimodal_projector_bias", "projector_hidden_act")
    kind = hf.part("text_config").get("model_type", "mistral")
    if not isinstance(kind, str) or kind not in KINDS:
        raise hf.refusal("text_config", f"but its model_type, {value_text(kind)}, is none of {', '.join(KINDS)}")
    config = KINDS[kind](hf.section("text_config", kind))
    return replace(config, family=hf.model_type, tied=hf.flag("tie_word_embeddings", True))


MISTRAL3 = Family(("mistral3",), decoder_config, llama.rules, VISION_PART, TEXT_PART)
