"""Architecture: who may import whom, read from the syntax trees; what may not be called at all."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nf_engine"
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
KERNELS = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels").glob("*.py")}

# Any module may also import these.
COMMON = {"errors", "records", "config", "device", "precision"}
# What each module may import beside them, lowest first: a new edge is a decision, so it is made here, too.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "records": set(),
    "device": set(),
    "precision": set(),
    "datafiles": set(),
    "preprocess": set(),
    "data": {"datafiles", "preprocess"},
    "feed": {"data"},
    "models": set(),
    "tracing": set(),
    "stages": {"tracing"},
    "reference": set(),
    "fused": {"kernels", "reference"},
    "ops": {"fused", "reference"},
    "heads": {"ops", "reference"},
    "recompute": set(),
    "local_step": {"heads", "ops", "recompute"},
    "tiers": set(),
    "costs": set(),
    "partitioner": {"costs", "tiers"},
    "run_folder": {"_cache"},
    "codec": set(),
    "cache_format": {"_cache"},
    "disk_tier": {"_cache", "cache_format", "codec"},
    "memory_tier": {"_cache", "cache_format", "codec"},
    "storage": {"_cache", "cache_format", "codec", "disk_tier", "memory_tier"},
    "step_graph": {"local_step"},
    "recovery": set(),
    "worker": {"codec", "data", "feed", "local_step", "preprocess", "step_graph", "storage"},
    "profiler": {"codec", "heads", "local_step", "ops", "partitioner", "preprocess", "stages", "storage", "worker"},
    "tier_probe": {"cache_format", "profiler", "storage"},
    "planner": {"costs", "heads", "partitioner", "preprocess", "profiler", "stages", "tier_probe", "tiers", "worker"},
    "controller": {
        *("data", "feed", "local_step", "partitioner", "preprocess", "recovery", "run_folder", "stages", "step_graph"),
        *("storage", "tiers", "worker"),
    },
    "progress": set(),
    "exits": {"data", "preprocess"},
    "export": {"exits", "heads", "models", "preprocess", "run_folder", "stages"},
    "compare": {
        "data",
        "local_step",
        "partitioner",
        "precision",
        "preprocess",
        "recompute",
        "stages",
        "step_graph",
        "worker",
    },
    "engine": {
        *("controller", "data", "exits", "models", "partitioner", "planner", "preprocess", "profiler", "progress"),
        *("run_folder", "stages", "worker"),
    },
    "doctor": {"__init__", "ops", "storage"},
    "cli": {"__init__", "data", "doctor", "engine", "exits", "export", "models"},
    "__main__": {"cli"},
    "__init__": set(),  # loads engine, exits and export by name, at first use
}
COMMON_IN_COMMON = {
    "errors": set(),
    "config": {"errors"},
    "records": {"errors"},
    "device": {"config", "errors"},
    "precision": {"config"},
}
NO_TORCH = ("errors", "config", "records", "tiers", "costs", "partitioner", "cli", "__init__", "__main__", "datafiles",
            "progress")  # fmt: skip
CODE_IN_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "ctypes"}


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running(node: ast.AST):
    """All nodes below this one but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if not only_for_types(child):
            yield child
            yield from running(child)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that a module imports, inside functions, too."""
    names: set[str] = set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = "nf_engine" + (f".{node.module}" if node.module else "") if node.level else str(node.module)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def own(tree: ast.AST) -> set[str]:
    """Modules of nf_engine that a module imports."""
    names = [name.split(".") for name in imported(tree)]
    return {(parts[1] if len(parts) > 1 else "__init__") for parts in names if parts[0] == "nf_engine"}


EDGES = {name: own(tree) for name, tree in TREES.items()}


def test_the_table_names_every_module():
    assert set(ALLOWED) == set(TREES)


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_imports_only_what_the_table_allows(name):
    assert EDGES[name] - ALLOWED[name] - COMMON_IN_COMMON.get(name, COMMON) == set()


def test_the_imports_have_no_cycle():
    order = list(graphlib.TopologicalSorter({n: e - {"__init__"} for n, e in EDGES.items()}).static_order())
    assert order.index("errors") < order.index("engine") < order.index("cli")


def importers(name: str) -> set[str]:
    return {module for module, edges in EDGES.items() if name in edges}


def test_only_fused_imports_kernels_and_only_ops_imports_fused():
    assert (importers("kernels"), importers("fused")) == ({"fused"}, {"ops"})


def test_only_the_cache_and_the_run_folder_import_the_compiled_module():
    assert "storage" in importers("_cache") <= {"cache_format", "disk_tier", "memory_tier", "storage", "run_folder"}


def test_only_the_command_line_imports_the_engine():
    assert importers("engine") == {"cli"}


def test_kernels_import_nothing_of_the_engine():
    assert "__init__" in KERNELS
    for name, tree in KERNELS.items():  # `from .tiles import ...` reads as nf_engine.tiles here
        assert {n.split(".")[1] for n in imported(tree) if n.split(".")[0] == "nf_engine"} <= set(KERNELS), name


def test_what_plans_and_what_prints_help_runs_without_torch():
    modules = ", ".join(f"nf_engine.{name}" for name in NO_TORCH)
    code = f"import sys, {modules}; assert 'nf_engine.partitioner' in sys.modules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_runs_no_code_that_it_read(name):
    assert {n.split(".")[0] for n in imported(TREES[name])} & CODE_IN_DATA == set()
    calls = {dotted(node.func) for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)}
    assert calls & {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "torch.hub.load"} == set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and dotted(node.func) in ("np.load", "numpy.load"):
            assert [ast.unparse(k.value) for k in node.keywords if k.arg == "allow_pickle"] == ["False"]


def test_programs_of_torch_export_are_read_only_to_check_what_was_just_written():
    readers = {
        module
        for module, tree in TREES.items()
        if any(isinstance(n, ast.Attribute) and dotted(n) == "torch.export.load" for n in ast.walk(tree))
    }
    assert readers == {"cli", "export"}
