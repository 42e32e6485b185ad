"""Models, prompts, clocks and tables that all sections share."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

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


def table(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """One Markdown table."""
    print(f"## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def decoder_config(config: dict[str, Any]) -> Any:
    """The decoder of a config.json."""
    from spinal_jax.models.formats.orbax import read_model

    return read_model(config)[1]


def random_model(decoder: Any, dtype: str, seed: int = 0) -> Any:
    """Weights drawn on the device by one program: normal with deviation 0.02, norms around 1."""
    import jax
    import jax.numpy as jnp

    from spinal_jax.models.translate import assemble, parameter_shapes

    def draw(key: Any, shape: tuple[int, ...], centre: float) -> Any:
        if len(shape) > 2 and np.prod(shape) > 2**28:  # block by block, so that no float32 copy of all is made
            return jax.lax.map(lambda k: draw(k, shape[1:], centre), jax.random.split(key, shape[0]))
        return (centre + 0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    @jax.jit
    def arrays(key: Any) -> dict[str, Any]:
        found = {}
        for number, (path, shape) in enumerate(sorted(parameter_shapes(decoder).items())):
            centre = 1.0 if "norm" in path and path.endswith("weight") and not decoder.norm_unit_offset else 0.0
            found[path] = draw(jax.random.fold_in(key, number), shape.shape, centre)
        return found

    return assemble(decoder, arrays(random_key(seed)))


def random_key(seed: int) -> Any:
    """A key of the generator whose programs compile fastest. Programs take it as an argument: with a constant key XLA
    would draw the numbers while it compiles."""
    import jax

    return jax.random.key(seed, impl="rbg")


def prompt_ids(vocabulary: int, count: int, longest: int = LONGEST) -> list[np.ndarray]:
    """Random tokens, the same for both frameworks."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(min(SHORTEST, longest // 2), longest + 1, count)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def planned(decoder: Any, count: int, batch_tokens: int) -> Any:
    """The plan of an audit of random prompts."""
    from spinal_jax.config.positions import Positions
    from spinal_jax.data.packing import TokenSequence, plan_batches

    ids = prompt_ids(decoder.vocab_size, count)
    sequences = [TokenSequence(each, number % GROUPS) for number, each in enumerate(ids)]
    return plan_batches(sequences, Positions.parse(f"last:{LAST}"), 1, batch_tokens, groups=GROUPS)


def alone() -> Any:
    """Settings of an audit without variants."""
    from spinal_jax.config import MetricsConfig, VariantsConfig

    return MetricsConfig(groups=GROUPS, variants=VariantsConfig(center=False, positions=()))


class Response(NamedTuple):
    """Tokens, the first of which are the prompt."""

    ids: np.ndarray
    start: int


def pairs(vocabulary: int, toy: bool) -> tuple[list[tuple[Any, Any]], int]:
    """Pairs of random tokens, halves of which are the prompt, and their length."""
    count, length = (2, 32) if toy else (8, 512)
    ids = np.random.default_rng(2).integers(0, vocabulary, (count, 2, length)).astype(np.int32)
    ids[:, 1, : length // 2] = ids[:, 0, : length // 2]
    return [(Response(a, length // 2), Response(b, length // 2)) for a, b in ids], length


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return, each in a thread of its own: XLA compiles outside of Python's lock."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


class Program(NamedTuple):
    """A jitted function, and arguments that it is compiled for."""

    function: Any
    arguments: tuple[Any, ...]
    x64: bool = False


def compiled(programs: Mapping[str, Program]) -> dict[str, Callable[..., Any]]:
    """All of them, compiled at once, to be called with such arguments."""
    import jax

    def compile_one(program: Program) -> Callable[..., Any]:
        with jax.enable_x64(program.x64):
            return program.function.lower(*program.arguments).compile()

    return dict(zip(programs, at_once(*(partial(compile_one, each) for each in programs.values())), strict=True))


def normal(seed: int, shape: tuple[int, ...], dtype: str = "bfloat16", scale: float = 1.0) -> Any:
    """Normal numbers with deviation `scale`, drawn on the device."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def draw(key: Any) -> Any:
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return draw(random_key(seed))


def seconds(call: Callable[[], Any], repeats: int = 5, of: Callable[[list[float]], Any] = np.median) -> float:
    """Median, or what `of` takes, of some calls after one that compiles."""
    import jax

    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return float(of(times))


def card() -> str:
    """The device and the versions."""
    import jax

    kind = jax.devices()[0].device_kind
    return f"{kind}, jax {jax.__version__}, Python {platform.python_version()}"
