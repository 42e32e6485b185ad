"""OLMo 3 and 3.1: OLMo 2 with sliding windows in three of four blocks, which keep an unscaled rope of their own."""

from __future__ import annotations

from dataclasses import replace

from spinal_jax.models.config import DecoderConfig
from spinal_jax.models.families import llama, olmo2
from spinal_jax.models.hf_config import HFConfig
from spinal_jax.models.translate import Family, without_prefix


def decoder_config(hf: HFConfig) -> DecoderConfig:
    """config.json of an `olmo3` model."""
    hf.defaults(sliding_window=4096)
    config = olmo2.without_rope(hf)
    # Hugging Face reads rope_theta and rope_scaling of older files for full attention alone.
    full = hf.rope(config.head_dim, section="full_attention", default_theta=5e5)
    sliding = hf.rope(config.head_dim, section="sliding_attention", theta_key="", default_theta=5e5)
    window = hf.window("sliding_window")
    windows = llama.layer_windows(hf, config.depth, window, lambda layer: (layer + 1) % 4 != 0)
    return replace(
        config, ropes=(full, sliding), layer_rope=tuple(int(window > 0) for window in windows), windows=windows
    )


OLMO3 = Family(("olmo3",), decoder_config, olmo2.rules, llama.ROTARY_TABLES, without_prefix("model"))
