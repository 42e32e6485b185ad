"""Phi-3, 3.5, 4 and 4-mini: Llama with fused projections and longrope."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.rope import RopeKind
from spinal_jax.models.translate import Family, Rule, fused, linear, qkv_rows, without_prefix

# "su" and "yarn" are what the first releases called longrope.
KINDS: dict[str, RopeKind] = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `phi3` model."""
    hf.defaults(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    hf.refuse("attention_bias", "mlp_bias", "lm_head_bias")
    for key in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini states them, and nothing reads them
        hf.agree(key, 1, "only 1 is supported")
    fields = llama.common(hf)
    fields["windows"] = (hf.window("sliding_window"),) * fields["depth"]
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], kinds=KINDS, default_partial=1.0),),
        tied=hf.flag("tie_word_embeddings"),
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Phi-3 checkpoint."""
    layer = "model.layers.{i}"
    projections = [f"block.attention.{name}.weight" for name in ("query", "key", "value")]
    return [
        *llama.end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", False),
        *linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", False),
        fused(f"{layer}.self_attn.qkv_proj.weight", projections, qkv_rows),
        *linear(f"{layer}.self_attn.o_proj", "block.attention.out", False),
        fused(
            f"{layer}.mlp.gate_up_proj.weight",
            ["block.mlp.gate.weight", "block.mlp.up.weight"],
            lambda config: (config.mlp_width, config.mlp_width),
        ),
        *linear(f"{layer}.mlp.down_proj", "block.mlp.down", False),
    ]


PHI3 = Family(("phi3",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
