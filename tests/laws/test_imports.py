"""Imports run one way: the table says what each part may import, and the modules are read to check it."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import spinal_jax

ROOT = Path(spinal_jax.__file__).parent

# A part is a package or module, named by its dotted name within spinal_jax; a longer name has what it names for itself.
# It may import the parts named, each of which stands above it. Imports inside functions count.
_JSON = {"errors", "files", "jsontypes", "wording"}  # reading and showing of saved files
_RECORDS = {*_JSON, "audit.trace", "comparison.record", "runs"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "interrupts": set(),
    "jsontypes": set(),
    "plotting": set(),
    "files": {"errors", "jsontypes", "plotting"},
    "wording": set(),
    "progress": set(),
    "stats.near_duplicates": set(),
    "stats.groups": {"stats.near_duplicates"},
    "data.vocabulary": {"errors"},
    "config": {"jsontypes", "errors"},
    "data.packing": {"errors", "config", "stats.groups", "data.vocabulary"},
    "metrics.columns": set(),
    "metrics.depth": {"errors"},
    "data": {"jsontypes", "errors", "stats.groups"},
    "parallel.device_defaults": set(),
    "metrics": {"errors", "parallel.device_defaults"},
    "stats": {"errors", "metrics", "metrics.depth"},
    "parallel": {"jsontypes", "errors", "interrupts", "files", "config", "parallel.device_defaults"},
    "models": {"jsontypes", "progress", "errors", "files", "metrics"},
    "audit.trace": {*_JSON, "metrics.columns"},
    "audit": {
        "jsontypes",
        "progress",
        "errors",
        "files",
        "stats.groups",
        "data.packing",
        "data.vocabulary",
        "data",
        "config",
        "metrics",
        "metrics.columns",
        "metrics.depth",
        "stats",
        "parallel.device_defaults",
        "parallel",
        "models",
        "audit.trace",
    },
    "comparison.record": {*_JSON, "metrics.columns"},
    "comparison": {*_JSON, "metrics", "metrics.columns", "metrics.depth", "stats", "audit.trace", "comparison.record"},
    "runs": {*_JSON, "audit.trace", "comparison.record", "comparison"},
    "report": {*_RECORDS, "comparison", "metrics.columns", "stats"},
    "objectives": {"jsontypes", "errors", "data", "config", "metrics", "models"},
    "comparison.preference_gradient": {
        "jsontypes",
        "progress",
        "config",
        "metrics",
        "models",
        "objectives",
        "parallel",
    },
    "comparison.prompt_steps": {"jsontypes", "data.packing", "comparison.record"},
    "comparison.checkpoints": {
        "jsontypes",
        "progress",
        *("stats.groups", "data.vocabulary", "metrics.depth", "comparison.prompt_steps"),
        *("errors", "data.packing", "data", "config", "models", "audit.trace", "audit", "comparison", "objectives"),
        *("parallel", "parallel.device_defaults", "comparison.record", "comparison.preference_gradient"),
    },
    "recording": {
        "jsontypes",
        "progress",
        *("errors", "files", "data.packing", "data", "config", "metrics", "parallel", "models", "audit.trace", "audit"),
        *("comparison.record", "comparison", "runs", "report"),
    },
    "plan": {
        "jsontypes",
        "errors",
        "data.packing",
        "config",
        "metrics",
        "parallel",
        "models",
        "audit",
        "parallel.device_defaults",
    },
    "comparison.flow": {
        "jsontypes",
        "progress",
        *("errors", "config", "audit.trace", "audit", "comparison.record", "comparison", "comparison.checkpoints"),
    },
    "train": {
        "parallel.device_defaults",
        "jsontypes",
        "progress",
        *("errors", "files", "data.packing", "data", "config", "metrics", "parallel", "models", "audit.trace", "audit"),
        *("comparison.record", "comparison", "runs", "report", "objectives"),
    },
    "torch_reference": {"progress", "models"},
    "verify": {"jsontypes", "progress", "errors", "data", "config", "metrics", "models", "audit", "torch_reference"},
    "api": {"jsontypes", "progress", "errors", "runs", "config", "models", "audit.trace", "audit", "train"},
    "__init__": {
        *("errors", "plotting", "models", "audit", "audit.trace", "comparison.record", "comparison", "comparison.flow"),
        *("report", "api", "recording", "train"),
    },
    "cli": {
        "jsontypes",
        "progress",
        *("errors", "files", "interrupts", "config", "parallel", "models", "audit.trace", "audit"),
        *("comparison.record", "comparison", "comparison.flow", "runs", "report"),
        *("plan", "train", "recording", "verify"),
    },
}
# Libraries that only these parts may import, and only inside a function.
RESERVED = {"hydra": {"cli"}, "omegaconf": {"cli"}, "torch": {"torch_reference"}, "peft": {"torch_reference"}}
# Saved traces are read, compared and drawn where no JAX is.
WITHOUT_JAX = (
    *(
        "errors",
        "files",
        "wording",
        "config",
        "data",
        "stats",
        "audit.trace",
        "comparison.record",
        "comparison",
        "runs",
        "report",
    ),
    "__init__",
)
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
    """The longest name in the table that the module has or lies below."""
    name = module.removeprefix("spinal_jax.")
    while name not in ALLOWED and "." in name:
        name = name.rpartition(".")[0]
    return name


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
        if found.target in KNOWN and found.target != f"spinal_jax.{found.module}":
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


def test_what_contributing_tells_a_newcomer_is_so() -> None:
    """The files to read first are there, and a new family or command touches no more files than the table says."""
    root = ROOT.parent
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^\d\. `([^`]+)`", text, re.MULTILINE)
    assert len(named) == 5
    assert all((root / name).is_file() for name in named)
    counts = dict(re.findall(r"^\| (an? [\w ]+) \| (\d+) \|", text, re.MULTILINE))
    families = {i.module for i in IMPORTS if re.match(r"spinal_jax\.models\.families\.\w", i.target)}
    outside = {module for module in families if not module.startswith("models.families.")}
    assert (counts["a model family"], outside) == ("2", {"models.families"})
    records = {name.rpartition(".")[2]: name for name in MODULES if name.startswith("config.")}
    for name in ("attribute", "watch", "plan"):
        users = {i.module for i in IMPORTS if i.target == f"spinal_jax.{records[name]}" and i.module.startswith("cli.")}
        assert (counts["a command"], len(users)) == ("2", 1), name
