"""This audit against the plain PyTorch pipeline that one would write first, and its stages against their matmuls.

    python benchmarks/audit.py MODEL.gguf [--prompts FILE.jsonl.gz --format hh] [--limit 512] [--max-length 128]
    python benchmarks/audit.py --shape llama-3-8b --dtype bfloat16 --device gpu

Both pipelines run here, one after the other, each in a process of its own, on the same weights, prompts and positions:
wall time from start to numbers, the time that processors worked, which other work on the machine lengthens less, and
the peak of resident memory. The plain one keeps every hidden state, stacks them, takes `torch.linalg.svdvals` of each
layer and the softmax of each layer at the last four positions; it gives no intervals.
The audit's figures include its jackknife. Stages are medians of repeated calls in one process.

With --shape both run on random weights in the shape of a model, over bytes; with --device gpu both run on a GPU, where
the plain one keeps every hidden state too: a lower --limit makes room for it. Tokens/s are those of the batches, of the
audit without what it takes to compile them. The share of a device's peak (MFU) is by FLOPs of
`spinal_jax.plan.estimate` and the data sheets of `spinal_jax.config.data_sheets`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PLATFORM = {"cpu": "cpu", "gpu": "cuda"}
LAST = 4
TORCH_BATCH = 8
MATMUL_ROWS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a checkpoint of the Llama family")
    parser.add_argument("--shape", help="random weights instead: a shape that spinal plan knows, or 0.3m to 30m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=list(PLATFORM), default="cpu")
    parser.add_argument("--peak", help="the device as spinal plan names it; found by its own name where it is one")
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
    if (args.model is None) == (args.shape is None):
        parser.error("give a checkpoint or --shape")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_PLATFORMS"] = "cpu"  # weights are drawn on the host: the device is the children's
        model = as_folder(args, Path(folder) / "model")
        found = {role: child(role, model, args) for role in ("audit", "torch", "stages")}
    show(found)


def child(role: str, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs this file again as one of its roles, on the folder."""
    at = sys.argv.index(args.model) if args.model else None
    arguments = [model, *(a for n, a in enumerate(sys.argv[1:], 1) if n != at), "--role", role]
    print(f"running {role} ...", file=sys.stderr)
    own = {**os.environ, "JAX_PLATFORMS": PLATFORM[args.device]}
    done = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=own
    )
    return json.loads(done.stdout.splitlines()[-1])


def as_folder(args: argparse.Namespace, folder: Path) -> str:
    """The checkpoint as safetensors of one dtype with tokenizer, so that neither side converts as it runs."""
    from spinal_jax.models.formats.byte_level import SIZES, byte_tokenizer
    from spinal_jax.models.formats.export import export
    from spinal_jax.models.formats.memory import random_checkpoint
    from spinal_jax.models.formats.open import open_checkpoint
    from spinal_jax.plan.shapes import shipped

    if args.shape is None:
        checkpoint = open_checkpoint(args.model)
    else:
        config = dict({**shipped(), **SIZES}[args.shape])
        checkpoint = random_checkpoint(args.shape, config, byte_tokenizer(), 0)
    export(checkpoint, str(folder), dtype=args.dtype)
    checkpoint.close()
    return str(folder)


def measured(begin: float, device_bytes: int | None) -> dict[str, Any]:
    """Seconds since `begin`, those that processors worked for this process, and the peaks of its resident memory and of
    the device's in GiB; None where the device has no memory of its own."""
    return {
        "seconds": time.perf_counter() - begin,
        "worked": time.process_time(),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device_gib": device_bytes and device_bytes / 2**30,
    }


def matmul_rate(call: Callable[[], Any], width: int, wide: int) -> float:
    """FLOP/s of the fastest of twenty calls, each a product [MATMUL_ROWS, width] by [width, wide]."""
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 2 * MATMUL_ROWS * width * wide / min(times)


def run_audit(args: argparse.Namespace) -> dict[str, Any]:
    """This project."""
    begin = time.perf_counter()
    import jax

    from spinal_jax.audit.pipeline import run_audit

    trace = run_audit(asked(args))
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    transport = list(trace.columns["transport"][1:])
    return measured(begin, peak) | {"tokens": trace.prompts["tokens"], "transport": transport}


def asked(args: argparse.Namespace) -> Any:
    """The settings of the audit."""
    from spinal_jax.config import AuditConfig, ModelConfig, PromptsConfig

    return AuditConfig(
        ModelConfig(args.model, dtype=args.dtype),
        PromptsConfig(path=args.prompts, format=args.format, limit=args.limit, max_length=args.max_length),
    )


