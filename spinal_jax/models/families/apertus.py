"""Apertus: no gate, the activation xIELU with two learnt slopes a block, norms on queries and keys."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import ACTIVATIONS, HFConfig
from spinal_jax.models.translate import Family, Rule, linear, same, scalar, without_prefix

# What its class takes where config.json states no rope at all.
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12e6,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `apertus` model."""
    hf.defaults(
        vocab_size=131072,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=65536,
        rms_norm_eps=1e-5,
        hidden_act="xielu",
        attention_bias=False,
        tie_word_embeddings=False,
    )
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf.values["rope_parameters"] = dict(ROPE)
    hf.refuse("mlp_bias", "post_norm")
    hf.agree("qk_norm", True, "queries and keys are always normed")
    fields, bias = llama.common(hf, activations=ACTIVATIONS | {"xielu": "xielu"}), hf.flag("attention_bias")
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_theta=12e6),),
        tied=hf.flag("tie_word_embeddings"),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        gated=False,
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of an Apertus checkpoint."""
    layer = "model.layers.{i}"
    slopes = f"{layer}.mlp.act_fn"
    learnt = [
        same(f"{slopes}.alpha_p", "block.mlp.learnt.positive"),
        same(f"{slopes}.alpha_n", "block.mlp.learnt.negative"),
        scalar(f"{slopes}.beta", "block.mlp.learnt.slope"),
        scalar(f"{slopes}.eps", "block.mlp.learnt.limit"),
    ]
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.attention_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.feedforward_layernorm", "block.mlp_norm", False),
        *llama.attention_rules(config, f"{layer}.self_attn"),
        *llama.query_key_norm_rules(config, f"{layer}.self_attn"),
        *linear(f"{layer}.mlp.up_proj", "block.mlp.up", False),
        *linear(f"{layer}.mlp.down_proj", "block.mlp.down", False),
        *(learnt if config.activation == "xielu" else []),
    ]


APERTUS = Family(("apertus",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
