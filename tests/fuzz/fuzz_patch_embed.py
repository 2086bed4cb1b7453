# SPDX-License-Identifier: Apache-2.0
"""Random calls of patch embedding: the letters of ``cases.py`` and a few more, and spoiled calls.

Further letters: dtype (of the weight) and pixels (of the images), names in DTYPES; family and seed of the values;
threads; Pw (width of a patch, 0: square); given (which numbers of the normalisation); lead (a leading 1 where the
docstring allows one); as_rows (rows as ``patch_embed`` takes them); bare (one image of rows, no ``grid_thw``);
int32 (of ``grid_thw``); layouts: (argument, layout, seed), "grad" among them. ``stride`` may have three numbers.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from layouts import LAYOUTS, laid_out

from mmkernels.ops.patch_embed import cases
from mmkernels.ops.patch_embed.layout import patch_count
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "patch_embed"
CASES = cases
KINDS = ("image", "packed", "tubelet", "audio")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
          "uint8": torch.uint8}  # fmt: skip
# What a failing case shrinks to, letter by letter; letters that are not here do not shrink.
SIMPLEST: dict[str, Any] = {
    **cases.DEFAULTS,
    "B": 1, "C": 1, "T": 0, "H": 1, "W": 1, "P": 1, "D": 1, "norm": False, "bias": False,
    "dtype": "fp32", "pixels": "uint8", "family": "random", "threads": 1, "Pw": 0, "given": "all",
    "lead": False, "as_rows": False, "int32": False, "bare": False, "layouts": (),
}  # fmt: skip
VARIED = tuple("dtype pixels order edge mode m rows flat last given threads family".split())
WIDTHS = (1, 2, 3, 5, 8, 9, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 96, 127, 128, 129, 161)


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    found = {**SIMPLEST, "seed": r.randrange(2**31), "D": r.choice(WIDTHS) if r.random() > 0.01 else 0,
             "C": r.choice((1, 1, 2, 3, 3, 3, 4, 5)), "norm": r.random() < 0.7, "bias": r.random() < 0.7,
             "R": r.choice((0, 0, 1, 1, 2, 3, 5)), "last": r.random() < 0.3, "lead": r.random() < 0.2,
             "family": r.choice(cases.FAMILIES), "threads": r.choice((1, 2, 2, 3, 5)),
             "dtype": r.choice(("fp32", "fp32", "bf16", "bf16", "fp16", "fp64")),
             "pixels": r.choice(("uint8", "uint8", "fp32", "bf16", "fp16", "fp64")),
             "m": r.choice((1, 1, 1, 2, 2, 3)), "order": r.choice(("", "", "", "cpp", "ppc"))}  # fmt: skip
    found["given"] = r.choice(("all", "all", "all", "rescale", "mean", "std", "mean+std"))
    found["P"] = r.choice((1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 11, 14, 16))
    if found["P"] ** 2 * found["C"] > 600:
        found["C"] = 1
    found |= {"image": _image, "packed": _packed, "tubelet": _tubelet, "audio": _audio}[kind](
        r, found
    )
    found["u8"] = found["pixels"] == "uint8"
    if found["u8"] and found["dtype"] == "fp16":  # sums of 0…255 overflow
        found |= {"norm": True, "given": "all" if found["given"] == "mean" else found["given"]}
    return found | {"layouts": _layouts(r, found)}


def _count(r: random.Random, m: int, most: int = 5) -> int:
    """Patches along an axis, a multiple of m."""
    if r.random() < 0.04:
        return m * r.randint(1, 40 // m)
    return m * r.randint(1, max(1, most // m))


def _size(r: random.Random, patch: int, stride: int, count: int, edge: str) -> int:
    """A number of pixels that gives ``count`` patches."""
    whole = (count - 1) * stride + patch
    if edge == "crop":
        return whole + r.randint(0, stride - 1)
    if edge == "pad":
        return r.randint(max(1, whole - (stride if count > 1 else patch) + 1), whole)
    return whole


def _dense(r: random.Random, x: dict[str, Any], stride: tuple[int, ...] | None) -> dict[str, Any]:
    """Sizes of a dense batch whose patch and stride are known."""
    edge, m = x["edge"], x["m"]
    patch = (max(x["Pt"], 1), x["P"], x["Pw"] or x["P"])
    steps = _three(stride, patch)
    h, w = _count(r, m), _count(r, m)
    if patch[1] <= 2 and r.random() < 0.03:
        h, w = m * r.randint(8, 20), m * r.randint(8, 20)  # several panels
    found = {"B": r.choice((1, 1, 2, 3, 4)), "stride": stride}
    found |= {
        "H": _size(r, patch[1], steps[1], h, edge),
        "W": _size(r, patch[2], steps[2], w, edge),
    }
    if x["T"]:
        frames = _size(r, patch[0], steps[0], r.choice((1, 1, 2, 3)), edge)
        found["T"] = r.choice((1, frames, frames, frames))
    rare = r.random()
    if rare < 0.01:
        found["B"] = 0
    elif rare < 0.015:
        found[r.choice("HW")] = 0
    elif rare < 0.02 and edge == "crop" and patch[1] > 1:
        found["H"] = r.randint(1, patch[1] - 1)  # no patch at all
    return found | {"S": r.choice((-1, *range(x["R"] + 1)))}


def _three(stride: Any, patch: tuple[int, ...]) -> tuple[int, ...]:
    if stride is None:
        return patch
    return (1, *stride) if len(stride) == 2 else tuple(stride)


def _stride(r: random.Random, x: dict[str, Any], frames: bool) -> tuple[int, ...] | None:
    """Any for a convolution's weight; a Linear's tells its patch by it."""
    patch = (max(x["Pt"], 1), x["P"], x["Pw"] or x["P"])
    if x["order"]:
        square = patch[0] == 1 and patch[1] == patch[2]
        if square and r.random() < 0.5:
            return None
        return patch if patch[0] > 1 or r.random() < 0.5 else patch[1:]
    if r.random() < 0.6:
        return None
    steps = tuple(r.randint(1, p + 2) for p in patch)
    return steps if frames else steps[1:]


def _image(r: random.Random, x: dict[str, Any]) -> dict[str, Any]:
    x = x | {"Pt": r.choice((0, 0, 0, 1, 2, 3)), "edge": r.choice(("", "", "pad", "crop"))}
    if r.random() < 0.2:  # rows [B, N, K]
        x |= {
            "rows": True,
            "m": 1,
            "edge": "",
            "order": x["order"] or r.choice(("cpp", "ppc")),  # beside a Linear's weight
            "B": r.choice((0, 1, 1, 2, 3)),
            "H": r.randint(1, 4),
        }
        return x | {"W": _count(r, 1), "S": r.choice((-1, *range(x["R"] + 1)))}
    if r.random() < 0.2:
        x["Pw"] = r.randint(1, 9)
    return x | _dense(r, x, _stride(r, x, frames=x["Pt"] > 0))


def _tubelet(r: random.Random, x: dict[str, Any]) -> dict[str, Any]:
    x = x | {"T": 1, "Pt": r.choice((0, 1, 2, 2, 3, 4)), "edge": r.choice(("", "", "pad", "crop"))}
    x["P"] = min(x["P"], r.choice((3, 4, 7)))
    if r.random() < 0.1:
        x["Pw"] = r.randint(1, 5)
    return x | _dense(r, x, _stride(r, x, frames=True)) | ({"T": -1} if r.random() < 0.01 else {})


def _audio(r: random.Random, x: dict[str, Any]) -> dict[str, Any]:
    """Overlapping patches of a spectrogram."""
    P, Pw = r.randint(1, 16), r.choice((0, 0, r.randint(1, 16)))
    x = x | {"C": r.choice((1, 1, 1, 2)), "P": P, "Pw": Pw, "order": "", "m": r.choice((1, 1, 2))}
    x |= {
        "pixels": r.choice(("fp32", "bf16", "fp16", "fp64", "uint8")),
        "edge": r.choice(("", "pad", "crop", "crop")),
    }
    stride = (r.randint(1, P), r.randint(1, Pw or P))
    return x | _dense(r, x, stride)


def _packed(r: random.Random, x: dict[str, Any]) -> dict[str, Any]:
    form = r.choice(("list", "list", "list", "flat", "rows", "rows"))
    x = x | {"rows": form == "rows", "flat": form == "flat", "Pt": r.choice((0, 0, 1, 2, 3))}
    x["P"] = min(x["P"], r.choice((4, 7, 16)))
    m, rows = x["m"], x["rows"]
    images = 0 if r.random() < 0.02 else r.choice((1, 2, 2, 3, 4, 5, 9))
    x["flat"] = x["flat"] and images > 0
    frames = r.choice((0.0, 0.3, 1.0)) if x["Pt"] else 0.0  # clips among stills
    mode = r.choice(("none", "fixed", "nearest", "bilinear", "bilinear", "bicubic", "factorised"))
    mode = mode if images else "bilinear"  # without images a table tells a packed call
    side = lambda: _count(r, m, 6)
    same = (side(), side())
    grids = []
    for _ in range(images):
        h, w = (r.choice((same, same[::-1])) if mode == "fixed" else (side(), side()))  # fmt: skip
        t = r.randint(1, 3) if rows or r.random() < frames else 0
        grids.append((1 if mode == "fixed" and t else t, h, w))
    x["grids"] = tuple(grids)
    if not rows and mode != "fixed" and r.random() < 0.5:
        least = min(x["P"], x["Pt"] or x["P"]) - 1
        x["edge"] = r.choice(("pad", "crop"))
        x["rest"] = r.randint(0, x["P"] - 1) if x["edge"] == "crop" else -r.randint(0, least)
        if m == 1 and not x["order"] and r.random() < 0.4:
            x["stride"] = (r.randint(1, x["P"] + 1), r.randint(1, x["P"] + 1))
            if x["edge"] == "crop":
                x["stride"] = (r.randint(1, x["P"]), r.randint(1, x["P"]))
    if x["order"] and x["Pt"] > 1 and not rows:
        x["stride"] = (x["Pt"], x["P"], x["P"])
    if x["order"] and not rows and (x["flat"] or not images):
        x |= {"C": 3, "given": "all"}  # nothing else tells the channels
    if rows:
        x |= {
            "as_rows": mode in ("none", "fixed") and images > 0 and r.random() < 0.3,
            "int32": r.random() < 0.3,
            "bare": r.random() < 0.5,
        }
    return x | _table(r, x, mode)


def _table(r: random.Random, x: dict[str, Any], mode: str) -> dict[str, Any]:
    """A position table, larger or smaller than the grids."""
    if mode == "none" or (x["as_rows"] and mode != "fixed"):
        return {"table": ()}
    grids = [_grid_of(x, g) for g in x["grids"]]
    if mode == "fixed":
        count = math.prod(grids[0]) if grids else 5
        if len({math.prod(g) for g in grids}) > 1 or (
            x["as_rows"] and len(grids) > 1 and x["R"] == 0
        ):
            return {"table": ()}
        return {"table": (count + r.randint(0, x["R"]),), "mode": "fixed"}
    if mode == "factorised":
        most = [max([g[i] for g in grids], default=1) for i in (1, 2)]
        return {"table": tuple(n + r.choice((0, 0, 1, 5)) for n in most), "mode": mode}
    corners = mode != "nearest" and r.random() < 0.3
    antialias = mode in ("bilinear", "bicubic") and not corners and r.random() < 0.4
    sizes = (r.choice((1, 2, 3, 5, 8, 13)), r.choice((1, 2, 4, 7, 11)))
    return {"table": sizes, "mode": mode, "corners": corners, "antialias": antialias}


def _grid_of(x: dict[str, Any], grid: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid of a packed image after its rest of pixels and its stride."""
    t, h, w = grid
    if x["rows"]:
        return grid
    patch = (max(x["Pt"], 1), x["P"], x["P"])
    sizes = (t * patch[0] + x["rest"] if t else 1, h * x["P"] + x["rest"], w * x["P"] + x["rest"])
    edge = x["edge"] or "exact"
    edges = ("pad" if sizes[0] == 1 else edge, edge, edge)
    return tuple(map(patch_count, sizes, patch, _three(x["stride"], patch), edges))  # type: ignore[return-value]


