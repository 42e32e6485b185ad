"""Hunyuan, dense: Llama with norms on queries and keys behind the rotation, and a rope stretched by a fixed alpha."""

from __future__ import annotations

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.rope import Rope
from spinal_jax.models.translate import Family, Rule, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of a `hunyuan_v1_dense` model."""
    hf.defaults(
        vocab_size=290943,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        rms_norm_eps=1e-5,
        attention_bias=False,
        tie_word_embeddings=False,
    )
    hf.ignore("eod_token_id")
    hf.refuse("use_cla", "mlp_bias")
    hf.agree("use_qk_norm", True, "queries and keys are always normed")
    fields, bias = llama.common(hf), hf.flag("attention_bias")
    hf.agree("attention_head_dim", fields["head_dim"], f"head_dim makes it {fields['head_dim']}")
    return DecoderConfig(
        **fields,
        ropes=(hunyuan_rope(hf, fields["head_dim"]),),
        tied=hf.flag("tie_word_embeddings"),
        qk_norm="head",
        qk_norm_last=True,
        qkv_bias=bias,
        out_bias=bias,
    )


def hunyuan_rope(hf: HFConfig, head_dim: int) -> Rope:
    """The rotary embedding; a `dynamic` one with an alpha is static, of theta * alpha ** (dim / (dim - 2))."""
    key = "rope_scaling" if hf.get("rope_parameters") is None else "rope_parameters"
    scaling = hf.part(key)
    read = hf.rope(head_dim, extra=("alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"))
    if read.kind != "dynamic" or not scaling.get("alpha"):
        return read
    return Rope(head_dim, read.theta * scaling.positive("alpha") ** (head_dim / (head_dim - 2)))


def rules(config: DecoderConfig) -> list[Rule]:
    """Names of a Hunyuan checkpoint."""
    attention = "model.layers.{i}.self_attn"
    norms = llama.query_key_norm_rules(config, attention, "query_layernorm", "key_layernorm")
    return [*llama.rules(config), *norms]


HUNYUAN = Family(("hunyuan_v1_dense",), decoder_config, rules, llama.ROTARY_TABLES, without_prefix("model"))
