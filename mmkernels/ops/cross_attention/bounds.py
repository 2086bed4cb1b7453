# SPDX-License-Identifier: Apache-2.0
"""How far absorbed cross-attention may be from fp64, output and gradients: derived in TOLERANCES.md.

Tensors of the spelled-out call (``cases.spelled``): one head a query head, keys and values of all sources. Heads come
first: ``[B, A, Q, ·]``. u is that of fp32 for gradients in any narrow dtype: the kernel computes them in fp32 and
rounds once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from mmkernels.ops.cross_attention.reference import scores_with_mask
from mmkernels.testing.case import Inputs, leaves, map_tensors
from mmkernels.testing.yardstick import UNIT, Tensors, one_reduction, ulp

Spelled = Callable[[Inputs], Inputs]


def heads(rows: torch.Tensor, A: int) -> torch.Tensor:
    """``[…, T, A·d]`` → ``[…, A, T, d]``."""
    return rows.unflatten(-1, (A, -1)).transpose(-2, -3)


def _rows(of_heads: torch.Tensor) -> torch.Tensor:
    return of_heads.transpose(1, 2).flatten(2)


def _project(x: Inputs, name: str, of: str, bias: bool = True) -> torch.Tensor:
    weight, b_k = x[f"{name}_weight"], x.get(f"{name}_bias") if bias else None
    return heads(F.linear(x[of], weight, b_k), x["A"])


class _Attention:
    """Probabilities, values and the sizes of their terms."""

    def __init__(self, x: Inputs) -> None:
        size = map_tensors(x, lambda t: t.abs() if t.is_floating_point() else t)
        q, self.value = heads(x["query"], x["A"]), _project(x, "value", "of_values")
        self.scale, self.value_size = q.shape[-1] ** -0.5, _project(size, "value", "of_values")
        key = _project(x, "key", "of_keys", bias=False)  # b_k adds the same to a whole row
        self.key_size, mask = _project(size, "key", "of_keys", bias=False), x["mask"]
        self.query_size = q.abs() * self.scale
        full = (*q.shape[:3], key.shape[2])
        mask = None if mask is None else mask.expand(full)
        self.p = torch.softmax(scores_with_mask(q, key, mask, self.scale), -1).nan_to_num(0.0)
        X, A, Q, d = x["of_keys"].shape[-1], x["A"], q.shape[2], q.shape[3]
        self.chain, self.sums = X + d + full[-1], (len(q) + A) * Q
        self.score_size = self._largest_score(mask)

    def _largest_score(self, mask: torch.Tensor | None) -> torch.Tensor:
        """s̄ of a row, ``[B, A, Q, 1]``; adding a mask rounds once, which is a part of a chain's rounding."""
        size = self.query_size @ self.key_size.transpose(-1, -2)
        if mask is not None and mask.is_floating_point():
            size = size + mask.abs() / (2 * self.chain**0.5)
        size = torch.where(self.p > 0, size, 0.0)
        return size.amax(-1, keepdim=True) if size.shape[-1] else size.new_zeros(*size.shape[:3], 1)

    def centred(self, d_out: torch.Tensor) -> torch.Tensor:
        """dP less its mean over the row."""
        d_p = d_out @ self.value.transpose(-1, -2)
        return d_p - (self.p * d_p).sum(-1, keepdim=True)

    def d_scores(self, d_out: torch.Tensor) -> torch.Tensor:
        return self.p * self.centred(d_out)


