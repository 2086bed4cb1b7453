# SPDX-License-Identifier: Apache-2.0
"""Models of transformers as they are and patched: forward and training step, time, peak memory; each part by itself.

``python -m benchmarks.models OUT.json [--dtype fp32] [--compile] [--only NAME ...]``. Real widths and image sizes, two
layers a tower and a decoder: at full depth the front's share of the time is that much smaller, and so is the gain.
Losses are compared before anything is timed; the step has no optimizer. A part's time is that of the calls which
``patch`` has replaced, with the arguments they have in the forward.
"""

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import mmkernels
from benchmarks.record import new_run
from mmkernels.hf.merge import scatter_rows
from mmkernels.testing import timing

PARTS = ("patch_embed", "projector", "merge", "positions")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
IMAGE, START, END, SAMPLES, WORDS = 31990, 31991, 31992, 1, 64
TEXT = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {"model_type": "llama", **TEXT}
TWO = {"num_hidden_layers": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
IDS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": 31989, "vision_start_token_id": START,
    "vision_end_token_id": END,
}  # fmt: skip
Inputs = dict[str, Any]


def square(side: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: {"pixel_values": torch.randn(SAMPLES, 3, side, side, generator=g)}


def rows(h: int, w: int, width: int) -> Callable[[torch.Generator], Inputs]:
    return lambda g: {
        "pixel_values": torch.randn(SAMPLES * h * w, width, generator=g),
        "image_grid_thw": torch.tensor([[1, h, w]] * SAMPLES),
    }


def _llava() -> Any:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14, **TWO,
    }  # fmt: skip
    return "LlavaForConditionalGeneration", {
        "vision_config": vision,
        "vision_feature_layer": -1,
        "text_config": LLAMA,
    }


def _internvl() -> Any:
    vision = {
        "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "image_size": [448, 448], "patch_size": [14, 14], **TWO,
    }  # fmt: skip
    return "InternVLForConditionalGeneration", {
        "vision_config": vision,
        "downsample_ratio": 0.5,
        "text_config": LLAMA,
    }


def _idefics2() -> Any:
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "image_size": 378,
        **TWO,
    }
    perceiver = {"hidden_size": 1024, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
                 "resampler_head_dim": 96, "num_key_value_heads": 4}  # fmt: skip
    return "Idefics2ForConditionalGeneration", {
        "vision_config": {**vision, "patch_size": 14}, "perceiver_config": perceiver, "text_config": LLAMA,
    }  # fmt: skip


def _qwen(kind: str, vision: Inputs, **text: Any) -> Any:
    return f"{kind}ForConditionalGeneration", {
        "vision_config": vision, "text_config": {**TEXT, "rope_parameters": MROPE, **text},
    }  # fmt: skip


def _blip2() -> Any:
    vision = {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "image_size": 224,
        **TWO,
    }
    text = {"model_type": "opt", "hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16, **TWO,
            "word_embed_proj_dim": 1024, "vocab_size": 32000}  # fmt: skip
    return "Blip2ForConditionalGeneration", {
        "vision_config": {**vision, "patch_size": 14}, "num_query_tokens": 32, "text_config": text,
        "qformer_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
                           "encoder_hidden_size": 1408, **TWO},
    }  # fmt: skip


def _siglip() -> Any:
    return "SiglipVisionModel", {
        "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
        **TWO,
    }  # fmt: skip


