"""The same audit and the same DPO step in plain PyTorch."""

from __future__ import annotations

import importlib
import platform
import time
from typing import Any

import numpy as np

from benchmarks.accelerator.common import LAST, PROMPTS, SHAPES, TORCH_BATCH, pairs, prompt_ids, table


def load() -> None:
    """Imports the libraries."""
    importlib.import_module("torch")
    importlib.import_module("transformers.models.llama.modeling_llama")


def torch_card() -> str:
    import torch
    import transformers

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return f"{kind}, torch {torch.__version__}, transformers {transformers.__version__}"


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_model(shape: str, dtype: str) -> Any:
    """A Llama of Hugging Face with random weights, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{k: v for k, v in SHAPES[shape].items() if k != "model_type"})
    with torch.device(torch_device()):
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    return model


def torch_audit(name: str, shape: str, toy: bool) -> bool:
    """All hidden states kept, transport by softmax, spectra of the states or of their Gram matrices; no intervals."""
    import torch

    device = torch_device()

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    model = torch_model(shape, "bfloat16").eval()
    ids = prompt_ids(SHAPES[shape]["vocab_size"], 128 if toy else PROMPTS)
    final: list[Any] = []
    model.model.layers[-1].register_forward_hook(
        lambda module, inputs, out: final.append(out[0] if isinstance(out, tuple) else out)
    )

    @torch.no_grad()
    def batches(ids: list[np.ndarray]) -> tuple[Any, Any]:
        hidden, steps = [], []
        for start in range(0, len(ids), TORCH_BATCH):
            some = ids[start : start + TORCH_BATCH]
            longest = max(map(len, some))
            tokens = torch.zeros((len(some), longest), dtype=torch.long)
            mask = torch.zeros_like(tokens)
            for row, each in enumerate(some):
                tokens[row, : len(each)], mask[row, : len(each)] = torch.from_numpy(each.astype(np.int64)), 1
            final.clear()
            out = model(
                input_ids=tokens.to(device), attention_mask=mask.to(device), output_hidden_states=True, logits_to_keep=1
            )
            states = torch.stack([*out.hidden_states[:-1], final[0]])
            for row, each in enumerate(some):
                hidden.append(states[:, row, 1 : len(each)].clone())
                logits = model.lm_head(model.model.norm(states[:, row, max(0, len(each) - LAST) : len(each)]))
                p = torch.softmax(logits.float(), -1)
                steps.append(2 * torch.arccos((p[:-1] * p[1:]).sqrt().sum(-1).clamp(max=1)))
        return torch.cat(hidden, dim=1), torch.cat(steps, 1).mean(1)

    batches(ids[:TORCH_BATCH])
    begin = clock()
    stacked, transport = batches(ids)
    forward = clock() - begin
    count = len(stacked)
    tried = count if toy or name == "1B" else 3  # of the boundaries, whose time is then that of all
    with torch.no_grad():
        torch.linalg.svdvals(stacked[0].float())
        begin = clock()
        for layer in stacked[:tried]:
            torch.linalg.svdvals(layer.float())
        singular = (clock() - begin) * count / tried

        def spectrum(layer: Any) -> Any:
            wide = layer.double()
            return torch.linalg.eigvalsh(wide.T @ wide)

        spectrum(stacked[0])
        begin = clock()
        for layer in stacked:
            spectrum(layer)
        eigen = clock() - begin
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    scaled = "" if tried == count else f" ({tried} of {count} boundaries, scaled)"
    rows = [
        ("batches, s", f"{forward:.2f}"),
        ("singular values of the states, float32, s", f"{singular:.2f}{scaled}"),
        ("**whole by singular values, s**", f"**{forward + singular:.2f}**"),
        ("float64 Gram matrices and eigenvalues, s", f"{eigen:.2f}"),
        ("**whole by eigenvalues, s**", f"**{forward + eigen:.2f}**"),
        ("peak memory of the device, GiB", f"{peak:.1f}"),
    ]
    table(f"Plain PyTorch without intervals, {name} shape, bfloat16 ({torch_card()})", ("", "PyTorch"), rows)
    return bool(torch.isfinite(transport).all())


def torch_dpo(toy: bool) -> bool:
    """One DPO step of all weights: bfloat16 autocast over float32 weights, AdamW."""
    import torch
    import torch.nn.functional as F

    device, shape = torch_device(), "toy" if toy else "1B"
    model = torch_model(shape, "float32")
    model.gradient_checkpointing_enable()
    examples, length = pairs(SHAPES[shape]["vocab_size"], toy)
    tokens = torch.from_numpy(np.stack([s.ids for pair in examples for s in pair]).astype(np.int64)).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def logp() -> Any:
        with torch.autocast(device, torch.bfloat16):
            logits = model(input_ids=tokens).logits[:, length // 2 - 1 : -1]
        every = torch.log_softmax(logits.float(), -1)
        return every.gather(-1, tokens[:, length // 2 :, None])[..., 0].sum(-1)

    with torch.no_grad():
        known = logp()
    times, loss = [], None
    for _ in range(5):
        begin = time.perf_counter()
        ratio = logp() - known
        loss = -F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    taken, count = float(np.median(times[1:])), sum(p.numel() for p in model.parameters())
    rate = 6 * count * tokens.numel() / taken / 1e12
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    head = ("PyTorch", "ms a step", "TFLOP/s by 6 P T", "peak GiB", "loss")
    table(
        f"DPO step, 1B shape, {len(examples)} pairs of {length} tokens ({torch_card()})",
        head,
        [
            (
                "all weights, autocast, checkpointing",
                f"{taken * 1e3:.0f}",
                f"{rate:.1f}",
                f"{peak:.1f}",
                f"{loss.item():.4f}",
            )
        ],
    )
    return True