def output_bound(x: Inputs, reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of the output; ``x`` spelled out, in fp64."""
    a = _Attention(x)
    if dtype == torch.float32:
        terms = a.p @ a.value_size * (1 + 2 * a.score_size)
        return ulp(reference, dtype) + 2 * UNIT[dtype] * a.chain**0.5 * _rows(terms)
    squares = _rows(a.p.square() @ a.value.square())
    return one_reduction(reference, dtype, squares, squares, squares)


def gradient_bounds(
    spelled: Spelled, wide: Inputs, reference: Tensors, grad: torch.Tensor, dtype: torch.dtype
) -> Tensors:
    """Of every gradient in ``reference``; ``wide`` is the call in fp64."""
    wide = map_tensors(wide, lambda t: t.detach().requires_grad_(t.is_floating_point()))
    x, names = spelled(wide), {n: t for n, t in leaves(wide).items() if n in reference}
    with torch.no_grad():
        attention = _Attention(x)
        found = _spelled_bounds(x, attention, grad, dtype)
        parts = _parts(x, attention, grad) if "key_position" in wide else []
    # Copies, sums and broadcasts lead to what the caller gave; bounds and parts add up along them.
    to_leaves = lambda of_spelled: _mapped(x, names, of_spelled)
    bounds, last = to_leaves(found), 1.0 if dtype == torch.float32 else 0.505
    for part in map(to_leaves, parts):
        bounds |= {n: bounds[n] + last * ulp(part[n], dtype) for n in part}
    return {n: last * ulp(reference[n], dtype) + bounds.get(n, 0.0) for n in names}


def _mapped(x: Inputs, names: Tensors, of_spelled: Tensors) -> Tensors:
    own = {n: t for n, t in of_spelled.items() if x.get(n) is not None and x[n].requires_grad}
    found = torch.autograd.grad(
        [x[n] for n in own], list(names.values()), list(own.values()), retain_graph=True, allow_unused=True
    )  # fmt: skip
    return {n: t for n, t in zip(names, found, strict=True) if t is not None}


def _parts(x: Inputs, a: _Attention, grad: torch.Tensor) -> list[Tensors]:
    """With positions of keys, the gradients of query and W_k are sums of two, each of which rounds."""
    d_scores, A = a.d_scores(heads(grad, x["A"])), x["A"]
    q, weight = heads(x["query"], A) * a.scale, x["key_weight"].unflatten(0, (A, -1))
    found = []
    for source in (x["of_values"], x["of_keys"] - x["of_values"]):
        wide = d_scores @ source.unsqueeze(1)
        query = _rows(wide @ weight.transpose(-1, -2)) * a.scale
        key_weight = (q.transpose(-1, -2) @ wide).sum(0).flatten(0, 1)
        found.append({"query": query, "key_weight": key_weight})
    return found


def _spelled_bounds(x: Inputs, a: _Attention, grad: torch.Tensor, dtype: torch.dtype) -> Tensors:
    A = x["A"]
    g = 2 * UNIT[torch.float32] * (a.chain + a.sums) ** 0.5
    of_p = g * (1 + 2 * a.score_size)  # relative, of a probability
    d_out = heads(grad, A)
    centred = a.centred(d_out)
    terms = d_out.abs() @ a.value_size.transpose(-1, -2)
    both = lambda t: t + (a.p * t).sum(-1, keepdim=True)  # its own, and through Σ p·dp
    error = a.p * (of_p * both(centred.abs()) + g * (centred.abs() + both(terms)))
    d_scores, p = g * a.p * centred.abs() + error, (g + of_p) * a.p
    key_weight, value_weight = (
        x[n].abs().unflatten(0, (A, -1)) for n in ("key_weight", "value_weight")
    )
    wide_query, wide_out = a.query_size @ key_weight, d_out.abs() @ value_weight
    keys, values = (x[n].abs().unsqueeze(1) for n in ("of_keys", "of_values"))
    of_weight = lambda rows, p, keys: (rows.transpose(-1, -2) @ (p @ keys)).sum(0).flatten(0, 1)
    bounds = {
        "query": _rows(d_scores @ a.key_size) * a.scale,
        "of_keys": (d_scores.transpose(-1, -2) @ wide_query).sum(1),
        "of_values": (p.transpose(-1, -2) @ wide_out).sum(1),
        "key_weight": of_weight(a.query_size, d_scores, keys),
        "value_weight": of_weight(d_out.abs(), p, values),
        "value_bias": g * d_out.abs().sum((0, 2)).flatten(),
    }
    if x["mask"] is not None and x["mask"].is_floating_point():
        # it leaves the op in the mask's dtype, before broadcasting sums it
        rounded = 0.505 * ulp(a.p * centred, dtype)
        bounds["mask"] = _broadcast_back(d_scores + rounded, x["mask"])
    return bounds


def _broadcast_back(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    t = t.sum_to_size(*(1,) * (t.dim() - like.dim()), *like.shape)
    return t.reshape(like.shape)
