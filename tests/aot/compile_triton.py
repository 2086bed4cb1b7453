# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel ahead of time, without a GPU: ``python tests/aot/compile_triton.py``.

The launchers themselves run, on meta tensors of real shapes, with a driver that only names a GPU; so what is
compiled (tiles, warps, stages, alignment, sizes equal to 1) is what that GPU would get. Prints
registers, spills and shared memory, and fails on spills, on too much shared memory, and on a 16-bit
kernel for sm_90 without wgmma where its tile allows it.
"""

import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from mmkernels.ops.compact_kv import triton as compact_kv
from mmkernels.ops.cross_attention import triton as cross_attention
from mmkernels.ops.mrope_positions import FAMILIES
from mmkernels.ops.mrope_positions import triton as mrope_positions
from mmkernels.ops.paged_attention import triton as paged_attention
from mmkernels.ops.patch_embed import triton as patch_embed
from mmkernels.ops.patch_merge import triton as patch_merge

SHARED_KB = {80: 163, 90: 227, 100: 227}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
AFFINE = ([0.015, 0.015, 0.014], [-1.8, -1.75, -1.5])


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    kernel: str
    case: str
    arch: int
    dtype: str
    tile: str
    registers: int
    spills: int
    shared: int
    wgmma: bool
    wants_wgmma: bool

    def faults(self) -> list[str]:
        """Why this kernel may not ship."""
        found = []
        # ptxas parks a scalar or two in local memory now and then, with registers to spare: no pressure.
        if self.spills > 4 or (self.spills and self.registers > 128):
            found.append(f"{self.spills} accesses of local memory")
        if self.shared > SHARED_KB[self.arch] * 1024:
            found.append(f"more than {SHARED_KB[self.arch]} KB of shared memory")
        if self.wants_wgmma and not self.wgmma:
            found.append("no wgmma")
        return found

    def __str__(self) -> str:
        return (
            f"{self.kernel:22} {self.case:16} sm_{self.arch:<4} {self.dtype:5} {self.tile:27}"
            f"{self.registers:4} {self.spills:6} {self.shared / 1024:8.1f} {'wgmma' if self.wgmma else '-':6}"
            f" {'; '.join(self.faults())}"
        )


class NamedGpu:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _patch_embed(
    dtype: torch.dtype,
    images: list[torch.Tensor],
    weight: tuple[int, ...],
    *,
    stride: tuple[int, ...] | None = None,
    sizes: tuple[int, ...] = (),
    edge: str = "exact",
    merge: int = 1,
    mode: str = "none",
    antialias: bool = False,
    tables: tuple[tuple[int, ...], ...] = (),
    R: int = 0,
    bias: bool = True,
    grid_thw: torch.Tensor | None = None,
    affine: tuple[list[float] | None, list[float] | None] = (None, None),
) -> None:
    """Forward and every gradient, as the op calls the launchers."""
    D, C, *patch = weight
    w = _meta(*weight, dtype=dtype)
    b = _meta(D, dtype=dtype) if bias else None
    positions = [_meta(*shape, D, dtype=dtype) for shape in tables]
    prefix = _meta(R, D, dtype=dtype) if R else None
    layout = (
        list(stride or patch), list(sizes), edge, merge, False, mode if tables else "none", False, antialias
    )  # fmt: skip
    out = patch_embed.patch_embed(images, w, b, positions, prefix, grid_thw, *affine, *layout)
    needs = [images[0].is_floating_point(), True, True, bool(tables), R > 0]
    rows = [n for shape in tables for n in shape]
    patch_embed.patch_embed_backward(out, images, w, grid_thw, *affine, R, rows, needs, *layout)


def _batch(
    dtype: torch.dtype,
    B: int,
    side: int,
    P: int,
    D: int,
    pixels: torch.dtype = torch.uint8,
    extras: bool = True,
) -> None:
    N, R = (side // P) ** 2, int(extras)
    _patch_embed(
        dtype, [_meta(B, 3, 1, side, side, dtype=pixels)], (D, 3, 1, P, P), mode="fixed",
        tables=((R + N,),) if extras else (), R=R, bias=extras,
        affine=AFFINE if extras else (None, None),
    )  # fmt: skip


def _qwen3_vl(dtype: torch.dtype) -> None:
    """Still images of several sizes; the weight of two frames is summed before."""
    images = [_meta(3, h, w, dtype=torch.uint8) for h, w in ((448, 672), (1024, 768), (256, 320))]
    _patch_embed(
        dtype,
        images,
        (1152, 3, 1, 16, 16),
        merge=2,
        mode="bilinear",
        tables=((48, 48),),
        affine=AFFINE,
    )


def _packed_any(dtype: torch.dtype) -> None:
    """What lists may also be: odd sides, padded, float, patch 14, cubic and antialiased positions."""
    images = [_meta(3, h, w, dtype=torch.float32) for h, w in ((451, 673), (1021, 767))]
    _patch_embed(
        dtype, images, (1152, 3, 1, 14, 14), edge="pad", mode="bicubic", antialias=True,
        tables=((27, 27),), R=1, affine=AFFINE,
    )  # fmt: skip


def _video(dtype: torch.dtype, edge: str = "exact") -> None:
    frames = 17 if edge == "pad" else 16
    _patch_embed(
        dtype, [_meta(8, 3, frames, 224, 224, dtype=dtype)], (768, 3, 2, 16, 16), edge=edge, mode="fixed",
        tables=(((frames + 1) // 2 * 196,),), affine=AFFINE,
    )  # fmt: skip


def _audio(dtype: torch.dtype) -> None:
    """AST: patches of 16 every 10."""
    _patch_embed(
        dtype, [_meta(16, 1, 1, 128, 1024, dtype=torch.float32)], (768, 1, 1, 16, 16), stride=(1, 10, 10),
        edge="crop", mode="fixed", tables=((2 + 12 * 101,),), R=2,
    )  # fmt: skip


def _rows(dtype: torch.dtype, K: int, D: int, affine: Any = (None, None), **positions: Any) -> None:
    _patch_embed(
        dtype, [_meta(16384, K, dtype=torch.float32)], (D, K, 1, 1, 1), merge=2, affine=affine,
        grid_thw=_meta(24, 3, dtype=torch.int64), **positions,
    )  # fmt: skip


def _cross_attention(
    dtype: torch.dtype,
    B: int,
    Q: int,
    n: int,
    X: int,
    A: int,
    d: int,
    shared: bool = False,
    mask: str = "none",
    dropped: bool = False,
) -> None:
    query = _meta(*(() if shared else (B,)), Q, A * d, dtype=dtype)
    context, bias = _meta(B, n, X, dtype=dtype), _meta(A * d, dtype=dtype)
    w_k, w_v = _meta(A * d, X, dtype=dtype), _meta(A * d, X, dtype=dtype)
    masks = {
        "none": None,
        "bool": _meta(B, 1, 1, n, dtype=torch.bool).expand(B, A, Q, n),
        "additive": _meta(1, 1, Q, n, dtype=dtype).expand(B, A, Q, n),
    }
    m = masks[mask]
    keep = _meta(B, A, Q, n, dtype=torch.bool) if dropped else None
    out, lse = cross_attention.cross_attention(
        query, context, None, w_k, w_v, None, bias, m, keep, None, 0, A, 0.125, 0.1 * dropped
    )
    cross_attention.cross_attention_backward(
        out,
        query,
        context,
        None,
        w_k,
        w_v,
        bias,
        m,
        keep,
        None,
        out,
        lse,
        0,
        A,
        0.125,
        0.1 * dropped,
        [True] * 7,
    )


def _patch_merge(
    dtype: torch.dtype,
    N: int,
    C: int,
    J: int,
    norm: str,
    after: bool,
    *,
    gathered: bool,
    ckk: bool = False,
) -> None:
    features = _meta(N, C, dtype=dtype)
    index = _meta(N // J, J, dtype=torch.int64) if gathered else None
    width = C * J if after else C
    weight = None if norm == "none" else _meta(width, dtype=dtype)
    bias = _meta(width, dtype=dtype) if norm == "layer" else None
    arguments = (features, index, weight, bias, J, norm, after, ckk, 1e-6)
    out = patch_merge.patch_merge(*arguments)
    patch_merge.patch_merge_backward(out, *arguments, [True] * 3)


def _mrope_positions(family: str, seconds: bool = False, packed: bool = False) -> None:
    tokens = (1, 30976) if packed else (4, 7744)
    ids, types, mask = (_meta(*tokens, dtype=torch.int64) for _ in range(3))
    ends = _meta(9, dtype=torch.int32) if packed else None
    grids = [_meta(n, 3, dtype=torch.int64) for n in (64, 8)]
    interval = _meta(8, dtype=torch.float32) if seconds else None
    mrope_positions.mrope_positions(
        ids, types, None if packed else mask, ends, *grids, interval, None, None,
        list(FAMILIES[family]),
    )  # fmt: skip


def _paged(
    dtype: torch.dtype,
    B: int,
    H: int,
    G: int,
    d: int,
    page: int,
    *,
    T: int = 0,
    prefix: bool = False,
    int8: bool = False,
) -> None:
    """A decode, or with T a packed prefill."""
    index = lambda *shape: _meta(*shape, dtype=torch.int32)
    cache = _meta(4096, page, H, d, dtype=torch.int8 if int8 else dtype)
    scale = _meta(H, dtype=torch.float32) if int8 else None
    groups = (index(B), index(2, 128), index(2)) if prefix else (None, None, None)
    paged_attention.paged_attention(
        _meta(T or B, H * G, d, dtype=dtype), cache, cache, index(B, 256), index(B),
        index(B + 1) if T else None, scale, scale, *groups, True, d**-0.5,
    )  # fmt: skip


def _compact(dtype: torch.dtype, page: int) -> None:
    index = lambda *shape: _meta(*shape, dtype=torch.int64)
    cache, keep = _meta(28, 1024, page, 4, 128, dtype=dtype), _meta(2, 8192, dtype=torch.bool)
    compact_kv.compact_kv(cache, cache, index(2, 512), index(2, 512), index(2), keep)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# fp16 differs from bf16 in nothing but the instruction's type: two cases show that it compiles.
CASES: dict[str, Callable[[torch.dtype], None]] = {
    "clip_l14_336": lambda t: _batch(t, 64, 336, 14, 1024),
    "clip_l14_b4": lambda t: _batch(t, 4, 336, 14, 1024),
    "vit_b16_float_b1": lambda t: _batch(t, 1, 224, 16, 768, pixels=t, extras=False),
    "vit_b16_f32_pix": lambda t: _batch(t, 64, 224, 16, 768, pixels=torch.float32),
    "patch_of_ones": lambda t: _batch(t, 1, 1, 1, 1, extras=False),
    "qwen3_vl_images": _qwen3_vl,
    "packed_any": _packed_any,
    "video_tubelets": _video,
    "video_padded": lambda t: _video(t, "pad"),
    "audio_ast": _audio,
    "rows_qwen2_vl": lambda t: _rows(t, 1176, 1280),
    "rows_gemma": lambda t: _rows(t, 768, 1152, mode="factorised", tables=((10240,), (10240,))),
    "rows_siglip2": lambda t: _rows(
        t, 768, 1152, mode="bilinear", antialias=True, tables=((16, 16),)
    ),
    "rows_normalised": lambda t: _rows(
        t, 1176, 1280, affine=([0.01] * 1175 + [0.02], [0.1] * 1176), R=1
    ),
    "blip2_layer": lambda t: _cross_attention(t, 16, 32, 257, 1408, 12, 64),
    "blip2_padded": lambda t: _cross_attention(t, 16, 32, 257, 1408, 12, 64, mask="bool"),
    "blip2_dropped": lambda t: _cross_attention(
        t, 16, 32, 257, 1408, 12, 64, mask="bool", dropped=True
    ),
    "siglip_map_head": lambda t: _cross_attention(t, 16, 1, 729, 1152, 16, 72, shared=True),
    "granite_window": lambda t: _cross_attention(t, 256, 3, 15, 1024, 16, 64, mask="additive"),
    "mrope_qwen2_vl": lambda _: _mrope_positions("qwen2_vl"),
    "mrope_qwen2_5_vl": lambda _: _mrope_positions("qwen2_5_vl", seconds=True),
    "mrope_qwen3_vl": lambda _: _mrope_positions("qwen3_vl"),
    "mrope_hy_v4_vl": lambda _: _mrope_positions("hy_v4_vl"),
    "mrope_ernie4_5_vl": lambda _: _mrope_positions("ernie4_5_vl_moe"),
    "mrope_packed": lambda _: _mrope_positions("qwen3_vl", packed=True),
    "merge_qwen2_vl": lambda t: _patch_merge(t, 16384, 1280, 4, "layer", False, gathered=False),
    "merge_internvl": lambda t: _patch_merge(t, 8192, 1024, 4, "layer", True, gathered=True),
    "merge_mistral3": lambda t: _patch_merge(
        t, 8192, 1024, 4, "rms", False, gathered=True, ckk=True
    ),
    "merge_rms_ckk": lambda t: _patch_merge(t, 8192, 1111, 4, "rms", True, gathered=True, ckk=True),
    "merge_bare": lambda t: _patch_merge(t, 8192, 1152, 4, "none", False, gathered=True),
    "merge_wide_norm": lambda t: _patch_merge(t, 4096, 3584, 1, "layer", False, gathered=False),
    "paged_decode_qwen2": lambda t: _paged(t, 16, 4, 7, 128, 16, prefix=True),
    "paged_decode_mha": lambda t: _paged(t, 64, 32, 1, 80, 16),
    "paged_prefill": lambda t: _paged(t, 8, 8, 4, 128, 16, T=2048, prefix=True),
    "paged_prefill_d256": lambda t: _paged(t, 8, 1, 16, 256, 256, T=2048),
    "paged_int8": lambda t: _paged(t, 16, 4, 7, 128, 16, T=512, int8=True),
    "paged_pages_of_1": lambda t: _paged(t, 16, 4, 8, 64, 1),
    "compact_qwen2_7b": lambda t: _compact(t, 16),
    "compact_pages_of_1": lambda t: _compact(t, 1),
    "cross_of_ones": lambda t: _cross_attention(t, 1, 1, 1, 1, 1, 1, shared=True),
}
FP16_CASES = ("clip_l14_336", "blip2_layer")


def compile_for(arch: int) -> list[Row]:
    """Every kernel the launchers ask for on this GPU."""
    rows: dict[str, Row] = {}
    driver.set_active(NamedGpu(arch))
    launch = JITFunction.run
    current = {"case": "", "dtype": ""}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in rows:
            rows[kernel.hash] = _row(kernel, arch, kwargs, **current)

    JITFunction.run = compile_only
    for case, call in CASES.items():
        for name, dtype in DTYPES.items():
            current.update(case=case, dtype=name)
            if (name != "fp16" or case in FP16_CASES) and (name == "bf16" or "ones" not in case):
                call(dtype)
    return list(rows.values())


def _row(kernel: Any, arch: int, options: dict[str, Any], case: str, dtype: str) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        # A frame of 8 bytes may be the compiler's own; what counts is whether anything goes there.
        sass = _cuobjdump("-sass", file.name) if found["STACK"] + found["LOCAL"] else ""
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    blocks = {k: v for k, v in options.items() if k.startswith("BLOCK_")}
    tile = " ".join(f"{k[6:]}{v}" for k, v in blocks.items())
    tile += f" w{kernel.metadata.num_warps} s{kernel.metadata.num_stages}"
    rows = options.get("BLOCK_M", options.get("BLOCK_I", options.get("BLOCK_R", 0)))
    if "_grad_weight" in kernel.metadata.name:  # the product's rows are those of the weight
        rows = options["BLOCK_D"]
    return Row(
        kernel=kernel.metadata.name.strip("_").removesuffix("_kernel"), case=case, arch=arch, dtype=dtype,
        tile=tile, registers=found["REG"], spills=spills,
        shared=kernel.metadata.shared, wgmma="wgmma.mma_async" in kernel.asm["ptx"],
        wants_wgmma=arch == 90 and dtype != "fp32" and rows >= 64 and "tt.dot" in kernel.asm["ttir"],
    )  # fmt: skip


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, option, path], capture_output=True, text=True, check=True
    ).stdout


def main() -> int:
    """Compiles for every GPU, prints the table, returns the exit status."""
    with multiprocessing.get_context("spawn").Pool(min(3, torch.get_num_threads() + 1)) as pool:
        rows: Iterator[Row] = (row for found in pool.imap(compile_for, SHARED_KB) for row in found)
        print(f"{'kernel':22} {'case':16} {'arch':7} {'dtype':5} {'tile':27} reg  spill   shared")
        faulty = total = 0
        for row in rows:
            total += 1
            faulty += bool(row.faults())
            print(row, flush=True)
    print(f"{total} kernels, {faulty} at fault (triton {triton.__version__})")
    return 1 if faulty or total == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
