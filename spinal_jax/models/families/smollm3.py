"""SmolLM3: Llama of which every fourth block has no rotary embedding."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `smollm3` model."""
    hf.defaults(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        attention_bias=False,
        mlp_bias=False,
        use_sliding_window=False,
        no_rope_layer_interval=4,
        tie_word_embeddings=True,
    )
    fields = llama.common(hf)
    depth, interval = fields["depth"], hf.size("no_rope_layer_interval")
    turns = hf.get("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(depth)])
    if not isinstance(turns, list) or len(turns) < depth or not all(turn in (0, 1) for turn in turns):
        raise hf.refusal("no_rope_layers", f"which is not {depth} times 1 (rotary) or 0")
    window = hf.window("sliding_window")
    slides = hf.flag("use_sliding_window") and window > 0
    fields["windows"] = llama.layer_windows(hf, depth, window, lambda layer: slides and not turns[layer])
    fields["layer_rope"] = tuple(0 if turn else -1 for turn in turns[:depth])
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_theta=2e6),),
        tied=hf.flag("tie_word_embeddings"),
        qkv_bias=hf.flag("attention_bias"),
        out_bias=hf.flag("attention_bias"),
        mlp_bias=hf.flag("mlp_bias"),
    )


SMOLLM3 = Family(("smollm3",), decoder_config, llama.rules, llama.ROTARY_TABLES, without_prefix("model"))
