# SPDX-License-Identifier: Apache-2.0
"""``rope_write_kv``: values, caches of every dtype and stride, slots, and torch's integrations.

The op has no gradient, so ``tests/test_ops.py`` leaves it out; what it asks there of others is asked here.
"""

import os
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from mmkernels import backends, mrope, poll_errors, rope_write_kv
from mmkernels.ops.rope_write_kv import cases, reference
from mmkernels.testing import Case, captured_calls, in_fp64, which_kernel_ran
from mmkernels.testing.case import Inputs

WRITE = [pytest.param(c, id=c.name) for c in cases.CASES if "test" in c.tags]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("key_cache", "value_cache")


def named(name: str) -> Case:
    return next(c for c in cases.CASES if c.name == name)


def arguments(inputs: Inputs) -> Inputs:
    kept = {k: v for k, v in inputs.items() if k != "rotation"}
    return kept | {"inv_freq": inputs["inv_freq"].view(torch.float32)}


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def poisoned(inputs: Inputs) -> Inputs:
    """Caches of NaN (of 77 where there is none), with a page of it before and after."""

    def full(t: torch.Tensor) -> torch.Tensor:
        pages, *rest = t.shape
        wide = torch.full((pages + 2, *rest), 77 if t.dtype == torch.int8 else torch.nan)
        return wide.to(t.dtype).to(t.device)[1:-1]

    return {**inputs, **{n: full(inputs[n]) for n in NAMES}}


def is_poison(t: torch.Tensor) -> bool:
    return bool((t == 77).all() if t.dtype == torch.int8 else t.float().isnan().all())


def guards_hold(cache: torch.Tensor) -> bool:
    """Nothing is written before or after a poisoned cache."""
    whole = cache._base
    assert whole is not None and whole.shape[0] == cache.shape[0] + 2
    return is_poison(whole[0]) and is_poison(whole[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WRITE)
def test_values_hold_the_bound(case: Case, dtype: torch.dtype) -> None:
    for seed, family in enumerate(cases.FAMILIES):
        inputs = cases.make_inputs(case, dtype, seed=seed, family=family)
        with which_kernel_ran() as ran:
            got = cases.results(inputs)
        assert ran == {"rope_write_kv": "native"}
        assert got["query"].dtype == got["key"].dtype == dtype
        failed = [c for c in cases.compared(inputs, got) if not c.ratio <= 1]
        assert not failed, f"{family}: " + "; ".join(map(str, failed))


@pytest.mark.parametrize("case", WRITE)
def test_fp64_is_the_reference(case: Case) -> None:
    inputs = in_fp64(cases.make_inputs(case, torch.float32)) if not case.cache else None
    inputs = inputs or cases.make_inputs(case, torch.float64)
    got = cases.results(inputs)
    with backends.backend("reference"):
        expected = cases.results(inputs)
    for name, value in got.items():
        wide = value.dtype in (torch.float64, torch.float32)
        off = (value.double() - expected[name].double()).abs()
        assert not off.numel() or off.max() <= (
            1e-9 if value.dtype == torch.float64 else 1e-6 if wide else 0
        )


@pytest.mark.parametrize("case", WRITE)
def test_the_rotation_is_mropes_and_the_cache_holds_its_bits(case: Case) -> None:
    inputs = arguments(poisoned(cases.make_inputs(case, torch.bfloat16)))
    query, key = rope_write_kv(**inputs)
    if not case.norm:
        rotation = [inputs[n] for n in ("position_ids", "inv_freq", "axis")]
        more = {n: inputs[n] for n in ("pairing", "attention_scaling")}
        expected = mrope(inputs["query"], inputs["key"], *rotation, **more)
        assert torch.equal(query, expected[0]) and torch.equal(key, expected[1])
    slots = inputs["slot_mapping"].tolist()
    for cache, rows in zip(
        (inputs[n].flatten(0, 1) for n in NAMES), (key, inputs["value"]), strict=True
    ):
        for slot, token in zip(slots, range(case.T), strict=True):
            if slot >= 0 and not case.cache:
                assert torch.equal(bits(cache[slot]), bits(rows[token]))
        rest = torch.ones(len(cache), dtype=torch.bool)
        rest[[s for s in slots if s >= 0]] = False
        assert is_poison(cache[rest])
        assert not cache[~rest].float().isnan().any()
    assert all(guards_hold(inputs[n]) for n in NAMES)


@pytest.mark.parametrize("name", ["to_int8", "to_int8_heads", "to_fp8", "to_fp8_heads"])
@pytest.mark.parametrize("family", ["random", "spread"])
def test_quantised_caches_follow_the_rule(name: str, family: str) -> None:
    """From an fp32 call, whose key comes back unrounded: bit by bit, and half a scale off at most."""
    inputs = arguments(cases.make_inputs(named(name), torch.float32, family=family))
    inputs["value"][0, 0, :5] = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, 0.0])
    _, key = rope_write_kv(**inputs)
    kept = inputs["slot_mapping"] >= 0
    slots = inputs["slot_mapping"][kept]
    for cache_name, rows in zip(NAMES, (key, inputs["value"]), strict=True):
        cache = inputs[cache_name]
        scale = inputs[f"{cache_name[0]}_scale"].expand(cache.shape[2])
        held = cache.flatten(0, 1).view(torch.uint8)[slots]
        assert torch.equal(held, reference.stored(rows[kept], cache.dtype, scale).view(torch.uint8))
        if cache.dtype == torch.int8:
            back = cache.flatten(0, 1)[slots].float() * scale[:, None]
            inside = rows[kept].abs() <= 127 * scale[:, None]
            assert inside.any()
            off = (back - rows[kept]).abs() / scale[:, None]
            assert off[inside].max() <= 0.5 + 127 * 2.0**-23


