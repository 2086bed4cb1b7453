# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs, in fresh processes: with the native library, without it, and with one that will not load."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import mmkernels
from mmkernels import backends
from mmkernels.testing import which_kernel_ran

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


def chosen() -> str:
    return backends.chosen_kernel("patch_embed", "cpu")[0]


def embed() -> torch.Tensor:
    return mmkernels.patch_embed(torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 4, 4))


def crossing(enter: Callable[[], AbstractContextManager[Any]], inside: Callable[[], Any]) -> None:
    """Two threads in blocks that overlap: the first to enter is the first to leave."""
    steps, failed = [threading.Event() for _ in range(4)], []

    def first() -> None:
        with enter():
            steps[0].set()
            steps[1].wait(10)
            inside()
        steps[2].set()

    def second() -> None:
        steps[0].wait(10)
        with enter():
            steps[1].set()
            steps[2].wait(10)
            inside()
        steps[3].set()

    def caught(run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=caught, args=(run,)) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failed, failed


def test_two_threads_choose_their_backend_apart() -> None:
    def inside() -> None:
        assert chosen() == "reference"

    def enter() -> AbstractContextManager[Any]:
        assert chosen() == "c++"  # whatever the other thread has
        return backends.backend("reference")

    crossing(enter, inside)
    assert chosen() == "c++" and not backends._state.compiled_reference


def test_two_tasks_choose_their_backend_apart() -> None:
    async def one(before: float, inside: float) -> None:
        await asyncio.sleep(before)
        assert chosen() == "c++"
        with backends.backend("reference"):
            await asyncio.sleep(inside)
            assert chosen() == "reference"
        assert chosen() == "c++"

    async def both() -> None:
        await asyncio.gather(one(0.0, 0.1), one(0.05, 0.2))

    asyncio.run(both())
    assert chosen() == "c++" and not backends._state.compiled_reference


def test_the_environment_is_the_default_of_every_thread() -> None:
    code = (
        "import threading\nfrom mmkernels import backends\n"
        "def say(): print(backends.chosen_kernel('patch_embed', 'cpu')[0])\n"
        "with backends.backend('auto'): say(); t = threading.Thread(target=say); t.start(); t.join()\n"
        "say()"
    )
    assert run(code, MMKERNELS_BACKEND="reference").stdout.split() == ["c++"] + ["reference"] * 2


def test_two_threads_watch_their_own_kernels() -> None:
    found: list[dict[str, str]] = []

    def enter() -> AbstractContextManager[Any]:
        watch = which_kernel_ran()
        stack = ExitStack()
        found.append(stack.enter_context(watch))
        return stack

    crossing(enter, embed)
    assert found == [{"patch_embed": "native"}] * 2
    assert backends._ran.get() is None


def test_a_backward_follows_its_forward() -> None:
    """Of the reference it is torch's own, wherever it runs: no op of ours is called."""
    weight = torch.zeros(4, 3, 4, 4, requires_grad=True)
    with backends.backend("reference"):
        out = mmkernels.patch_embed(torch.zeros(1, 3, 8, 8), weight)
    with which_kernel_ran() as ran:
        out.sum().backward()
    assert ran == {}
    out = mmkernels.patch_embed(torch.zeros(1, 3, 8, 8), weight)
    with which_kernel_ran() as ran, backends.backend("reference"):
        out.sum().backward()
    assert ran == {"patch_embed_backward": "native"}


def test_compiled_code_follows_the_backend() -> None:
    torch._dynamo.reset()
    called: list[str] = []

    def recorded(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        ours = any("mmkernels" in str(node.target) for node in graph.graph.nodes)

        def run(*tensors: torch.Tensor) -> Any:
            called.append("kernel" if ours else "reference")
            return graph(*tensors)

        return run

    compiled = torch.compile(embed, fullgraph=True, backend=recorded)
    for _ in range(2):
        compiled()
        with backends.backend("reference"):
            compiled()
            with backends.backend("auto"):
                compiled()
    assert called == ["kernel", "reference", "kernel"] * 2

    def inside() -> torch.Tensor:
        with backends.backend("reference"):
            return embed()

    torch.compile(inside, fullgraph=True, backend=recorded)()
    assert called[6:] == ["reference"] and chosen() == "c++"
