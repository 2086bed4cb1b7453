# SPDX-License-Identifier: Apache-2.0
"""Builds ``mmkernels/_C.so`` with CMake. Imports no torch; without a compiler the package is pure Python.

``MMKERNELS_BUILD``: ``auto`` (default: what this machine can, the reason for the rest is stored), ``cpu``, ``cuda``
(both fail loudly), ``none``. ``MMKERNELS_TORCH_DIR`` names a torch to compile against,
``MMKERNELS_CUDA_ARCHS`` the CUDA architectures, ``MAX_JOBS`` the compile jobs.
"""

import importlib.util
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("MMKERNELS_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"MMKERNELS_BUILD must be auto, cpu, cuda or none, got {MODE!r}")


def torch_dir() -> Path:
    """The torch to compile against, found without importing it."""
    if named := os.environ.get("MMKERNELS_TORCH_DIR"):
        return Path(named)
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            "torch was not found at build time; install torch first, then "
            "`pip install --no-build-isolation .`"
        )
    return Path(next(iter(spec.submodule_search_locations)))


class Build(build_ext):
    """Runs CMake; in ``auto`` mode a failure leaves a pure Python install that knows why."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"  # no Python tag: torch loads it, not Python

    def run(self) -> None:
        self.asked_in_place = bool(self.inplace)  # setuptools clears it while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        ext.failed = False
        info: dict[str, Any] = {"mode": MODE, "machine": platform.platform()}
        try:
            if MODE == "none":
                raise RuntimeError("MMKERNELS_BUILD=none")
            info |= self._compiled(target)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE not in ("auto", "none"):
                raise
            ext.failed = True
            info["error"] = _reason(error)
            self.warn(f"mmkernels is installed without its kernels: {info['error']}")
        places = {target, ROOT / "mmkernels"} if self._in_source() else {target}
        for place in places:
            (place / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
            if ext.failed:
                (place / "_C.so").unlink(missing_ok=True)  # of an earlier build

    def _compiled(self, target: Path) -> dict[str, Any]:
        """``auto``: an nvcc that does not fit costs the CUDA kernels, not those of the CPU."""
        try:
            return self._cmake(target, MODE)
        except subprocess.CalledProcessError as error:
            if MODE != "auto":
                raise
            found = self._cmake(target, "cpu")
            self.warn(f"mmkernels is installed without its CUDA kernels: {_reason(error)}")
            return {**found, "cuda_error": _reason(error)}

    def _cmake(self, target: Path, mode: str) -> dict[str, Any]:
        torch = torch_dir()
        build = Path(self.build_temp).resolve() / mode
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={torch}", f"-DMMK_BUILD={mode}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        if archs := os.environ.get("MMKERNELS_CUDA_ARCHS"):
            configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={archs}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        for command in (configure, ["cmake", "--build", str(build), "-j", jobs]):
            _run(command)
        cache = (build / "CMakeCache.txt").read_text()
        return {
            "torch_headers": _torch_version(torch),
            "stable_abi_target": "2.11",
            "cxx": _cached(cache, "CMAKE_CXX_COMPILER"),
            "nvcc": _cached(cache, "CMAKE_CUDA_COMPILER"),
            "cuda_archs": _cached(cache, "MMK_CUDA_ARCHS"),
        }

    def _in_source(self) -> bool:
        return bool(self.asked_in_place or getattr(self, "editable_mode", False))

    def _built(self) -> bool:
        return not any(getattr(e, "failed", False) for e in self.extensions)

    def get_outputs(self) -> list[str]:
        return super().get_outputs() if self._built() else []

    def copy_extensions_to_source(self) -> None:
        if self._built():
            super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """One wheel for every Python: the library knows torch's stable ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        failed = any(getattr(e, "failed", False) for e in self.distribution.ext_modules or ())
        return ("py3", "none", "any" if failed else super().get_tag()[2])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, stderr=done.stdout)


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        said = [line for line in lines if re.search(r"\berror:|\bfatal\b", line)]  # of a compiler
        marked = said or [line for line in lines if "error" in line.lower()] or lines
        return f"{error.cmd[0]} failed: {' '.join(marked[:2])[:400]}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} was not found on PATH"
    return str(error)


def _torch_version(torch: Path) -> str:
    found = re.search(r"__version__ = ['\"](.+?)['\"]", (torch / "version.py").read_text())
    return found[1] if found else "unknown"


def _cached(cache: str, key: str) -> str:
    lines = [line for line in cache.splitlines() if line.startswith(f"{key}:")]
    value = lines[0].split("=", 1)[1] if lines else ""
    return "" if value.endswith("NOTFOUND") else value


version: dict[str, str] = {}
exec((ROOT / "mmkernels" / "version.py").read_text(), version)
setup(
    version=version["__version__"],
    ext_modules=[Extension("mmkernels._C", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