# Bugs that are known: letters and class of the failure. Delete the entry with the bug.
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def folds(x: dict[str, Any]) -> bool:
    """Whether all are stills under a temporal weight, whose sum over time rounds in 16 bits."""
    return not (
        x["rows"] or x["Pt"] < 2 or x["T"] not in (0, 1) or any(t for t, _, _ in x["grids"])
    )


ARGUMENTS = (
    "pixel_values",
    "images",
    "weight",
    "bias",
    "prefix_tokens",
    "position_embed",
    "position_table",
    "grad",
)


def _layouts(r: random.Random, x: dict[str, Any]) -> tuple[tuple[str, str, int], ...]:
    """Of some arguments a layout. Equal values in a sum err alike; the bound is of errors that do not."""
    found, coherent = [], x["family"] != "random" or folds(x)
    for name in ARGUMENTS:
        if r.random() < 0.35:
            layout = r.choice(LAYOUTS)
            if layout == "expanded" and x["dtype"] != "fp64":
                alike = coherent and name in ("weight", "grad", "pixel_values", "images")
                # Thousands of terms of 256 values: their roundings have a mean.
                layout = "permuted" if alike or name == "grad" else layout
                coherent = True
            found.append((name, layout, r.randrange(1000)))
    return tuple(found)


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, and the same call with all numbers of the normalisation spelled out, for the reference."""
    plain = {"S": -1, "stride": None, "edge": "", "u8": x["u8"]}
    case = Case("fuzz", {**cases.DEFAULTS, **x, **plain})
    inputs = cases.make_inputs(case, torch.float64, seed=x["seed"], family=x["family"])
    g = torch.Generator().manual_seed(x["seed"] + 1)
    normal = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    K = x["C"] * max(x["Pt"], 1) * x["P"] * (x["Pw"] or x["P"])
    if x["Pw"]:
        shape = (K,) if x["order"] else (x["C"], *[x["Pt"]] * bool(x["Pt"]), x["P"], x["Pw"])
        inputs["weight"] = normal(x["D"], *shape) * K**-0.5
    if x["S"] >= 0 and "pixel_values" in inputs:
        inputs["position_embed"] = normal(x["S"] + patches_of(x), x["D"]) * 0.5
    if x["edge"]:
        inputs[x["edge"]] = True
    if x["stride"] is not None:
        same = len(set(x["stride"])) == 1 and len(x["stride"]) == 2 and x["lead"]
        inputs["stride"] = x["stride"][0] if same else list(x["stride"])
    if x["as_rows"]:
        table = inputs.pop("position_table", None)
        inputs = {"pixel_values": inputs.pop("images"), **inputs}
        inputs.pop("position_mode", None)
        if table is not None:
            inputs["position_embed"] = table
        if x["bare"] and len(x["grids"]) == 1 and x["m"] == 1:
            del inputs["grid_thw"]
    if "grid_thw" in inputs and x["int32"]:
        inputs["grid_thw"] = inputs["grid_thw"].int()
    if x["lead"]:
        for name in ("prefix_tokens", "position_embed"):
            if name in inputs:
                inputs[name] = inputs[name][None]
    inputs = {n: _typed(n, v, x) for n, v in inputs.items()}
    for name, layout, seed in x["layouts"]:
        if name in inputs:
            change = functools.partial(laid_out, layout=layout, seed=seed)
            inputs[name] = map_tensors({name: inputs[name]}, change)[name]
    return _affine(inputs, x)


def _typed(name: str, value: Any, x: dict[str, Any]) -> Any:
    dtype = DTYPES[x["pixels"] if name in ("pixel_values", "images") else x["dtype"]]
    # All of the mantissa: the values of cases.py come from fp32.
    cast = lambda t: (t * (1 + 1e-9)).to(dtype) if t.is_floating_point() else t
    if x["dtype"] == "fp16" and name in ("pixel_values", "images"):
        cast = lambda t: (
            t.clamp(min=2**-12).to(dtype) if t.is_floating_point() else t
        )  # normal in fp16
    return map_tensors({name: value}, cast)[name]


def _affine(inputs: Inputs, x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    if not x["norm"]:
        return inputs, inputs
    C, given = x["C"], x["given"]
    scale = 255.0 if x["u8"] else 1.0
    unit = 1.0 if given == "all" or given == "rescale" else scale
    full = {
        "rescale_factor": 1 / scale if unit == 1.0 else 1.0,
        "image_mean": [cases.MEAN[i % 3] * unit + 0.01 * (i // 3) for i in range(C)],
        "image_std": [cases.STD[i % 3] * unit + 0.01 * (i // 3) for i in range(C)],
    }
    if "mean" not in given and given != "all":
        full["image_mean"] = [0.0] * C
    if "std" not in given and given != "all":
        full["image_std"] = [1.0] * C
    names = {"all": full, "rescale": ["rescale_factor"], "mean": ["image_mean"], "std": ["image_std"],
             "mean+std": ["image_mean", "image_std"]}[given]  # fmt: skip
    inputs = {k: v for k, v in inputs.items() if k not in full}
    told = {k: full[k] for k in names}
    if x["rows"] and given == "rescale":
        full = {**full, "image_mean": [0.0], "image_std": [1.0]}
    return {**inputs, **told}, {**inputs, **full}


def patches_of(x: dict[str, Any]) -> int:
    """Of a dense image."""
    if x["rows"]:
        return int(x["H"] * x["W"])
    patch = (max(x["Pt"], 1), x["P"], x["Pw"] or x["P"])
    sizes = (max(x["T"], 0), x["H"], x["W"]) if x["T"] else (1, x["H"], x["W"])
    edge = x["edge"] or "exact"
    edges = ("pad" if x["T"] in (0, 1) else edge, edge, edge)
    return math.prod(map(patch_count, sizes, patch, _three(x["stride"], patch), edges))


# Calls that must raise: each takes a valid call apart; None where it does not apply.
Spoil = Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]


def spoil(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> tuple[str, Inputs]:
    """A spoiled call and what was done to it."""
    names = r.sample(sorted(SPOILED), len(SPOILED))
    if r.random() < 0.3:  # few calls have these numbers, and memory is at stake
        names = ["grid_thw", "image_sizes", *names]
    for name in names:
        changed = SPOILED[name](r, inputs, x)
        if changed is not None:
            return name, {**inputs, **changed}
    raise AssertionError("some always apply")


def _wider(tensor: torch.Tensor, dim: int, by: int = 1) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] += by
    return tensor.new_zeros(shape)


def _pixels(inputs: Inputs) -> str:
    return "images" if "images" in inputs else "pixel_values"


def _some_image(r: random.Random, inputs: Inputs, change: Any) -> Inputs | None:
    """One image of a list, or the batch, changed."""
    name = _pixels(inputs)
    value = inputs[name]
    if isinstance(value, torch.Tensor):
        return {name: change(value)}
    if not value:
        return None
    i = r.randrange(len(value))
    return {name: [*value[:i], change(value[i]), *value[i + 1 :]]}


def _no_pixels(inputs: Inputs) -> bool:
    value = inputs[_pixels(inputs)]
    return isinstance(value, list) and not value


def _in_axis(inputs: Inputs, x: dict[str, Any]) -> bool:
    """Images whose sizes are in pixels: neither rows nor a flat buffer."""
    return not (x["rows"] or x["flat"] or _no_pixels(inputs))


def _a_rest(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    patch = (x["P"], x["Pw"] or x["P"])
    steps = _three(x["stride"], (1, *patch))[1:]
    axis = r.choice([i for i in (0, 1)])
    if not _in_axis(inputs, x) or x["edge"] or steps[axis] < 2:
        return None
    return _some_image(r, inputs, lambda t: _wider(t, axis - 2, r.randint(1, steps[axis] - 1)))


def _merge_rest(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    if not _in_axis(inputs, x) or x["m"] == 1 or x["edge"] or x["H"] == 0 or x["W"] == 0:
        return None
    patch = (x["P"], x["Pw"] or x["P"])
    axis = r.choice((0, 1))
    step = _three(x["stride"], (1, *patch))[1:][axis]
    return _some_image(r, inputs, lambda t: _wider(t, axis - 2, step))


def _grid(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    if "grid_thw" not in inputs or len(inputs["grid_thw"]) == 0:
        return None
    grid = inputs["grid_thw"].clone().long()
    image, axis = r.randrange(len(grid)), r.randrange(3)
    before = int(grid[image, axis])
    wild = [0, -1, -(2**63), 2**63 - 1, 2**62, 2**32, 2**31, before + x["m"], -before]
    grid[image, axis] = r.choice([n for n in wild if n != before])
    if r.random() < 0.2:  # products that wrap around to what was there, or to 0
        grid[image] = torch.tensor(
            r.choice([(2**32, 2**32, 1), (2**21, 2**21, 2**22), (2**63 - 1, 2**63 - 1, 2**63 - 1)])
        )
    return {"grid_thw": grid}


def _image_sizes(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    if "image_sizes" not in inputs or not inputs["image_sizes"]:
        return None
    sizes = [list(s) for s in inputs["image_sizes"]]
    size = r.choice(sizes)
    axis = r.randrange(len(size))
    size[axis] = r.choice(
        [-1, -size[axis], size[axis] + 1, 2**62, 2**63 - 1, 2**32, *([0] if axis else [])]
    )
    if r.random() < 0.3:
        size[-2:] = r.choice(
            [(2**32, 2**32), (2**31, 2**33), (2**62, 4), (-1, -1), (2**16 * x["P"], 2**48 * x["P"])]
        )
    if r.random() < 0.3:  # a product that wraps around to 0 beside sizes that fit
        wild = r.choice([(2**32, 2**32), (2**31, 2**33), (2**62, 4), (2**62, 2**62)])
        sizes = [*map(list, inputs["image_sizes"])]
        sizes.insert(r.randint(0, len(sizes)), list(wild))
    return {"image_sizes": [tuple(s) for s in sizes]}


def _numbers(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    if _no_pixels(inputs):
        return None
    name = r.choice(("image_mean", "image_std"))
    C = x["C"] if not x["rows"] else len(inputs.get("image_mean", inputs.get("image_std", [0])))
    fine = [0.5] * C
    wild = [[*fine[1:], r.choice((math.nan, math.inf, -math.inf))]]
    wild += [[0.5] * (C + 1)] * (not x["rows"] and not x["flat"]) + [[*fine[1:], 0.0]] * (
        name == "image_std"
    )
    return {name: r.choice(wild)}


def _table_of(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    table, D = inputs.get("position_table"), x["D"]
    if table is None:
        return None
    one = table[0] if isinstance(table, list) else table
    wrong = [
        one.new_zeros(*one.shape[:-1], D + 1),
        one[None],
        one.new_zeros(D),
        one.to(torch.int64),
    ]
    wrong += [one.half() if one.dtype != torch.float16 else one.float()]
    if D and x["mode"] != "fixed":
        wrong += [one.new_zeros(0, *one.shape[1:])]
    changed = r.choice(wrong)
    if not isinstance(table, list):
        return {"position_table": changed}
    return {
        "position_table": r.choice(([changed, table[1]], [table[0], changed], [*table, one], [one]))
    }


def _positions(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    table = inputs.get("position_embed")
    if table is None or x["as_rows"]:
        return None
    N, D, R = patches_of(x), x["D"], x["R"]
    other = torch.float16 if table.dtype != torch.float16 else torch.float32
    shapes = [(N + R + r.choice((1, 2, 1000)), D), (N + R, D + 1), (D,), (2, N, D)]
    wrong = [*map(table.new_zeros, shapes), table.int(), table.to(other)]
    wrong += [table.new_zeros(r.randrange(N), D)] if N else []
    return {"position_embed": r.choice(wrong)}


def _weight(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    w = inputs["weight"]
    wrong = [w.to(torch.int32), w.bool(), w.new_zeros(x["D"]), w.new_zeros(x["D"], 3, 5), w.new_zeros(x["D"], 0),
             w.new_zeros(x["D"], *[1] * 5)]  # fmt: skip
    if not _no_pixels(inputs):
        wrong += [_wider(w, 1)]
    if w.dim() > 2 and not x["rows"]:
        wrong += [w.new_zeros(*w.shape[:-1], 0), w.new_zeros(*w.shape[:2], 0, *w.shape[3:])]
    return {"weight": r.choice(wrong)}


def _vectors(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    D, w = x["D"], inputs["weight"]
    other = torch.float16 if w.dtype != torch.float16 else torch.float32
    name = r.choice(("bias", "prefix_tokens"))
    shapes = [(D + 1,), (1, 2, 1, D)] + (
        [(D, 1), (1, D)] if name == "bias" else [(2, D + 1), (2, 2, D)]
    )
    if name == "bias" or D != 1:
        shapes += [()]
    if name == "prefix_tokens" and D == 0:
        shapes = [(2, 1)]
    wrong = [w.new_zeros(s) for s in shapes] + [
        w.new_zeros(D, dtype=other),
        w.new_zeros(D, dtype=torch.int64),
    ]
    return {name: r.choice(wrong)}


def _pixel_tensor(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    change: list[Any] = [
        lambda t: t.to(
            r.choice((torch.int32, torch.int64, torch.bool, torch.int8, torch.complex64))
        ),
        lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
        lambda t: t.new_zeros(()),
        lambda t: t[None, None, None, None],
    ]
    return _some_image(r, inputs, r.choice(change))


def _one_of_the_list(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    images = inputs.get("images")
    if not isinstance(images, list) or not images:
        return None
    C, dtype = x["C"], images[0].dtype
    other = torch.uint8 if dtype != torch.uint8 else torch.float32
    P = x["P"] * 6
    shapes = [(C + 1, P, P), (C, 0, P), (C, P, 0), (C, 0, P, P), (P, P), (1, C, 1, P, P)]
    wrong = r.choice([*map(images[0].new_zeros, shapes), images[0].to(other)])
    at = r.randint(0, len(images))
    return {"images": [*images[:at], wrong, *images[at:]]}


def _form(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    """The arguments of one form of a packed call with another."""
    grid = torch.tensor([[1, 1, 1]])
    if "image_sizes" in inputs:
        return r.choice(({"grid_thw": grid}, {"image_sizes": None}))
    if "images" in inputs and "grid_thw" in inputs:
        return r.choice(({"grid_thw": inputs["grid_thw"].float()}, {"grid_thw": inputs["grid_thw"].view(-1)},
                         {"grid_thw": None}, {"image_sizes": [(1, 1)]}))  # fmt: skip
    if "images" in inputs:
        return r.choice(({"grid_thw": grid}, {"image_sizes": [(1, 1)]}))
    return {"grid_thw": grid} if not x["as_rows"] else {"grid_thw": grid[:, :2]}


def _words(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    wrong: list[Inputs] = [
        {"prefix": r.choice(("middle", "", "FIRST"))},
        {"patch_order": r.choice(("hwc", "", "pcp"))},
        {"pad": True, "crop": True},
        {"merge_size": r.choice((0, -1, -(2**62)))},
        {"rescale_factor": r.choice((math.nan, math.inf))},
    ]
    if not x["rows"]:
        wrong += [{"stride": r.choice((0, -1, (0, 1), (1, -1), (1,), (1, 1, 1, 1), ()))}]
        if x["order"] == "":
            wrong += [{"patch_order": "ppc"}]
    if "position_table" in inputs:
        wrong += [{"position_mode": r.choice(("cubic", "", "none"))}]
        if x["mode"] in ("nearest", "fixed", "factorised") or x["corners"]:
            wrong += [{"antialias": True}]
    return r.choice(wrong)


SPOILED: dict[str, Spoil] = {
    "a rest of pixels": _a_rest, "a rest of blocks": _merge_rest, "grid_thw": _grid, "image_sizes": _image_sizes,
    "mean or std": _numbers, "position_table": _table_of, "position_embed": _positions, "weight": _weight,
    "bias or prefix": _vectors, "pixels": _pixel_tensor, "one of the list": _one_of_the_list, "form": _form,
    "words": _words,
}  # fmt: skip
