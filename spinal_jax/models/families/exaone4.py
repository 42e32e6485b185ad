"""EXAONE 4: norms behind attention and MLP alone, windows, and no rotary embedding in blocks without one."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama, olmo2
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `exaone4` model."""
    hf.defaults(
        vocab_size=102400,
        hidden_size=4096,
        intermediate_size=16384,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        sliding_window_pattern=4,
        tie_word_embeddings=False,
    )
    hf.refuse("attention_bias", "mlp_bias")
    fields = llama.common(hf)
    window = hf.window("sliding_window")
    if window and hf.get("layer_types") is None:  # else the pattern is a word such as LLLG, which nobody reads
        period = hf.size("sliding_window_pattern")
        fields["windows"] = llama.layer_windows(hf, fields["depth"], window, lambda layer: (layer + 1) % period != 0)
    else:
        fields["windows"] = llama.layer_windows(hf, fields["depth"], window, lambda layer: False)
    hf.ignore("sliding_window_pattern")
    fields["layer_rope"] = tuple(0 if own or not window else -1 for own in fields["windows"])
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"]),),
        tied=hf.flag("tie_word_embeddings"),
        pre_norm=False,
        post_norm=True,
        qk_norm="head",
    )


EXAONE4 = Family(("exaone4",), decoder_config, olmo2.rules, llama.ROTARY_TABLES, without_prefix("model"))
