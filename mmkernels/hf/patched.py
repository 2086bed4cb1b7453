# SPDX-License-Identifier: Apache-2.0
"""``mmkernels.patch(model)``: the parts of an instance that the table knows run through the ops."""

from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

from torch import nn

from mmkernels.hf import merge
from mmkernels.hf.row import Found, Row, attach, class_of, detach, is_replaced, refusal, told
from mmkernels.hf.table import ROWS


class NothingToPatch(ValueError):
    """No part of the model was replaced."""


@dataclass(frozen=True)
class Line:
    """One part of the model: what computes it now, or why it was left alone."""

    module: str
    part: str
    op: str
    why_not: str = ""


@dataclass
class Patched:
    """What ``patch`` did to a model. As a context manager it takes it back at the end."""

    model: nn.Module
    lines: list[Line] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str]] = field(default_factory=list)

    def __str__(self) -> str:
        width = max((len(line.module) for line in self.lines), default=0)
        return "\n".join(
            f"{line.module:<{width}}  {line.part:<11} "
            + (f"left alone: {line.why_not}" if line.why_not else f"→ {line.op}")
            for line in self.lines
        )

    def report(self) -> None:
        """Prints a line for every part: module → op, or why it was left alone."""
        print(self)

    def remove(self) -> None:
        """Puts every method back: the model computes what it did, bit for bit.

        What has been put around a method since (accelerate's hooks, say) stays, around the model's own again.
        Copies of the model made since are taken back with it.
        """
        for module, method in self.replaced:
            detach(module, method)
        self.replaced.clear()

    def __enter__(self) -> "Patched":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()


def patch(
    model: nn.Module,
    *,
    patch_embed: bool = True,
    projector: bool = True,
    merge: bool = True,
    positions: bool = True,
    cache: bool = False,
    strict: bool = False,
) -> Patched:
    """Replaces, in this instance, what our ops compute: same parameters, same names, same numbers to the ops' bounds.

    Methods of single modules are replaced, nothing else: ``state_dict``, ``save_pretrained``, Trainer, peft, FSDP
    (patch before sharding), hooks and ``torch.compile`` go on as before. Parts are recognised by structure, each is
    proven on a small random call before it is taken; what does not fit is left alone, and ``report()`` says why.

    Args:
        model: Any module; one of transformers, open_clip, timm, or your own.
        patch_embed: Convolutions that cut patches, with class tokens and positions where they follow.
        projector: Q-Former, perceiver and pooling attention, pixel shuffles, patch mergers.
        merge: ``masked_scatter`` of features among the tokens.
        positions: ``get_rope_index``.
        cache: ``generate`` keeps keys and values in pages (``PagedCache``), unless it is given a cache.
        strict: Anything left alone is an error, and nothing is replaced.

    Returns:
        A handle: ``report()``, ``remove()``; ``with mmkernels.patch(model): ...`` takes it back at the end. Patching
        twice changes nothing; either handle takes it back.

    Raises:
        NothingToPatch: No part fits, with what was looked at.
        ValueError: ``strict``, and something was left alone.

    Numerics: those of the ops, each to its bound; where features and placeholders do not match in number, an error
        (``masked_scatter`` leaves surplus features out).
    """
    chosen = {
        "patch_embed": patch_embed,
        "projector": projector,
        "merge": merge,
        "positions": positions,
        "cache": cache,
    }
    patched = Patched(model)
    todo = _look(model, {part for part, on in chosen.items() if on}, patched)
    if strict and any(line.why_not for line in patched.lines):
        raise ValueError(f"patch: left alone under strict:\n{patched}")
    for module, found in todo:
        attach(module, found)
    if not patched.replaced:
        told = (
            f":\n{patched}"
            if patched.lines
            else f" for {sorted(p for p, on in chosen.items() if on)}"
        )
        raise NothingToPatch(f"patch: {type(model).__name__} has nothing to replace{told}")
    return patched


def _look(model: nn.Module, parts: set[str], patched: Patched) -> list[tuple[nn.Module, Found]]:
    """Writes a line for every part that a row knows; returns what is to be replaced."""
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    shared = frozenset(i for i, count in names.items() if count > 1)
    todo = []
    for name, module in model.named_modules():
        if type(module).__getattr__ is not nn.Module.__getattr__:
            continue  # a wrapper that answers for what it wraps (torch.compile, peft, FSDP): looked at by itself
        for part, found in _candidates(name, module, parts):
            line = name or type(module).__name__
            if isinstance(found, str):
                patched.lines.append(Line(line, part, "", found))
                continue
            if found.method != "forward":
                line += f".{found.method}"
            if is_replaced(module, found.method):
                why = ""
            elif why := refusal(module, found, shared):
                pass
            else:
                todo.append((module, found))
            patched.lines.append(Line(line, part, found.op, why))
            if not why:
                patched.replaced.append((module, found.method))
    return todo


def _candidates(name: str, module: nn.Module, parts: set[str]) -> list[tuple[str, Found | str]]:
    found = [
        (row.part, _find(row, module)) for row in ROWS if row.part in parts and row.within in name
    ]
    if "merge" in parts:
        found += [("merge", f) for f in merge.scattering(class_of(module))]
    return [(part, f) for part, f in found if f is not None]


def _find(row: Row, module: nn.Module) -> Found | str | None:
    """A stranger's module may raise at whatever it is asked."""
    try:
        return row.find(module)
    except Exception as error:
        return f"could not be looked at: {told(error)}"
