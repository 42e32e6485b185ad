"""Gemma 3, its text part: Gemma 2 with norms on queries and keys for soft-caps, and a rope of its own for windows."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import gemma, llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def text_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gemma3_text` model."""
    hf.defaults(
        vocab_size=262208,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_pattern=6,
    )
    fields = gemma.common(hf, "hidden_activation")
    hf.agree("hidden_act", hf.values["hidden_activation"], "hidden_activation says otherwise")
    hf.ignore("attn_logit_softcapping")  # Hugging Face reads it and never applies it
    pattern = hf.size("sliding_window_pattern")
    if hf.get("layer_types") is None:
        hf.agree("_sliding_window_pattern", pattern, "without layer_types, sliding_window_pattern counts")
    hf.ignore("_sliding_window_pattern")
    window = hf.window("sliding_window")
    windows = llama.layer_windows(hf, fields["depth"], window, lambda layer: bool((layer + 1) % pattern))
    fields["windows"] = windows
    fields["layer_rope"] = tuple(int(window > 0) for window in windows)
    dim = fields["head_dim"]
    full = hf.rope(dim, section="full_attention", default_theta=1e6)
    sliding = hf.rope(dim, section="sliding_attention", theta_key="rope_local_base_freq")
    return DecoderConfig(
        **fields,
        ropes=(full, sliding),
        post_norm=True,
        qk_norm="head",
        query_scale=hf.positive("query_pre_attn_scalar") ** -0.5,
        final_softcap=hf.softcap("final_logit_softcapping"),
    )


def composite_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gemma3` model, which reads images too: its text part."""
    hf.defaults(text_config={}, tie_word_embeddings=True)
    hf.ignore("vision_config", "mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")
    text = hf.section("text_config", "gemma3_text")
    text.refuse("final_logit_softcapping")  # Hugging Face's composite model leaves it out
    text.agree("tie_word_embeddings", hf.flag("tie_word_embeddings"), "outside of text_config it says otherwise")
    return replace(text_config(text), family=hf.model_type, tied=hf.flag("tie_word_embeddings"))


# The names of the text part that releases of transformers gave it, and what is not the text part.
TEXT_PART = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
)
VISION_PART = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)

GEMMA3_TEXT = Family(("gemma3_text",), text_config, gemma.four_norm_rules, llama.ROTARY_TABLES, without_prefix("model"))
GEMMA3 = Family(("gemma3",), composite_config, gemma.four_norm_rules, VISION_PART, TEXT_PART)
