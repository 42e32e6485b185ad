"""Fuzzed descriptions of models: config.json of every family, metadata of GGUF files, indices of shards."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from spinal_jax import data
from spinal_jax.models.families import read_checkpoint, read_model
from spinal_jax.models.formats.gguf_architectures import ARCHITECTURES
from spinal_jax.models.formats.open import open_checkpoint
from spinal_jax.models.rope import inverse_frequencies

from ..parity.gguf_files import KEYS, some_tensors, write
from ..parity.published import PUBLISHED
from .mutations import TEXTS, changed_json, json_text, value

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": True},
    "longrope": {"factor": 2.0, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "attention_factor": 1.1},
}
LAYERS = ("full_attention", "sliding_attention", "linear_attention", "chunked_attention", "mamba")
NUMBERS = (0, -1, 1, 7, 1e-45, 3.4e38, 1e99, 0.3, float("nan"), float("inf"), 10**30, True, None, "2", [], [0.0] * 32)
OTHERS: dict[str, Any] = {  # settings that most families do not state
    "sliding_window": 7,
    "use_sliding_window": True,
    "head_dim": 64,
    "attention_bias": True,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "text_config": {"model_type": "llama"},
    "final_logit_softcapping": 30.0,
}


def families(folder: Path, rng: random.Random) -> None:
    """A published config with other ropes, types of layers, sizes and switches is refused, or its ropes are finite."""
    config = copy.deepcopy(PUBLISHED[rng.choice(sorted(PUBLISHED))])
    holder = config.get("text_config", config)
    for _ in range(rng.randrange(1, 3)):
        action = rng.randrange(5)
        if action == 0:
            kind = rng.choice(list(ROPES))
            rope = ROPES[kind] | {"rope_type": kind, "original_max_position_embeddings": 64}
            rope[rng.choice(list(rope))] = rng.choice(NUMBERS)
            del rope[rng.choice(list(rope))]
            holder[rng.choice(("rope_scaling", "rope_parameters"))] = rope
        elif action == 1:
            said = holder.get("num_hidden_layers")
            depth = (said if isinstance(said, int) and 0 < said < 100 else 12) + rng.choice((0, 0, 0, 1, -1))
            holder["layer_types"] = rng.choices(LAYERS[: rng.randrange(1, 6)], k=depth)
        elif action == 2:
            holder[rng.choice([*holder, *OTHERS])] = rng.choice(NUMBERS)
        elif action == 3:
            name = rng.choice(list(OTHERS))
            holder[name] = value(rng) if rng.random() < 0.5 else OTHERS[name]
        else:
            config = changed_json(rng, config)
            holder = config.get("text_config", config) if isinstance(config, dict) else {}
            holder = holder if isinstance(holder, dict) else {}
    if not isinstance(config, dict):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, decoder = read_model(config)
        for rope in decoder.ropes:
            assert np.isfinite(inverse_frequencies(rope, jnp.full((1, 2), 40))).all(), rope


METADATA: dict[str, Any] = {  # with those of gguf_files.KEYS
    ".attention.layer_norm_epsilon": 1e-5,
    ".attention.key_length": 16,
    ".attention.value_length": 16,
    ".attention.sliding_window": 7,
    ".attention.sliding_window_pattern": [True],
    ".attention.scale": 0.3,
    ".attention.clamp_kqv": 0.5,
    ".attention.temperature_scale": 0.1,
    ".vocab_size": 24,
    ".expert_count": 4,
    ".expert_used_count": 2,
    ".expert_feed_forward_length": 32,
    ".expert_weights_norm": True,
    ".expert_gating_func": 2,
    ".expert_group_count": 2,
    ".expert_shared_count": 1,
    ".leading_dense_block_count": 0,
    ".nextn_predict_layers": 0,
    ".attention.kv_lora_rank": 8,
    ".attention.q_lora_rank": 8,
    ".ssm.inner_size": 64,
    ".ssm.time_step_rank": 4,
    ".ssm.group_count": 2,
    ".ssm.state_size": 16,
    ".ssm.conv_kernel": 4,
    ".use_parallel_residual": True,
    ".rope.scaling.yarn_log_multiplier": 0.1,
    ".rope.dimension_count": 16,
    ".rope.freq_base": 1e4,
    ".rope.freq_base_swa": 1e4,
    ".rope.scaling.type": "yarn",
    ".rope.scaling.factor": 4.0,
    ".rope.scaling.attn_factor": 1.2,
    ".rope.scaling.original_context_length": 16,
    "general.alignment": 32,
    "split.count": 1,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*"abcdefghijklmnopqrstuvw", "ab"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.scores": [0.5] * 24,
    "tokenizer.ggml.token_type": [1] * 24,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.unknown_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
SAID = (
    *(0, 1, 2, 3, 5, 23, 24, 2**31, 2**32 - 1, 0.0, -1.0, 1e-45, 3e38, float("nan"), float("inf"), True, "", "yarn"),
    *("none", "linear", "longrope", "llama", "gemma3", "llama-bpe", [0], [1, 2], [0.5], ["a"], [""], [" "], ["a  b"]),
)


def metadata(folder: Path, rng: random.Random) -> None:
    """Metadata of any architecture, with what they do not say left out, and one to three of them changed."""
    keys = dict(KEYS) | {key: said for key, said in METADATA.items() if rng.random() < 0.6}
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(list(keys))
        keys[key] = rng.choice(TEXTS[:6]) if rng.random() < 0.1 else rng.choice(SAID)
        if rng.random() < 0.2:
            del keys[key]
    tensors = some_tensors()
    if rng.random() < 0.3:
        name = rng.choice(("rope_freqs", "rope_factors_long", "rope_factors_short"))
        table = np.full(rng.choice((1, 7, 8)), rng.choice((0.0, 1.0, 8.0, -1.0, np.nan, np.inf)), np.float32)
        tensors |= {f"{name}.weight": table}
    if rng.random() < 0.2:
        tensors[rng.choice(list(tensors))] = np.ones(rng.choice(((1,), (3, 5), (2, 3, 32), (64, 64))), np.float32)
    write(folder / "m.gguf", rng.choice(list(ARCHITECTURES)), keys, tensors)
    with contextlib.closing(open_checkpoint(str(folder / "m.gguf"))) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        data.token_ids(data.Prompt("abc", (("user", "abc"),)), checkpoint.tokenizer(), 16, False)
        read_checkpoint(checkpoint)
        for name in checkpoint.names():
            checkpoint.tensor(name)


def shards(sound: Path, folder: Path, rng: random.Random) -> None:
    """Two shards whose index is changed, or which are not what the index says: what is read is what was there."""
    source = shutil.copytree(sound, folder / "model")
    whole = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(whole)
    cut = rng.randrange(1, len(names))
    parts = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    index: Any = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in whole.values())},
        "weight_map": {name: shard for shard, held in parts.items() for name in held},
    }
    for shard, held in parts.items():
        tensors = {name: whole[name] for name in held}
        if rng.random() < 0.3:
            twice = rng.choice([name for name in names if name not in held])
            tensors[twice] = whole[twice] if rng.random() < 0.5 else whole[twice] + 1
        if rng.random() < 0.2:
            del tensors[rng.choice(sorted(tensors))]
        save_file(tensors, source / shard)
    if rng.random() < 0.5:
        place = rng.choice(("a.safetensors", "b.safetensors", "", ".", "..", "/etc/passwd", "../model/a.safetensors"))
        index["weight_map"][rng.choice(names)] = place
    text = json_text(rng, index) if rng.random() < 0.5 else json.dumps(index).encode()
    (source / "model.safetensors.index.json").write_bytes(text)
    with contextlib.closing(open_checkpoint(str(source))) as checkpoint:
        for name in checkpoint.names():
            if name in whole:
                np.testing.assert_array_equal(checkpoint.tensor(name), whole[name], err_msg=name)
