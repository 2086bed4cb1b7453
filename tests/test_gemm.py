# SPDX-License-Identifier: Apache-2.0
"""The CPU GEMM against numpy in fp64, on every instruction set of this machine.

An instruction set is chosen once for a process, so each check runs in one of its own: this file, as a script.
"""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

if __name__ != "__main__":  # a check needs no torch
    from test_headers import headers  # noqa: F401

Array = Any
ISAS = ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
SIZES = [1, 2, 3, 5, 15, 16, 17, 31, 33, 47, 97]
ROWS = [*SIZES, 161]  # AMX fetches ahead from 128 rows on
REDUCTIONS = [1, 2, 3, 31, 588, 1176]
GUARD = 40  # elements around every array that must stay what they are


def to_bf16(x: Array) -> Array:
    """The bits, rounded to nearest even; no NaN."""
    u = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Element:
    """A type of A and B: how numpy stores it, and what C is made of. NaN in `storage` is `nan`."""

    name: str
    storage: Any
    sum: Any
    nan: Any

    def of(self, x: Array) -> Array:
        if self.name == "bf16":
            return to_bf16(x)
        return x.astype(self.storage).view(self.storage)

    def wide(self, x: Array) -> Array:
        if self.name == "bf16":
            x = (x.astype(np.uint32) << 16).view(np.float32)
        return x.astype(np.float64)


F32 = Element("f32", np.float32, np.float32, np.nan)
F64 = Element("f64", np.float64, np.float64, np.nan)
BF16 = Element("bf16", np.uint16, np.float32, 0x7FFF)


def bits(x: Array) -> Array:
    return x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


