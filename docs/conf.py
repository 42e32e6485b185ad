"""The documentation site: `make docs`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from generate import write_example, write_reference

write_reference(Path(__file__).parent / "reference")
write_example(Path(__file__).parent / "example", Path(__file__).parent / "pages")

project = "spinal_jax"
author = "the spinal_jax authors"
release = version = importlib.metadata.version("spinal-jax")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "example", "pages"]
html_theme = "furo"
html_title = f"spinal_jax {release}"
html_extra_path = ["pages"]  # the example page, as `spinal report` draws it
nb_execution_mode = "off"  # notebooks carry their outputs; tests/cli/test_notebooks.py runs them
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures carry them
python_use_unqualified_type_names = True
