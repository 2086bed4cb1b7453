# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs, in fresh processes: with the native library, without it, and with one that will not load."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import backends

ROOT = Path(__file__).parents[1]
EMBED = """
import torch, mmkernels
from mmkernels.testing import which_kernel_ran
with which_kernel_ran() as ran:
    mmkernels.patch_embed(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 4, 4))
print(ran["patch_embed"])
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_with_the_library_the_kernel_runs_and_nothing_is_said() -> None:
    done = run(EMBED)
    assert done.stdout.split() == ["native"], done.stderr
    assert "reference" not in done.stderr


def test_without_the_library_the_reference_runs_and_says_so_once_with_the_remedy() -> None:
    done = run(EMBED + EMBED, MMKERNELS_NATIVE="0")
    assert done.stdout.split() == ["reference", "reference"]
    assert done.stderr.count("patch_embed runs through the PyTorch reference") == 1
    assert "pip install" in done.stderr and "MMKERNELS_NATIVE=0" in done.stderr


def test_strict_makes_the_fallback_an_error() -> None:
    done = run(EMBED, MMKERNELS_NATIVE="0", MMKERNELS_STRICT="1")
    assert done.returncode != 0
    assert "MMKERNELS_STRICT=1 makes this an error" in done.stderr


def test_a_forced_reference_is_silent() -> None:
    done = run(EMBED.replace('["patch_embed"]', ""), MMKERNELS_BACKEND="reference")
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("name", ["BACKEND", "NATIVE", "STRICT", "ISA"])
def test_an_unknown_value_in_the_environment_is_named(name: str) -> None:
    done = run(EMBED, **{f"MMKERNELS_{name}": "refrence"})
    assert done.returncode != 0
    assert f"MMKERNELS_{name}: expected one of" in done.stderr and "'refrence'" in done.stderr


def test_a_broken_library_is_reported_with_its_cause(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    done = run(
        "import mmkernels.backends as b, pathlib\n"
        f"b.NATIVE_PATH = pathlib.Path({str(broken)!r})\n"
        "b.load_native(); print(b.native_error())"
    )
    assert "too short" in done.stdout or "invalid ELF" in done.stdout
    assert "does not load" in done.stderr and "Results are right, only slower" in done.stderr


def test_info_and_doctor_agree_with_the_dispatcher(capsys: pytest.CaptureFixture[str]) -> None:
    import argparse

    from mmkernels import info

    assert info.main(argparse.Namespace(json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["native_library"]["loaded"]
    for op in mmkernels.OPS:
        backward = found["kernels"][op]["cpu"]["backward"]
        assert found["kernels"][op]["cpu"]["forward"] == "c++"
        assert backward in ("c++", "none: inference only")


def test_doctor_finds_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    from mmkernels import doctor
    from mmkernels.ops.patch_embed import cases

    right = cases.run
    monkeypatch.setattr(doctor, "OPS", ("patch_embed",))
    assert doctor.main(argparse.Namespace()) == 0
    monkeypatch.setattr(cases, "run", lambda inputs: right(inputs) * 1.01)
    assert doctor.main(argparse.Namespace()) == 1
    assert "WRONG" in capsys.readouterr().out


def sources(folder: Path) -> None:
    for name in (
        "setup.py",
        "pyproject.toml",
        "CMakeLists.txt",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
    ):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("_C.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "mmkernels", folder / "mmkernels", ignore=ignore)


def test_the_source_distribution_holds_what_a_build_needs(tmp_path: Path) -> None:
    sources(tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    built = [tmp_path / "mmkernels" / name for name in ("_C.so", "_build_info.json")]
    for path in built:
        path.write_text("of this machine")
    make = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(make, cwd=tmp_path, capture_output=True, check=True)
    (made,) = (tmp_path / "dist").iterdir()
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = [tmp_path / "CMakeLists.txt", *(tmp_path / "csrc").rglob("*.*")]
    assert {str(path.relative_to(tmp_path)) for path in needed} <= names
    assert not {str(path.relative_to(tmp_path)) for path in built} & names


def test_without_a_compiler_the_wheel_is_pure_python_and_knows_why(tmp_path: Path) -> None:
    sources(tmp_path)
    build = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", "wheels"]
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "mmkernels/_C.so" not in archive.namelist()
        info = json.loads(archive.read("mmkernels/_build_info.json"))
    assert info["error"] == "cmake was not found on PATH"
    environment["MMKERNELS_BUILD"] = "cpu"
    done = subprocess.run(build, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "cmake" in done.stderr


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="got 'fast'"), backends.backend("fast"):
        pass


def test_the_library_writes_no_build_path() -> None:
    assert str(ROOT).encode() not in backends.NATIVE_PATH.read_bytes()


def test_autocast_does_not_touch_fp64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = mmkernels.patch_embed(
            torch.zeros(1, 3, 8, 8).double(), torch.zeros(4, 3, 4, 4).double()
        )
    assert out.dtype == torch.float64
