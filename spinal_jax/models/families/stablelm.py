"""StableLM: Llama with layer norms and partial rotary, in some releases with attention and MLP side by side."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, Rule, same, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `stablelm` model."""
    hf.defaults(
        vocab_size=50304,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        layer_norm_eps=1e-5,
        use_qkv_bias=False,
        qk_layernorm=False,
        use_parallel_residual=False,
        tie_word_embeddings=False,
    )
    fields = llama.common(hf, eps="layer_norm_eps")
    hf.agree("head_dim", llama.equal_share(fields["width"], fields["heads"]), "heads share the width equally")
    parallel = hf.flag("use_parallel_residual")
    return DecoderConfig(
        **fields,
        ropes=(hf.rope(fields["head_dim"], default_partial=0.25),),
        tied=hf.flag("tie_word_embeddings"),
        norm="layer",
        norm_bias=True,
        parallel=parallel,
        shared_norm=parallel,
        qk_norm="heads" if hf.flag("qk_layernorm") else "none",
        qkv_bias=hf.flag("use_qkv_bias"),
    )


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a StableLM checkpoint."""
    attention = "model.layers.{i}.self_attn"
    norms = [
        same(f"{attention}.q_layernorm.norms.{{e}}.weight", "block.attention.query_norm.weight"),
        same(f"{attention}.k_layernorm.norms.{{e}}.weight", "block.attention.key_norm.weight"),
    ]
    return [*llama.rules(config), *(norms if config.qk_norm == "heads" else [])]


STABLELM = Family(("stablelm",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
