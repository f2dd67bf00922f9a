"""Builds the C++ module with CMake and Ninja; everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve() / "csrc"


class CMakeBuild(build_ext):
    """One CMake project is the extension; its build folder is kept, so that a second build compiles what changed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "csrc"
        configure = [
            Path(cmake.CMAKE_BIN_DIR) / "cmake",
            *("-S", SOURCE, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        target.mkdir(parents=True, exist_ok=True)
        # An isolated build leaves a cache that names its own deleted tools.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([Path(cmake.CMAKE_BIN_DIR) / "cmake", "--build", build], check=True)


setup(ext_modules=[Extension("nf_engine._cache", sources=[])], cmdclass={"build_ext": CMakeBuild})
