# SPDX-License-Identifier: Apache-2.0
"""``mmkernels bench``: every op on one shape of a real model beside what runs without it, forward, on this machine.

The bound is checked first, on fewer samples where the shape is large: what is wrong has no time. All shapes, backward
and stronger baselines are ``python -m benchmarks.run`` of the repository.
"""

import argparse
import importlib

import torch

from mmkernels import OPS, info
from mmkernels.ops.cross_attention.cost import SLOW_ON_CPU
from mmkernels.testing import timing, which_kernel_ran, yardstick
from mmkernels.testing.case import CHECK_QUICKLY, smaller, timed

ROUNDS = 7
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int64": torch.int64}
REAL = {
    "patch_embed": "clip_l14_336",
    "cross_attention": "siglip_map_head",
    "merge_embeddings": "qwen2vl_2b",
    "patch_merge": "internvl",
    "pack_embeddings": "qwen2vl_2b",
    "mrope_positions": "qwen2_vl_64_images",
    "mrope": "qwen2_5_vl_7b",
    "rope_write_kv": "qwen2_5_vl_7b_prefill",
    "paged_attention": "decode_qwen2_7b_16_questions",
    "compact_kv": "qwen2_7b_quarter",
}
LINE = "{:17} {:29} {:6} {:6} {}"


def main(args: argparse.Namespace) -> int:
    """Prints a line an op, dtype and device; 1 if an op is out of its bound."""
    print(LINE.format("op", "case", "device", "dtype", "  ours ms   eager ms  × eager  kernel"))
    wrong = 0
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for op in OPS:
            for dtype in dtypes(op, device):
                told, right = measured(op, dtype, device)
                print(LINE.format(op, REAL[op], device, dtype, told), flush=True)
                wrong += not right
    print(
        f"Medians of {ROUNDS} interleaved rounds, {torch.get_num_threads()} threads. {info.verdict()}"
    )
    return int(wrong > 0)


def dtypes(op: str, device: str) -> list[str]:
    """Those of the op's benchmarks, without one that torch takes minutes for on this CPU."""
    cases = importlib.import_module(f"mmkernels.ops.{op}.cases")
    slow = SLOW_ON_CPU if device == "cpu" else frozenset()
    return [d for d in getattr(cases, "DTYPES", ("fp32", "bf16")) if DTYPES[d] not in slow]


def measured(op: str, dtype: str, device: str) -> tuple[str, bool]:
    """Times and kernel, or what is wrong; and whether it is right."""
    cases = importlib.import_module(f"mmkernels.ops.{op}.cases")
    case = next(c for c in cases.CASES if c.name == REAL[op])
    inputs = cases.make_inputs(case, DTYPES[dtype], device)
    small = cases.make_inputs(smaller(case, inputs, CHECK_QUICKLY), DTYPES[dtype], device)
    try:
        worst = yardstick.worst(yardstick.examined(cases, small)[1])
    except Exception as error:  # the other ops are still measured
        return f"WRONG: {type(error).__name__}: {error}", False
    if not worst.ratio <= 1:
        return f"WRONG: {worst}", False
    calls = {n: timing.rotating(timed(cases)[n], [inputs]) for n in ("ours", "eager")}
    with torch.no_grad(), which_kernel_ran() as ran:
        calls["ours"]()
    with torch.no_grad():
        times = timing.measure(calls, device, ROUNDS)
    ours, eager = times["ours"], times["eager"]
    faster = timing.ratio(eager, ours)
    kernel = ran.get(op, "torch")
    return f"{ours.median * 1e3:9.3f} {eager.median * 1e3:10.3f} {faster:8.2f}  {kernel}", True