def test_int8_rounds_ties_to_even_and_nan_to_0() -> None:
    value = torch.tensor(
        [0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 200.0, -127.5, -300.0, torch.nan, 3.0]
    )
    cache = torch.zeros(2, 1, 1, 1, 12, dtype=torch.int8)
    one, none = torch.ones(1), torch.zeros(0)
    rope_write_kv(
        value.view(1, 1, 12), value.view(1, 1, 12), value.view(1, 1, 12), *cache, torch.tensor([0]),
        torch.tensor([0]), none, k_scale=one, v_scale=one,
    )  # fmt: skip
    expected = [0, 2, 2, 0, -2, 126, 127, 127, -127, -127, 0, 3]
    assert cache[0].flatten().tolist() == cache[1].flatten().tolist() == expected


@pytest.mark.parametrize("case", WRITE)
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    inputs = cases.make_inputs(case, torch.bfloat16)
    torch.set_num_threads(1)
    expected = cases.results(inputs)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        got = cases.results(inputs)
        assert all(torch.equal(bits(got[n]), bits(expected[n])) for n in expected), threads


@pytest.mark.parametrize("where", ["kernel", "op", "reference"])
@pytest.mark.parametrize(("token", "slot"), [(3, 16), (0, -2), (6, 2**40), (6, 2**63 - 1), (4, 4)])
def test_a_wrong_slot_writes_nothing(token: int, slot: int, where: str) -> None:
    inputs = arguments(poisoned(cases.make_inputs(cases.CASES[0], torch.float32)))
    inputs["slot_mapping"] = torch.arange(7).roll(1)
    inputs["slot_mapping"][token] = slot
    message = rf"rope_write_kv: slot_mapping\[\d\] is {slot}, expected a slot"
    if where == "op":
        names = (
            "query",
            "key",
            "value",
            *NAMES,
            "slot_mapping",
            "position_ids",
            "inv_freq",
            "axis",
        )
        with pytest.raises(RuntimeError, match=message):
            torch.ops.mmkernels.rope_write_kv(
                *(inputs[n] for n in names), "half", 1.0, None, None, 1e-6, None, None
            )
    else:
        backend = backends.backend("reference" if where == "reference" else "auto")
        with backend, pytest.raises(ValueError, match=message):
            rope_write_kv(**inputs)
    assert all(is_poison(inputs[n]) and guards_hold(inputs[n]) for n in NAMES)


