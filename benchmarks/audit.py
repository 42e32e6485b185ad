"""This audit against the plain PyTorch pipeline that one would write first, and its stages against their matmuls.

    python benchmarks/audit.py MODEL.gguf [--prompts FILE.jsonl.gz --format hh] [--limit 512] [--max-length 128]

Both pipelines run here, one after the other, each in a process of its own, on the same weights, prompts and positions:
wall time from start to numbers, and the peak of resident memory. The plain one keeps every hidden state, stacks them,
takes `torch.linalg.svdvals` of each layer and the softmax of each layer at the last four positions; it gives no
intervals.
The audit's figures include its jackknife. Stages are medians of repeated calls in one process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAST = 4
TORCH_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts")
    parser.add_argument("--format", default="jsonl")
    parser.add_argument("--limit", type=int, default=512)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="calls of each stage")
    parser.add_argument("--role", choices=["audit", "torch", "stages"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        print(json.dumps({"audit": run_audit, "torch": run_torch, "stages": run_stages}[args.role](args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        as_folder(args.model, Path(folder))
        found = {role: child(role, folder) for role in ("audit", "torch", "stages")}
    show(found)


def child(role: str, folder: str) -> dict[str, Any]:
    """Runs this file again as one of its roles, on the float32 folder."""
    arguments = [folder if a == sys.argv[1] else a for a in sys.argv[1:]]
    print(f"running {role} ...", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--role", role], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def as_folder(source: str, folder: Path) -> None:
    """The checkpoint as float32 safetensors with tokenizer, so that neither side dequantises as it runs."""
    from safetensors.numpy import save_file

    from spinal_jax.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    save_file(
        {name: checkpoint.tensor(name).astype(np.float32) for name in checkpoint.names()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    checkpoint.tokenizer().save_pretrained(folder)
    checkpoint.close()


def measured(begin: float) -> dict[str, float]:
    """Seconds since `begin`, and the peak of this process's resident memory in GiB."""
    return {
        "seconds": time.perf_counter() - begin,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run_audit(args: argparse.Namespace) -> dict[str, Any]:
    """This project."""
    begin = time.perf_counter()
    import spinal_jax

    trace = spinal_jax.audit(
        args.model, args.prompts, format=args.format, limit=args.limit, max_length=args.max_length, progress=False
    )
    return measured(begin) | {"tokens": trace.prompts["tokens"], "transport": list(trace.columns["transport"][1:])}


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    """The plain pipeline, with the model and library used as their documentation shows."""
    begin = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spinal_jax.data import read_prompts

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    texts = [p.text for p in read_prompts(args.prompts, args.format, limit=args.limit).prompts]
    hidden: list[Any] = []
    steps: list[Any] = []
    final: list[Any] = []
    model.model.layers[-1].register_forward_hook(
        lambda module, inputs, out: final.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for start in range(0, len(texts), TORCH_BATCH):
            batch = tokenizer(
                texts[start : start + TORCH_BATCH],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=args.max_length,
            )
            final.clear()
            out = model(**batch, output_hidden_states=True, logits_to_keep=1)
            # The last entry of hidden_states is already normed; the hook has it before the norm.
            states = torch.stack([*out.hidden_states[:-1], final[0]])  # [D + 1, B, T, d]
            for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
                hidden.append(states[:, row, 1:length].clone())
                p = torch.softmax(model.lm_head(model.model.norm(states[:, row, max(0, length - LAST) : length])), -1)
                overlap = (p[:-1] * p[1:]).sqrt().sum(-1).clamp(max=1)
                steps.append(2 * torch.arccos(overlap))
        stacked = torch.cat(hidden, dim=1)  # [D + 1, N, d]
        spectra = [torch.linalg.svdvals(layer) for layer in stacked]
    slope = [np.polyfit(np.log(np.arange(58, 289)), np.log(s.numpy()[57:288]), 1)[0] for s in spectra]
    assert all(np.isfinite(slope))
    return measured(begin) | {"transport": torch.cat(steps, 1).mean(1).tolist()}


def run_stages(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage of one batch, and of the matmuls that it cannot do without."""
    from functools import partial

    import jax
    import jax.numpy as jnp

    from spinal_jax import api, data
    from spinal_jax.batch import SLOTS
    from spinal_jax.config import AuditConfig, ModelConfig, PromptsConfig
    from spinal_jax.metrics import contraction
    from spinal_jax.metrics.transport import lens_stats
    from spinal_jax.models.decoder import fold
    from spinal_jax.trace import reading

    config = AuditConfig(
        ModelConfig(args.model),
        PromptsConfig(args.prompts, args.format, limit=args.limit, max_length=args.max_length),
    )
    prompts = data.read_prompts(args.prompts, args.format, limit=args.limit)
    with api.opened(config.model) as (checkpoint, family, decoder):
        plan = api.plan_prompts(prompts, checkpoint.tokenizer(), decoder, config.prompts, config.metrics)
        model = api.load(checkpoint, family, decoder, config.model.dtype)
    batch = jax.tree.map(jnp.asarray, next(iter(plan)))
    height, length = batch.tokens.shape
    tokens, measured_count = height * length, batch.measured.shape[0]
    boundaries, width = decoder.depth + 1, decoder.width

    def seconds(call: Callable[[], Any]) -> float:
        jax.block_until_ready(call())
        times = []
        for _ in range(args.repeats):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - begin)
        return float(np.median(times))

    def forward(model: Any, batch: Any, tap: Any = None) -> Any:
        return model.forward(
            batch.tokens, tap=tap, positions=batch.positions, segments=batch.segments, lengths=batch.lengths
        )

    grams = contraction.init(SLOTS, boundaries, width, np.dtype(np.float32))
    states = jax.random.normal(jax.random.key(0), (boundaries, height, length, width))

    def gram_stage(grams: Any, states: Any, batch: Any) -> Any:
        def add(i: Any, sums: Any) -> Any:
            return contraction.update(sums, states[i], batch.counted, batch.slots, i)

        return jax.lax.fori_loop(0, boundaries, add, grams)

    def block_matmuls(x: Any, wide: Any, stack: Any) -> Any:
        def block(carry: Any, weights: Any) -> Any:
            outs = [(wide if w.shape[1] != width else x) @ w.T for w in weights]
            return carry + sum(o[0, 0] for o in outs), None

        return jax.lax.scan(block, jnp.float32(0), stack)[0]

    block = model.stacks[0]
    stack = [
        m.weight[...]
        for m in (
            block.attention.query,
            block.attention.key,
            block.attention.value,
            block.attention.out,
            block.mlp.gate,
            block.mlp.up,
            block.mlp.down,
        )
    ]
    x, wide = jnp.ones((tokens, width)), jnp.ones((tokens, decoder.mlp_width))
    kept = jax.random.normal(jax.random.key(1), (boundaries, measured_count, width)) / 3
    head = model.head()
    lens = partial(lens_stats, pairs=reading.pairs_of(decoder.depth + 1))
    chunk = 512

    def lens_matmuls(x: Any, unembed: Any) -> Any:
        def add(i: Any, total: Any) -> Any:
            rows = jax.lax.dynamic_slice_in_dim(unembed, i * chunk, chunk)
            return total + (x.reshape(-1, width) @ rows.T)[::64, ::64].sum()

        return jax.lax.fori_loop(0, unembed.shape[0] // chunk, add, jnp.float32(0))

    jit = {
        "forward": jax.jit(forward),
        "forward and Gram sums": jax.jit(
            lambda model, batch, grams: forward(
                model,
                batch,
                fold(lambda g, h, i: contraction.update(g, h, batch.counted, batch.slots, i), grams),
            )
        ),
        "block matmuls": jax.jit(block_matmuls),
        "Gram sums": jax.jit(gram_stage),
        "transport": jax.jit(lambda model, x: lens((model.head(),), (x,))),
        "transport matmuls": jax.jit(lens_matmuls),
    }
    begin = time.perf_counter()
    jit["forward"].lower(model, batch).compile()
    compile_forward = time.perf_counter() - begin
    rows = np.random.default_rng(0).normal(size=(4 * width, width))
    found = {
        "forward": seconds(lambda: jit["forward"](model, batch)),
        "block matmuls": seconds(lambda: jit["block matmuls"](x, wide, stack)),
        "forward and Gram sums": seconds(lambda: jit["forward and Gram sums"](model, batch, grams)),
        "Gram sums": seconds(lambda: jit["Gram sums"](grams, states, batch)),
        "transport": seconds(lambda: jit["transport"](model, kept)),
        "transport matmuls": seconds(lambda: jit["transport matmuls"](kept, head.unembed)),
        "eigenvalues of one boundary": seconds(lambda: contraction.singular_values(rows.T @ rows)),
    }
    return {
        "seconds": found,
        "compile forward": compile_forward,
        "batches": len(plan.batches),
        "boundaries": boundaries,
        "waste": plan.waste,
    }


def show(found: dict[str, Any]) -> None:
    """The tables, in Markdown."""
    ours, torch, stages = found["audit"], found["torch"], found["stages"]
    gap = np.abs(np.array(ours["transport"]) - np.array(torch["transport"])).max()
    print("| pipeline | seconds | peak GiB |\n|---|---|---|")
    for name, row in (("spinal audit, with intervals", ours), ("plain PyTorch, without", torch)):
        print(f"| {name} | {row['seconds']:.1f} | {row['gib']:.2f} |")
    print(f"| ratio | {torch['seconds'] / ours['seconds']:.2f} | {ours['gib'] / torch['gib']:.2f} |")
    print(
        f"\n{ours['tokens']:,} tokens, {stages['waste']:.1%} padding; transport of the two differs by at most "
        f"{gap:.1e} rad.\n"
    )
    s = stages["seconds"]
    spectra = s["eigenvalues of one boundary"] * stages["boundaries"] / stages["batches"]
    print("| stage of one batch | ms | against | ratio |\n|---|---|---|---|")
    print(f"| forward | {s['forward'] * 1e3:.0f} | its block matmuls | {s['forward'] / s['block matmuls']:.2f} |")
    print(f"| transport | {s['transport'] * 1e3:.0f} | its matmuls | {s['transport'] / s['transport matmuls']:.2f} |")
    both = s["Gram sums"] + spectra
    print(f"| contraction: Gram sums and eigenvalues | {both * 1e3:.0f} | forward | {both / s['forward']:.3f} |")
    print(f"\nCompiling the forward took {stages['compile forward']:.1f} s.")


if __name__ == "__main__":
    main()
