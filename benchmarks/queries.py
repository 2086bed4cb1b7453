# SPDX-License-Identifier: Apache-2.0
"""Both algorithms of cross_attention against the number of queries, and which one ``auto`` takes.

``python -m benchmarks.queries OUT.json`` measures and says where auto is not within 5 % of the better one.
``benchmarks.report`` draws it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mmkernels
from benchmarks.record import new_run
from mmkernels.ops.cross_attention.cost import absorbs
from mmkernels.testing import timing

# B, n, X, A, d and numbers of queries
SHAPES = {
    "SigLIP tokens": (4, 729, 1152, 16, 72, (1, 2, 4, 8, 16, 32, 64)),
    "BLIP-2 tokens": (4, 257, 1408, 12, 64, (1, 2, 4, 8, 16, 32, 64)),
    "video, 8 frames": (1, 2056, 1408, 12, 64, (8, 16, 32, 64)),
    "speech windows": (64, 15, 1024, 16, 64, (1, 3, 8)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(rounds: int, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """A point a shape, dtype, direction and number of queries."""
    found = []
    for name, (B, n, X, A, d, numbers) in SHAPES.items():
        for dtype in dtypes:
            for Q in numbers:
                for direction in ("fwd", "fwdbwd"):
                    point: dict[str, Any] = {
                        "shape": name,
                        "dtype": dtype,
                        "direction": direction,
                        "Q": Q,
                    }
                    calls = _calls(B, Q, n, X, A, d, DTYPES[dtype], direction)
                    times = timing.measure(calls, "cpu", rounds)
                    for algorithm, t in times.items():
                        point[algorithm] = {"median": t.median, "p20": t.p20, "p80": t.p80}
                    pays = absorbs(Q, n, d, X, DTYPES[dtype], "cpu", direction == "fwdbwd")
                    point["auto"] = "absorbed" if pays else "projected"
                    found.append(point)
                    print(point["shape"], dtype, direction, Q, flush=True)
    return found


def _calls(
    B: int, Q: int, n: int, X: int, A: int, d: int, dtype: torch.dtype, direction: str
) -> dict[str, Callable[[], object]]:
    g = torch.Generator().manual_seed(0)
    training = direction == "fwdbwd"
    make = lambda *s: torch.randn(*s, generator=g).to(dtype)
    query, context, grad = make(B, Q, A * d), make(B, n, X), make(B, Q, A * d)
    w_k, w_v = (make(A * d, X) * X**-0.5 for _ in range(2))
    leaves = [t.requires_grad_(training) for t in (query, context, w_k, w_v)]

    def run(algorithm: str) -> object:
        with torch.set_grad_enabled(training):
            out = mmkernels.cross_attention(*leaves, num_heads=A, algorithm=algorithm)
            return torch.autograd.grad(out, leaves, grad) if training else out

    return {a: lambda a=a: run(a) for a in ("absorbed", "projected")}  # type: ignore[misc]


def losses(points: Sequence[dict[str, Any]]) -> list[str]:
    """Where auto's choice is slower than the other by more than 5 % and the spread."""
    found = []
    for p in points:
        other = "projected" if p["auto"] == "absorbed" else "absorbed"
        if p[p["auto"]]["p20"] > 1.05 * p[other]["p80"]:
            slower = p[p["auto"]]["median"] / p[other]["median"]
            place = f"{p['shape']} {p['dtype']} {p['direction']} Q={p['Q']}"
            found.append(f"{place}: auto takes {p['auto']}, {slower:.2f} times the other's time")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queries", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="one alone: bf16 takes torch minutes without AVX-512"
    )
    args = parser.parse_args(argv)
    points = measure(args.rounds, [args.dtype] if args.dtype else list(DTYPES))
    run = asdict(new_run({"rounds": args.rounds}, [])) | {"rows": points}
    args.json.write_text(json.dumps(run, indent=1) + "\n")
    lost = losses(points)
    print("\n".join(lost) or "auto is within 5 % of the better algorithm everywhere")
    return 0


if __name__ == "__main__":
    sys.exit(main())
