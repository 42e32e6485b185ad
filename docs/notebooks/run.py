"""Runs the notebooks of this folder and keeps their outputs: python docs/notebooks/run.py [NAME...]"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run(notebook: Path) -> nbformat.NotebookNode:
    """The notebook after a run from the repository's root; CellExecutionError where a cell fails."""
    found = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        found, timeout=None, kernel_name="python3", resources={"metadata": {"path": FOLDER.parents[1]}}
    )
    client.execute()
    for cell in found.cells:
        cell.metadata.pop("execution", None)  # times
        if "outputs" in cell:  # warnings of libraries and progress are no result
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return found


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        nbformat.write(run(FOLDER / f"{name}.ipynb"), FOLDER / f"{name}.ipynb")
