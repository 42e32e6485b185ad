"""Gemma 2: Gemma with soft-caps, windows on every other block, and norms also behind attention and MLP."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import gemma, llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gemma2` model."""
    hf.defaults(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        final_logit_softcapping=30.0,
        attn_logit_softcapping=50.0,
    )
    fields = gemma.common(hf, "hidden_activation")
    hf.agree("hidden_act", hf.values["hidden_activation"], "hidden_activation says otherwise")
    window = hf.window("sliding_window")
    hf.agree("sliding_window_size", window, "sliding_window says otherwise")
    fields["windows"] = llama.layer_windows(hf, fields["depth"], window, lambda layer: layer % 2 == 0)
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"]),),
        post_norm=True,
        query_scale=hf.positive("query_pre_attn_scalar") ** -0.5,
        attention_softcap=hf.softcap("attn_logit_softcapping"),
        final_softcap=hf.softcap("final_logit_softcapping"),
    )


GEMMA2 = Family(("gemma2",), decoder_config, gemma.four_norm_rules, llama.ROTARY_TABLES, without_prefix("model"))