class Gemm:
    """The bindings, with poison around and inside everything they are given."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.elements = [F32, F64] + ([BF16] if module.gemm_has_bf16() else [])

    def call(self, name: str, *args: Any) -> Any:
        return getattr(self.module, name)(*args)

    def pack_b(self, e: Element, b: Array, N: int, K: int, stride_n: int, stride_k: int,
               source: str = "", start: int = 0) -> Array:  # fmt: skip
        """In two calls, the last block first."""
        size, blocks = self.call(f"packed_elements_{e.name}", N, K), -(-N // 32)
        packed = np.full(size + 2 * GUARD, e.nan, e.storage)
        name = f"pack_b_{e.name}_from_{source or e.name}"
        for first, last in ((blocks - 1, blocks), (0, blocks - 1)):
            self.call(name, packed, GUARD, b, start, N, K, stride_n, stride_k, first, last)
        padded = self.call(f"padded_k_{e.name}", K)
        assert size == blocks * 32 * padded
        guards = np.concatenate([packed[:GUARD], packed[-GUARD:]])
        assert np.array_equal(bits(guards), bits(np.full_like(guards, e.nan))), "pack_b beyond"
        return packed

    def pack_a(self, e: Element, a: Array, M: int, K: int, stride_m: int, stride_k: int,
               source: str = "", start: int = 0) -> Array:  # fmt: skip
        row = self.call(f"lda_{e.name}", K)
        packed = np.full(M * row + 2 * GUARD, e.nan, e.storage)
        name = f"pack_a_{e.name}_from_{source or e.name}"
        self.call(name, packed, GUARD, a, start, M, K, stride_m, stride_k)
        guards = np.concatenate([packed[:GUARD], packed[-GUARD:]])
        assert np.array_equal(bits(guards), bits(np.full_like(guards, e.nan))), "pack_a beyond"
        return packed

    def rows(self, e: Element, a: Array, M: int, K: int, gap: int = 0) -> tuple[Array, int]:
        """A by hand: zeros up to padded_k, NaN beyond and below."""
        padded = self.call(f"padded_k_{e.name}", K)
        row = padded + gap if gap else self.call(f"lda_{e.name}", K)
        panel = np.full((M + 3, row), e.nan, e.storage)
        panel[:M, :padded] = 0
        panel[:M, :K] = a
        return panel, row

    def multiply(self, e: Element, a: Array, a_offset: int, row: int, M: int, N: int, K: int, packed: Array,
                 before: Array | None = None, gap: int = 5) -> Array:  # fmt: skip
        """Every column block into one C with a gap; what lies around C must stay."""
        columns = -(-N // 32) * 32
        ldc = columns + gap
        c = np.full(M * ldc + 2 * GUARD, np.nan, e.sum)
        inside = c[GUARD : GUARD + M * ldc].reshape(M, ldc)
        if before is not None:
            inside[:, :N] = before
            inside[:, N:columns] = 0
        for j in range(columns // 32):
            self.call(f"multiply_{e.name}", a, a_offset, row, M, K, packed, GUARD, j, c, GUARD + 32 * j, ldc,
                      before is not None)  # fmt: skip
        untouched = np.concatenate([c[:GUARD], inside[:, columns:].ravel(), c[-GUARD:]])
        assert np.isnan(untouched).all(), "multiply beyond C"
        assert (inside[:, N:columns] == 0).all(), "columns beyond N"
        return inside[:, :N].copy()


def within_bound(got: Array, a: Array, b: Array, before: Array | float, e: Element) -> None:
    """ulp + 2 u √K Σ|t|, in units of the type that sums; b is [N, K]."""
    exact = a @ b.T + before
    magnitude = np.abs(a) @ np.abs(b).T + np.abs(before)
    unit = 2.0**-53 if e.sum == np.float64 else 2.0**-24
    spacing = np.spacing(np.abs(exact).astype(e.sum)).astype(np.float64)
    bound = spacing + 2 * unit * np.sqrt(a.shape[1] + 1) * magnitude
    ratio = np.max(np.abs(got.astype(np.float64) - exact) / bound)
    assert ratio <= 1, f"{ratio} of the bound"


def shapes(seed: int) -> Iterator[tuple[int, int, int]]:
    """Each M with each N, each with two K; every K comes up for every remainder of rows."""
    rng = np.random.default_rng(seed)
    for M, N in itertools.product(ROWS, SIZES):
        for K in rng.choice(REDUCTIONS, 2, replace=False):
            yield M, N, int(K)


def check_bound(gemm: Gemm) -> None:
    rng = np.random.default_rng(0)
    for e in gemm.elements:
        for M, N, K in shapes(1):
            a, b = e.of(rng.standard_normal((M, K))), e.of(rng.standard_normal((N, K)))
            before = rng.standard_normal((M, N)).astype(e.sum)
            packed = gemm.pack_b(e, b, N, K, K, 1)
            panel, row = gemm.rows(e, a, M, K, gap=7 if M % 2 else 0)
            got = gemm.multiply(e, panel, 0, row, M, N, K, packed)
            within_bound(got, e.wide(a), e.wide(b), 0.0, e)
            more = gemm.multiply(e, panel, 0, row, M, N, K, packed, before)
            within_bound(more, e.wide(a), e.wide(b), before.astype(np.float64), e)


def check_integers(gemm: Gemm) -> None:
    """Small integers have one right answer; bits are compared."""
    rng = np.random.default_rng(0)
    for e in gemm.elements:
        for M, N, K in shapes(2):
            a, b, before = (rng.integers(-8, 9, s).astype(e.sum) for s in ((M, K), (N, K), (M, N)))
            packed = gemm.pack_b(e, e.of(b), N, K, K, 1)
            panel, row = gemm.rows(e, e.of(a), M, K)
            expected = a.astype(np.int64) @ b.T.astype(np.int64)
            for start in (None, before):
                got = gemm.multiply(e, panel, 0, row, M, N, K, packed, start)
                total = (expected + (0 if start is None else start)).astype(e.sum)
                assert np.array_equal(bits(got), bits(total)), (e.name, M, N, K)


def check_no_reduction(gemm: Gemm) -> None:
    for e in gemm.elements:
        panel, row = gemm.rows(e, e.of(np.zeros((33, 0))), 33, 0)
        packed = gemm.pack_b(e, e.of(np.zeros((5, 0))), 5, 0, 1, 1)
        assert (gemm.multiply(e, panel, 0, row, 33, 5, 0, packed) == 0).all()


def check_a_row_alone(gemm: Gemm) -> None:
    """A row has the same bits alone, at every place of a panel, at any alignment of A, B and C."""
    rng = np.random.default_rng(0)
    for e, K in itertools.product(gemm.elements, (31, 588)):
        N = 47
        b = e.of(rng.standard_normal((N, K)))
        a = e.of(rng.standard_normal((1, K)))
        start = rng.standard_normal((1, N)).astype(e.sum)
        packed = gemm.pack_b(e, b, N, K, K, 1)
        others = e.of(rng.standard_normal((97, K)))
        for before in (None, start):
            panel, row = gemm.rows(e, a, 1, K)
            alone = gemm.multiply(e, panel, 0, row, 1, N, K, packed, before)
            for M, shift, gap in ((97, 0, 0), (96, 1, 3), (77, 3, 1), (17, 2, 0)):
                full = np.full((M, N), 1, e.sum) if before is not None else None
                for place in range(0, M, 1 if M == 17 else 5):
                    rows = others[:M].copy()
                    rows[place] = a
                    if full is not None:
                        full[place] = start
                    panel, row = gemm.rows(e, rows, M, K, gap)
                    moved = np.concatenate([np.zeros(shift, e.storage), panel.ravel()])
                    got = gemm.multiply(e, moved, shift, row, M, N, K, packed, full, gap=5 + shift)
                    assert np.array_equal(bits(got[place]), bits(alone[0])), (e.name, M, place)


def sources(
    gemm: Gemm,
) -> Iterator[tuple[Element, str, Callable[[Array], Array], Callable[[Array], Array]]]:
    """Element, source type, how to make such a source, and the values of E it stands for."""
    for e in gemm.elements:
        yield e, e.name, e.of, lambda x: x
    yield F32, "bf16", to_bf16, lambda x: (x.astype(np.uint32) << 16).view(np.float32)
    half = lambda x: x.astype(np.float16).view(np.uint16)
    yield F32, "f16", half, lambda x: x.view(np.float16).astype(np.float32)


def check_packing(gemm: Gemm) -> None:
    """Every stride pattern gives the values of the source, bit by bit, and zeros in the padding."""
    rng = np.random.default_rng(0)
    for e, source, make, values in sources(gemm):
        together = 2 if e is BF16 else 1
        nan = 0x7FFF if source in ("bf16", "f16") else np.nan
        for rows, K in itertools.product(
            (1, 3, 17, 31, 32, 33, 97), (1, 2, 3, 31, 32, 33, 97, 588)
        ):
            x = make(rng.standard_normal((rows, K)))
            exact = values(x)
            padded = gemm.call(f"padded_k_{e.name}", K)
            blocks = -(-rows // 32)
            b_expected = np.zeros((blocks * 32, padded), e.storage)
            b_expected[:rows, :K] = exact
            b_expected = b_expected.reshape(blocks, 32, padded // together, together).transpose(
                0, 2, 1, 3
            )
            for wide, step in ((K, 1), (K + 3, 1), (rows, 0), (rows + 3, 0), (2 * K + 1, 2)):
                if step == 0:  # [k][row]
                    memory = np.full((K, wide), nan, x.dtype)
                    memory[:, :rows] = x.T
                    stride, stride_k = 1, wide
                else:
                    memory = np.full((rows, wide), nan, x.dtype)
                    memory[:, : K * step : step] = x
                    stride, stride_k = wide, step
                flat = np.concatenate([np.full(1, nan, x.dtype), memory.ravel()])
                where = (e.name, source, rows, K, stride, stride_k)
                packed = gemm.pack_b(e, flat, rows, K, stride, stride_k, source, 1)[GUARD:-GUARD]
                assert np.array_equal(bits(packed), bits(b_expected).ravel()), ("pack_b", where)
                panel = gemm.pack_a(e, flat, rows, K, stride, stride_k, source, 1)[GUARD:-GUARD]
                panel = panel.reshape(rows, -1)
                assert np.array_equal(bits(panel[:, :K]), bits(exact)), ("pack_a", where)
                assert (panel[:, K:padded] == 0).all(), ("pack_a padding", where)


def check_leading_dimensions(gemm: Gemm) -> None:
    for e, K in itertools.product(gemm.elements, (0, 1, 31, 588, 768, 1024, 2048, 4096)):
        row, padded = gemm.call(f"lda_{e.name}", K), gemm.call(f"padded_k_{e.name}", K)
        assert row >= padded >= K and row * np.dtype(e.storage).itemsize % 4096 != 0


CHECKS = {name: f for name, f in globals().items() if name.startswith("check_")}


def run_check(headers: Any, isa: str, check: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, __file__, headers.__file__, check]
    return subprocess.run(
        command, env={**os.environ, "MMKERNELS_ISA": isa}, capture_output=True, text=True
    )


@pytest.mark.parametrize("check", sorted(CHECKS))
@pytest.mark.parametrize("isa", ISAS)
def test_gemm(headers: Any, isa: str, check: str) -> None:
    run = run_check(headers, isa, check)
    if run.returncode == 77:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stderr


def test_unknown_instruction_set(headers: Any) -> None:
    run = run_check(headers, "avx1024", "check_leading_dimensions")
    assert run.returncode == 1 and "got avx1024" in run.stderr


def main(path: str, check: str) -> int:
    spec = importlib.util.spec_from_file_location("mmkernels_headers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if ISAS[module.gemm_isa()] != os.environ["MMKERNELS_ISA"]:
        return 77
    CHECKS[check](Gemm(module))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
