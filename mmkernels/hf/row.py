# SPDX-License-Identifier: Apache-2.0
"""What a row of the table is, when it may be taken, and how a method of one instance is replaced.

A row recognises a module by its structure, never by its class, and says what computes in its place. Before it is taken
it is proven: on a copy with random parameters, in fp64, it must give what the module gives (``proven``).
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Run = Callable[..., Any]
LAYERS = (
    nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.MultiheadAttention,
    NonDynamicallyQuantizableLinear,
)  # fmt: skip
CLOSE = 1e-5  # of the largest value, in fp64: some modules compute a part in fp32


class Found(NamedTuple):
    """A row fits this module.

    ``run(module, original, *args)`` takes the place of ``method`` and calls ``original``, the method itself, where a
    call is not what the row is for. ``probe(module)``: arguments of a call that must not go there; None: proven
    otherwise. ``layers``: submodules whose parameters are read directly, so that their own forward is not called: a
    call finds them as they were, or goes to ``original``.
    ``pure``: reads no parameter, so it is proven on the module itself.
    """

    op: str
    run: Run
    probe: Callable[[nn.Module], tuple[Any, ...]] | None
    layers: tuple[str, ...] = ()
    method: str = "forward"
    pure: bool = False


class Row(NamedTuple):
    """``find`` gives None where a module has nothing to do with the row, and a reason where it nearly fits.

    ``within``: part of the module's name where its structure leaves open what it is for.
    """

    part: str
    find: Callable[[nn.Module], Found | str | None]
    within: str = ""


class NotTaken(Exception):
    """A probe went to the original."""


def intact(*layers: nn.Module) -> bool:
    """Whether their forward is their class's and nobody watches it: else it must be called."""
    return not any(changed(layer) for layer in layers)


def changed(layer: nn.Module) -> str:
    """What makes a layer more than its parameters; empty: nothing."""
    kind = type(layer)
    if kind not in LAYERS:
        known = any(
            kind.__name__ == k.__name__ for k in LAYERS
        )  # a quantised Linear is a Linear by name
        name = f"{kind.__module__}.{kind.__name__}" if known else kind.__name__
        return f"is a {name}, which may compute otherwise"
    if "forward" in layer.__dict__ and not is_ours(layer.__dict__["forward"]):
        return "has a forward of its own"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "has hooks"
    if any(map(is_sharded, layer._parameters.values())):
        return "has a DTensor parameter: patch before sharding"
    return ""


def is_sharded(parameter: torch.Tensor | None) -> bool:
    """Whether it is a DTensor, whose import takes a second."""
    return hasattr(parameter, "device_mesh")


def is_ours(method: Any) -> bool:
    """Whether it was put there by ``attach``."""
    return isinstance(method, functools.partial) and hasattr(method, "mmkernels_op")


def attach(module: nn.Module, found: Found) -> None:
    """On the instance: the class and other instances stay as they are, hooks and wrappers go on working."""
    original = getattr(module, found.method)
    method = functools.partial(_call, found.run, found.layers, module, original)
    functools.update_wrapper(method, original)  # its signature is what Trainer and generate ask for
    method.mmkernels_op = found.op  # type: ignore[attr-defined]
    object.__setattr__(module, found.method, method)


def _call(
    run: Run, layers: tuple[str, ...], module: nn.Module, original: Run, *args: Any, **kwargs: Any
) -> Any:
    """The replacement, unless somebody has put an adapter, a hook or a shard where its parameters were."""
    if not intact(*[module.get_submodule(name) for name in layers]):
        return original(*args, **kwargs)
    return run(module, original, *args, **kwargs)


def refusal(module: nn.Module, found: Found, shared: frozenset[int]) -> str:
    """Why the row must not be taken; empty: it may. ``shared``: ids of parameters that have several names."""
    if found.method in module.__dict__:
        return f"has a {found.method} of its own"
    layers = [module.get_submodule(name) for name in found.layers]
    for name, layer in zip(found.layers, layers, strict=True):
        if why := changed(layer):
            return f"{name} {why}"
    read = [p for layer in layers for p in layer.parameters()] + list(module._parameters.values())
    for parameter in () if found.pure else read:
        if is_sharded(parameter):
            return "has a DTensor parameter: patch before sharding"
        if parameter is not None and parameter.is_meta:
            return "is on the meta device: patch after loading"
        if id(parameter) in shared:
            return "shares a parameter with another module"
    return proven(module, found) if found.probe is not None else ""


@torch.no_grad()
def proven(module: nn.Module, found: Found) -> str:
    """Empty, or where a copy of the module with random parameters, in fp64, differs from what would replace it."""
    assert found.probe is not None
    there = module if found.pure else copy.deepcopy(module).double().eval()
    device = next(module.parameters(), torch.empty(0)).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in () if found.pure else there.parameters():
        parameter.normal_(std=0.5, generator=generator)
    arguments = _as_double(found.probe(there))
    original = getattr(there, found.method)
    try:
        expected = original(*arguments)
        got = found.run(there, _not_taken, *arguments)
    except NotTaken:
        return "its call does not look as expected"
    except Exception as error:  # whatever a stranger's forward raises
        return f"a trial call failed: {type(error).__name__}: {error}".splitlines()[0]
    return _difference(got, expected)


def _not_taken(*args: Any, **kwargs: Any) -> Any:
    raise NotTaken


def _as_double(arguments: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


def _difference(got: Any, expected: Any) -> str:
    if type(got) is not type(expected):
        return f"a trial call gave {type(got).__name__}, the module {type(expected).__name__}"
    if isinstance(got, tuple | list):
        if len(got) != len(expected):
            return f"a trial call gave {len(got)} results, the module {len(expected)}"
        return next(filter(None, map(_difference, got, expected)), "")
    if not isinstance(got, torch.Tensor):
        return "" if got is expected else f"a trial call gave {got!r}, the module {expected!r}"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        told = [f"{t.dtype} {list(t.shape)}" for t in (got, expected)]
        return f"a trial call gave {told[0]}, the module {told[1]}"
    off = (got.double() - expected.double()).abs().max() if got.numel() else torch.zeros(())
    allowed = CLOSE * expected.double().abs().max() if got.is_floating_point() else 0
    if off <= allowed:
        return ""
    return f"a trial call differs by {off.item():.2g}: it computes something else"
