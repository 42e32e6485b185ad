"""Ministral 3: Mistral with yarn, whose queries grow with the logarithm of their position."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix

# What its class takes where config.json states no rope at all.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
EXTRA = ("llama_4_scaling_beta", "max_position_embeddings")


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `ministral3` model."""
    hf.defaults(
        vocab_size=131072,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=34,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    key = "rope_parameters" if hf.get("rope_scaling") is None else "rope_scaling"
    if hf.get(key) is None:
        hf.values[key] = dict(ROPE)
    fields = llama.common(hf)
    fields["windows"] = (hf.window("sliding_window"),) * fields["depth"]
    rope, scaling = hf.rope(fields["head_dim"], extra=EXTRA), hf.part(key)
    growth = (scaling.number("llama_4_scaling_beta"), scaling.size("original_max_position_embeddings"))
    return DecoderConfig(
        **fields,
        ropes=(rope,),
        tied=hf.flag("tie_word_embeddings"),
        query_growth=growth,
    )


MINISTRAL3 = Family(("ministral3",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))
