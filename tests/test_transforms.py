# SPDX-License-Identifier: Apache-2.0
"""Forward-mode AD and ``torch.func`` through every op with a gradient: right, or an error that names the op."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import mmkernels
from mmkernels import OPS, backends
from mmkernels.testing import Case, captured_calls, which_kernel_ran, yardstick
from mmkernels.testing.case import leaves, map_tensors

ROOT = Path(__file__).parents[1]
Function = Callable[..., torch.Tensor]


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"mmkernels.ops.{op}.cases")


DIFFERENTIABLE = [op for op in OPS if hasattr(torch.ops.mmkernels, f"{op}_backward")]
ROWS = [
    pytest.param(cases_of(op), case, id=f"{op}-{case.name}")
    for op in DIFFERENTIABLE
    for case in cases_of(op).CASES
    if "gradcheck" in case.tags
]
FIRST = [pytest.param(*next(r for r in ROWS if r.id.startswith(op + "-")).values, id=op)
         for op in DIFFERENTIABLE]  # fmt: skip


def function_of(cases: ModuleType, case: Case) -> tuple[Function, tuple[torch.Tensor, ...]]:
    """The op as a function of its float tensors, in fp64, and those tensors."""
    inputs = cases.make_inputs(case, torch.float64)
    given = list(leaves(inputs).values())

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        changed = {id(old): new for old, new in zip(given, tensors, strict=True)}
        out: torch.Tensor = cases.run(map_tensors(inputs, lambda t: changed.get(id(t), t)))
        return out

    return function, tuple(given)


def directions(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in tensors)


def test_every_op_with_a_gradient_is_walked() -> None:
    assert set(DIFFERENTIABLE) == backends.DIFFERENTIABLE and len(FIRST) == len(DIFFERENTIABLE)


@pytest.mark.parametrize(("cases", "case"), ROWS)
def test_tangents_are_dual_to_the_kernels_gradients(cases: ModuleType, case: Case) -> None:
    """⟨J v, u⟩ = ⟨v, Jᵀ u⟩, the left from ``jvp``, the right from the native backward."""
    function, tensors = function_of(cases, case)
    v = directions(tensors)
    out, tangent = torch.func.jvp(function, tensors, v)
    torch.testing.assert_close(out, function(*tensors), rtol=1e-9, atol=1e-9)
    u = yardstick.upstream(out)
    leaf = [t.clone().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(function(*leaf), leaf, u, allow_unused=True)
    right = sum((g * w).sum() for g, w in zip(grads, v, strict=True) if g is not None)
    size = (tangent * u).abs().sum()
    assert size > 0 and abs((tangent * u).sum() - right) <= 1e-10 * size


@pytest.mark.parametrize(("cases", "case"), ROWS)
def test_tangents_are_the_differences_of_the_kernel(cases: ModuleType, case: Case) -> None:
    function, tensors = function_of(cases, case)
    v, step = directions(tensors), 1e-6
    with forward_ad.dual_level():
        pairs = zip(tensors, v, strict=True)
        out = function(*(forward_ad.make_dual(t, w) for t, w in pairs))
        tangent = forward_ad.unpack_dual(out).tangent
    ahead, behind = (
        function(*(t + s * w for t, w in zip(tensors, v, strict=True))) for s in (step, -step)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_one_dual_input_is_enough_and_none_takes_the_kernel(cases: ModuleType, case: Case) -> None:
    function, tensors = function_of(cases, case)
    with forward_ad.dual_level(), which_kernel_ran() as ran:
        function(*tensors)
    assert ran and set(ran.values()) == {"native"}
    for i, tensor in enumerate(tensors):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tensor, torch.ones_like(tensor))
            out = function(*tensors[:i], dual, *tensors[i + 1 :])
            assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_reverse_mode_of_torch_func(cases: ModuleType, case: Case) -> None:
    """grad, vjp, jacrev and jacfwd against the native backward."""
    function, tensors = function_of(cases, case)
    every = tuple(range(len(tensors)))
    loss = lambda *t: function(*t).square().sum()
    leaf = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(loss(*leaf), leaf)
    for got, want in zip(torch.func.grad(loss, every)(*tensors), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    _, back = torch.func.vjp(loss, *tensors)
    for got, want in zip(back(torch.tensor(1.0).double()), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    (rows,) = torch.autograd.functional.jacobian(lambda t: function(t, *tensors[1:]), (tensors[0],))
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(function)(*tensors), rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_second_derivatives(cases: ModuleType, case: Case) -> None:
    """Forward over reverse, reverse over forward and reverse over reverse agree with differences."""
    function, tensors = function_of(cases, case)
    t, rest, v = tensors[0], tensors[1:], directions(tensors[:1])[0]
    loss = lambda t: function(t, *rest).pow(3).sum()
    grad = torch.func.grad(loss)
    _, forward_over_reverse = torch.func.jvp(grad, (t,), (v,))
    reverse_over_forward = torch.func.grad(lambda t: torch.func.jvp(loss, (t,), (v,))[1])(t)
    reverse_over_reverse = torch.func.grad(lambda t: (grad(t) * v).sum())(t)
    step = 1e-6
    numbers = (grad(t + step * v) - grad(t - step * v)) / (2 * step)
    assert numbers.abs().max() > 0
    for got in (forward_over_reverse, reverse_over_forward, reverse_over_reverse):
        torch.testing.assert_close(got, numbers, rtol=1e-4, atol=1e-4 * float(numbers.abs().max()))


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_vmap_is_the_kernel_of_each_sample(cases: ModuleType, case: Case) -> None:
    function, tensors = function_of(cases, case)
    many = torch.stack([tensors[0] * s for s in (1.0, 2.0, -1.0)], 1)
    apply = lambda t: function(t, *tensors[1:])
    expected = torch.stack([apply(t) for t in many.unbind(1)])
    with which_kernel_ran() as ran:
        got = torch.func.vmap(apply, in_dims=1)(many)
    assert torch.equal(got, expected)
    assert ran and set(ran.values()) == {"native"}
    loss = lambda t: apply(t).square().sum()
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=1)(many)
    wanted = torch.stack([torch.func.grad(loss)(t) for t in many.unbind(1)])
    torch.testing.assert_close(grads, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_batched_gradients_are_the_kernels(cases: ModuleType, case: Case) -> None:
    function, tensors = function_of(cases, case)
    leaf = tensors[0].clone().requires_grad_()
    out = function(leaf, *tensors[1:])
    several = torch.stack([yardstick.upstream(out), torch.ones_like(out)])
    back = lambda g: torch.autograd.grad(out, [leaf], g, retain_graph=True)[0]
    got = torch.func.vmap(back)(several)
    each = [back(g) for g in several]
    assert torch.equal(got, torch.stack(each))


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_raw_ops_say_no(cases: ModuleType, case: Case) -> None:
    function, tensors = function_of(cases, case)
    leaf = [t.clone().requires_grad_() for t in tensors]
    with captured_calls() as calls:
        function(*leaf).sum().backward()
    assert len({name for name, _ in calls}) >= 2  # a forward and a backward
    detached = lambda a: a.detach() if isinstance(a, torch.Tensor) else a
    for name, args in calls:
        raw = getattr(torch.ops.mmkernels, name)
        plain = [[*map(detached, a)] if isinstance(a, list) else detached(a) for a in args]
        at, first = next(
            (i, t)
            for i, a in enumerate(plain)
            for t in (a if isinstance(a, list) else [a])
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        )

        first = first.clone()

        def of_one(t: torch.Tensor, raw: Any = raw, plain: Any = plain, at: int = at) -> Any:
            changed = [t, *plain[at][1:]] if isinstance(plain[at], list) else t
            out = raw(*plain[:at], changed, *plain[at + 1 :])
            return out if isinstance(out, torch.Tensor) else out[0]

        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"{name}: .*forward-mode"):
            of_one(forward_ad.make_dual(first, torch.ones_like(first)))
        with pytest.raises(RuntimeError, match=f"{name}: .*forward-mode"):
            torch.func.jvp(of_one, (first,), (torch.ones_like(first),))
        with pytest.raises(RuntimeError, match=f"{name}: .*torch.func.grad"):
            torch.func.vjp(of_one, first)


def test_ops_of_inference_refuse_tangents() -> None:
    for op in ("rope_write_kv", "paged_attention"):
        cases = cases_of(op)
        inputs = cases.make_inputs(cases.CASES[0], torch.float32)
        query = inputs["query"]
        with forward_ad.dual_level():
            inputs["query"] = forward_ad.make_dual(query, torch.ones_like(query))
            with pytest.raises(RuntimeError, match=f"{op}: query has a tangent"):
                getattr(cases, "results", lambda i, f: f(i))(inputs, cases.run)


def test_merging_into_memory_refuses_tangents() -> None:
    ids, table, out = torch.tensor([0, 1]), torch.zeros(2, 3), torch.zeros(2, 3)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="None under forward-mode AD"):
        dual = forward_ad.make_dual(table, torch.ones_like(table))
        mmkernels.merge_embeddings(ids, dual, [], out=out)


JVP = """
import torch, mmkernels
x, w = torch.ones(1, 3, 8, 8), torch.ones(4, 3, 4, 4)
for _ in range(2):
    print(torch.func.jvp(lambda x: mmkernels.patch_embed(x, w), (x,), (x,))[1].sum().item())
