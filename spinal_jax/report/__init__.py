"""Figures and the HTML page of a saved depth trace: no model, no accelerator."""

from spinal_jax.report.figures import curve_figure, depth_figure, entropy_figure, save_figures, spectra_figure
from spinal_jax.report.page import render_report, write_report

__all__ = [
    "curve_figure",
    "depth_figure",
    "entropy_figure",
    "render_report",
    "save_figures",
    "spectra_figure",
    "write_report",
]
