"""Imports run one way: the table says what each part may import, and the modules are read to check it."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import spinal_jax

ROOT = Path(spinal_jax.__file__).parent

# A part is a module or a package right below spinal_jax. It may import the parts named, each of which stands above it.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "batch": {"errors"},
    "config": {"errors", "batch"},
    "responses": set(),
    "mesh": {"errors", "config"},
    "preference": {"responses"},
    "metrics": {"errors"},
    "models": {"errors", "metrics"},
    "files": {"errors"},
    "trace": {"errors", "batch", "config", "mesh", "metrics", "models", "files"},
    "data": {"errors"},
    "wording": set(),
    "result": {"errors", "files", "wording"},
    "verdict": {"errors", "metrics", "files", "wording", "result"},
    "onset": {"errors", "metrics", "files", "verdict"},
    "report": {"errors", "files", "wording", "result", "verdict", "onset"},
    "runs": {"errors", "files", "result", "verdict", "report"},
    "collect": {"errors", "files", "wording", "result", "verdict", "report", "runs"},
    "api": {"errors", "batch", "config", "mesh", "metrics", "models", "trace", "data", "result"},
    "plan": {"errors", "batch", "config", "mesh", "metrics", "models", "trace", "api"},
    "train": {
        *(
            "errors",
            "batch",
            "config",
            "responses",
            "mesh",
            "preference",
            "metrics",
            "models",
            "trace",
            "data",
            "files",
            "result",
        ),
        *("verdict", "runs", "report", "api", "onset"),
    },
    "footprint": {
        *("errors", "batch", "config", "responses", "metrics", "models", "trace", "data", "result", "verdict"),
        *("api", "train"),
    },
    "verify": {"errors", "config", "metrics", "models", "trace", "data"},
    "__init__": {"errors", "result", "verdict", "models", "api", "footprint"},
    "help": set(),
    "console": {"api"},
    "processes": {"errors", "files", "mesh", "console"},
    "jobs": {
        "console",
        "config",
        "models",
        "report",
        "result",
        "verdict",
        "runs",
        "api",
        "train",
        "footprint",
        "verify",
        "plan",
        *("errors", "collect", "mesh", "processes"),
    },
    "sweep": {"errors", "files", "console"},
    "cli": {"errors", "report", "help", "console", "jobs", "sweep"},
}
# Libraries that only these parts may import, and only inside a function.
RESERVED = {"hydra": {"cli"}, "omegaconf": {"cli"}, "torch": {"verify"}}
# Saved traces are read, compared and drawn where no JAX is.
WITHOUT_JAX = ("errors", "files", "wording", "result", "verdict", "report", "data", "__init__")
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}


class Import(NamedTuple):
    """One import statement: the module that has it, what it imports, and whether importing the module runs it."""

    module: str
    target: str
    at_once: bool


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; packages are named by themselves."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


MODULES = modules()
KNOWN = {f"spinal_jax.{name}" for name in MODULES}


def imports_of(module: str) -> Iterator[Import]:
    """Every import of a module; those within the package come as `spinal_jax.` and a name of MODULES."""

    def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, at_once
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(child, at_once and not checking and not inside)

    for node, at_once in walk(ast.parse(MODULES[module].read_text(encoding="utf-8")), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            # `from package import name` imports a module where there is one of that name.
            names = [
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in KNOWN else node.module for a in node.names
            ]
        for name in names:
            yield Import(module, "spinal_jax.__init__" if name == "spinal_jax" else name, at_once)


IMPORTS = [found for module in MODULES for found in imports_of(module)]


def part(module: str) -> str:
    return module.removeprefix("spinal_jax.").split(".")[0]


def test_the_table_knows_every_part_and_runs_one_way() -> None:
    assert {part(module) for module in MODULES} == set(ALLOWED)
    above: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= above, f"{name} may import {allowed - above}, which stands below it"
        above.add(name)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_part_imports_only_what_the_table_allows(name: str) -> None:
    for found in IMPORTS:
        if part(found.module) == name and found.target.startswith("spinal_jax"):
            assert found.target in KNOWN, f"{found.module} imports {found.target}, which is not there"
            assert part(found.target) in ALLOWED[name] | {name}, f"{found.module} imports {found.target}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        if found.at_once and found.target in KNOWN and found.target != f"spinal_jax.{found.module}":
            graph[found.module].add(found.target.removeprefix("spinal_jax."))
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("library", RESERVED)
def test_a_reserved_library_stays_where_it_belongs(library: str) -> None:
    for found in IMPORTS:
        if found.target.split(".")[0] == library:
            assert part(found.module) in RESERVED[library], f"{found.module} imports {library}"
            assert not found.at_once, f"importing {found.module} imports {library}"


@pytest.mark.parametrize("name", WITHOUT_JAX)
def test_reading_and_drawing_saved_traces_imports_no_jax(name: str) -> None:
    reached, waiting = set(), [module for module in MODULES if part(module) == name]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        for found in (i for i in IMPORTS if i.module == module and i.at_once):
            assert found.target.split(".")[0] not in JAX, f"{name} comes to import {found.target} through {module}"
            inner = found.target.removeprefix("spinal_jax.")
            if found.target in KNOWN and inner not in reached:
                waiting.append(inner)
