"""What this project does on one GPU, against the ceilings of that GPU and against plain PyTorch.

    python benchmarks/accelerator.py [--out RESULT.md] [--sections NAME ...] [--size full|toy]

Needs JAX and PyTorch with a GPU of 80 GB, no network and about four minutes. Weights are random and are made on the
device; prompts are 512 sequences of 60 to 128 random tokens. Every section is a process of its own and prints its
Markdown tables as soon as it has them; with --out they are also appended to a file. `--size toy` runs the same code on
a CPU in small shapes. Exit code 1 where a section failed or a number is out of its bounds.

What the figures mean: "ceiling" is what one product of 8192 x 8192 matrices reaches in the same run. The audit is
measured after its programs have been compiled, which is stated beside it. Both PyTorch pipelines keep all hidden
states; the one takes singular values of the states in float32, the other eigenvalues of Gram matrices in float64;
neither has intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8B": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    "1B": LLAMA
    | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    "toy": LLAMA
    | {"vocab_size": 301, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
# Tiny models of three families: grouped queries; windows, soft-caps and norms behind; learned positions and biases.
TINY: dict[str, dict[str, Any]] = {
    "llama": SHAPES["toy"] | {"hidden_size": 128, "head_dim": 32},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 301,
        "hidden_size": 128,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attention_bias": False,
    },
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": 301,
        "n_embd": 128,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 256,
        "layer_norm_epsilon": 1e-5,
    },
}
PROMPTS, SHORTEST, LONGEST, GROUPS, LAST = 512, 60, 128, 16, 4
TORCH_BATCH = 64
EXACT, LENS = 1e-4, 1e-3  # bounds: states in float32 against the CPU, relative; columns of a trace
SECTIONS = ("correctness", "ceilings", "attention", "audit 1B", "audit 8B", "torch 1B", "torch 8B", "dpo", "torch dpo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file that the tables are appended to")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        sys.exit(0 if run(args.section, args.size == "toy") else 1)
    began, failed = time.perf_counter(), []
    write(args.out, f"# Accelerator benchmark\n\n`python {' '.join(['benchmarks/accelerator.py', *sys.argv[1:]])}`\n")
    for section in args.sections:
        begin = time.perf_counter()
        command = [sys.executable, __file__, "--section", section, "--size", args.size]
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        said, errors = process.communicate()
        write(args.out, said)
        if process.returncode:
            failed.append(section)
            write(args.out, f"**{section} failed** (exit code {process.returncode})\n\n```\n{errors[-3000:]}\n```\n")
        write(args.out, f"_{section}: {time.perf_counter() - begin:.0f} s_\n")
    write(args.out, f"_{time.perf_counter() - began:.0f} s in all{'; failed: ' + ', '.join(failed) if failed else ''}_")
    sys.exit(1 if failed else 0)


def write(out: Path | None, text: str) -> None:
    """To the terminal and to the file, at once."""
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())


def table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """One Markdown table."""
    print(f"## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def run(section: str, toy: bool) -> bool:
    """Runs a section; whether its numbers are within their bounds."""
    name = section.rpartition(" ")[2]
    shape = "toy" if toy else name
    functions: dict[str, Callable[[], bool]] = {
        "correctness": correctness,
        "ceilings": partial(ceilings, toy),
        "attention": partial(attention, toy),
        f"audit {name}": partial(audit, name, shape, toy),
        f"torch {name}": partial(torch_audit, name, shape, toy),
        "dpo": partial(dpo, toy),
        "torch dpo": partial(torch_dpo, toy),
    }
    return functions[section]()


# Models, prompts and clocks


def decoder_config(config: dict[str, Any]) -> Any:
    """The decoder of a config.json."""
    from spinal_jax.models.formats.orbax import read_model

    return read_model(config)[1]


def random_model(decoder: Any, dtype: str, seed: int = 0) -> Any:
    """Weights drawn on the device: normal with deviation 0.02, norms around 1."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.translate import assemble, parameter_shapes

    arrays = {}
    for number, (path, shape) in enumerate(sorted(parameter_shapes(decoder).items())):
        key = jax.random.fold_in(jax.random.key(seed), number)
        centre = 1.0 if "norm" in path and path.endswith("weight") and not decoder.norm_unit_offset else 0.0

        @partial(jax.jit, static_argnums=(1, 2))
        def draw(key: Any, shape: tuple[int, ...], centre: float) -> Any:
            if len(shape) > 2 and np.prod(shape) > 2**28:  # block by block, so that no float32 copy of all is made
                return jax.lax.map(lambda k: draw_one(k, shape[1:], centre), jax.random.split(key, shape[0]))
            return draw_one(key, shape, centre)

        def draw_one(key: Any, shape: tuple[int, ...], centre: float) -> Any:
            return (centre + 0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

        arrays[path] = jax.block_until_ready(draw(key, shape.shape, centre))
    return assemble(decoder, arrays)


def prompt_ids(vocabulary: int, count: int, longest: int = LONGEST) -> list[np.ndarray]:
    """Random tokens, the same for both frameworks."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(min(SHORTEST, longest // 2), longest + 1, count)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def planned(decoder: Any, count: int, batch_tokens: int) -> Any:
    """The plan of an audit of random prompts."""
    from spinal_jax.data.packing import Positions, TokenSequence, plan

    ids = prompt_ids(decoder.vocab_size, count)
    sequences = [TokenSequence(each, number % GROUPS) for number, each in enumerate(ids)]
    return plan(sequences, Positions.parse(f"last:{LAST}"), 1, batch_tokens, groups=GROUPS)


def alone() -> Any:
    """Settings of an audit without variants."""
    from spinal_jax.config import MetricsConfig, VariantsConfig

    return MetricsConfig(groups=GROUPS, variants=VariantsConfig(center=False, positions=()))


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median of some calls after one that compiles."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def card() -> str:
    """The device and the versions."""
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind}, jax {jax.__version__}, Python {platform.python_version()}"


def torch_card() -> str:
    import torch
    import transformers

    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return f"{kind}, torch {torch.__version__}, transformers {transformers.__version__}"


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# What this project does


def states_of(parts: Any, arrays: Any, tokens: np.ndarray, segments: np.ndarray, where: Any, dtype: str) -> np.ndarray:
    """[D + 1, N, d] hidden states of the real tokens, computed on a device in a dtype."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.decoder import collect
    from spinal_jax.models.parts import cast

    model = parts.assemble(jax.device_put(cast(arrays, jnp.dtype(dtype)), where))
    kind = {"cuda": "gpu", "rocm": "gpu"}.get(where.platform, where.platform)

    def forward(model: Any, tokens: Any, segments: Any) -> Any:
        return model.forward(tokens, segments=segments, tap=collect(lambda h: h), backend=kind)[1]

    found = jax.jit(forward)(model, *jax.device_put((tokens, segments), where))
    return np.asarray(found.astype(jnp.float32))[:, segments > 0]


def correctness() -> bool:
    """Three tiny families on this device against the CPU."""
    import jax

    from spinal_jax.audit.measure import measure
    from spinal_jax.models.parts import take_apart

    cpu, here = jax.devices("cpu")[0], jax.devices()[0]
    rows, fine = [], True
    for name, config in TINY.items():
        decoder = decoder_config(config)
        with jax.default_device(cpu):
            model = random_model(decoder, "float32")
        parts, arrays = take_apart(model)
        tokens = np.random.default_rng(1).integers(0, decoder.vocab_size, (4, 96)).astype(np.int32)
        segments = np.repeat([[1] * 40 + [2] * 50 + [0] * 6], 4, axis=0).astype(np.int32)

        wanted = states_of(parts, arrays, tokens, segments, cpu, "float32")
        size = np.abs(wanted).max()
        exact = np.abs(states_of(parts, arrays, tokens, segments, here, "float32") - wanted).max() / size
        rough = np.abs(states_of(parts, arrays, tokens, segments, here, "bfloat16") - wanted).max() / size
        work, settings = planned(decoder, 64, 1024), alone()
        traces = []
        for device in (cpu, here):
            with jax.default_device(device):
                traces.append(measure(parts.assemble(jax.device_put(arrays, device)), work, settings).whole.columns)
        apart = {
            column: float(np.nanmax(np.abs(traces[0][column] - traces[1][column])))
            for column in ("contraction", "transport", "entropy")
        }
        ok = exact <= EXACT and max(apart.values()) <= LENS
        fine &= bool(ok)
        cells = (f"{apart['contraction']:.1e}", f"{apart['transport']:.1e}", f"{apart['entropy']:.1e}")
        rows.append((name, f"{exact:.1e}", f"{rough:.1e}", *cells, "yes" if ok else "NO"))
    table(
        f"Correctness against the CPU ({card()})",
        ("family", "float32 states", "bfloat16 states", "contraction", "transport", "entropy", "within bounds"),
        rows,
    )
    return fine


def ceilings(toy: bool) -> bool:
    """Products of matrices, eigenvalues, and the stages of a batch of the 8B shape against them."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.lens_step import pairs_of
    from spinal_jax.metrics import contraction
    from spinal_jax.metrics.transport import lens_stats
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.plan import estimate

    n = 256 if toy else 8192
    rates, rows = {}, []
    highest = jax.lax.Precision.HIGHEST
    with jax.enable_x64(True):
        for name, dtype, precision in (
            ("bfloat16", jnp.bfloat16, None),
            ("float32", jnp.float32, highest),
            ("float64", jnp.float64, highest),
        ):
            size = n if name == "bfloat16" else n // 2
            a = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
            multiply = jax.jit(lambda a, p=precision: jnp.matmul(a, a, precision=p))
            rates[name] = 2 * size**3 / seconds(lambda a=a, f=multiply: f(a))
            rows.append((f"{name}, {size} x {size}", f"{rates[name] / 1e12:,.2f} TFLOP/s"))
        for size in (64,) if toy else (2048, 4096):
            a = jax.random.normal(jax.random.key(0), (size, size), jnp.float64)
            a = a @ a.T
            solve = jax.jit(lambda a: jnp.linalg.eigvalsh(a, UPLO="L", symmetrize_input=False))
            taken = seconds(lambda a=a, f=solve: f(a), 2)
            known = np.linalg.eigvalsh(np.asarray(a)) if size <= 2048 else None
            error = "" if known is None else f", error {np.abs(np.asarray(solve(a)) / known - 1).max():.0e}"
            rows.append((f"float64 eigenvalues, {size}", f"{taken:.3f} s{error}"))
            del a
    table(f"Ceilings ({card()})", ("what", "measured"), rows)

    decoder = decoder_config(SHAPES["toy" if toy else "8B"])
    model = random_model(decoder, "bfloat16")
    shapes, boundaries, width = parameter_shapes(decoder), decoder.depth + 1, decoder.width
    rows = []
    for length in (64,) if toy else (256, 8192):
        height = (512 if toy else 16384) // length
        tokens = jnp.zeros((height, length), jnp.int32)
        forward = jax.jit(lambda model, tokens: model.forward(tokens)[0])
        taken = seconds(lambda t=tokens, f=forward: f(model, t), 3)
        rate = estimate.forward_flops(decoder, shapes, height, length) / taken
        share = f"{rate / rates['bfloat16']:.0%}"
        rows.append((f"forward, {height} x {length}", f"{taken * 1e3:.1f}", f"{rate / 1e12:.1f}", share))
        if length <= 256:
            first = taken
    height, length = (8, 64) if toy else (64, 256)
    states = jax.random.normal(jax.random.key(1), (height, length, width), jnp.float32).astype(jnp.bfloat16)
    counted, slots = jnp.ones((height, length), jnp.float32), jnp.repeat(jnp.arange(4, dtype=jnp.int32), height // 4)
    with jax.enable_x64(True):
        grams = contraction.init(4, 1, width, np.dtype(np.float64))
        add = jax.jit(contraction.update, donate_argnums=0, static_argnames="backend")
        grams = add(grams, states, counted, slots, jnp.int32(0))
        jax.block_until_ready(grams)
        begin = time.perf_counter()
        for _ in range(10):
            grams = add(grams, states, counted, slots, jnp.int32(0))
        jax.block_until_ready(grams)
        taken = (time.perf_counter() - begin) / 10 * boundaries
    flops = 2 * height * length * contraction.triangle_size(width) * boundaries
    rows.append(
        (
            "Gram sums of all boundaries",
            f"{taken * 1e3:.1f}",
            f"{flops / taken / 1e12:.1f}",
            f"{taken / first:.0%} of the forward",
        )
    )
    count = 8 if toy else 704
    x = jax.random.normal(jax.random.key(2), (boundaries, count, width), jnp.float32).astype(jnp.bfloat16)
    lens = jax.jit(lambda model, x: lens_stats((model.head(),), (x,), pairs_of(boundaries)))
    taken = seconds(lambda: lens(model, x), 3)
    rate = 2 * boundaries * count * decoder.vocab_size * width / taken
    rows.append(
        (f"lens, {count} positions", f"{taken * 1e3:.1f}", f"{rate / 1e12:.1f}", f"{rate / rates['bfloat16']:.0%}")
    )
    table("Stages of a batch, 8B shape, bfloat16", ("stage", "ms", "TFLOP/s", "of the bfloat16 ceiling"), rows)
    return True


def attention(toy: bool) -> bool:
    """Attention by cuDNN and by XLA: forward and backward, several sequences in a row or one, and a window."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.attention import attend, attend_fused

    heads, kv_heads, dim, tokens = (4, 2, 16, 256) if toy else (32, 8, 128, 16384)
    on_gpu, fine, rows = jax.default_backend() == "gpu", True, []
    for length in (64,) if toy else (256, 2048, 8192):
        height = max(1, tokens // length)
        for packed, window in ((1, None), (4, None), (4, length // 8)):
            if length > 2048 and window:
                continue
            key = jax.random.key(length)
            q, k, v = (
                jax.random.normal(jax.random.fold_in(key, n), (height, length, count, dim), jnp.float32).astype(
                    jnp.bfloat16
                )
                for n, count in enumerate((heads, kv_heads, kv_heads))
            )
            segments = jnp.broadcast_to(1 + jnp.arange(length, dtype=jnp.int32) * packed // length, (height, length))
            span = None if window is None else jnp.int32(window)

            def plain(q: Any, k: Any, v: Any, segments: Any = segments, span: Any = span) -> Any:
                return attend(q, k, v, segments, window=span, scale=dim**-0.5, softcap=None)

            def fused(q: Any, k: Any, v: Any, segments: Any = segments, span: Any = span) -> Any:
                return attend_fused(q, k, v, segments, window=span, scale=dim**-0.5)

            def gradients(function: Any) -> Any:
                def loss(*rows: Any) -> Any:
                    return jnp.sum(function(*rows).astype(jnp.float32) ** 2)

                return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

            name = f"{height} x {length}, {packed} in a row" + (f", window {window}" if window else "")
            ours = seconds(partial(jax.jit(plain), q, k, v), 3)
            if not on_gpu:
                rows.append((name, f"{ours * 1e3:.2f}", "no GPU", "", "", ""))
                continue
            theirs = seconds(partial(jax.jit(fused), q, k, v), 3)
            some = tuple(x[:1] for x in (q, k, v))
            short = {"segments": segments[:1], "span": span}
            exact = jax.jit(partial(plain, **short))(*(x.astype(jnp.float32) for x in some))
            forward = (
                jnp.abs(jax.jit(partial(fused, **short))(*some).astype(jnp.float32) - exact).max()
                / jnp.abs(exact).max()
            )
            wanted = gradients(partial(plain, **short))(*(x.astype(jnp.float32) for x in some))
            found = gradients(partial(fused, **short))(*some)
            backward = max(
                float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
                for a, b in zip(found, wanted, strict=True)
            )
            ok = float(forward) < 2e-2 and backward < 4e-2  # a few roundings of bfloat16, 2^-8 each
            fine &= ok
            rows.append(
                (
                    name,
                    f"{ours * 1e3:.2f}",
                    f"{theirs * 1e3:.2f}",
                    f"{float(forward):.1e}",
                    f"{backward:.1e}",
                    "yes" if ok else "NO",
                )
            )
    head = ("rows", "XLA, ms", "cuDNN, ms", "forward apart", "backward apart", "within bounds")
    table(f"Attention, {heads} heads of {dim}, {kv_heads} key heads, bfloat16 ({card()})", head, rows)
    return fine


def audit(name: str, shape: str, toy: bool) -> bool:
    """The whole audit with exact intervals, its sums and spectra on the device."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.audit.devices import OneDevice
    from spinal_jax.audit.gram_store import gram_home
    from spinal_jax.audit.lens_step import zero_lens_sums
    from spinal_jax.audit.measure import measure
    from spinal_jax.audit.spectra import eigenvalues
    from spinal_jax.models.parts import take_apart
    from spinal_jax.parallel.device_defaults import batch_tokens

    decoder, settings = decoder_config(SHAPES[shape]), alone()
    model = random_model(decoder, "bfloat16")
    weights = sum(x.nbytes for x in take_apart(model)[1].values())
    devices = OneDevice()
    home = gram_home(decoder, settings, weights, devices)
    work = planned(decoder, 128 if toy else PROMPTS, 1024 if toy else batch_tokens(jax.default_backend()))
    begin = time.perf_counter()
    with jax.enable_x64(True):
        grams = devices.grams(1, work.slots, decoder.depth + 1, decoder.width, np.dtype(np.float64))
        batch = devices.batch(next(iter(work)))
        lens = devices.lens(model.head())
        grams, x, _ = devices.forward_step(model, grams, devices.lens_error(), batch, (), work.groups_at_once)
        sums = devices.lens_sums(zero_lens_sums(decoder.depth + 1, settings, 1, False))
        jax.block_until_ready(devices.lens_step((lens,), sums, (x,), batch, settings))
        one = devices.of_boundaries(grams[0], [0])[0]
        jax.block_until_ready(eigenvalues(one, jnp.ones(work.slots), 1.0, center=False))
    del grams, x, one, batch
    compiling = time.perf_counter() - begin
    took: dict[str, float] = {}

    @contextlib.contextmanager
    def bar(what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        start = time.perf_counter()
        yield lambda amount: None
        took[what] = time.perf_counter() - start

    begin = time.perf_counter()
    found = measure(model, work, settings, bar, devices=devices)
    whole = time.perf_counter() - begin
    stats = jax.devices()[0].memory_stats() or {}
    rows = [
        ("prompts, tokens, batches", f"{len(work.sequences)}, {work.tokens:,}, {len(work.batches)}"),
        ("Gram sums", str(home)),
        ("compiling and one batch, s", f"{compiling:.1f}"),
        ("batches, s", f"{took['audit']:.2f}"),
        ("spectra, s", f"{took['spectra']:.2f}"),
        ("**whole, s**", f"**{whole:.2f}**"),
        ("peak memory of the device, GiB", f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f}"),
        (
            "contraction at the last boundary",
            f"{found.whole.columns['contraction'][-1]:.4f} +- {found.errors.columns['contraction'][-1]:.4f}",
        ),
    ]
    table(f"Audit with exact intervals, {name} shape, bfloat16 ({card()})", ("", "this project"), rows)
    return bool(np.isfinite(found.whole.columns["contraction"]).all())


def dpo(toy: bool) -> bool:
    """One DPO step, all weights and LoRA."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from spinal_jax.config.training import ObjectiveConfig, OptimizerConfig
    from spinal_jax.models import lora
    from spinal_jax.models.parts import cast, take_apart
    from spinal_jax.models.translate import parameter_shapes
    from spinal_jax.objectives.responses import choose_shape, micro_batches
    from spinal_jax.objectives.step import TrainState, make_steps
    from spinal_jax.train.optimizer import optimizer

    decoder, rows = decoder_config(SHAPES["toy" if toy else "1B"]), []
    examples, length = pairs(decoder.vocab_size, toy)
    count = sum(int(np.prod(s.shape)) for s in parameter_shapes(decoder).values())
    for name, rank in (("all weights", 0), ("LoRA of rank 16", 16)):
        model = random_model(decoder, "bfloat16" if rank else "float32")
        if rank:
            lora.attach(model, rank, 32.0, ("all-linear",), 0)
        parts, arrays = take_apart(model)
        trained = parts.paths(nnx.LoRAParam if rank else nnx.Param)
        parameters = cast({path: arrays[path] for path in sorted(trained)}, jnp.float32)
        fixed = {path: x for path, x in arrays.items() if path not in trained}
        del model, arrays
        method = optimizer(OptimizerConfig(schedule="constant"), 10)
        steps = make_steps(parts, decoder, ObjectiveConfig("dpo"), method, dtype="bfloat16", remat="blocks")
        with jax.numpy_dtype_promotion("standard"):
            state = TrainState(parameters, method.init(parameters), jnp.int32(0))
        del parameters
        shape = choose_shape([examples], length, 2 * len(examples) * length, 1)
        times, loss = [], float("nan")
        for _ in range(5):
            begin = time.perf_counter()
            gradients: Any = None
            sums: Any = None
            for _, micro in micro_batches(examples, shape):
                micro = jax.tree.map(jnp.asarray, micro)
                arguments = (state.parameters, fixed, micro, jnp.float32(len(examples)))
                gradients, sums = (
                    steps.first(*arguments) if gradients is None else steps.more(*arguments, gradients, sums)
                )
            updated = steps.update(state, gradients, sums)
            del gradients
            state = updated.state
            loss = float(sums.loss) / len(examples)  # waits for the device
            jax.block_until_ready(state.parameters)
            times.append(time.perf_counter() - begin)
        del state, updated, fixed
        taken, tokens = float(np.median(times[1:])), 2 * len(examples) * length
        stats = jax.devices()[0].memory_stats() or {}
        rows.append(
            (
                name,
                f"{taken * 1e3:.0f}",
                f"{6 * count * tokens / taken / 1e12:.1f}",
                f"{stats.get('peak_bytes_in_use', 0) / 2**30:.1f}",
                f"{loss:.4f}",
            )
        )
    head = ("this project", "ms a step", "TFLOP/s by 6 P T", "peak GiB so far", "loss")
    table(f"DPO step, 1B shape, {len(examples)} pairs of {length} tokens ({card()})", head, rows)
    return True


def pairs(vocabulary: int, toy: bool) -> tuple[list[tuple[Any, Any]], int]:
    """Pairs of random tokens, halves of which are the prompt, and their length."""
    from typing import NamedTuple

    class Response(NamedTuple):
        ids: np.ndarray
        start: int

    count, length = (2, 32) if toy else (8, 512)
    ids = np.random.default_rng(2).integers(0, vocabulary, (count, 2, length)).astype(np.int32)
    ids[:, 1, : length // 2] = ids[:, 0, : length // 2]
    return [(Response(a, length // 2), Response(b, length // 2)) for a, b in ids], length


# Plain PyTorch


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


if __name__ == "__main__":
    main()
