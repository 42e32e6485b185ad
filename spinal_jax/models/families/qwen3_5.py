"""Qwen3.5 and 3.6, the text part: Qwen3-Next with a layer for each input of a delta net, dense or with experts."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import qwen3_next
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, fused, linear, without_prefix


def text_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3_5_text` model."""
    hf.defaults(
        vocab_size=248320,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=32,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    hf.refuse("mlp_only_layers")
    return DecoderConfig(**qwen3_next.common(hf, *MROPE))


def moe_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3_5_moe_text` model."""
    hf.defaults(
        vocab_size=248320,
        hidden_size=2048,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=2,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts_per_tok=8,
        num_experts=256,
    )
    hf.refuse("mlp_only_layers")
    hf.agree("decoder_sparse_step", 1, "every block has experts")
    hf.agree("norm_topk_prob", True, "the weights of the chosen experts are always normalised")
    hf.values |= {"intermediate_size": hf.size("moe_intermediate_size")}  # no block is dense
    fields = qwen3_next.common(hf, *MROPE)
    return DecoderConfig(**fields, **qwen3_next.mixture(hf, (True,) * fields["depth"], normalise=True))


def composite_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `qwen3_5` or `qwen3_5_moe` model, which reads images too: its text part."""
    hf.defaults(text_config={}, tie_word_embeddings=False)
    hf.ignore("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    hf.ignore("language_model_only")
    text = hf.section("text_config", f"{hf.model_type}_text")
    text.agree("tie_word_embeddings", hf.flag("tie_word_embeddings"), "outside of text_config it says otherwise")
    read = moe_config if hf.model_type == "qwen3_5_moe" else text_config
    return replace(read(text), family=hf.model_type, tied=hf.flag("tie_word_embeddings"))


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Qwen3.5 checkpoint."""
    net, delta = "model.layers.{i}.linear_attn", "block.delta"
    shared = qwen3_next.shared_with_qwen3_5(config)
    if config.delta is None:
        return shared
    inputs = [f"{delta}.{name}.weight" for name in ("query", "key", "value")]
    return [
        *shared,
        fused(f"{net}.in_proj_qkv.weight", inputs, qwen3_next.input_rows),
        *linear(f"{net}.in_proj_z", f"{delta}.gate", False),
        *linear(f"{net}.in_proj_b", f"{delta}.rate", False),
        *linear(f"{net}.in_proj_a", f"{delta}.decay", False),
    ]


# How rotations are shared by time, height and width, which are all the same for text.
MROPE = ("mrope_section", "mrope_interleaved")
# The names of the text part within a model that reads images, and what is not the text part.
TEXT_PART = ((r"^model\.language_model\.", "model."),)
VISION_PART = (*qwen3_next.IGNORED, r"(model\.)?visual\..*")

QWEN3_5_TEXT = Family(("qwen3_5_text",), text_config, rules, qwen3_next.IGNORED, without_prefix("model"))
QWEN3_5_MOE_TEXT = Family(
    ("qwen3_5_moe_text",), moe_config, rules, qwen3_next.IGNORED, without_prefix("model"), experts_apart=True
)
QWEN3_5 = Family(("qwen3_5", "qwen3_5_moe"), composite_config, rules, VISION_PART, TEXT_PART, experts_apart=True)
