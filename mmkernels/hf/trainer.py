# SPDX-License-Identifier: Apache-2.0
"""``Trainer(..., callbacks=[mmkernels.hf.trainer.PatchCallback()])``: patches the model before it is wrapped.

Not imported by ``mmkernels.hf``: it needs transformers' Trainer.
"""

from typing import Any

from transformers import TrainerCallback

from mmkernels.hf.patched import Patched, patch


class PatchCallback(TrainerCallback):
    """``options`` are those of ``mmkernels.patch``; the handle is ``patched``."""

    def __init__(self, **options: bool) -> None:
        self.options = options
        self.patched: Patched | None = None

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Trainer has its model, and has not sharded or compiled it."""
        self.patched = patch(model, **self.options)
