"""gpt-oss: experts with biases and a clamped SwiGLU, learnt sinks in the softmax, windows in every other block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spinal_jax.models.config import ClampedSwiGLU, DecoderConfig, Experts
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, same, without_prefix

# What its class takes where config.json states no rope at all.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gpt_oss` model."""
    hf.defaults(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=36,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        sliding_window=128,
        attention_bias=True,
        tie_word_embeddings=False,
        num_experts_per_tok=4,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )
    if hf.get("rope_parameters") is None and hf.get("rope_scaling") is None:
        hf.values["rope_parameters"] = dict(ROPE)
    hf.agree("hidden_act", "silu", "its experts have a clamped SwiGLU, always")
    hf.agree("experts_per_token", hf.values["num_experts_per_tok"], "num_experts_per_tok says otherwise")
    hf.ignore("initial_context_length")  # that of rope_scaling counts
    count = hf.integer("num_local_experts", hf.integer("num_experts", 128))
    hf.agree("num_experts", count, f"num_local_experts is {count}")
    fields, bias = llama.common(hf), hf.flag("attention_bias")
    window = hf.window("sliding_window")
    fields["windows"] = llama.layer_windows(hf, fields["depth"], window, lambda layer: layer % 2 == 0)
    fields["activation"] = ClampedSwiGLU(hf.number("swiglu_alpha"), hf.positive("swiglu_limit"))
    experts = Experts(count, hf.integer("num_experts_per_tok"), fields["mlp_width"], bias=True)
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_theta=150000.0),),
        tied=hf.flag("tie_word_embeddings"),
        norm_float32=True,
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        experts=experts,
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a gpt-oss checkpoint, whose experts share a tensor, [experts, in, out]; gate and up alternate in it."""
    layer, hf, mlp = "model.layers.{i}", "model.layers.{i}.mlp", "block.mlp"

    def alternating(name: str, ours: tuple[str, ...], swap: bool) -> Rule:
        def split(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
            parts = [tensor[..., start :: len(ours)] for start in range(len(ours))]
            return [part.swapaxes(1, 2) for part in parts] if swap else parts

        def join(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
            turned = [part.swapaxes(1, 2) for part in parts] if swap else parts
            return np.stack(turned, axis=-1).reshape(*turned[0].shape[:-1], -1)

        return Rule(f"{hf}.experts.{name}", ours, split, join)

    return [
        *llama.rules(config),
        same(f"{layer}.self_attn.sinks", "block.attention.sinks"),
        same(f"{hf}.router.weight", f"{mlp}.router"),
        same(f"{hf}.router.bias", f"{mlp}.router_bias"),
        alternating("gate_up_proj", (f"{mlp}.gate", f"{mlp}.up"), swap=True),
        alternating("gate_up_proj_bias", (f"{mlp}.gate_bias", f"{mlp}.up_bias"), swap=False),
        alternating("down_proj", (f"{mlp}.down",), swap=True),
        alternating("down_proj_bias", (f"{mlp}.down_bias",), swap=False),
    ]


GPT_OSS = Family(("gpt_oss",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
