"""GLM-4-0414: norms before and after attention and MLP, half of a head rotated in pairs, gate and up in one matrix."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, fused, linear, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `glm4` model."""
    hf.defaults(
        vocab_size=151552,
        hidden_size=4096,
        intermediate_size=13696,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1.5625e-7,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf)
    return DecoderConfig(
        **fields,
        ropes=(replace(hf.rope(fields["head_dim"], default_partial=0.5), interleaved=True),),
        tied=hf.flag("tie_word_embeddings"),
        post_norm=True,
        qkv_bias=hf.flag("attention_bias"),
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a GLM-4 checkpoint."""
    layer = "model.layers.{i}"
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.post_self_attn_layernorm", "block.attention_post_norm", False),
        *linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", False),
        *linear(f"{layer}.post_mlp_layernorm", "block.mlp_post_norm", False),
        *llama.attention_rules(config, f"{layer}.self_attn"),
        fused(
            f"{layer}.mlp.gate_up_proj.weight",
            ("block.mlp.gate.weight", "block.mlp.up.weight"),
            lambda config: (config.mlp_width, config.mlp_width),
        ),
        *linear(f"{layer}.mlp.down_proj", "block.mlp.down", False),
    ]


GLM4 = Family(("glm4",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
