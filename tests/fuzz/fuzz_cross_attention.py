# SPDX-License-Identifier: Apache-2.0
"""Random calls of cross_attention, absorbed: batches and packed contexts; masks, latents, positions, grouped heads."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import torch

from mmkernels.ops.cross_attention import cases
from mmkernels.ops.norm import Norm
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "cross_attention"
CASES = cases
KINDS = ("batch", "packed")
SIMPLEST: dict[str, Any] = {
    "B": 1, "Q": 1, "n": 1, "X": 1, "A": 1, "G": 1, "d": 1, "L": 0, "shared": False, "bias": False, "mask": None,
    "norm": "", "position": "", "lengths": (), "dtype": "fp32", "family": "random", "threads": 1, "layouts": (),
}  # fmt: skip
LAYOUTS = layouts.LAYOUTS
VARIED = tuple("dtype Q n L shared bias mask norm position family threads".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {
    # their scores come from torch's GEMM, which on some CPUs sums by the threads it has
    "positions of keys": lambda x, why: bool(x["position"]) and why.startswith("bits"),
}
NAMES = ("query", "context", "key_weight", "value_weight", "latents", "attention_mask", "grad")


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    G = r.choice((1, 1, 1, 2, 3))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "B": r.choice((0, 1, 2, 3, 7)), "Q": r.choice((0, 1, 1, 2, 3, 7, 33)),
        "n": r.choice((0, 1, 2, 5, 15, 16, 17, 33, 80)), "X": r.choice((1, 2, 5, 16, 31, 64, 100)), "G": G,
        "A": G * r.choice((1, 2, 3, 5)), "d": r.choice((1, 2, 3, 8, 16, 24)), "L": r.choice((0, 0, 0, 1, 4)),
        "shared": r.random() < 0.4, "bias": r.random() < 0.5, "family": r.choice(cases.FAMILIES),
        "dtype": r.choice(tuple(layouts.DTYPES)), "threads": r.choice((1, 2, 3, 5)),
    }  # fmt: skip
    if (
        r.random() < 0.2 and x["X"] > 2
    ):  # a norm before it is held to fp64 alone: it rounds on its own
        x |= {"norm": r.choice(("layer", "rms")), "dtype": "fp64"}
    if kind == "packed":
        x |= {"B": r.choice((1, 2, 5)), "n": 0}
        x["lengths"] = tuple(r.choice((0, 1, 2, 9, 30)) for _ in range(x["B"]))
    elif r.random() < 0.3 and x["n"]:
        x |= {"position": r.choice(("table", "grid"))}
        x["n"] = 3 * r.choice((1, 2, 11)) if x["position"] == "grid" else x["n"]
    if kind == "batch" and r.random() < 0.5:
        x["mask"] = r.choice(("rows", "padding", "additive"))
    x["layouts"] = layouts.drawn(r, NAMES, 0.25)
    if min(x["B"], x["Q"]) == 0 or (x["B"] > 3 and x["mask"] == "padding"):
        x["mask"] = None
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    inputs = cases.make_inputs(
        Case("fuzz", x), layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"]
    )
    for name, layout, seed in x["layouts"]:
        if isinstance(inputs.get(name), torch.Tensor):
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    return inputs, map_tensors(inputs, lambda t: t)


def spoil(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> tuple[str, Inputs]:
    """A spoiled call and what was done to it."""
    for name in r.sample(sorted(SPOILED), len(SPOILED)):
        changed = SPOILED[name](r, inputs)
        if changed is not None:
            return name, {**inputs, **changed}
    raise AssertionError("some always apply")


def _a_row_too_many(n: int, X: int, context: torch.Tensor) -> torch.Tensor:
    return context.new_zeros(n + 1, X)


def _grown(name: str, dim: int) -> Callable[[random.Random, Inputs], Inputs | None]:
    """``name`` with one more along a dimension."""

    def change(r: random.Random, inputs: Inputs) -> Inputs | None:
        if not isinstance(inputs.get(name), torch.Tensor):
            return None
        shape = list(inputs[name].shape)
        shape[dim] += 1
        return {name: inputs[name].new_zeros(shape)}

    return change


def _offsets(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda r, i: (
        {"cu_seqlens": change(i["cu_seqlens"].clone())} if "cu_seqlens" in i else None
    )


SPOILED: dict[str, Callable[[random.Random, Inputs], Inputs | None]] = {
    "heads": lambda r, i: {"num_heads": i["query"].shape[-1] + r.choice((1, 2, 7))},
    "no_heads": lambda r, i: {"num_heads": r.choice((0, -1))},
    "kv_heads": lambda r, i: {"num_key_value_heads": i["num_heads"] + 1},
    "context_width": _grown("context", -1),
    "key_weight": _grown("key_weight", 0),
    "value_weight": _grown("value_weight", 1),
    "value_bias": _grown("value_bias", 0),
    "key_bias": _grown("key_bias", 0),
    "latents_width": _grown("latents", -1),
    "latents_batch": _grown("latents", 0),
    "context_dtype": lambda r, i: {"context": torch.zeros(i["context"].shape, dtype=torch.int64)},
    "query_rank": lambda r, i: {"query": i["query"].reshape(-1)},
    "mask_dtype": lambda r, i: {"attention_mask": torch.ones(1, dtype=torch.int32)} if "cu_seqlens" not in i else None,
    "mask_shape": lambda r, i: {"attention_mask": torch.ones(i["context"].shape[-2] + 2, dtype=torch.bool)},
    "norm_width": lambda r, i: {"context_norm": Norm("rms", i["context"].new_ones(2000))},
    "norm_kind": lambda r, i: {"context_norm": Norm("group")},
    "dropout": lambda r, i: {"dropout_p": r.choice((-0.1, 1.0, 2.0, float("nan")))},
    "algorithm": lambda r, i: {"algorithm": "fast"},
    "position": lambda r, i: {"key_position": _a_row_too_many(*i["context"].shape[-2:], i["context"])},
    "offsets_first": _offsets(lambda t: t + 1),
    "offsets_last": _offsets(lambda t: torch.cat([t[:-1], t[-1:] + 1])),
    "offsets_float": _offsets(lambda t: t.float()),
    "longest": lambda r, i: {"max_seqlen": i["max_seqlen"] - 1} if i.get("max_seqlen") else None,
}  # fmt: skip
