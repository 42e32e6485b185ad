"""Llama 1-3.x, Mistral, SmolLM2, TinyLlama, DeepSeek-LLM (dense): pre-norm blocks, gated MLP, grouped queries, rotary.

Most families differ from these in a few switches and build on the pieces here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spinal_jax.errors import UserError
from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.hf_config import ACTIVATIONS, MOST_BLOCKS, HFConfig
from spinal_jax.models.translate import Family, Rule, linear, same, without_prefix


def common(
    hf: HFConfig,
    kv_heads: int | None = None,
    *,
    eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    activations: Mapping[str, str] = ACTIVATIONS,
) -> dict[str, Any]:
    """The fields that Llama-like families share, keyed as in DecoderConfig.

    What a family's class has other defaults for it states before, by `hf.defaults`.

    Args:
        hf: config.json.
        kv_heads: how many key heads an absent or null `num_key_value_heads` means; None: one for each query head.
        eps: the key of the norms' epsilon.
        activation: the key of the MLP's activation.
        activations: those that the family has, by Hugging Face's names.
    """
    hf.defaults(max_position_embeddings=2048, **{eps: 1e-6, activation: "silu"})
    depth = hf.integer("num_hidden_layers", high=MOST_BLOCKS)
    heads, width = hf.size("num_attention_heads"), hf.size("hidden_size")
    return {
        "family": hf.model_type,
        "vocab_size": hf.size("vocab_size"),
        "width": width,
        "depth": depth,
        "heads": heads,
        "kv_heads": hf.size("num_key_value_heads", kv_heads or heads),
        "head_dim": equal_share(width, heads) if hf.get("head_dim") is None else hf.size("head_dim"),
        "mlp_width": hf.size("intermediate_size"),
        "max_positions": hf.size("max_position_embeddings"),
        "activation": hf.choice(activation, activations),
        "norm_eps": hf.epsilon(eps),
        "layer_rope": (0,) * depth,
        "windows": (0,) * depth,
    }


def equal_share(width: int, heads: int) -> int:
    """The size of a head where heads share the width."""
    if heads < 1 or width % heads:
        raise UserError(f"config.json: a width of {width} features cannot be shared by {heads} attention heads")
    return width // heads


def layer_windows(hf: HFConfig, depth: int, window: int, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """[D] the window of every block, 0 where it has none.

    Args:
        hf: config.json, whose `layer_types` says which blocks slide.
        depth: D.
        window: of those that do; 0 if there is none.
        slides: whether a block (0-based) does where config.json has no `layer_types`.
    """
    kinds = {"full_attention": 0, "sliding_attention": window}
    names = ["full_attention", "sliding_attention"]
    layers = hf.get("layer_types", [names[slides(layer)] for layer in range(depth)])
    named = isinstance(layers, list) and all(isinstance(layer, str) and layer in kinds for layer in layers)
    if not named or len(layers) != depth:
        raise hf.refusal("layer_types", f"which is not {depth} times {' or '.join(names)}")
    if "sliding_attention" in layers and not window:
        raise UserError("config.json contradicts itself: layers have sliding attention, but there is no sliding_window")
    return tuple(kinds[layer] for layer in layers)


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `llama` model."""
    hf.defaults(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    hf.ignore("is_llama_config")  # SmolLM's trainer says so
    hf.refuse("rope_interleaved")
    fields = common(hf)
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"]),),
        tied=hf.flag("tie_word_embeddings"),
        qkv_bias=hf.flag("attention_bias"),
        out_bias=hf.flag("attention_bias"),
        mlp_bias=hf.flag("mlp_bias"),
    )


def mistral_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `mistral` model: Llama with a sliding window and without biases."""
    hf.defaults(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        sliding_window=4096,
        tie_word_embeddings=False,
    )
    fields = common(hf)
    hf.refuse("attention_bias", "mlp_bias")
    fields["windows"] = (hf.window("sliding_window"),) * fields["depth"]
    return DecoderConfig(**fields, ropes=(hf.rope(fields["head_dim"]),), tied=hf.flag("tie_word_embeddings"))


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Llama-like checkpoint."""
    layer = "model.layers.{i}"
    return [
        *end_rules(config),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", config.norm_bias),
        *(
            []
            if config.shared_norm
            else linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", config.norm_bias)
        ),
        *attention_rules(config, f"{layer}.self_attn"),
        *mlp_rules(config, f"{layer}.mlp"),
    ]


def end_rules(config: DecoderConfig, embedding: str = "model.embed_tokens", norm: str = "model.norm") -> list[Rule]:
    """What stands before and behind the blocks: `embedding`, the final `norm`, and lm_head as far as it is its own."""
    return [
        same(f"{embedding}.weight", "embedding"),
        *linear(norm, "final_norm", config.norm_bias),
        *([] if config.tied else [same("lm_head.weight", "unembedding.weight")]),
        *([same("lm_head.bias", "unembedding.bias")] if config.unembed_bias else []),
    ]


def attention_rules(config: DecoderConfig, hf: str, out: str = "o_proj") -> list[Rule]:
    """q_proj, k_proj, v_proj and `out` under `hf`."""
    return [
        *linear(f"{hf}.q_proj", "block.attention.query", config.qkv_bias),
        *linear(f"{hf}.k_proj", "block.attention.key", config.qkv_bias),
        *linear(f"{hf}.v_proj", "block.attention.value", config.qkv_bias),
        *linear(f"{hf}.{out}", "block.attention.out", config.out_bias),
    ]


def query_key_norm_rules(config: DecoderConfig, hf: str, query: str = "q_norm", key: str = "k_norm") -> list[Rule]:
    """The norms of queries and keys under `hf`, where the config has them."""
    if config.qk_norm == "none":
        return []
    return [
        *linear(f"{hf}.{query}", "block.attention.query_norm", config.qk_norm_bias),
        *linear(f"{hf}.{key}", "block.attention.key_norm", config.qk_norm_bias),
    ]


def mlp_rules(config: DecoderConfig, hf: str) -> list[Rule]:
    """gate_proj, up_proj and down_proj under `hf`."""
    return [
        *linear(f"{hf}.gate_proj", "block.mlp.gate", config.mlp_bias),
        *linear(f"{hf}.up_proj", "block.mlp.up", config.mlp_bias),
        *linear(f"{hf}.down_proj", "block.mlp.down", config.mlp_bias),
    ]


ROTARY_TABLES = (r".*rotary_emb\.inv_freq",)

LLAMA = Family(("llama",), decoder_config, rules, ROTARY_TABLES, without_prefix("model"))
MISTRAL = Family(("mistral",), mistral_config, rules, ROTARY_TABLES, without_prefix("model"))
