# SPDX-License-Identifier: Apache-2.0
"""Writes ``docs/systems.md``: every system, its components, their sizes, where they come from and what differs."""

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mmkernels.models.config import OutputProjectorConfig
from mmkernels.models.decoder import Decoder
from mmkernels.models.mmllm import ENCODERS
from mmkernels.models.output_projector import OutputProjector
from mmkernels.models.presets import PRESETS, Part, Preset
from mmkernels.models.projector import Projector

HEAD = """# The surveyed systems

Made by `python -m mmkernels.models.presets` from `mmkernels/models/presets/`; do not edit.

{systems} systems of the survey (Zhang et al. 2024, findings-acl) with image, video or audio input. `preset(name)` is
the configuration at the published size, `preset(name, "tiny")` the same parts in small.
*Status*: **read** in the source named, **recalled**, all or in part, from the paper named without opening it, or
**not published**. *Built*: the parts of the configuration, and their parameters, counted on the meta device; *printed*:
the parameters a source prints. No weights of these systems are in the box.
"""
COLUMNS = (
    "component", "published", "built", "parameters built", "printed", "source", "status", "differs",
)  # fmt: skip


def table() -> str:
    """The whole file."""
    return HEAD.format(systems=len(PRESETS)) + "".join(_section(p) for p in PRESETS.values())


def _section(system: Preset) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, part in system.parts.items():
        sizes = _sizes(part.config) if part.config is not None else "recorded only"
        count = _millions(_count(name, part, system)) if part.config is not None else ""
        printed = part.parameters or "not published"
        rows.append(
            (name, part.published, sizes, count, printed, part.source, part.status, part.differs)
        )
    for name, stage in (("learns in PT", system.pt), ("learns in IT", system.it)):
        learns = ", ".join(f"`{p}`" for p in stage.learns)
        rows.append((name, "", learns, "", "", stage.source, stage.status, stage.differs))
    shared = [
        f"{m} goes through the {kind} of {s}"
        for kind, parts in (("encoder", system.encoders), ("projector", system.projectors))
        for m, s in parts.items()
        if isinstance(s, str)
    ]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    note = f"\n{'; '.join(shared).capitalize()}.\n" if shared else ""
    return f"\n## {system.name}\n\n{lines}\n{note}"


def _sizes(config: Any) -> str:
    if isinstance(config, tuple):
        return " → ".join(_sizes(block) for block in config)
    values = (
        f"{f.name}={getattr(config, f.name)}" for f in fields(config) if _says(config, f.name)
    )
    return f"{type(config).__name__.removesuffix('Config')}({', '.join(values)})"


def _says(config: Any, name: str) -> bool:
    """Sizes always; switches where they are on."""
    return getattr(config, name) not in ((), 0, "", False, None)


@cache
def _parameters(kind: str, config: Any, width: int) -> int:
    with torch.device("meta"):
        if kind == "projector":
            module: torch.nn.Module = Projector(config, width)
        elif kind == "decoder":
            module = Decoder(config)
        elif isinstance(config, OutputProjectorConfig):
            module = OutputProjector(config, width)
        else:
            module = ENCODERS[type(config)](config)
    return sum(p.numel() for p in module.parameters())


def _count(name: str, part: Part, system: Preset) -> int:
    kind, _, modality = name.partition(", ")
    width = 0
    if kind == "projector":
        encoder = system.config.encoders[modality]
        owner = system.config.encoders[encoder] if isinstance(encoder, str) else encoder
        width = owner.hidden_size  # type: ignore[union-attr]
    elif kind == "output projector":
        width = system.config.decoder.hidden_size
    return _parameters(kind, part.config, width)


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


if __name__ == "__main__":
    path = Path(__file__).parents[3] / "docs" / "systems.md"
    path.write_text(table())
    print(f"{path}: {len(PRESETS)} systems")