def test_many_slots_are_all_told_apart() -> None:
    g = torch.Generator().manual_seed(0)
    T, page = 3000, 16
    x, none, at = torch.randn(T, 1, 2), torch.zeros(0), torch.zeros(T, dtype=torch.int64)
    for spread in (1, 7, 64, 1024):
        pages = -(-T * spread // page)
        slots = torch.randperm(T, generator=g) * spread
        caches = torch.zeros(2, pages, page, 1, 2)
        rope_write_kv(x, x, x, *caches, slots, at, none)
        assert torch.equal(caches[0].view(-1, 2)[slots], x[:, 0])
        i, j = sorted(torch.randperm(T, generator=g)[:2].tolist())
        slots[j] = slots[i]
        with pytest.raises(
            ValueError, match=rf"slot_mapping\[{j}\] is .*slot_mapping\[{i}\] has it"
        ):
            rope_write_kv(x, x, x, *caches, slots, at, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    """Query, key and value as views of one projection; caches of one buffer, heads before tokens, and odd offsets."""
    inputs = arguments(cases.make_inputs(named("page_16_partial"), dtype))
    plain = {n: inputs[n].clone() for n in NAMES}
    expected = (*rope_write_kv(**{**inputs, **plain}), *plain.values())
    P, page, Hk, d = inputs["key_cache"].shape
    fused = torch.cat([inputs[n].flatten(1) for n in ("query", "key", "value")], 1)
    widths = [inputs[n][0].numel() for n in ("query", "key", "value")]
    parts = [p.unflatten(1, (-1, d)) for p in fused.split(widths, 1)]
    others = {
        "slots": {"slot_mapping": torch.stack([inputs["slot_mapping"]] * 2, 1)[:, 1].int()},
        "positions": {"position_ids": inputs["position_ids"].t().contiguous().t().int()},
        "fused": dict(zip(("query", "key", "value"), parts, strict=True)),
        "steps": {n: torch.stack([inputs[n]] * 3, -1)[..., 1] for n in ("query", "key", "value")},
    }
    for name, change in others.items():
        caches = {n: inputs[n].clone() for n in NAMES}
        got = (*rope_write_kv(**{**inputs, **change, **caches}), *caches.values())
        assert all(map(torch.equal, got, expected)), name
    buffer = torch.stack([inputs[n] for n in NAMES], 1)  # [pages, 2, page_size, ...]
    heads_first = torch.stack([inputs[n].transpose(1, 2) for n in NAMES])
    odd = torch.full((2, P, page, Hk, d + 3), torch.nan, dtype=dtype)[..., 1 : d + 1]
    odd.copy_(torch.stack([inputs[n] for n in NAMES]))
    for name, (k, v) in {
        "one buffer": buffer.unbind(1), "heads first": heads_first.transpose(2, 3), "odd": odd,
    }.items():  # fmt: skip
        got = (*rope_write_kv(**{**inputs, "key_cache": k, "value_cache": v}), k, v)
        assert all(map(torch.equal, got, expected)), name


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Pages 1.2·10⁹ elements apart, in a sparse file."""
    stride, d = 1_200_000_000, 8
    memory = torch.from_file(
        str(tmp_path / "cache"), shared=True, size=3 * stride + 64, dtype=torch.int8
    )
    cache = memory.as_strided((4, 2, 1, d), (stride, d, d, 1))
    x, none, one = torch.randn(2, 1, d), torch.zeros(0), torch.ones(1)
    other = torch.zeros(4, 2, 1, d, dtype=torch.int8)
    rope_write_kv(
        x,
        x,
        x,
        other,
        cache,
        torch.tensor([7, 4]),
        torch.tensor([0, 0]),
        none,
        k_scale=one,
        v_scale=one,
    )
    assert torch.equal(cache[3, 1, 0], x[0, 0].round().to(torch.int8))
    assert torch.equal(cache[2, 0, 0], x[1, 0].round().to(torch.int8))
    assert os.stat(tmp_path / "cache").st_blocks < 2**16
    del cache, memory


def test_opcheck() -> None:
    for name in ("sectioned", "axes", "to_int8", "no_tokens"):
        with captured_calls() as calls:
            cases.run(cases.make_inputs(named(name), torch.float32))
        ((_, args),) = calls
        torch.library.opcheck(torch.ops.mmkernels.rope_write_kv.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_several_lengths_writes_the_caches(backend: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    step = torch.compile(lambda i: cases._ours(i), fullgraph=True, dynamic=True, backend=counter)
    for T in (13, 17, 21):  # no two sizes alike: torch would take them for one
        case = Case("t", {**named("sectioned").sizes, "T": T})
        inputs = cases.make_inputs(case, torch.float32)
        expected, got = cases.results(inputs), cases.results(inputs, step)
        assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert counter.frame_count <= 2


def test_caches_that_are_views_of_one_buffer_compiled() -> None:
    inputs = arguments(cases.make_inputs(named("sectioned"), torch.float32))
    buffer = torch.stack([inputs[n] for n in NAMES])

    def step(buffer: torch.Tensor, rest: Inputs) -> torch.Tensor:
        key_cache, value_cache = buffer.unbind(0)
        query, _ = rope_write_kv(**rest, key_cache=key_cache, value_cache=value_cache)
        return query + buffer[:, :, :, :1, :1].sum()

    rest = {k: v for k, v in inputs.items() if k not in NAMES}
    one, other = buffer.clone(), buffer.clone()
    torch._dynamo.reset()
    expected, got = (
        step(one, rest),
        torch.compile(step, fullgraph=True, backend="aot_eager")(other, rest),
    )
    assert torch.equal(got, expected) and torch.equal(one, other) and not torch.equal(one, buffer)


def test_autocast_casts_all_but_caches_scales_and_frequencies() -> None:
    inputs = arguments(cases.make_inputs(named("to_int8_heads"), torch.float32))
    cast = {n: inputs[n].bfloat16() for n in ("query", "key", "value")}
    caches = [{n: inputs[n].clone() for n in NAMES} for _ in range(2)]
    expected = rope_write_kv(**{**inputs, **cast, **caches[0]})
    with torch.autocast("cpu", torch.bfloat16):
        got = rope_write_kv(**{**inputs, **caches[1]})
    assert all(map(torch.equal, got, expected))
    assert all(torch.equal(caches[0][n], caches[1][n]) for n in NAMES)


def test_inference_mode_and_no_grad() -> None:
    inputs = cases.make_inputs(named("sectioned"), torch.float32)
    expected = cases.results(inputs)
    with torch.inference_mode():
        got = cases.results(inputs)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    wanted = {n: inputs[n].clone().requires_grad_() for n in ("query", "key", "value")}
    with torch.no_grad():
        got = cases.results({**inputs, **wanted})
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_autograd_sees_that_the_caches_changed() -> None:
    inputs = arguments(cases.make_inputs(named("sectioned"), torch.float32))
    weight = torch.ones(1, requires_grad=True)
    product = weight * inputs["key_cache"]  # saves the cache
    rope_write_kv(**inputs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_cuda_shapes_without_a_gpu() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = arguments(cases.make_inputs(named("to_fp8"), torch.bfloat16))
    with FakeTensorMode():
        fake = {
            n: torch.empty(t.shape, dtype=t.dtype, device="cuda")
            if isinstance(t, torch.Tensor)
            else t
            for n, t in inputs.items()
        }
        query, key = rope_write_kv(**fake)
    assert query.device.type == key.device.type == "cuda" and query.shape == inputs["query"].shape


def test_what_a_gpu_found_wrong_is_raised_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"slot": [1, 5, 99, 64], "axis": [2, 7, -1, 3], "nothing": [0, 0, 0, 0]}
    messages = {
        "slot": r"rope_write_kv: slot_mapping\[5\] is 99, expected a slot in \[0, 64\)",
        "axis": r"mrope: axis\[7\] is -1, expected a row of position_ids in \[0, 3\)",
    }
    none = lambda device: [0, 0, 0, 0]  # a build with CUDA has a poll, and wants a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mmkernels, "merge_embeddings_poll", none, raising=False)
    for name, word in found.items():
        monkeypatch.setattr(
            torch.ops.mmkernels, "rope_poll", lambda device, w=word: w, raising=False
        )
        if name == "nothing":
            poll_errors("cuda:0")
            continue
        with pytest.raises(ValueError, match=messages[name]):
            poll_errors("cuda:0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WRITE)
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    if case.cache in ("fp32", "bf16", "fp16") and cases.CACHE_DTYPES[case.cache] != dtype:
        pytest.skip("on CUDA a float cache is of the key's dtype")
    inputs = cases.make_inputs(case, dtype)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with which_kernel_ran() as ran:
        got = {n: t.cpu() for n, t in cases.results(moved).items()}
    assert ran == {"rope_write_kv": "native"}
    failed = [c for c in cases.compared(inputs, got) if not c.ratio <= 1]
    assert not failed, "; ".join(map(str, failed))
    if not case.T:
        return
    moved = poisoned(moved)
    moved["slot_mapping"] = torch.full_like(moved["slot_mapping"], -1)
    moved["slot_mapping"][-1] = moved["key_cache"].shape[0] * case.page
    cases.run(moved)
    assert all(is_poison(moved[n]) and guards_hold(moved[n]) for n in NAMES)
    with pytest.raises(ValueError, match=r"rope_write_kv: slot_mapping\[\d+\] is"):
        poll_errors()


def test_the_op_itself_refuses_what_would_leave_its_memory() -> None:
    op = torch.ops.mmkernels.rope_write_kv
    x, cache = torch.zeros(3, 2, 8), torch.zeros(4, 2, 2, 8)
    good = [
        x,
        x,
        x,
        cache,
        cache.clone(),
        torch.arange(3),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros(8),
        None,
    ]
    more = ["half", 1.0, None, None, 1e-6, None, None]
    op(*good, *more)
    wrong = {
        1: x[:2], 2: x[:, :1], 3: cache[..., :7], 4: cache[:3], 5: torch.arange(2), 6: good[6][:, :2],
        7: torch.zeros(10),
    }  # fmt: skip
    for i, tensor in wrong.items():
        with pytest.raises(RuntimeError, match="rope_write_kv"):
            op(*[tensor if j == i else a for j, a in enumerate(good)], *more)
    for i, tensor in (
        (2, torch.zeros(7)),
        (3, torch.zeros(9)),
        (2, torch.zeros(8).half()),
        (5, torch.ones(2)),
        (6, torch.ones(2)),
    ):
        with pytest.raises(RuntimeError, match="rope_write_kv"):
            op(*good, *[tensor if j == i else a for j, a in enumerate(more)])
    for cache_like in (
        cache.half(),
        cache.to(torch.int8),
        cache.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        with pytest.raises(RuntimeError, match="rope_write_kv"):
            op(*good[:3], cache_like, *good[4:], *more)
