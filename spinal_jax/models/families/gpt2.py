"""GPT-2: learned positions, layer norms, an MLP without a gate, and matrices stored as [in, out]."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families.llama import end_rules, equal_share
from spinal_jax.models.hf_config import ACTIVATIONS, MOST_BLOCKS, HFConfig
from spinal_jax.models.translate import Family, Rule, fused, linear, qkv_rows, same, transposed, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `gpt2` model."""
    hf.defaults(
        vocab_size=50257,
        n_positions=1024,
        n_embd=768,
        n_layer=12,
        n_head=12,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )
    hf.ignore(
        "n_ctx",  # the size of a mask that is no longer saved
        "reorder_and_upcast_attn",  # scores in float32, as they are here anyway
        "summary_type",  # these are of a head for classification
        "summary_use_proj",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
    )
    width, depth, heads = hf.size("n_embd"), hf.integer("n_layer", high=MOST_BLOCKS), hf.size("n_head")
    return DecoderConfig(
        family=hf.model_type,
        vocab_size=hf.size("vocab_size"),
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=heads,
        head_dim=equal_share(width, heads),
        mlp_width=hf.size("n_inner", 4 * width),
        max_positions=hf.size("n_positions"),
        activation=hf.choice("activation_function", ACTIVATIONS),
        tied=hf.flag("tie_word_embeddings"),
        learned_positions=True,
        ropes=(),
        layer_rope=(),
        windows=(0,) * depth,
        norm="layer",
        norm_eps=hf.epsilon("layer_norm_epsilon"),
        norm_bias=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        query_scale=0.0 if hf.flag("scale_attn_weights") else 1.0,
        scale_by_depth=hf.flag("scale_attn_by_inverse_layer_idx"),
    )


def conv1d(hf: str, ours: str) -> list[Rule]:
    """A linear layer stored as [in, out], with its bias."""
    return [transposed(f"{hf}.weight", f"{ours}.weight"), same(f"{hf}.bias", f"{ours}.bias")]


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a GPT-2 checkpoint."""
    layer = "transformer.h.{i}"
    projections = [f"block.attention.{name}" for name in ("query", "key", "value")]
    return [
        *end_rules(config, "transformer.wte", "transformer.ln_f"),
        same("transformer.wpe.weight", "positions"),
        *linear(f"{layer}.ln_1", "block.attention_norm", True),
        *linear(f"{layer}.ln_2", "block.mlp_norm", True),
        fused(f"{layer}.attn.c_attn.weight", [f"{p}.weight" for p in projections], qkv_rows, transpose=True),
        fused(f"{layer}.attn.c_attn.bias", [f"{p}.bias" for p in projections], qkv_rows),
        *conv1d(f"{layer}.attn.c_proj", "block.attention.out"),
        *conv1d(f"{layer}.mlp.c_fc", "block.mlp.up"),
        *conv1d(f"{layer}.mlp.c_proj", "block.mlp.down"),
    ]


# Causal masks that old releases saved; the published GPT-2 also leaves out the prefix.
MASKS = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)

GPT2 = Family(("gpt2",), decoder_config, rules, MASKS, without_prefix("transformer"))
