"""GPT-NeoX and Pythia: attention and MLP side by side behind a norm each, partial rotary, and queries, keys and values
interleaved head by head in one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, linear, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gpt_neox` model."""
    hf.defaults(
        vocab_size=50432,
        hidden_size=6144,
        intermediate_size=24576,
        num_hidden_layers=44,
        num_attention_heads=64,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        attention_bias=True,
        use_parallel_residual=True,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf, eps="layer_norm_eps")
    hf.agree("num_key_value_heads", fields["heads"], "every head has a key of its own")
    head_dim = llama.equal_share(fields["width"], fields["heads"])
    hf.agree("head_dim", head_dim, "heads share the width equally")
    rope = hf.rope(head_dim, theta_key="rotary_emb_base", partial_key="rotary_pct", default_partial=0.25)
    # Some releases wrote these two beside the keys that count.
    hf.agree("rope_theta", rope.theta, f"rotary_emb_base makes it {rope.theta}")
    if int(head_dim * hf.number("partial_rotary_factor", rope.dim / head_dim)) != rope.dim:
        raise hf.refusal("partial_rotary_factor", f"but rotary_pct rotates {rope.dim} of {head_dim} features")
    return DecoderConfig(
        **fields,
        ropes=(rope,),
        tied=hf.flag("tie_word_embeddings"),
        norm="layer",
        norm_bias=True,
        parallel=hf.flag("use_parallel_residual"),
        qkv_bias=hf.flag("attention_bias"),
        out_bias=hf.flag("attention_bias"),
        mlp_bias=True,
        gated=False,
    )


def split_heads(tensor: np.ndarray, config: DecoderConfig) -> Sequence[np.ndarray]:
    """[heads * 3 * head_dim, ...] to queries, keys and values, [heads * head_dim, ...] each."""
    by_head = tensor.reshape(config.heads, 3, config.head_dim, *tensor.shape[1:])
    return [by_head[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)]


def join_heads(parts: Sequence[np.ndarray], config: DecoderConfig) -> np.ndarray:
    """The inverse of `split_heads`."""
    by_head = [part.reshape(config.heads, config.head_dim, *part.shape[1:]) for part in parts]
    return np.stack(by_head, axis=1).reshape(-1, *parts[0].shape[1:])


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a GPT-NeoX checkpoint."""
    layer = "gpt_neox.layers.{i}"
    fused = [
        Rule(
            f"{layer}.attention.query_key_value.{kind}",
            tuple(f"block.attention.{name}.{kind}" for name in ("query", "key", "value")),
            split_heads,
            join_heads,
        )
        for kind in ("weight", "bias")[: 1 + config.qkv_bias]
    ]
    return [
        *llama.end_rules(config, "gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        *linear(f"{layer}.input_layernorm", "block.attention_norm", True),
        *linear(f"{layer}.post_attention_layernorm", "block.mlp_norm", True),
        *fused,
        *linear(f"{layer}.attention.dense", "block.attention.out", config.out_bias),
        *linear(f"{layer}.mlp.dense_h_to_4h", "block.mlp.up", True),
        *linear(f"{layer}.mlp.dense_4h_to_h", "block.mlp.down", True),
    ]


# Causal masks and rotary tables that old releases saved.
TABLES = (r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)

RENAMED = ((r"^embed_out\.", "lm_head."), *without_prefix("gpt_neox"))  # releases before transformers 5 say embed_out

GPT_NEOX = Family(("gpt_neox",), decoder_config, rules, TABLES, RENAMED)
