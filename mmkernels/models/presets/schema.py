# SPDX-License-Identifier: Apache-2.0
"""What an entry says: each component as it is built here, as it was published, and where that stands."""

from dataclasses import dataclass, field
from typing import Any

from mmkernels.models.config import MMConfig

READ, RECALLED, NOT_PUBLISHED = "read", "recalled", "not published"
PROJECTORS = "projectors.*"


@dataclass(frozen=True)
class Part:
    """A component.

    Args:
        config: What is built (``models/config.py``; blocks of a projector as a tuple), or None: only recorded.
        published: What the system has.
        source: File and line, or paper; ``"not published"`` if none says it.
        status: ``"read"`` there, or ``"recalled"``.
        differs: What is built here differs in this; empty: it does not.
        parameters: Number of parameters the source prints, as printed, and where; empty: none.
    """

    config: Any
    published: str
    source: str
    status: str = READ
    differs: str = ""
    parameters: str = ""


@dataclass(frozen=True)
class Stage:
    """What learns: ``fnmatch`` patterns of the model's parameter names."""

    learns: tuple[str, ...]
    source: str
    status: str = RECALLED
    differs: str = ""


def no_such(stage: Stage) -> Stage:
    """For a system without that stage: a step runs with the parts of the other."""
    return Stage(
        stage.learns,
        NOT_PUBLISHED,
        NOT_PUBLISHED,
        "no such stage; runs with the parts of the other one",
    )


@dataclass(frozen=True)
class Preset:
    """A published system; an encoder or projector may be the name of another modality's, which is then shared."""

    name: str
    encoders: dict[str, Part | str]
    projectors: dict[str, Part | str]
    decoder: Part
    pt: Stage
    it: Stage
    output_projectors: dict[str, Part] = field(default_factory=dict)
    generators: dict[str, Part] = field(default_factory=dict)

    @property
    def config(self) -> MMConfig:
        """The model at its published size."""
        image = self.output_projectors.get("image")
        return MMConfig(
            encoders={m: p if isinstance(p, str) else p.config for m, p in self.encoders.items()},
            projectors={
                m: p if isinstance(p, str) else p.config for m, p in self.projectors.items()
            },
            decoder=self.decoder.config,
            output_projector=image.config if image else None,
        )

    @property
    def parts(self) -> dict[str, Part]:
        """Components by name, shared ones once."""
        named: dict[str, Part | str] = {}
        for kind, parts in (
            ("encoder", self.encoders), ("projector", self.projectors),
        ):  # fmt: skip
            named |= {f"{kind}, {m}": p for m, p in parts.items()}
        named["decoder"] = self.decoder
        for kind, made in (
            ("output projector", self.output_projectors), ("generator", self.generators),
        ):  # fmt: skip
            named |= {f"{kind}, {m}": p for m, p in made.items()}
        return {name: part for name, part in named.items() if not isinstance(part, str)}
