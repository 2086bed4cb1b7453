# SPDX-License-Identifier: Apache-2.0
"""Every op against its reference: values, gradients, layouts, dtypes, threads, torch integrations.

Walks ``OPS`` and each op's ``cases.py``. The bound is that of TOLERANCES.md; nothing is tuned per test.
"""

import importlib
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from mmkernels import OPS as ALL_OPS
from mmkernels import backends
from mmkernels.testing import Case, captured_calls, gradients, which_kernel_ran, yardstick
from mmkernels.testing.case import Inputs, leaves, map_tensors

OPS = tuple(
    op for op in ALL_OPS if hasattr(torch.ops.mmkernels, f"{op}_backward")
)  # the others: tests of their own
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def cases_of(op: str) -> ModuleType:
    return importlib.import_module(f"mmkernels.ops.{op}.cases")


# Ops of inference: no gradients, so no tests of them.
DIFFERENTIABLE = [op for op in OPS if not getattr(cases_of(op).run, "inference_only", False)]


def tagged(tag: str) -> list[Any]:
    return [
        pytest.param(cases_of(op), case, id=f"{op}-{case.name}")
        for op in OPS
        for case in cases_of(op).CASES
        if tag in case.tags
    ]


def result(cases: ModuleType, inputs: Inputs) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    grad = yardstick.upstream(cases.run(inputs))
    return gradients(cases.run, inputs, grad=grad), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("cases", "case"), tagged("test"))
