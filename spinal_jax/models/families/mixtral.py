"""Mixtral: Mistral with experts in place of every MLP, two of eight for each token."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig, Experts
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, same, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `mixtral` model."""
    hf.defaults(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096 * 32,
        rms_norm_eps=1e-5,
        num_local_experts=8,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf)
    hf.refuse("attention_bias", "mlp_bias")
    hf.ignore("router_jitter_noise")  # training only
    fields["windows"] = (hf.window("sliding_window"),) * fields["depth"]
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_theta=1e6),),
        tied=hf.flag("tie_word_embeddings"),
        experts=Experts(
            count=hf.integer("num_local_experts"),
            per_token=hf.integer("num_experts_per_tok"),
            width=fields["mlp_width"],
        ),
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Mixtral checkpoint."""
    sparse = "model.layers.{i}.block_sparse_moe"
    return [
        *llama.rules(config),
        same(f"{sparse}.gate.weight", "block.mlp.router"),
        same(f"{sparse}.experts.{{e}}.w1.weight", "block.mlp.gate"),
        same(f"{sparse}.experts.{{e}}.w3.weight", "block.mlp.up"),
        same(f"{sparse}.experts.{{e}}.w2.weight", "block.mlp.down"),
    ]


MIXTRAL = Family(("mixtral",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