"""


def run(code: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    every = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=every, capture_output=True, text=True, timeout=120
    )


def test_it_is_said_once_and_strict_makes_it_an_error() -> None:
    done = run(JVP)
    assert done.stdout.split() == ["768.0", "768.0"]
    said = "patch_embed runs through the PyTorch reference: no kernel supports forward-mode AD"
    assert done.stderr.count(said) == 1 and "compiler" not in done.stderr
    strict = run(JVP, MMKERNELS_STRICT="1")
    assert strict.returncode != 0 and "MMKERNELS_STRICT=1 makes this an error" in strict.stderr


@pytest.mark.parametrize(("cases", "case"), FIRST)
def test_compiled_code_says_no(cases: ModuleType, case: Case) -> None:
    """Compiled graphs hold the op itself, which has no tangents."""
    function, tensors = function_of(cases, case)
    torch._dynamo.reset()
    v = directions(tensors)
    inside = torch.compile(lambda *t: torch.func.jvp(function, t, v)[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"no forward-mode AD; call mmkernels.*, uncompiled"):
        inside(*tensors)
    compiled = torch.compile(function, backend="aot_eager")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode AD"):
        compiled(*(forward_ad.make_dual(t, w) for t, w in zip(tensors, v, strict=True)))


@pytest.mark.parametrize("algorithm", ["projected", "absorbed"])
def test_both_algorithms_of_attention(algorithm: str) -> None:
    """torch's fused SDPA kernels have neither tangents nor second derivatives: its plain form runs."""
    weights = torch.randn(2, 8, 6, dtype=torch.float64)
    query = torch.randn(3, 8, dtype=torch.float64)
    loss = lambda x: mmkernels.cross_attention(
        query, x, *weights, num_heads=2, algorithm=algorithm
    ).pow(3)  # fmt: skip
    x, v = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    step = 1e-6
    _, tangent = torch.func.jvp(loss, (x,), (v,))
    numbers = (loss(x + step * v) - loss(x - step * v)) / (2 * step)
    torch.testing.assert_close(tangent, numbers, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        out = loss(forward_ad.make_dual(x, v))
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent)
    hessian = torch.func.hessian(lambda x: loss(x).sum())(x)
    grad = torch.func.grad(lambda x: loss(x).sum())
    numbers = (grad(x + step * v) - grad(x - step * v)) / (2 * step)
    torch.testing.assert_close((hessian * v).sum((-1, -2, -3)), numbers, rtol=1e-5, atol=1e-7)


