# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs: the op library, the native library, and the reference behind both.

Every op is defined once, in Python (``define``), with the plain PyTorch reference under
``CompositeExplicitAutograd``. A kernel is whatever is registered above it for a device: C++ and CUDA
from ``_C.so`` (``load_native``), Triton from Python (``register_triton``). The dispatcher chooses, so
there is no ``if`` to get wrong; when it lands on the reference we say so once, with the remedy.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmkernels import transforms

logger = logging.getLogger("mmkernels")
LIB = torch.library.Library("mmkernels", "DEF")  # keep alive: the ops live as long as this object
NATIVE_PATH = Path(__file__).parent / "_C.so"
BUILD_INFO_PATH = Path(__file__).parent / "_build_info.json"
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


_VARIABLES = {  # of the environment, read once
    "MMKERNELS_BACKEND": ("auto", "reference"),
    "MMKERNELS_NATIVE": ("1", "0"),  # 0: without the C++ and CUDA kernels
    "MMKERNELS_STRICT": ("0", "1"),
    "MMKERNELS_ISA": ("", "generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"),
}
ENVIRONMENT = {name: os.environ.get(name) or values[0] for name, values in _VARIABLES.items()}
for _name, _value in ENVIRONMENT.items():
    if _value not in _VARIABLES[_name]:
        raise ValueError(f"{_name}: expected one of {_VARIABLES[_name]}, got {_value!r}")


@dataclass
class _State:
    native_error: str = "not loaded yet"  # empty once the native library is in
    references: int = int(ENVIRONMENT["MMKERNELS_BACKEND"] == "reference")  # see _count
    compiled_reference: bool = ENVIRONMENT["MMKERNELS_BACKEND"] == "reference"


_state = _State()
_lock = threading.Lock()
# Of each thread and asyncio task its own: what ``backend`` chose there.
_forced_reference = ContextVar("mmkernels_reference", default=_state.compiled_reference)
DIFFERENTIABLE: set[str] = set()  # those with a backward, by name
TRITON_OPS: set[str] = set()  # those whose CUDA kernel is in Triton, by name
POLLS: list[
    Callable[[int], None]
] = []  # each raises the value error its CUDA kernels latched, if any
# (op, kernel) of the call that testing.which_kernel_ran() watches
_ran: ContextVar[list[tuple[str, str]] | None] = ContextVar("mmkernels_ran", default=None)


def native_error() -> str:
    """Why the native library is not loaded; empty when it is."""
    return _state.native_error


def load_native() -> None:
    """Loads ``_C.so`` if the build made one; otherwise keeps the reason for ``info`` and the warning."""
    if ENVIRONMENT["MMKERNELS_NATIVE"] == "0":
        _state.native_error = "switched off by MMKERNELS_NATIVE=0"
    elif not NATIVE_PATH.exists():
        _state.native_error = (
            build_info().get("error") or "this install was built without a compiler"
        )
    else:
        try:
            torch.ops.load_library(str(NATIVE_PATH))
            _state.native_error = ""
        except OSError as error:  # the undefined symbol is in the cause, not in the message
            _state.native_error = str(error.__cause__ or error).splitlines()[0]
            logger.warning(
                "%s exists but does not load: %s. %s", NATIVE_PATH, native_error(), REMEDY
            )


def build_info() -> dict[str, Any]:
    """What ``setup.py`` wrote about this build: mode, compiler, error text."""
    with contextlib.suppress(OSError, ValueError):
        info: dict[str, Any] = json.loads(BUILD_INFO_PATH.read_text())
        return info
    return {"error": "no build information: the package was not installed with pip"}


REMEDY = (
    "Results are right, only slower. Install a C++17 compiler, then: "
    "pip install 'setuptools>=77' 'cmake>=3.25' ninja && "
    "pip install --no-build-isolation --force-reinstall --no-deps mmkernels "
    "(`mmkernels info` shows the details)"
)


@dataclass(frozen=True)
class Op:
    """A torch op and the plain PyTorch it equals; calling it runs whichever ``backend`` asks for.

    What no kernel follows (a tangent, ``torch.func.grad``) runs the reference too: see ``transforms.py``.
    """

    name: str
    overload: Callable[..., Any]
    reference: Callable[..., Any]
    autocast_skip: tuple[int, ...]

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # Dynamo cannot guard on a ContextVar
            return self._plain(args) if _state.compiled_reference else self.overload(*args)
        if _forced_reference.get():
            return self._plain(args)
        why = transforms.without_kernel(args) if self.name in DIFFERENTIABLE else ""
        return self._followed(args, why) if why else self.overload(*args)

    def _plain(self, args: tuple[Any, ...]) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return self.reference(*args)
        args = _autocast(args, torch.get_autocast_dtype(device), self.autocast_skip)
        with torch.autocast(device, enabled=False):
            return self.reference(*args)

    def _followed(self, args: tuple[Any, ...], why: str) -> Any:
        """The reference, where ``why`` differentiates the call as only plain PyTorch can follow."""
        _note_fallback(self.name, f"no kernel supports {why}", "Results are right, only slower.")
        try:
            return self._plain(args)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            told = f"{why} inside torch.func.vmap cannot batch ids, rows or grids"
            raise RuntimeError(f"{self.name}: {told} ({error})") from error


