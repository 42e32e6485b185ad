"""Writes smollm2_shipped.json, to which test_smollm2.py holds an audit: python -m tests.golden.reference_smollm2

Hugging Face PyTorch on SmolLM2-135M-Instruct and the first of the prompts that ship with the package, a prompt at a
time, in float64 from the weights on; singular values are those of the hidden states themselves. Token ids are those of
the package, which isolates digits as the model's own tokenizer does and transformers' reading of GGUF files does not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from spinal_jax.data.prompts import read_prompts
from spinal_jax.models.formats.open import open_checkpoint

from .test_oracle import angle, spectrum, turn

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, MAX_LENGTH, LAST = 40, 96, 4


@torch.no_grad()
def reference() -> dict[str, Any]:
    """The columns of docs/method.md."""
    tokenizer = open_checkpoint(str(MODEL)).tokenizer()
    model = AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=torch.float64).eval()
    depth, rows, near, far, entropy = model.config.num_hidden_layers, [], [], [], []
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    for prompt in read_prompts(None, "jsonl", "prompt", PROMPTS, 0).prompts:
        ids = torch.tensor([tokenizer(prompt.text)["input_ids"][-MAX_LENGTH:]])
        seen.clear()
        model(ids, use_cache=False)
        h = torch.stack([x.reshape(x.shape[-2:]) for x in seen])  # [D + 1, T, d]
        lens = torch.log_softmax(model.lm_head(model.model.norm(h[:, -LAST:])), dim=-1)
        p = np.exp(lens.numpy())
        entropy.append(-np.sum(p * lens.numpy(), axis=-1))
        near.append(angle(p[:-1], p[1:]))
        far.append(angle(p[:-2], p[2:]))
        rows.append(h[:, 1:].numpy())
    side, across = np.concatenate(near, axis=1), np.concatenate(far, axis=1)
    turns = [turn(side[at - 1], side[at], across[at - 1]) for at in range(1, depth)]
    states = np.concatenate(rows, axis=1)  # [D + 1, N, d]
    spectra = [spectrum(each) for each in states]
    columns = {name: [found[name] for found in spectra] for name in spectra[0]}
    columns |= {"entropy": list(np.concatenate(entropy, axis=1).mean(axis=1))}
    columns |= {"transport": [math.nan, *(2 * side).mean(axis=1)], "curvature": [math.nan, *turns, math.nan]}
    return {
        "prompts": PROMPTS,
        "max_length": MAX_LENGTH,
        "rows": states.shape[1],
        "columns": {name: [None if math.isnan(x) else float(x) for x in values] for name, values in columns.items()},
    }


if __name__ == "__main__":
    (HERE / "smollm2_shipped.json").write_text(json.dumps(reference(), indent=1) + "\n")
