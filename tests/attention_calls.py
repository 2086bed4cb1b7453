# SPDX-License-Identifier: Apache-2.0
"""Calls of cross_attention with dropped probabilities, or with keys that no query may attend to.

Both suites walk them: ``tests/test_cross_attention.py`` with the CPU kernel, ``tests/interpreted`` with the Triton
kernel.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

import mmkernels
from mmkernels import Norm
from mmkernels.ops.cross_attention import reference

Tensors = dict[str, torch.Tensor]
B, Q, N, X, A, D = 3, 4, 12, 10, 2, 8  # n = 3 · 4 as a grid; in the grid's last row no key is seen
HIDDEN = torch.arange(N) >= torch.tensor([8, 5, 8])[:, None]  # [B, n]
HIDDEN_BY_ALL = HIDDEN.all(0)
POISON = {"nan": math.nan, "inf": math.inf, "minus_inf": -math.inf, "overflowing": 3e38}


def _rows_mask(g: torch.Generator) -> torch.Tensor:
    """``[B, A, Q, n]``, bool: queries see different keys, one sees none."""
    seen = torch.rand(B, A, Q, N, generator=g) > 0.4
    seen[0, 0, 0] = False
    seen[:, 1, 1] = True
    return seen & ~HIDDEN[:, None, None]


MASKS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "padding": lambda g: ~HIDDEN[:, None, None],
    "rows": _rows_mask,
    "additive": lambda g: torch.randn(B, 1, Q, N, generator=g).masked_fill(
        HIDDEN[:, None, None], -math.inf
    ),
    "of_keys": lambda g: ~HIDDEN_BY_ALL,
}
EXTRAS = ("", "layer", "rms", "table", "grid", "latents", "bias", "shared")


def hidden_of(mask: str) -> torch.Tensor:
    """``[B, n]``: the keys it hides from every query."""
    return HIDDEN_BY_ALL.expand(B, N) if mask == "of_keys" else HIDDEN


def make(mask: str, extra: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the public call."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g)
    call: dict[str, Any] = {
        "query": new(Q, A * D) if extra == "shared" else new(B, Q, A * D), "context": new(B, N, X),
        "key_weight": new(A * D, X), "value_weight": new(A * D, X), "attention_mask": MASKS[mask](g),
    }  # fmt: skip
    if extra in ("layer", "rms"):
        call["context_norm"] = Norm(extra, new(X), new(X) if extra == "layer" else None, 1e-5)
    if extra == "table":
        call["key_position"] = new(N, X)
    if extra == "grid":
        call["key_position"] = (new(3, X), new(4, X))
    if extra == "latents":
        call["latents"] = new(B, 3, X)
    if extra == "bias":
        call |= {"key_bias": new(A * D), "value_bias": new(A * D)}
    return _mapped(call, lambda t: t.to(dtype) if t.is_floating_point() else t)


def _mapped(call: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(call, torch.Tensor):
        return change(call)
    if isinstance(call, Norm):
        return Norm(call.kind, _mapped(call.weight, change), _mapped(call.bias, change), call.eps)
    if isinstance(call, dict):
        return {name: _mapped(value, change) for name, value in call.items()}
    return tuple(_mapped(t, change) for t in call) if isinstance(call, tuple) else call


def poisoned(call: dict[str, Any], mask: str, value: float) -> dict[str, Any]:
    """The same call with ``value`` in every hidden row of the context and of its positions."""
    call = dict(call)
    call["context"] = call["context"].masked_fill(hidden_of(mask)[..., None], value)
    position = call.get("key_position")
    if isinstance(position, torch.Tensor):
        call["key_position"] = position.masked_fill(HIDDEN_BY_ALL[:, None], value)
    elif position is not None:
        call["key_position"] = (
            position[0].masked_fill(torch.tensor([[0], [0], [1]]).bool(), value),
            position[1],
        )
    return call


def outcome(call: dict[str, Any], algorithm: str) -> Tensors:
    """Output and all gradients."""
    leaves: list[torch.Tensor] = []

    def leaf(t: torch.Tensor) -> torch.Tensor:
        t = t.detach().clone()
        if t.is_floating_point():
            leaves.append(t.requires_grad_())
        return t

    out = mmkernels.cross_attention(**_mapped(call, leaf), num_heads=A, algorithm=algorithm)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    named = {f"gradient of {i}": t for i, t in enumerate(found) if t is not None}
    at = next(i for i, t in enumerate(leaves) if t.shape == (B, N, X))
    return {"out": out.detach(), **named, "of the context": found[at]}


def assert_hidden_rows_do_not_matter(
    mask: str, extra: str, algorithm: str, dtype: torch.dtype, kinds: Iterable[str] = tuple(POISON)
) -> None:
    """The same bits whatever hidden rows hold, and no gradient for them."""
    call = make(mask, extra, dtype)
    expected = outcome(call, algorithm)
    assert all(t.isfinite().all() for t in expected.values())
    assert not expected["of the context"][hidden_of(mask)].any()
    for kind in kinds:
        got = outcome(poisoned(call, mask, POISON[kind]), algorithm)
        for name, tensor in expected.items():
            torch.testing.assert_close(
                got[name], tensor, rtol=0, atol=0, msg=f"{kind}, {name}: {{}}".format
            )
        assert not got["of the context"][hidden_of(mask)].any()


def dropped(dtype: torch.dtype, packed: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """Tensors of the op by name, in its order, and the mask of kept probabilities."""
    g = torch.Generator().manual_seed(2)
    new = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    lengths = torch.tensor([0, 4, 4, 11])
    n = 7 if packed else 6
    call = {
        "query": new(3, 3, 16), "context": new(11, 10) if packed else new(3, n, 10), "latents": new(3, 2, 10),
        "key_weight": new(16, 10), "value_weight": new(16, 10), "key_bias": None, "value_bias": new(16),
    }  # fmt: skip
    keep = torch.rand(3, 2, 3, n + 2, generator=g) > 0.4
    keep[0, 0, 0] = False  # a row may lose everything
    mask = None if packed else torch.rand(3, 2, 3, n + 2, generator=g) > 0.2
    if mask is not None:
        mask[1, 1, 2] = False
    call |= {
        "attention_mask": mask,
        "dropout_mask": keep,
        "cu_seqlens": lengths if packed else None,
    }
    return call, keep


def through(
    op: Callable[..., tuple[torch.Tensor, ...]], call: dict[str, Any], packed: bool
) -> Tensors:
    """Output and gradients of the op, or of the reference, with the same dropped probabilities."""
    leaves = {
        n: t.clone().requires_grad_()
        for n, t in call.items()
        if t is not None and t.is_floating_point()
    }
    out = op(*{**call, **leaves}.values(), 7 if packed else 0, 2, 0.5, 0.4)[0]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_bias_is_dropped_with_its_probability(
    dtype: torch.dtype, packed: bool, within: float
) -> None:
    """Our kernel against the reference in fp64, which forms V with its bias."""
    call, _ = dropped(dtype, packed)
    wide = {
        n: t.double() if t is not None and t.is_floating_point() else t for n, t in call.items()
    }
    expected = through(reference.cross_attention, wide, packed)
    for name, got in through(torch.ops.mmkernels.cross_attention, call, packed).items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(
            got.double(),
            expected[name],
            rtol=0,
            atol=within * largest,
            msg=f"{name}: {{}}".format,
        )
