# SPDX-License-Identifier: Apache-2.0
"""The resamplers of MiniCPM-V and Qwen-VL, folded and as they are, against eager: ``python -m benchmarks.resampler
OUT.json``. Inference, fp32 and bf16; numbers of one run, as in ``benchmarks.run``.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import new_run
from mmkernels.nn import Resampler
from mmkernels.nn.resampler import sincos_tables
from mmkernels.testing import timing

# The layer, its grid of features and images a batch
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, int], int]] = {
    "MiniCPM-V 2.6": ({"num_queries": 64, "embed_dim": 3584, "num_heads": 28, "kv_dim": 1152}, (32, 32), 1),
    "Qwen-VL": (
        {"num_queries": 256, "embed_dim": 4096, "num_heads": 32, "kv_dim": 1664, "query_grid": True, "post": False},
        (32, 32), 1,
    ),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Eager(nn.Module):
    """As released: kv_proj, ln_kv, a table of positions added to the keys, nn.MultiheadAttention.

    Qwen-VL resizes that of its queries, MiniCPM-V cuts its own from a larger one.
    """

    def __init__(self, layer: Resampler) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        layer = self.layer
        x = layer.ln_kv(layer.kv_proj(features))
        width, side = x.shape[-1], math.isqrt(len(layer.query))
        rows, columns = sincos_tables(width, *((side, side) if layer.query_grid else grid))
        table = (rows[:, None] + columns[None]).to(x.dtype)
        if layer.query_grid:  # get_abs_pos of Qwen/Qwen-VL, visual.py
            picture = table.float().permute(2, 0, 1)[None]
            picture = nn.functional.interpolate(picture, grid, mode="bicubic", align_corners=False)
            table = picture[0].permute(1, 2, 0).to(x.dtype)
        position = table.flatten(0, 1)
        query = layer._queries().expand(len(x), -1, -1)
        attn = layer.attn
        out = nn.functional.multi_head_attention_forward(
            query.transpose(0, 1), (x + position).transpose(0, 1), x.transpose(0, 1), attn.embed_dim, attn.num_heads,
            attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0, attn.out_proj.weight, attn.out_proj.bias,
            need_weights=False,
        )[0].transpose(0, 1)  # fmt: skip
        return layer.ln_post(out) @ layer.proj if layer.post else out


def calls_of(name: str, dtype: str) -> tuple[dict[str, Callable[[], object]], torch.Tensor]:
    """The layer in three ways, and its output in fp64."""
    sizes, grid, B = LAYERS[name]
    torch.manual_seed(0)
    layer, folded = (Resampler(**sizes).eval().requires_grad_(False) for _ in range(2))
    folded.load_state_dict(layer.state_dict())
    features = torch.randn(B, grid[0] * grid[1], sizes["kv_dim"])
    exact = Eager(layer.double())(features.to(DTYPES[dtype]).double(), grid)
    layer, folded = layer.to(DTYPES[dtype]), folded.to(DTYPES[dtype]).fold()
    features = features.to(DTYPES[dtype])
    return {
        "eager": lambda: Eager(layer)(features, grid),
        "unfolded": lambda: layer(features, grid),
        "folded": lambda: folded(features, grid),
    }, exact


@torch.inference_mode()
def measure(name: str, dtype: str, rounds: int) -> dict[str, Any]:
    """One row: times and how far each is from the layer in fp64."""
    _, grid, B = LAYERS[name]
    calls, exact = calls_of(name, dtype)
    row: dict[str, Any] = {"layer": name, "dtype": dtype, "images": B, "tokens": grid[0] * grid[1]}
    times = timing.measure(calls, "cpu", rounds)
    for variant, t in times.items():
        out = calls[variant]()
        assert isinstance(out, torch.Tensor)
        error = float((out.double() - exact).abs().max())
        ratio = timing.ratio(times["eager"], t)
        row[variant] = {
            "median": t.median,
            "p20": t.p20,
            "p80": t.p80,
            "vs_eager": ratio,
            "error": error,
        }
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resampler", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES)
    args = parser.parse_args(argv)
    rows = []
    for name in LAYERS:
        for dtype in [args.dtype] if args.dtype else DTYPES:
            rows.append(measure(name, dtype, args.rounds))
            print(json.dumps(rows[-1]), flush=True)
            run = asdict(new_run({"rounds": args.rounds}, [])) | {"rows": rows}
            args.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
