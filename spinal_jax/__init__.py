"""SPINAL in JAX: how a language model's layers contract and transport, measured with error bars.

trace = spinal_jax.audit("FOLDER")                 # a DepthTrace
trace["contraction"], trace.interval("transport")
spinal_jax.compare(aligned, reference)             # of two traces or two checkpoints, a Comparison
spinal_jax.rank([comparison, "runs/compared"])     # of several comparisons, a Ranking
spinal_jax.train("runs/dpo", model={"source": "FOLDER"}, preferences={"format": "hh", "path": "FILE"})   # a Trained
spinal_jax.attribute("runs/dpo-*", "runs/shuffled-*")   # of several runs against controls, an Attribution
"""

from __future__ import annotations

import sys

import spinal_jax.audit  # so that it is a package before it becomes a function too
import spinal_jax.train  # noqa: F401
from spinal_jax import plotting
from spinal_jax.errors import UserError

TYPE_CHECKING = False  # as typing's, which would take the command line longer to import than all else here
if TYPE_CHECKING:
    from typing import Any

    from matplotlib.figure import Figure

    from spinal_jax.api import audit, load_model, train
    from spinal_jax.audit.trace import DepthTrace, load_trace, save_trace
    from spinal_jax.comparison.attribution import Attribution, attribute, load_attribution
    from spinal_jax.comparison.compare import BothModels
    from spinal_jax.comparison.flow import compare
    from spinal_jax.comparison.ranking import Ranking, rank
    from spinal_jax.comparison.record import Comparison, load_comparison, save_comparison
    from spinal_jax.models.decoder import Tap, collect, fold
    from spinal_jax.recording.recorder import Recorder
    from spinal_jax.train.run import Trained

    __version__: str

__all__ = [
    "Attribution",
    "BothModels",
    "Comparison",
    "DepthTrace",
    "Ranking",
    "Recorder",
    "Tap",
    "Trained",
    "UserError",
    "__version__",
    "attribute",
    "audit",
    "collect",
    "compare",
    "fold",
    "load_attribution",
    "load_comparison",
    "load_model",
    "load_trace",
    "rank",
    "save_comparison",
    "save_trace",
    "train",
]

# Imported when they are first used: reading saved traces does without JAX, and the command line starts at once.
_LAZY = {
    **dict.fromkeys(("audit", "load_model", "train"), "spinal_jax.api"),
    **dict.fromkeys(("DepthTrace", "load_trace", "save_trace"), "spinal_jax.audit.trace"),
    "BothModels": "spinal_jax.comparison.compare",
    "compare": "spinal_jax.comparison.flow",
    **dict.fromkeys(("Attribution", "attribute", "load_attribution"), "spinal_jax.comparison.attribution"),
    **dict.fromkeys(("Ranking", "rank"), "spinal_jax.comparison.ranking"),
    **dict.fromkeys(("Comparison", "load_comparison", "save_comparison"), "spinal_jax.comparison.record"),
    **dict.fromkeys(("Tap", "collect", "fold"), "spinal_jax.models.decoder"),
    "Recorder": "spinal_jax.recording.recorder",
    "Trained": "spinal_jax.train.run",
}


class _CallablePackage(type(sys)):
    """The package spinal_jax.audit or train, which is the function of `spinal_jax.api` when it is called."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from spinal_jax import api

        return getattr(api, self.__name__.rpartition(".")[2])(*arguments, **settings)


for _package in ("spinal_jax.audit", "spinal_jax.train"):
    sys.modules[_package].__class__ = _CallablePackage


def _draw(record: DepthTrace | Comparison, kind: str | None) -> Figure:
    from spinal_jax.report.notebook import plot

    return plot(record, kind)


plotting.draw = _draw


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("spinal-jax")
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