def run_torch(args: argparse.Namespace) -> dict[str, Any]:
    """The plain pipeline, with the model and library used as their documentation shows."""
    begin = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from spinal_jax.data import read_prompts

    device = PLATFORM[args.device]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval().to(device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    texts = [p.text for p in read_prompts(args.prompts, args.format, limit=args.limit).prompts]
    hidden: list[Any] = []
    steps: list[Any] = []
    final: list[Any] = []
    model.model.layers[-1].register_forward_hook(
        lambda module, inputs, out: final.append(out[0] if isinstance(out, tuple) else out)
    )
    batches = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(texts), TORCH_BATCH):
            batch = tokenizer(
                texts[start : start + TORCH_BATCH],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=args.max_length,
            ).to(device)
            final.clear()
            out = model(**batch, output_hidden_states=True, logits_to_keep=1)
            # The last entry of hidden_states is already normed; the hook has it before the norm.
            states = torch.stack([*out.hidden_states[:-1], final[0]])  # [D + 1, B, T, d]
            for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
                hidden.append(states[:, row, 1:length].clone())
                logits = model.lm_head(model.model.norm(states[:, row, max(0, length - LAST) : length]))
                p = torch.softmax(logits.float(), -1)
                overlap = (p[:-1] * p[1:]).sqrt().sum(-1).clamp(max=1)
                steps.append(2 * torch.arccos(overlap))
        transport = torch.cat(steps, 1).mean(1).tolist()  # waits for the device
        batches = time.perf_counter() - batches
        stacked = torch.cat(hidden, dim=1)  # [D + 1, N, d]
        spectra = [torch.linalg.svdvals(layer.float()).cpu().numpy() for layer in stacked]
    count = len(spectra[0])
    k = np.arange(-(-count // 10), count // 2 + 1)
    assert all(np.isfinite(np.polyfit(np.log(k), np.log(s[k - 1]), 1)[0]) for s in spectra)
    peak = torch.cuda.max_memory_allocated() if args.device == "gpu" else None
    found = measured(begin, peak) | {"transport": transport, "batches": batches}
    sizes = model.config.hidden_size, model.config.intermediate_size
    dtype = getattr(torch, args.dtype)
    x, w = torch.ones(MATMUL_ROWS, sizes[0], dtype=dtype, device=device), model.model.layers[0].mlp.up_proj.weight

    def product() -> None:
        torch.nn.functional.linear(x, w)
        if args.device == "gpu":
            torch.cuda.synchronize()

    with torch.no_grad():
        return found | {"matmul": matmul_rate(product, *sizes)}


def run_stages(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage of one batch, and of the matmuls that it cannot do without."""
    from dataclasses import replace
    from functools import partial

    import jax
    import jax.numpy as jnp

    from spinal_jax import data
    from spinal_jax.audit import pipeline
    from spinal_jax.audit.lens_step import pairs_of
    from spinal_jax.metrics import contraction
    from spinal_jax.metrics.transport import lens_stats
    from spinal_jax.models.decoder import fold
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.plan import estimate
    from spinal_jax.plan.layout import DeviceLayout

    config = asked(args)
    prompts = data.read_prompts(args.prompts, args.format, limit=args.limit)
    with pipeline.opened(config.model) as (checkpoint, family, decoder):
        plan = pipeline.plan_prompts(prompts, checkpoint.tokenizer(), decoder, config.prompts, config.metrics)
        model = pipeline.load(checkpoint, family, decoder, config.model.dtype)
    batch = jax.tree.map(jnp.asarray, next(iter(plan)))
    height, length = batch.tokens.shape
    tokens, measured_count = height * length, batch.measured.shape[0]
    boundaries, width = decoder.depth + 1, decoder.width

    def seconds(call: Callable[[], Any], wide: bool = False) -> float:
        """Median of repeated calls; `wide`: with float64, as Gram sums are."""
        if wide:
            with jax.enable_x64(True):
                return seconds(call)
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

    dtype = jnp.dtype(config.model.dtype)
    with jax.enable_x64(True):
        grams = contraction.init(plan.slots, boundaries, width, contraction.gram_dtype())
    states = jax.random.normal(jax.random.key(0), (boundaries, height, length, width), dtype)

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
    x, wide = jnp.ones((tokens, width), dtype), jnp.ones((tokens, decoder.mlp_width), dtype)
    kept = jax.random.normal(jax.random.key(1), (boundaries, measured_count, width), dtype) / 3
    head = model.head()
    lens = partial(lens_stats, pairs=pairs_of(decoder.depth + 1))
    chunk = min(512, head.unembed.shape[0])

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
            )[1],
            donate_argnames="grams",
        ),
        "block matmuls": jax.jit(block_matmuls),
        "Gram sums": jax.jit(gram_stage, donate_argnames="grams"),
        "transport": jax.jit(lambda model, x: lens((model.head(),), (x,))),
        "transport matmuls": jax.jit(lens_matmuls),
    }

    def onto(step: Callable[[Any], Any]) -> Any:
        """Adds to the sums in place, as the audit does."""
        nonlocal grams
        grams = step(grams)
        return grams

    begin = time.perf_counter()
    jit["forward"].lower(model, batch).compile()
    compile_forward = time.perf_counter() - begin
    rows = np.random.default_rng(0).normal(size=(4 * width, width))
    found = {
        "forward": seconds(lambda: jit["forward"](model, batch)),
        "block matmuls": seconds(lambda: jit["block matmuls"](x, wide, stack)),
        "forward and Gram sums": seconds(
            lambda: onto(lambda sums: jit["forward and Gram sums"](model, batch, sums)), wide=True
        ),
        "Gram sums": seconds(lambda: onto(lambda sums: jit["Gram sums"](sums, states, batch)), wide=True),
        "transport": seconds(lambda: jit["transport"](model, kept)),
        "transport matmuls": seconds(lambda: jit["transport matmuls"](kept, head.unembed)),
        "eigenvalues of one boundary": seconds(lambda: contraction.singular_values(rows.T @ rows)),
    }
    up, some = block.mlp.up.weight[0], jnp.ones((MATMUL_ROWS, width), dtype)
    product = jax.jit(lambda x, w: x @ w.T)
    alone = DeviceLayout("one", 1, 1, 1)
    one, shapes = replace(plan, batches=plan.batches[:1]), parameter_shapes(decoder)
    work = estimate.audit_stages(decoder, shapes, one, config.metrics, config.model.dtype, alone, jax.default_backend())
    dtypes = {stage.name: stage.dtype for stage in work}
    peak = peak_of(args.peak, jax.devices()[0].device_kind)
    return {
        "seconds": found,
        "tokens": int((batch.segments > 0).sum()),
        "flops": {stage.name: stage.flops for stage in work},
        "peak": None if peak is None else peak.title,
        "rates": {stage.name: None if peak is None else peak.rate(dtypes[stage.name]) for stage in work},
        "compile forward": compile_forward,
        "matmul": matmul_rate(lambda: product(some, up).block_until_ready(), width, decoder.mlp_width),
        "batches": len(plan.batches),
        "boundaries": boundaries,
        "waste": plan.waste,
    }


def peak_of(name: str | None, kind: str) -> Any:
    """The data sheet of the device of this name, or of this kind; None where neither is in the list."""
    from spinal_jax.config.data_sheets import DEVICES, device_of

    own = next((known for known in DEVICES if known != "cpu" and known in kind.lower()), None)
    return device_of(name or own) if name or own else None


def show(found: dict[str, Any]) -> None:
    """The tables, in Markdown."""
    ours, torch, stages = found["audit"], found["torch"], found["stages"]
    gap = np.abs(np.array(ours["transport"]) - np.array(torch["transport"])).max()
    s = stages["seconds"]
    rates = stages["tokens"] / (s["forward and Gram sums"] + s["transport"]), ours["tokens"] / torch["batches"]
    print("| pipeline | seconds | of processors | peak GiB | of the device | tokens/s |\n|---|---|---|---|---|---|")
    names = "spinal audit, with intervals", "plain PyTorch, without"
    for name, row, rate in zip(names, (ours, torch), rates, strict=True):
        took = f"{row['seconds']:.1f} | {row['worked']:.1f}"
        print(f"| {name} | {took} | {row['gib']:.2f} | {gib(row['device_gib'])} | {rate:,.0f} |")
    less = ours["gib"] / torch["gib"]
    on_device = ours["device_gib"] and ours["device_gib"] / torch["device_gib"]
    faster = f"{torch['seconds'] / ours['seconds']:.2f} | {torch['worked'] / ours['worked']:.2f}"
    print(f"| ratio | {faster} | {less:.2f} | {gib(on_device)} | {rates[0] / rates[1]:.2f} |")
    print(
        f"\n{ours['tokens']:,} tokens, {stages['waste']:.1%} padding; transport of the two differs by at most "
        f"{gap:.1e} rad.\n"
    )
    spectra = s["eigenvalues of one boundary"] * stages["boundaries"] / stages["batches"]
    print("| stage of one batch | ms | against | ratio |\n|---|---|---|---|")
    print(f"| forward | {s['forward'] * 1e3:.0f} | its block matmuls | {s['forward'] / s['block matmuls']:.2f} |")
    print(f"| transport | {s['transport'] * 1e3:.0f} | its matmuls | {s['transport'] / s['transport matmuls']:.2f} |")
    both = s["Gram sums"] + spectra
    print(f"| contraction: Gram sums and eigenvalues | {both * 1e3:.0f} | forward | {both / s['forward']:.3f} |")
    print(
        f"\nCompiling the forward took {stages['compile forward']:.1f} s. "
        f"{MATMUL_ROWS:,} rows times a matrix of the MLP: {stages['matmul'] / 1e9:,.0f} GFLOP/s by XLA, "
        f"{torch['matmul'] / 1e9:,.0f} by PyTorch.\n"
    )
    print(f"| stage of one batch | GFLOP | TFLOP/s | MFU, {stages['peak'] or 'no data sheet'} |\n|---|---|---|---|")
    taken = {"forward": s["forward"], "gram": s["Gram sums"], "lens": s["transport"]}
    for name, title in (("forward", "forward"), ("gram", "Gram sums"), ("lens", "transport")):
        flops, rate = stages["flops"][name], stages["rates"][name]
        share = "" if rate is None else f"{flops / taken[name] / rate:.1%}".replace("%", " %")
        print(f"| {title} | {flops / 1e9:,.1f} | {flops / taken[name] / 1e12:.3f} | {share} |")


def gib(value: float | None) -> str:
    """A cell; nothing where it is not known."""
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
