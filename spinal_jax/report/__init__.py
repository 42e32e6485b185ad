"""Figures and HTML pages of saved runs: no model, no accelerator."""

import os
from pathlib import Path

from spinal_jax.errors import UserError
from spinal_jax.report.attribution import render_attribution, write_attribution_report
from spinal_jax.report.comparison import is_comparison, render_comparison_report, write_comparison_report
from spinal_jax.report.figures import curve_figure, depth_figure, entropy_figure, save_figures, spectra_figure
from spinal_jax.report.page import render_report, write_report
from spinal_jax.report.training import render_training_report, write_training_report
from spinal_jax.runs.training_run import is_training_run, load_training_run

__all__ = [
    "curve_figure",
    "depth_figure",
    "draw_report",
    "entropy_figure",
    "load_training_run",
    "render_attribution",
    "render_comparison_report",
    "render_report",
    "render_training_report",
    "save_figures",
    "spectra_figure",
    "write_attribution_report",
    "write_comparison_report",
    "write_report",
    "write_training_report",
]


def draw_report(folder: str | os.PathLike[str]) -> Path:
    """Draws figures and page of a run's folder, whatever the run was, and returns the page's path.

    Raises:
      UserError: the folder holds no run that can be drawn.
    """
    if is_training_run(folder):
        return write_training_report(folder)
    if (Path(folder) / "attribution.json").is_file():
        return write_attribution_report(folder)
    if is_comparison(folder):
        return write_comparison_report(folder)
    if not Path(folder).is_file() and not (Path(folder) / "trace.json").is_file():
        raise UserError(f"no run at {folder}: give the folder of an audit, a comparison, an attribution or a training")
    return write_report(folder)
