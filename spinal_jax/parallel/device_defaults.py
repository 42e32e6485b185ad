"""What a device is given at a time: sizes that depend on the kind of device and on nothing else.

`backend` is the name of JAX's backend: "cpu", "gpu" or "tpu".
"""

from __future__ import annotations

MODEL_SHARE = 0.8  # of a device's memory that a model and its sums may take; the rest is for what a batch needs
GRAM_SHARE = 0.85  # of a device's memory behind the weights, for Gram sums
HOST_SHARE = 0.25  # of the memory of a machine, for Gram sums: those of a CPU, and those that devices have no room for
TABLE_BYTES = 1 << 30  # of the unembedding, up to which only `tensor` splits its rows


def logit_tile_bytes(backend: str) -> int:
    """Bytes of logits that exist at a time: all boundaries x a tile of positions x a chunk of vocabulary.

    On a CPU about what a core's second-level cache holds; elsewhere enough to fill the machine.
    """
    return 2**21 if backend == "cpu" else 2**27


def gram_rows(backend: str) -> int:
    """Rows of hidden states, at most, in one product of a Gram sum.

    On accelerators their sum may be float32, whose rounding grows with the rows. On a CPU fewer fill the cores, and
    what is multiplied beyond the rows of one group is lost.
    """
    return 512 if backend == "cpu" else 1024


def eigenvalues_on_device(backend: str) -> bool:
    """Whether float64 eigenvalues are taken on the devices; elsewhere LAPACK of the host takes them."""
    return backend == "gpu"


def batch_tokens(backend: str) -> int:
    """Tokens of an audit's batch, padding included, for each device that shares its rows."""
    return 2048 if backend == "cpu" else 16384


def pair_tokens(backend: str) -> int:
    """Tokens of a micro-batch of preference pairs, whose forward and backward are computed."""
    return 1024 if backend == "cpu" else 8192
