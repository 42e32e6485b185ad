"""SPINAL in JAX: how a language model's layers contract and transport, measured with error bars.

trace = spinal_jax.audit("FOLDER")                 # a DepthTrace
trace.columns["contraction"], trace.interval("transport")
spinal_jax.compare(aligned, reference)             # of two traces, a Comparison
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spinal_jax.audit.trace import DepthTrace, load_trace, save_trace
from spinal_jax.comparison.compare import BothModels, compare
from spinal_jax.comparison.record import Comparison, load_comparison, save_comparison
from spinal_jax.errors import UserError

if TYPE_CHECKING:
    from spinal_jax.api import audit, load_model
    from spinal_jax.comparison.checkpoints import compare_models
    from spinal_jax.models.decoder import Tap, collect, fold

__all__ = [
    "BothModels",
    "Comparison",
    "DepthTrace",
    "Tap",
    "UserError",
    "audit",
    "collect",
    "compare",
    "compare_models",
    "fold",
    "load_comparison",
    "load_model",
    "load_trace",
    "save_comparison",
    "save_trace",
]

# These bring JAX with them; reading saved traces does without.
_LAZY = {
    "audit": "spinal_jax.api",
    "load_model": "spinal_jax.api",
    "compare_models": "spinal_jax.comparison.checkpoints",
    "Tap": "spinal_jax.models.decoder",
    "collect": "spinal_jax.models.decoder",
    "fold": "spinal_jax.models.decoder",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
