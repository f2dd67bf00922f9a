"""What is installed, and under which names."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def processor_time_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_folder_kernels_cannot_be_imported_by_that_name():
    command = [sys.executable, "-c", "import kernels"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert "import nf_engine.kernels" in result.stderr


def test_every_python_folder_of_the_package_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "nf_engine").rglob("*.py")} | {"kernels"}
    moved = {folder: name for name, folder in settings["package-dir"].items()}
    assert {moved.get(folder, folder.replace("/", ".")) for folder in folders} == set(settings["packages"])


@pytest.mark.slow
def test_the_wheel_holds_both_packages_and_the_compiled_module(tmp_path):
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(ROOT, tree, ignore=ignored)  # not in place: a build leaves files behind
    begun = processor_time_of_children()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tree]
    subprocess.run(command, check=True, cwd=tmp_path)
    seconds = processor_time_of_children() - begun  # the wall clock would measure what else runs here
    (wheel,) = tmp_path.glob("nf_engine-0.1.0-*.whl")
    names = zipfile.ZipFile(wheel).namelist()

    assert sum(name.startswith("nf_engine/_cache.") and name.endswith(".so") for name in names) == 1
    sources = [path.relative_to(tree).as_posix() for path in (tree / "nf_engine").rglob("*.py")]
    kernels = [f"nf_engine/{path.relative_to(tree).as_posix()}" for path in (tree / "kernels").glob("*.py")]
    assert {
        *sources,
        *kernels,
        "nf_engine/py.typed",
        "nf_engine/_cache/__init__.pyi",
        "nf_engine/_cache/io.pyi",
    } <= set(names)
    assert {name.split("/")[0] for name in names} == {"nf_engine", "nf_engine-0.1.0.dist-info"}
    entry_points = zipfile.ZipFile(wheel).read("nf_engine-0.1.0.dist-info/entry_points.txt").decode()
    assert "nf-engine = nf_engine.cli:main" in entry_points
    assert seconds < 60
