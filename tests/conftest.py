"""What every test runs under: eight virtual CPU devices, strict dtype promotion, repeatable properties.

Shapes in the annotations of the modules in SHAPED are checked with beartype; SPINAL_SHAPES=0 turns the checks off.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import install_import_hook

# Modules with shapes in annotations. The hook must be installed before they are imported.
SHAPED = (
    "spinal_jax.data.packing",
    "spinal_jax.metrics.depth",
    "spinal_jax.metrics.tail",
    "spinal_jax.stats",
)
if os.environ.get("SPINAL_SHAPES", "1") != "0":
    install_import_hook(SHAPED, "beartype.beartype")

from spinal_jax.models.config import DecoderConfig  # noqa: E402
from spinal_jax.models.decoder import Decoder  # noqa: E402
from spinal_jax.models.rope import Rope  # noqa: E402

# A shell that starts pytest in the background has it ignore Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_dtype_promotion", "strict")
# The first example of a property pays for compiling, and a run must say the same as the last one.
hypothesis.settings.register_profile("spinal", deadline=None, derandomize=True)
hypothesis.settings.load_profile("spinal")


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiles equal programs once a session: every audit jits its step anew, and that is most of what a test takes."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    """`make_decoder(seed=0, **settings)`: a Llama-like Decoder with random parameters, 7 blocks of 32 unless told."""
    return _make_decoder


def _make_decoder(seed: int = 0, **settings: Any) -> Decoder:
    fields: dict[str, Any] = {"vocab_size": 301, "width": 32, "depth": 7, "heads": 4, "kv_heads": 2} | settings
    dim = fields["width"] // fields["heads"]
    config = DecoderConfig(
        **{
            "family": "llama",
            "head_dim": dim,
            "mlp_width": 2 * fields["width"],
            "max_positions": 2048,
            "tied": False,
            "ropes": (Rope(dim, 1e4),),
            "layer_rope": (0,) * fields["depth"],
            "windows": (0,) * fields["depth"],
        }
        | fields
    )
    shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def drawn(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        """Norms around 1, the rest wide enough for tokens to move from boundary to boundary as in a real model."""
        neutral = float("norm" in jax.tree_util.keystr(path) and "weight" in jax.tree_util.keystr(path))
        return jnp.asarray(neutral + 0.16 * rng.normal(size=shape.shape), shape.dtype)

    nnx.update(shapes, jax.tree_util.tree_map_with_path(drawn, nnx.state(shapes)))
    return shapes
