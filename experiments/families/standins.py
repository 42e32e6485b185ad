"""Stand-ins for the paper's families: python experiments/families/standins.py OUT.

For each pair a base of random weights, in the architecture of the family and of bytes, and an "aligned" copy whose
terminal blocks alone are disturbed, as OUT/PAIR/base and OUT/PAIR/aligned. They prove the pipeline, which has to find
what was planted: everything that has changed lies in the terminal block. Of alignment they say nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from spinal_jax.metrics.depth import terminal_block
from spinal_jax.models.decoder import Decoder
from spinal_jax.models.families import read_model
from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
from spinal_jax.models.formats.export import export
from spinal_jax.models.formats.memory import MemoryCheckpoint
from spinal_jax.models.parts import take_apart

DISTURBED = 0.3  # standard deviation of what is added, of that of the matrix
_SHARED = {**SIZES["0.3m"], "num_attention_heads": 4, "tie_word_embeddings": False}
_SHARED.pop("rms_norm_eps")
# What sets each family apart, as in the config.json of the checkpoint; depths differ, as theirs do.
FAMILIES: dict[str, dict[str, Any]] = {
    "phi-2": {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "num_hidden_layers": 8,
        "num_key_value_heads": 4,
        "hidden_act": "gelu_new",
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
    },
    "deepseek-llm-7b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 7,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
    },
    "llama-3-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 9,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
    },
}


def make(config: dict[str, Any], seed: int, folder: Path) -> None:
    """Writes base and aligned as Hugging Face folders; equal seeds give equal weights."""
    _, decoder = read_model(config)
    tokenizer = byte_tokenizer()
    base = jax.device_get(take_apart(Decoder(decoder, rngs=nnx.Rngs(seed)))[1])
    for name, arrays in (("base", base), ("aligned", disturbed(base, decoder.depth, seed))):
        export(MemoryCheckpoint(name, config, arrays, tokenizer), str(folder / name), overwrite=True)


def disturbed(arrays: dict[str, np.ndarray], depth: int, seed: int) -> dict[str, np.ndarray]:
    """The parameters with noise in the matrices of the terminal blocks; block l, from 1, ends at boundary l."""
    rng = np.random.default_rng(seed)
    first, last = terminal_block(depth)
    found = dict(arrays)
    for path in sorted(arrays):
        if path.startswith("stacks.") and arrays[path].ndim > 2:
            changed = arrays[path].copy()
            part = changed[first - 1 : last]
            part += DISTURBED * changed.std() * rng.standard_normal(part.shape, np.float32)
            found[path] = changed
    return found


def main(out: Path) -> None:
    for seed, (pair, own) in enumerate(FAMILIES.items()):
        make({**_SHARED, **own}, seed, out / pair)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python experiments/families/standins.py OUT")
    main(Path(sys.argv[1]))
