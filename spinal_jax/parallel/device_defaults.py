"""Default sizes that depend only on the kind of device.

`backend` is the name of JAX's backend: "cpu", "gpu" or "tpu".
"""

from __future__ import annotations

MODEL_SHARE = 0.8  # of device memory for the model and its sums; the rest is for batches
HOST_SHARE = 0.25  # of host memory, for Gram sums
TABLE_BYTES = 1 << 30  # size of the unembedding up to which only `tensor` splits its rows


def logit_tile_bytes(backend: str) -> int:
    """Bytes of a tile of logits: all boundaries x some positions x a chunk of the vocabulary.

    On a CPU about the size of the second-level cache; on accelerators enough to saturate them.
    """
    return 2**21 if backend == "cpu" else 2**27


def gram_rows(backend: str) -> int:
    """Maximum number of rows that are multiplied before a Gram sum is read and written.

    On a CPU few rows saturate the cores, and padding beyond the rows of a group is wasted work. On an H200 one round of
    a loop costs as much as the product of 2,000 rows of 4,096; with 8,192 rows padding costs more than rounds save.
    """
    return {"cpu": 512, "gpu": 4096}.get(backend, 1024)


def stripes_at_once(backend: str) -> int:
    """Stripes of a Gram sum in one product of bfloat16 states. That of one stripe has too few tiles for a GPU."""
    return 2 if backend == "gpu" else 1


def gram_memory_share(backend: str) -> float:
    """Fraction of the device memory left by the weights that Gram sums may take.

    TPUs emulate float64 by pairs of float32; a program that updates float64 sums there holds them twice.
    """
    return 0.4 if backend == "tpu" else 0.85


def eigenvalues_on_device(backend: str) -> bool:
    """Whether float64 eigenvalues are computed on the devices; otherwise by LAPACK on the host."""
    return backend == "gpu"


def batch_tokens(backend: str) -> int:
    """Tokens of an audit batch, with padding, for each device that splits its rows."""
    return 2048 if backend == "cpu" else 16384


def pair_tokens(backend: str) -> int:
    """Tokens of a micro-batch of preference pairs, with a backward pass."""
    return 1024 if backend == "cpu" else 8192


def training_tokens(backend: str) -> int:
    """Tokens of a micro-batch in training."""
    return 1024 if backend == "cpu" else 16384
