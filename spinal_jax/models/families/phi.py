"""Phi-1, 1.5 and 2: attention and MLP side by side behind one norm, partial rotary, biases everywhere."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `phi` model."""
    hf.defaults(
        vocab_size=51200,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        hidden_act="gelu_new",
        layer_norm_eps=1e-5,
        qk_layernorm=False,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf, eps="layer_norm_eps")
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_partial=0.5),),
        tied=hf.flag("tie_word_embeddings"),
        norm="layer",
        norm_bias=True,
        parallel=True,
        shared_norm=True,
        qk_norm="head" if hf.flag("qk_layernorm") else "none",
        qk_norm_bias=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        unembed_bias=True,
        gated=False,
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Phi checkpoint."""
    layer = "model.layers.{i}"
    attention = f"{layer}.self_attn"
    return [
        *llama.end_rules(config, norm="model.final_layernorm"),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", True),
        *llama.attention_rules(config, attention, out="dense"),
        *llama.query_key_norm_rules(config, attention, "q_layernorm", "k_layernorm"),
        *linear(f"{layer}.mlp.fc1", "block.mlp.up", True),
        *linear(f"{layer}.mlp.fc2", "block.mlp.down", True),
    ]


PHI = Family(("phi",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
