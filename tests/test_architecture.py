"""Architecture: who may import whom, read from the syntax trees; what may not be called at all."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import mutants
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
    "data": {"preprocess"},
    "sources": {"data", "datafiles", "preprocess"},
    "feed": {"data"},
    "models": set(),
    "tracing": set(),
    "stages": {"tracing"},
    "reference": set(),
    "fused": {"kernels", "reference"},
    "ops": {"fused", "reference"},
    "heads": {"ops", "reference"},
    "instruments": set(),
    "unit_heads": {"heads", "instruments", "stages"},
    "seconds": {"instruments", "preprocess", "stages", "unit_heads"},
    "recompute": set(),
    "local_step": {"heads", "ops", "recompute"},
    "tiers": set(),
    "costs": set(),
    "partitioner": {"costs", "tiers"},
    "manifest": set(),
    "folder_files": {"_cache"},
    "committed": {"_cache", "folder_files", "manifest"},
    "run_folder": {"_cache", "committed", "folder_files", "manifest"},
    "interrupt": set(),
    "codec": set(),
    "cache_format": {"_cache"},
    "disk_tier": {"_cache", "cache_format", "codec"},
    "memory_tier": {"_cache", "cache_format", "codec"},
    "storage": {"_cache", "cache_format", "codec", "disk_tier", "memory_tier"},
    "compiler": set(),
    "step_graph": {"compiler", "local_step"},
    "checkpoint": {"local_step"},
    "recovery": set(),
    "worker": {"codec", "data", "feed", "local_step", "preprocess", "step_graph", "storage"},
    "profiler": {
        *("heads", "instruments", "local_step", "ops", "preprocess", "recovery", "seconds", "stages", "unit_heads"),
    },
    "peaks": {"codec", "instruments", "local_step", "preprocess", "stages", "unit_heads", "worker"},
    "tier_probe": {"cache_format", "seconds", "storage"},
    "planner": {
        *("costs", "heads", "partitioner", "peaks", "preprocess", "profiler", "recovery", "seconds", "stages"),
        *("tier_probe", "tiers"),
    },
    "job": {
        *("checkpoint", "data", "interrupt", "local_step", "preprocess", "recompute", "recovery", "run_folder"),
        *("stages", "worker"),
    },
    "run_caches": {"data", "job", "manifest", "precision", "storage", "worker"},
    "chain": {
        *("data", "feed", "job", "local_step", "manifest", "preprocess", "recovery", "run_caches", "storage", "worker"),
    },
    "trainer": {
        *("chain", "checkpoint", "job", "local_step", "manifest", "partitioner", "recovery"),
        *("run_caches", "run_folder", "step_graph", "storage", "tiers", "worker"),
    },
    "controller": {
        *("chain", "checkpoint", "interrupt", "job", "local_step", "manifest", "recovery", "run_folder", "trainer"),
        "worker",
    },
    "resume": {"manifest", "run_folder", "stages"},
    "progress": set(),
    "exits": {"preprocess", "sources"},
    "export": {
        *("checkpoint", "committed", "exits", "folder_files", "heads", "manifest", "models", "preprocess", "stages"),
    },
    "compare": {
        "data",
        "feed",
        "local_step",
        "partitioner",
        "precision",
        "preprocess",
        "recompute",
        "stages",
        "step_graph",
        "worker",
    },
    "assembly": {"exits", "instruments", "models", "preprocess", "stages", "worker"},
    "given": {"data", "models", "sources", "stages"},
    "engine": {
        *("__init__", "assembly", "checkpoint", "controller", "data", "exits", "given", "interrupt", "job", "manifest"),
        *("partitioner", "planner", "preprocess", "profiler", "progress", "recovery", "resume", "run_folder"),
        *("stages", "unit_heads", "worker"),
    },
    "settings": set(),
    "predictions": {"data", "exits", "export", "sources"},
    "doctor": {"__init__", "committed", "ops", "storage"},
    "cli": {
        *("__init__", "data", "doctor", "engine", "exits", "export", "models", "predictions", "settings", "sources"),
    },
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
            "progress", "settings")  # fmt: skip
CODE_IN_DATA = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "ctypes", "pydoc", "cPickle"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "os.system"}
RUNS_CODE |= {"os.popen", "os.execv", "os.execve", "os.spawnv", "torch.package.PackageImporter", "np.fromregex"}
IMPORTS_BY_NAME = {"importlib.import_module", "import_module"}
IMPORT_NAMES = {"nvidia-ml-py": "pynvml", "scikit-learn": "sklearn", "pillow": "PIL"}  # where the package's differs
# Who may write, rename or remove beside run_folder and its parts, and what.
WRITES = {
    ("export", "os.open"): "reads, and does not wait for a pipe",
    ("records", "write_text"): "Record.save: a profile or plan where the user wants it, no part of a run",
    ("doctor", "tempfile.TemporaryDirectory"): "the folder of a check, gone after it",
    ("tier_probe", "unlink"): "the cache that was written to measure the disk",
    ("export", "torch.export.save"): "into memory",
}
OF_PATHS = {
    "write_text",
    "write_bytes",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
    "touch",
    "symlink_to",
    "hardlink_to",
    "tofile",
}
OF_MODULES = {
    "shutil",
    "tempfile",
    "torch.save",
    "torch.export.save",
    "torch.jit.save",
    "np.save",
    "np.savez",
    "save_file",
}
OF_MODULES |= {
    f"os.{name}" for name in ("replace", "rename", "renames", "remove", "unlink", "mkdir", "makedirs", "rmdir")
}
OF_MODULES |= {
    f"os.{name}" for name in ("link", "symlink", "truncate", "ftruncate", "write", "pwrite", "open", "mkfifo")
}


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
    files = {"committed", "folder_files", "run_folder"}
    assert "storage" in importers("_cache") <= {"cache_format", "disk_tier", "memory_tier", "storage", *files}


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


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_module_runs_no_code_that_it_read(name):
    assert {n.split(".")[0] for n in imported(TREES[name])} & CODE_IN_DATA == set()
    assert {dotted(call.func) for call in calls(TREES[name])} & RUNS_CODE == set()
    for call in calls(TREES[name]):
        if dotted(call.func) in ("np.load", "numpy.load"):
            assert [ast.unparse(k.value) for k in call.keywords if k.arg == "allow_pickle"] == ["False"]


def test_modules_are_imported_by_name_only_where_the_names_are_in_the_code():
    by_name = {name for name, tree in TREES.items() if {dotted(c.func) for c in calls(tree)} & IMPORTS_BY_NAME}
    assert by_name == {"__init__", "datafiles"}


def test_only_declared_packages_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["demo"] + extras["images"] + extras["triton"]
    declared = {IMPORT_NAMES.get(n, n) for n in (re.match(r"[a-z-]+", line)[0] for line in wanted)}
    for name, tree in [*TREES.items(), *KERNELS.items()]:
        top = {n.split(".")[0] for n in imported(tree)}
        assert top - declared - {"nf_engine"} - sys.stdlib_module_names == set(), name


def written(call: ast.Call) -> str:
    """What writes, renames or removes in this call; "" where nothing does."""
    name = dotted(call.func)
    last = name.rpartition(".")[2] or (call.func.attr if isinstance(call.func, ast.Attribute) else "")
    if name in OF_MODULES or name.partition(".")[0] in OF_MODULES:
        return name
    if last in OF_PATHS or (
        last == "replace" and len(call.args) == 1 and not call.keywords
    ):  # of a path: of text has two
        return last
    modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    return (
        last
        if last == "open"
        and any(isinstance(m, str) and re.fullmatch(r"[wax+bt]*[wax+][bt+]*|r[bt]*\+[bt]*", m) for m in modes)
        else ""
    )


def test_only_the_run_folder_writes_files():
    """One door, so that one fault hook and one protocol reach every durable byte."""
    doors = ("committed", "folder_files", "run_folder")
    found = {(name, written(call)) for name, tree in TREES.items() if name not in doors for call in calls(tree)}
    assert {pair for pair in found if pair[1]} == set(WRITES)


@pytest.mark.parametrize(
    "code",
    [
        *(
            "open(p, 'w')",
            "p.open('wb')",
            "open(p, mode='r+')",
            "io.open(p, 'xb')",
            "gzip.open(p, 'ab')",
            "os.open(p, 1)",
        ),
        *("Path(p).write_text(t)", "p.write_bytes(b)", "p.replace(q)", "os.replace(p, q)", "shutil.move(p, q)"),
        *(
            "p.rename(q)",
            "(a / b).unlink()",
            "p.parent.mkdir()",
            "torch.save(x, p)",
            "tempfile.mkstemp()",
            "x.tofile(p)",
        ),
    ],
)
def test_the_search_for_writers_finds(code):
    (call, *_) = (c for c in calls(ast.parse(code)) if written(c))
    assert written(call)


@pytest.mark.parametrize(
    "code", ["open(p)", "p.open('rb')", "text.replace('a', 'b')", "replace(record, a=1)", "Image.open(f)"]
)
def test_the_search_for_writers_passes(code):
    assert not any(map(written, calls(ast.parse(code))))


def test_programs_of_torch_export_are_read_only_to_check_what_was_just_written():
    readers = {
        module
        for module, tree in TREES.items()
        if any(isinstance(n, ast.Attribute) and dotted(n) == "torch.export.load" for n in ast.walk(tree))
    }
    assert readers == {"export", "predictions"}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_a_mutant_of_the_checks_finds_its_text_once_and_is_python(mutant):
    """`make mutants-python` takes long, so that nobody would notice soon."""
    sound = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert sound.count(mutant.text) == 1
    ast.parse(sound.replace(mutant.text, mutant.instead))