def define(
    name: str,
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    autocast_skip: tuple[int, ...] = (),
) -> Op:
    """Defines ``mmkernels::<name>`` with its reference, fake and autocast rule.

    The schema must not hold default values: torch strips trailing defaults before Python handlers
    see them. ``autocast_skip`` lists argument positions autocast leaves alone.
    """
    LIB.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, _recorded_reference(name, reference), "CompositeExplicitAutograd")
    torch.library.register_fake(f"mmkernels::{name}", fake, lib=LIB)
    op = Op(name, getattr(torch.ops.mmkernels, name).default, reference, autocast_skip)
    if "!" in schema:
        LIB.impl(name, _version_rule(op.overload), "ADInplaceOrView", with_keyset=True)
    else:
        rule = transforms.looped(name, op.overload)
        torch.library.register_vmap(f"mmkernels::{name}", rule, lib=LIB)
    for device, key in _AUTOCAST_KEYS.items():
        LIB.impl(name, _autocast_rule(op, device, key), key)
    return op


def _version_rule(overload: Any) -> Callable[..., Any]:
    """Counts what the op writes, so that autograd notices where it had been saved."""
    written = [i for i, a in enumerate(overload._schema.arguments) if a.is_write]

    def rule(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in written])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return rule


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Registers the backward of ``name``; ``<name>_backward`` itself then refuses a second backward."""
    DIFFERENTIABLE.add(name)
    torch.library.register_autograd(
        f"mmkernels::{name}", backward, setup_context=setup_context, lib=_GUARDED
    )

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            f"{name}: double backward is not supported; for it, run the forward under "
            'mmkernels.backend("reference")'
        )

    torch.library.register_autograd(
        f"mmkernels::{name}_backward",
        refuse,
        setup_context=lambda ctx, inputs, output: None,
        lib=_GUARDED,
    )


class _Guarded(torch.library.Library):
    """Puts the errors of ``transforms.guarded`` before the autograd kernels that torch makes."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        super().impl(op_name, transforms.guarded(op_name, fn), dispatch_key, **options)


_GUARDED = _Guarded("mmkernels", "FRAGMENT")


def register_triton(op: Op, module: str) -> None:
    """Puts the launcher of the same name in ``module`` at the CUDA key; imported at the first call.

    Triton stays optional. fp64 goes to the reference: nobody trains in it on a GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return
    name = op.name
    fallback = _recorded_reference(name, op.reference)

    def launch(*args: Any) -> Any:
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args):
            return fallback(*args)
        _record(name, "triton")
        launcher = getattr(importlib.import_module(module), name)
        with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
            return launcher(*args)

    LIB.impl(name, launch, "CUDA")
    TRITON_OPS.add(name)


def _recorded_reference(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        _record(name, "reference")
        if not _forced_reference.get():
            why = native_error() or "no kernel for this device or dtype"
            _note_fallback(name, why, REMEDY)
        return reference(*args)

    return run


def _record(name: str, kernel: str) -> None:
    ran = _ran.get()
    if ran is not None:
        ran.append((name, kernel))


def _note_fallback(name: str, why: str, remedy: str) -> None:
    message = f"{name} runs through the PyTorch reference: {why}."
    if ENVIRONMENT["MMKERNELS_STRICT"] == "1":
        raise RuntimeError(f"{message} MMKERNELS_STRICT=1 makes this an error. {remedy}")
    _warn_once(f"{message} {remedy}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _autocast_rule(op: Op, device: str, key: str) -> Callable[..., Any]:
    # torch.library.register_autocast fixes one dtype at registration; users choose it per region.
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return op.overload(*_autocast(args, dtype, op.autocast_skip))

    return rule


def _autocast(args: tuple[Any, ...], dtype: torch.dtype, skip: tuple[int, ...]) -> tuple[Any, ...]:
    """Float tensors among ``args`` in the autocast dtype; fp64 stays, as in torch's own rules."""

    def cast(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [cast(item) for item in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value if value.dtype == torch.float64 else value.to(dtype)

    return tuple(a if i in skip else cast(a) for i, a in enumerate(args))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops inside through plain PyTorch (``"reference"``) or the kernels (``"auto"``).

    It holds in this thread and asyncio task alone; ``MMKERNELS_BACKEND=reference`` is for the whole process. A backward
    follows its forward, wherever it runs: that of the reference is torch's own. Code that is compiled cannot tell
    threads apart: it takes the reference while any thread has chosen it. On CUDA a checkpointed forward runs again in
    a thread of autograd's own: give ``checkpoint`` this block as ``context_fn``.
    """
    if name not in ("auto", "reference"):
        raise ValueError(f'backend: name must be "auto" or "reference", got {name!r}')
    if torch.compiler.is_compiling():
        before, _state.compiled_reference = _state.compiled_reference, name == "reference"
        try:
            yield
        finally:
            _state.compiled_reference = before
        return
    before, after = _forced_reference.get(), name == "reference"
    _forced_reference.set(after)
    _count(after - before)
    try:
        yield
    finally:
        _forced_reference.set(before)
        _count(before - after)


def _count(change: int) -> None:
    """Of threads and tasks, how many run the reference now; compiled code is guarded on whether any does."""
    with _lock:
        _state.references += change
        _state.compiled_reference = _state.references > 0


def chosen_kernel(op: str, device: str) -> tuple[str, str]:
    """``(kernel, reason)`` the dispatcher takes for ``op`` on ``device``: what ``info`` prints."""
    if _forced_reference.get():
        return "reference", "MMKERNELS_BACKEND=reference or mmkernels.backend('reference')"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"mmkernels::{op}", _DISPATCH_KEYS[device]):
        if device == "cuda" and op in TRITON_OPS:
            return "triton", "compiled at the first call; float64 takes the reference"
        return ("c++", "") if device == "cpu" else ("cuda c++", "")
    if native_error():
        return "reference", native_error()
    why = build_info().get("cuda_error") if device == "cuda" else None
    return "reference", why or f"no {device} kernel in this build (see `mmkernels info`)"