def test_a_patched_tower_has_the_tangent_of_the_model() -> None:
    pytest.importorskip("transformers")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = CLIPVisionModel(config).eval().double()
    pixels = torch.randn(2, 1, 3, 28, 28, dtype=torch.float64)
    tangent = lambda: torch.func.jvp(lambda x: model(x).pooler_output, *[(p,) for p in pixels])[1]
    expected = tangent()
    with mmkernels.patch(model):
        torch.testing.assert_close(tangent(), expected)


def test_vmap_over_ids_and_tables() -> None:
    """The kernel reads values of each sample; where plain PyTorch has to, an error names the op."""
    ids, table, feature = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.randn(3, 4), torch.randn(1, 4)

    def loss(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        merged = mmkernels.merge_embeddings(ids, table, [feature], feature_token_ids=[1])
        return merged.square().sum()

    got = torch.func.vmap(loss, in_dims=(None, 0))(table, ids)
    assert torch.equal(got, torch.stack([loss(table, i) for i in ids]))
    with pytest.raises((RuntimeError, ValueError), match=r"merge_embeddings: .* cannot batch ids"):
        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(table, ids)
    heads, positions = torch.randn(1, 3, 1, 16), torch.arange(3)[None]
    turned = lambda table: mmkernels.mrope(heads, heads, positions, table)[0]
    tables = torch.rand(2, 16)
    assert torch.equal(torch.func.vmap(turned)(tables), torch.stack([turned(t) for t in tables]))
    with pytest.raises(ValueError, match="mrope: vmap must have at least one sample, got 0"):
        torch.func.vmap(turned)(tables[:0])
