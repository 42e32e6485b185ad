"""SPINAL in JAX: how a language model's layers contract and transport, measured with error bars.

>>> import spinal_jax
>>> trace = spinal_jax.audit("path/or/hub-id")        # doctest: +SKIP
>>> trace.columns["contraction"], trace.columns["transport"]   # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spinal_jax.errors import AuditWarning, UserError
from spinal_jax.result import DepthTrace, load_trace, save_trace

if TYPE_CHECKING:
    from spinal_jax.api import audit

__all__ = ["AuditWarning", "DepthTrace", "UserError", "audit", "load_trace", "save_trace"]


def __getattr__(name: str) -> Any:
    """`audit` brings JAX with it; reading saved traces does not need that."""
    if name == "audit":
        from spinal_jax.api import audit

        return audit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
