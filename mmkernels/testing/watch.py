# SPDX-License-Identifier: Apache-2.0
"""Which kernel ran: a test that passes through the fallback proves nothing about the kernel."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mmkernels import backends


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.spoken: list[tuple[str, str]] = []  # (op, kernel)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "mmkernels":
            self.calls.append((func._schema.name.removeprefix("mmkernels::"), args))
        # For the call alone: torch brings this mode into the threads of a backward, not our variable.
        token = backends._ran.set(self.spoken)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            backends._ran.reset(token)


@contextlib.contextmanager
def captured_calls() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The ``mmkernels`` ops called inside, with their arguments, forward and backward."""
    with _Calls() as mode:
        yield mode.calls


@contextlib.contextmanager
def which_kernel_ran() -> Iterator[dict[str, str]]:
    """Op → ``"native"``, ``"triton"`` or ``"reference"``, filled when the block ends.

    The reference and Triton launchers, being Python, say so themselves; an op that was called while
    neither spoke ran in the native library. Other threads may watch too: each sees its own calls.
    """
    ran: dict[str, str] = {}
    with _Calls() as mode:
        yield ran
    spoken = dict(mode.spoken)
    ran.update({op: spoken.get(op, "native") for op, _ in mode.calls})