QWEN2 = {"depth": 2, "embed_dim": 1280, "hidden_size": 1024, "num_heads": 16, "mlp_ratio": 4}
QWEN3 = {"depth": 2, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 1024,
         "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [0]}  # fmt: skip
GLM = {"depth": 2, "hidden_size": 1536, "intermediate_size": 4096, "num_heads": 12, "out_hidden_size": 1024,
       "image_size": 336}  # fmt: skip
# name: class and config, pixels, tokens an image
CASES: dict[str, tuple[Callable[[], Any], Callable[[torch.Generator], Inputs], int]] = {
    "llava_clip_l_336": (_llava, square(336), 576),
    "internvl_448": (_internvl, square(448), 256),
    "idefics2_378": (
        _idefics2,
        lambda g: {"pixel_values": square(378)(g)["pixel_values"][:, None]},
        64,
    ),
    "blip2_vit_g_224": (_blip2, square(224), 32),
    "siglip_so400m_384": (_siglip, square(384), 0),
    "qwen2_vl_32x32": (lambda: _qwen("Qwen2VL", QWEN2), rows(32, 32, 1176), 256),
    "qwen3_vl_32x32": (lambda: _qwen("Qwen3VL", QWEN3), rows(32, 32, 1536), 256),
    "glm4v_24x24": (lambda: _qwen("Glm4v", GLM), rows(24, 24, 1176), 144),
}


def build(name: str) -> tuple[Any, Inputs]:
    """The model in training mode without dropout, and a batch with labels."""
    import transformers

    make, pixels, tokens = CASES[name]
    kind, settings = make()
    cls = getattr(transformers, kind)
    extra = {k: v for k, v in IDS.items() if kind.endswith("Generation")}
    torch.manual_seed(0)
    model = cls._from_config(
        cls.config_class(**settings, **extra), attn_implementation="sdpa"
    ).eval()
    g = torch.Generator().manual_seed(1)
    inputs = pixels(g)
    if tokens:
        words = torch.randint(5, 30000, (SAMPLES, WORDS), generator=g)
        image = torch.tensor([[START, *[IMAGE] * tokens, END]]).expand(SAMPLES, -1)
        ids = torch.cat([words[:, :4], image, words[:, 4:]], 1)
        labels = torch.where(torch.arange(ids.shape[1]) > tokens + 20, ids, -100)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return model, inputs


def loss_of(model: Any, inputs: Inputs) -> torch.Tensor:
    result = model(**inputs)
    found: torch.Tensor = (
        result.loss if "labels" in inputs else result.pooler_output.float().square().mean()
    )
    return found


def step(model: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Loss and gradients, which are thrown away."""
    loss = loss_of(model, inputs)
    loss.backward()
    model.zero_grad()
    return (loss.detach(),)


@torch.no_grad()
def forward(model: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return (loss_of(model, inputs),)


def variants_of(model: Any, compiled: bool) -> tuple[dict[str, Any], mmkernels.Patched]:
    """Copies: as it is, patched, and both compiled."""
    found = {"eager": model, "patched": copy.deepcopy(model)}
    patched = mmkernels.patch(found["patched"])
    if compiled:
        found["compile"] = torch.compile(copy.deepcopy(model))
        found["patched compile"] = torch.compile(copy.deepcopy(found["patched"]))
    return found, patched


Calls = dict[str, list[tuple[timing.Call, timing.Call]]]  # by part: ours and the model's own


@torch.no_grad()
def calls_of(model: Any, patched: mmkernels.Patched, inputs: Inputs) -> Calls:
    """What is replaced in one forward, by part, with its arguments."""
    calls: Calls = {}
    taken = [line.part for line in patched.lines if not line.why_not]
    methods = [
        (part, module, method, module.__dict__[method])
        for part, (module, method) in zip(taken, patched.replaced, strict=True)
        if part != "merge"  # a whole forward, of which one line is ours
    ]

    def recorded(part: str, ours: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            mine, original = (
                functools.partial(f, *args, **kwargs) for f in (ours, ours.__wrapped__)
            )
            calls.setdefault(part, []).append((mine, original))
            return ours(*args, **kwargs)

        return call

    for part, module, method, ours in methods:
        object.__setattr__(module, method, recorded(part, ours))
    loss_of(patched.model, inputs)
    for _, module, method, ours in methods:
        object.__setattr__(module, method, ours)
    if "merge" in taken:
        calls["merge"] = [
            (
                functools.partial(scatter_rows, *args),
                functools.partial(args[0].masked_scatter, *args[1:]),
            )
            for args in scattered(model, inputs)
        ]
    return calls


def scattered(model: Any, inputs: Inputs) -> list[tuple[torch.Tensor, ...]]:
    """Arguments of every ``masked_scatter`` of a forward."""
    found: list[tuple[torch.Tensor, ...]] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if getattr(func, "__name__", "") == "masked_scatter":
                found.append(args)
            return func(*args, **(kwargs or {}))

    with Watch():
        loss_of(model, inputs)
    return found


@torch.no_grad()
def parts_of(calls: Calls, rounds: int) -> dict[str, dict[str, float]]:
    """Each part's median times, ours and the model's own, and the median of their ratios within a round."""
    found = {}
    for part, pairs in calls.items():
        each: list[timing.Call] = [
            functools.partial(_all, [pair[i] for pair in pairs]) for i in (0, 1)
        ]
        times = timing.measure({"ours": each[0], "eager": each[1]}, "cpu", rounds)
        found[part] = {
            "ours_s": times["ours"].median, "eager_s": times["eager"].median,
            "speedup": timing.ratio(times["eager"], times["ours"]), "calls": len(pairs),
        }  # fmt: skip
    return found


def _all(calls: list[timing.Call]) -> None:
    for call in calls:
        call()


def measured(name: str, dtype: str, rounds: int, compiled: bool) -> dict[str, Any]:
    model, inputs = build(name)
    to = lambda v: v.to(DTYPES[dtype]) if torch.is_tensor(v) and v.is_floating_point() else v
    inputs = {k: to(v) for k, v in inputs.items()}
    models, patched = variants_of(model.to(DTYPES[dtype]), compiled)
    found: dict[str, Any] = {
        "model": name,
        "dtype": dtype,
        "rounds": rounds,
        "report": str(patched).splitlines(),
        "times_s": {},
    }
    losses = {n: step(m, inputs)[0].item() for n, m in models.items()}
    found["loss"] = losses
    if abs(losses["patched"] - losses["eager"]) > (1e-4 if dtype == "fp32" else 2e-2) * abs(
        losses["eager"]
    ):
        return {**found, "failure": f"losses differ: {losses}"}
    found["parts"] = parts_of(calls_of(model, patched, inputs), rounds)
    for direction, call in (("fwd", forward), ("step", step)):
        calls: dict[str, timing.Call] = {
            n: functools.partial(call, m, inputs) for n, m in models.items()
        }
        times = timing.measure(calls, "cpu", rounds)
        found["times_s"][direction] = {
            n: {"median": t.median, "p20": t.p20, "p80": t.p80} for n, t in times.items()
        }  # fmt: skip
        found.setdefault("speedup", {})[direction] = {
            n: timing.ratio(times["eager"], t) for n, t in times.items() if n != "eager"
        }  # fmt: skip
        found.setdefault("peak_bytes", {})[direction] = {
            n: timing.peak_extra_bytes(functools.partial(call, models[n], inputs), "cpu") for n in ("eager", "patched")
        }  # fmt: skip
    return found


def line(row: dict[str, Any]) -> str:
    if "failure" in row:
        return f"{row['model']:<20} {row['dtype']}  {row['failure']}"
    told = [
        f"{row['model']:<20} {row['dtype']} parts "
        + ", ".join(
            f"{part} {p['speedup']:.2f} of {1e3 * p['eager_s']:.1f} ms"
            for part, p in row["parts"].items()
        )
    ]
    for direction in ("fwd", "step"):
        each = ", ".join(f"{n} {s:.2f}" for n, s in row["speedup"][direction].items())
        peak = row["peak_bytes"][direction]
        eager = 1e3 * row["times_s"][direction]["eager"]["median"]
        told.append(
            f"{row['model']:<20} {row['dtype']} {direction:<5} eager {eager:7.1f} ms  × {each}  "
            f"peak {peak['patched'] / 1e6:.0f} MB (eager {peak['eager'] / 1e6:.0f})"
        )
    return "\n".join(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile of both (minutes)"
    )
    args = parser.parse_args()
    run = asdict(new_run({k: str(v) for k, v in vars(args).items()}, []))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for dtype in args.dtype or ["fp32", "bf16"]:
        for name in args.only:
            found.append(measured(name, dtype, args.rounds, args.compile))
            print(line(found[-1]), flush=True)
            args.out.write_text(json.dumps({**run, "models": found}, indent=1) + "\n")
    return int(any("failure" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
