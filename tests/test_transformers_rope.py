# SPDX-License-Identifier: Apache-2.0
"""``mrope`` with the table of ``rope_table`` against transformers' own rotary modules, M-RoPE of every layout.

The reference equals them bit by bit in fp32. The kernels are held to the bound of TOLERANCES.md beside the rotation
in fp64, and in 16 bits to no more error than transformers, whose cos, sin, products and sum each round.
"""

import pytest
import torch

from mmkernels import backends, mrope
from mmkernels.ops.mrope import cases, reference
from mmkernels.testing import which_kernel_ran

pytest.importorskip("transformers")
from rope_families import FAMILIES, Rotary

IDS = [f"{f.model}-{i}" for i, f in enumerate(FAMILIES)]
Pair = tuple[torch.Tensor, torch.Tensor]


def call(family: Rotary, dtype: torch.dtype) -> tuple[Pair, torch.Tensor, Pair]:
    """Query and key ``[B, heads, L, d]``, positions, and what transformers makes of them."""
    module, apply, d = family.made()
    axis = family.table().axis
    g = torch.Generator().manual_seed(3)
    A = 1 if axis is None else int(axis.max()) + 1
    positions = torch.randint(0, 30_000, (A, 2, 37), generator=g)
    positions = positions if axis is not None else positions[0]
    heads = tuple(torch.randn(2, n, 37, d, generator=g).to(dtype) for n in (4, 2))
    more = {"layer_type": family.layer_type} if family.layer_type else {}
    cos, sin = module(heads[0], positions, **more)
    return heads, positions, apply(*heads, cos, sin)


def ours(family: Rotary, heads: Pair, positions: torch.Tensor) -> Pair:
    inv_freq, axis, pairing, scale = family.table()
    query, key = (x.transpose(1, 2) for x in heads)
    turned = mrope(query, key, positions, inv_freq, axis, pairing=pairing, attention_scaling=scale)
    return tuple(x.transpose(1, 2) for x in turned)


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_the_reference_is_transformers(family: Rotary) -> None:
    heads, positions, expected = call(family, torch.float32)
    with backends.backend("reference"):
        got = ours(family, heads, positions)
    for x, y, untouched in zip(got, expected, heads, strict=True):
        assert torch.equal(x, y) and not torch.equal(x, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_the_kernel_is_no_farther_from_fp64(family: Rotary, dtype: torch.dtype) -> None:
    heads, positions, theirs = call(family, dtype)
    with which_kernel_ran() as ran:
        got = ours(family, heads, positions)
    assert ran == {"mrope": "native"}
    inv_freq, axis, pairing, scale = family.table()
    at = positions if axis is not None else positions[None]
    cos, sin = reference.rotation("mrope", torch.float64, at, inv_freq, axis, scale)
    for name, x, y, given in zip(("query", "key"), got, theirs, heads, strict=True):
        wide = given.double().transpose(1, 2)
        truth = reference.rotated(wide, cos, sin, pairing)
        found = cases.within(
            name, x.transpose(1, 2), truth, cases.terms(wide, cos, sin, pairing), 2
        )
        assert found.ratio <= 1, str(found)
        if dtype == torch.bfloat16:
            assert found.error <= (y.transpose(1, 2).double() - truth).abs().max()


@pytest.mark.parametrize("family", FAMILIES, ids=IDS)
def test_gradients_are_those_of_transformers(family: Rotary) -> None:
    """In fp64 but for cos and sin, which transformers rounds to fp32: within their half ulp."""
    module, apply, d = family.made()
    heads, positions, _ = call(family, torch.float64)
    heads = tuple(x.requires_grad_() for x in heads)
    more = {"layer_type": family.layer_type} if family.layer_type else {}
    theirs = apply(*heads, *(t.double() for t in module(heads[0].float(), positions, **more)))
    grads = tuple(torch.randn_like(x) for x in theirs)
    expected = torch.autograd.grad(theirs, heads, grads)
    got = torch.autograd.grad(ours(family, heads, positions), heads, grads)
    for x, y, g in zip(got, expected, grads, strict=True):
        assert (x.double() - y.double()).abs().max() <= 2 * 2.0**-23 * g.abs().max()
        assert (x - g).abs().max() > 0.1


def test_a_module_that_does_something_else_is_refused() -> None:
    from mmkernels import rope_table

    module, apply, d = FAMILIES[0].made()
    skewed = lambda q, k, cos, sin: apply(q, k, cos * 1.5, sin)
    with pytest.raises(
        ValueError, match=r"rope_table: rotary_emb must turn pairs .*Qwen2VLRotaryEmbedding"
    ):
        rope_table(module, d, apply_rotary_pos_emb=skewed)