def test_values_and_gradients_hold_the_bound(
    cases: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    for seed, family in enumerate(cases.FAMILIES):
        inputs = cases.make_inputs(case, dtype, seed=seed, family=family)
        got, grad = result(cases, inputs)
        assert got["out"].dtype == dtype or getattr(cases, "EXACT", False)
        failed = [c for c in yardstick.check(cases, inputs, got, grad) if not c.ratio <= 1]
        assert not failed, f"{family}: " + "; ".join(map(str, failed))


def rotated(rows: list[Any], share: int) -> list[Any]:
    """Another ``1/share`` of the rows at every commit; all of them in ``make full``."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    turn = int(commit.stdout.strip() or "0", 16) % share
    return [
        row if i % share == turn else pytest.param(*row.values, id=row.id, marks=pytest.mark.full)
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("cases", "case"), rotated(tagged("family"), 8))
def test_shapes_of_real_models_hold_the_bound(
    cases: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    one = {"B": 1, "grids": case.grids[:1]}
    inputs = cases.make_inputs(Case(case.name, {**case.sizes, **one}), dtype)
    got, grad = result(cases, inputs)
    failed = [c for c in yardstick.check(cases, inputs, got, grad) if not c.ratio <= 1]
    assert not failed, "; ".join(map(str, failed))


@pytest.mark.parametrize(("cases", "case"), tagged("test"))
def test_expected_outputs_are_not_trivial(cases: ModuleType, case: Case) -> None:
    out = cases.plain(cases.make_inputs(case, torch.float64))
    assert out.numel() == 1 or out.double().std() > 0


@pytest.mark.parametrize(("cases", "case"), tagged("test"))
def test_the_native_kernel_ran(cases: ModuleType, case: Case) -> None:
    with which_kernel_ran() as ran:
        result(cases, cases.make_inputs(case, torch.float32))
    op = cases.__name__.split(".")[-2]
    expected = {op, f"{op}_backward"} if op in DIFFERENTIABLE else {op}
    assert expected <= set(ran) and set(ran.values()) == {"native"}


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_the_reference_backward_is_the_gradient_of_the_reference(op: str) -> None:
    """What runs without a compiler: the hand-written reference backward against autograd, in fp64."""
    cases = cases_of(op)
    for case in cases.CASES:
        if "gradcheck" not in case.tags:
            continue
        inputs = cases.make_inputs(case, torch.float64)
        grad = yardstick.upstream(cases.run(inputs))
        with captured_calls() as calls:
            gradients(cases.run, inputs, grad=grad)
        for name, args in calls:
            of = next(o for o in OPS if name.startswith(o))
            reference = importlib.import_module(f"mmkernels.ops.{of}.reference")
            native = getattr(torch.ops.mmkernels, name)(*args)
            plain = getattr(reference, name)(*args)
            for a, b in zip(_flat(native), _flat(plain), strict=True):
                torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _flat(item)]


@pytest.mark.parametrize(("cases", "case"), tagged("gradcheck"))
def test_gradcheck(cases: ModuleType, case: Case) -> None:
    inputs = cases.make_inputs(case, torch.float64)
    given = list(leaves(inputs).values())

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        changed = {id(old): new for old, new in zip(given, tensors, strict=True)}
        return cases.run(map_tensors(inputs, lambda t: changed.get(id(t), t)))

    tensors = [t.clone().requires_grad_() for t in given]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=False)


@pytest.mark.parametrize(("cases", "case"), tagged("gradcheck"))
def test_each_input_alone_gets_its_gradient(cases: ModuleType, case: Case) -> None:
    inputs = cases.make_inputs(case, torch.float32)
    everything, grad = result(cases, inputs)
    for wanted in leaves(inputs):
        alone = {n: t for n, t in leaves(inputs).items() if n == wanted}
        chosen = map_tensors(
            inputs,
            lambda t: (
                t.detach().requires_grad_()
                if any(t is a for a in alone.values())  # noqa: B023
                else t
            ),
        )
        out = cases.run(chosen)
        (only,) = torch.autograd.grad(out, [leaves(chosen)[wanted]], grad)
        assert torch.equal(only, everything[wanted])


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_double_backward_says_no(op: str) -> None:
    cases = cases_of(op)
    inputs = cases.make_inputs(cases.CASES[0], torch.float64)
    inputs = map_tensors(inputs, lambda t: t.requires_grad_() if t.is_floating_point() else t)
    out = cases.run(inputs)
    target = next(iter(leaves(inputs).values()))
    (first,) = torch.autograd.grad(out.square().sum(), [target], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        first.sum().backward()


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values laid out otherwise."""
    found = {}
    if tensor.dim() >= 2:
        found["transposed"] = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if tensor.dim() == 4:
        found["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    wide = tensor.new_zeros(*tensor.shape[:-1], 2 * tensor.shape[-1])
    wide[..., ::2] = tensor
    found["step_2"] = wide[..., ::2]
    base = tensor.new_zeros(tensor.numel() + 1)
    base[1:] = tensor.flatten()
    found["odd_offset"] = base[1:].view(tensor.shape)
    return found


@pytest.mark.parametrize("op", OPS)
def test_layouts_change_nothing(op: str) -> None:
    cases = cases_of(op)
    for case in [c for c in cases.CASES if "test" in c.tags][:5]:
        inputs = cases.make_inputs(case, torch.float32)
        expected, grad = result(cases, inputs)
        for name, value in inputs.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 0:
                continue
            for layout, other in layouts(value).items():
                got = gradients(cases.run, {**inputs, name: other}, grad=grad)
                for key in expected:
                    assert torch.equal(got[key], expected[key]), (case.name, name, layout, key)
        if op not in DIFFERENTIABLE:
            continue
        strided_grad = layouts(grad)["transposed"]
        got = gradients(cases.run, inputs, grad=strided_grad)
        assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize(("cases", "case"), tagged("test"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_bits_for_any_number_of_threads(
    cases: ModuleType, case: Case, dtype: torch.dtype
) -> None:
    inputs = cases.make_inputs(case, dtype)
    torch.set_num_threads(1)
    expected, _ = result(cases, inputs)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        got, _ = result(cases, inputs)
        for key in expected:
            assert torch.equal(got[key], expected[key]), (threads, key)


@pytest.mark.parametrize(("cases", "case"), tagged("empty"))
def test_empty_inputs(cases: ModuleType, case: Case) -> None:
    inputs = cases.make_inputs(case, torch.float32)
    got, grad = result(cases, inputs)
    expected = gradients(cases.plain, inputs, grad=grad)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    cases = cases_of(op)
    chosen = [c for c in cases.CASES if "gradcheck" in c.tags]
    if op not in DIFFERENTIABLE:
        chosen = [c for c in cases.CASES if "test" in c.tags][::3]
    for case in chosen:
        inputs = cases.make_inputs(case, torch.float32)
        with captured_calls() as calls:
            result(cases, inputs)
        for name, args in calls:
            overload = getattr(torch.ops.mmkernels, name).default
            torch.library.opcheck(overload, tuple(map(_detached, args)))
            if name == op and op in DIFFERENTIABLE:
                torch.library.opcheck(overload, _requiring(args))


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(v) for v in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def _requiring(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(v) for v in value]
        wants = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() != 4
        return value.detach().clone().requires_grad_() if wants else value

    return tuple(visit(a) for a in args)


@pytest.mark.parametrize("op", OPS)
def test_one_graph_for_several_shapes(op: str) -> None:
    cases = cases_of(op)
    case = cases.CASES[0]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cases.run, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5):
        inputs = cases.make_inputs(Case(case.name, {**case.sizes, "B": batch}), torch.float32)
        inputs.pop("feature_counts", None)  # Python numbers a compiled graph would guard on
        grad = yardstick.upstream(cases.run(inputs))
        expected = gradients(cases.run, inputs, grad=grad)
        got = gradients(compiled, inputs, grad=grad)
        assert all(torch.equal(got[k], expected[k]) for k in expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("op", OPS)
def test_inductor(op: str) -> None:
    cases = cases_of(op)
    torch._dynamo.reset()
    inputs = cases.make_inputs(cases.CASES[0], torch.float32)
    expected, grad = result(cases, inputs)
    got = gradients(torch.compile(cases.run, fullgraph=True), inputs, grad=grad)
    for key in expected:
        torch.testing.assert_close(got[key], expected[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_autocast(op: str, dtype: torch.dtype) -> None:
    """fp32 parameters under autocast give what parameters cast by hand give."""
    cases = cases_of(op)
    inputs = cases.make_inputs(cases.CASES[0], torch.float32)
    keep = inputs.get("pixel_values")
    cast = map_tensors(
        inputs, lambda t: t.to(dtype) if t.is_floating_point() and t is not keep else t
    )
    expected = cases.run(cast)
    with torch.autocast("cpu", dtype):
        got = gradients(cases.run, inputs)
        with backends.backend("reference"):
            plain = cases.run(inputs)
    assert got["out"].dtype == plain.dtype == dtype
    assert torch.equal(got["out"], expected)
    assert all(t.dtype == torch.float32 for n, t in got.items() if n != "out")


@pytest.mark.parametrize(("cases", "case"), tagged("gradcheck"))
def test_a_backward_under_autocast_is_that_of_its_forward(cases: ModuleType, case: Case) -> None:
    """``loss.backward()`` inside the region, the forward outside. torch's own matmul, of key tables, casts there."""
    if case.name == "key_table":
        pytest.skip("its scores of positions are torch's matmul")
    inputs = cases.make_inputs(case, torch.float32)
    expected, grad = result(cases, inputs)

    @torch.autocast("cpu", enabled=False)
    def forward(inputs: Inputs) -> torch.Tensor:
        return cases.run(inputs)

    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(forward, inputs, grad=grad)
    assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_activation_checkpointing_and_inference_mode(op: str) -> None:
    from torch.utils.checkpoint import checkpoint

    cases = cases_of(op)
    inputs = cases.make_inputs(cases.CASES[0], torch.float32)
    expected, grad = result(cases, inputs)
    rerun = lambda i: checkpoint(cases.run, i, use_reentrant=False)
    got = gradients(rerun, inputs, grad=grad)
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    with torch.inference_mode():
        assert torch.equal(cases.run(inputs), expected["out"])


@pytest.mark.parametrize("op", OPS)
def test_cuda_shapes_without_a_gpu(op: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    cases = cases_of(op)
    inputs = cases.make_inputs(cases.CASES[0], torch.bfloat16)
    with FakeTensorMode():
        inputs = map_tensors(inputs, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        if op == "merge_embeddings":
            inputs["check"] = "async"
        out = cases.run(inputs)
    assert out.device.type == "cuda"
