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
_FORWARDS = {kind: kind.forward for kind in LAYERS}
CLOSE = 1e-5  # of the largest value, in fp64: some modules compute a part in fp32


class Found(NamedTuple):
    """A row fits this module.

    ``run(module, original, *args)`` takes the place of ``method`` and calls ``original``, the method itself, where a
    call is not what the row is for. ``probe(module)``: arguments of a call that must not go there; None: proven
    otherwise. ``layers``: submodules whose parameters are read directly, so that their own forward is not called: a
    call finds them as they were, or goes to ``original``.
    ``pure``: reads no parameter, so it is proven on the module itself, wherever its weights are.
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
    """Whether their forward is torch's and nobody watches it: else it must be called."""
    return not any(changed(layer) for layer in layers)


def changed(layer: nn.Module) -> str:
    """What makes a layer more than its parameters; empty: nothing."""
    kind = class_of(layer)
    if kind not in LAYERS:
        known = any(
            kind.__name__ == k.__name__ for k in LAYERS
        )  # a quantised Linear is a Linear by name
        name = f"{kind.__module__}.{kind.__name__}" if known else kind.__name__
        return f"is a {name}, which may compute otherwise"
    if "forward" in layer.__dict__ or kind.forward is not _FORWARDS[kind]:
        return "has a forward of its own"
    if watched(layer):
        return "has hooks"
    if any(map(is_sharded, layer._parameters.values())):
        return "has a DTensor parameter: patch before sharding"
    return ""


def watched(layer: nn.Module) -> bool:
    """Whether a hook, its own or one for all modules, waits for its call."""
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    return any(map(len, hooks)) or bool(torch.nn.modules.module._has_any_global_hook())


def is_sharded(parameter: torch.Tensor | None) -> bool:
    """Whether it is a DTensor, whose import takes a second."""
    return hasattr(parameter, "device_mesh")


# Replacing a method ------------------------------------------------------------------------------------------------
#
# A module becomes an instance of a subclass of its class, as fully_shard does it. So a method finds the module it is
# called on: a replica of DataParallel, a copy, whatever accelerate wraps. On the instance it would stay bound to the
# first one.

FOUND = "mmkernels_found"  # in a class that ``attach`` made: what it replaces, by method


def class_of(module: nn.Module) -> Any:
    """Its class without what ``attach`` put before it."""
    return next(c for c in type(module).__mro__ if FOUND not in c.__dict__)


def is_replaced(module: nn.Module, method: str) -> bool:
    """Whether ``attach`` replaced it and ``detach`` has not taken it back."""
    return any(method in c.__dict__.get(FOUND, ()) for c in type(module).__mro__)


def attach(module: nn.Module, found: Found) -> None:
    """This instance computes ``found.method`` by ``found.run``; its class and other instances stay as they are."""
    base: Any = type(module)
    before: dict[str, Found] = {}
    if FOUND in base.__dict__:  # copies of the module may share this class
        base, before = base.__base__, base.__dict__[FOUND]
    module.__class__ = _subclass(base, {**before, found.method: found})


def detach(module: nn.Module, method: str) -> None:
    """Takes it back, whatever has been put around the method since."""
    for cls in type(module).__mro__:
        cls.__dict__.get(FOUND, {}).pop(method, None)
    if type(module).__dict__.get(FOUND) == {}:
        module.__class__ = type(module).__base__  # type: ignore[assignment]


def _subclass(base: Any, found: dict[str, Found]) -> Any:
    """Under the same name: Trainer, FSDP's policies and transformers' registries go by names."""
    names = ("__module__", "__qualname__", "__doc__")
    body = {FOUND: found, **{name: getattr(base, name) for name in names}}
    methods = {name: _method(base, name, found) for name in found}
    return type(base)(base.__name__, (base,), {**body, **methods})


def _method(base: Any, name: str, replaced: dict[str, Found]) -> Any:
    theirs = getattr(base, name)

    @functools.wraps(theirs)  # its signature is what Trainer and generate ask for
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        now, found = getattr(base, name), replaced.get(name)
        original = functools.partial(now, self)
        # The class may have another method since (Liger), and layers an adapter, a hook or a shard.
        if found is None or now is not theirs:
            return original(*args, **kwargs)
        if not intact(*[self.get_submodule(layer) for layer in found.layers]):
            return original(*args, **kwargs)
        return found.run(self, original, *args, **kwargs)

    return method


# Whether a row may be taken ----------------------------------------------------------------------------------------


def refusal(module: nn.Module, found: Found, shared: frozenset[int]) -> str:
    """Why the row must not be taken; empty: it may. ``shared``: ids of parameters that have several names."""
    if found.method in module.__dict__:
        return f"has a {found.method} of its own"
    layers = [module.get_submodule(name) for name in found.layers]
    for name, layer in zip(found.layers, layers, strict=True):
        if why := changed(layer):
            return f"{name} {why}"
    if not found.pure:
        read = [p for layer in layers for p in layer.parameters()]
        read += [p for p in module._parameters.values() if p is not None]
        if any(map(is_sharded, read)):
            return "has a DTensor parameter: patch before sharding"
        if any(p.is_meta for p in module.parameters()):
            return "is on the meta device: patch after loading"
        if any(id(p) in shared for p in read):
            return "shares a parameter with another module"
        if any(not p.is_floating_point() for p in read):
            return "has a quantised parameter"
    return proven(module, found) if found.probe is not None else ""


@torch.no_grad()
def proven(module: nn.Module, found: Found) -> str:
    """Empty, or where a copy of the module with random parameters, in fp64, differs from what would replace it."""
    assert found.probe is not None
    try:
        there = module if found.pure else _noisy(module)
        arguments = _as_double(found.probe(there))
        expected = getattr(there, found.method)(*arguments)
        got = found.run(there, _not_taken, *arguments)
    except NotTaken:
        return "its call does not look as expected"
    except Exception as error:  # whatever a stranger's module raises when copied or called
        return f"a trial call failed: {told(error)}"
    return _difference(got, expected)


def told(error: Exception) -> str:
    """One line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _noisy(module: nn.Module) -> nn.Module:
    """A copy in fp64; parameters that a quantiser packed into integers stay as they are."""
    there = copy.deepcopy(module).double().eval()
    for parameter in there.parameters():
        if parameter.is_floating_point():
            generator = torch.Generator(parameter.device).manual_seed(parameter.numel())
            parameter.normal_(std=0.5, generator=generator)
    return there


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
