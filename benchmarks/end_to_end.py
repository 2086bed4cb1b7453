# SPDX-License-Identifier: Apache-2.0
"""The whole model: a training step packed against padded eager, and 16 questions on one image shared against not.

``python -m benchmarks.end_to_end OUT.json [--dtype fp32]``. Same weights on both sides (``eager_model.py``); the losses
are compared before anything is timed. A LLaVA-shaped model at a size a CPU turns around: ViT of 6 × 384, MLP, Llama
decoder of 6 × 512; images of 64 rows in training (224 px, 2×2 merge), of 576 for the questions (336 px). Encoder
frozen, projector and decoder learn, no optimizer step in the time.

The mix of samples: a quarter text alone, half one image, a quarter two to four; text around them log-normal, median 60
tokens, σ = 1, at most 500: most are short and a few long, as instruction data is. 16 samples a batch.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.eager_model import IMAGE, EagerMMLLM
from benchmarks.record import new_run
from mmkernels.models import MMLLM, DecoderConfig, Features, MMConfig, VisionConfig
from mmkernels.models.config import DropPrefixConfig, LinearConfig, MergeConfig
from mmkernels.serve import Engine
from mmkernels.testing import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH, SIDE, ROWS = 16, 224, 64  # samples; pixels; rows an image becomes
QUESTIONS, ASKED_SIDE, NEW = 16, 336, 16


def config(side: int, merge: bool) -> MMConfig:
    """LLaVA's shape: an image becomes (side/14)² rows, with a merge a quarter of them."""
    vision = VisionConfig(
        image_size=side, hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1536, offset_bias=False
    )  # fmt: skip
    merging = (MergeConfig(),) if merge else ()
    return MMConfig(
        encoders={"image": vision},
        projectors={
            "image": (DropPrefixConfig(), *merging, LinearConfig(512, act="gelu"), LinearConfig(512))
        },
        decoder=DecoderConfig(
            hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=2048,
        ),
    )  # fmt: skip


def draw_batch(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Ids with a placeholder an image, labels of the second half of each text, and the images."""
    rng, rows, labels, images = random.Random(seed), [], [], 0
    for _ in range(BATCH):
        media = rng.choice((0, 1, 1, rng.randint(2, 4)))
        words = min(500, max(8, round(math.exp(rng.gauss(math.log(60), 1)))))
        text = torch.tensor([rng.randrange(97, 123) for _ in range(words)])
        ids = torch.cat((torch.full((media,), IMAGE), text))
        label = ids.clone()
        label[: media + words // 2] = -100
        rows.append(ids)
        labels.append(label)
        images += media
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=g)
    return rows, labels, pixels


def expanded(row: torch.Tensor) -> torch.Tensor:
    """A placeholder for every row of an image."""
    return row.repeat_interleave(torch.where(row == IMAGE, ROWS, 1))


def packed_loss(
    model: MMLLM, rows: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], seen: Features
) -> torch.Tensor:
    """As ``mmkernels.train`` computes it."""
    features = {"image": model.project("image", seen)}
    plan = model.plan(rows, features, labels)
    assert plan.labels is not None
    said = (plan.labels != -100).nonzero().squeeze(1)
    logits = model.logits(model(plan, features)[said - 1])
    return F.cross_entropy(logits.float(), plan.labels[said])


def training(model: MMLLM, eager: EagerMMLLM, rounds: int) -> dict[str, Any]:
    """Samples a second of one step, both ways."""
    rows, labels, pixels = draw_batch(0)
    padded = [expanded(r) for r in rows]
    wanted = [
        F.pad(label, (len(p) - len(label), 0), value=-100)
        for p, label in zip(padded, labels, strict=True)
    ]
    learning = [p for part in (model.projectors, model.language_model) for p in part.parameters()]

    def ours() -> torch.Tensor:
        with torch.no_grad():
            seen = model.encode("image", list(pixels))
        return packed_loss(model, rows, labels, seen)

    def theirs() -> torch.Tensor:
        with torch.no_grad():
            embeds = eager.encode(pixels)
        return eager.loss(padded, wanted, eager.project(embeds))

    def step(loss: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(loss(), learning, allow_unused=True)

    losses = {"ours": ours().item(), "eager": theirs().item()}
    print(
        f"training: loss {losses['ours']:.6f} packed, {losses['eager']:.6f} padded eager",
        flush=True,
    )
    if abs(losses["ours"] - losses["eager"]) > 0.02 * losses["eager"]:
        raise SystemExit("the two models do not compute the same")
    lengths = [len(p) for p in padded]
    times = timing.measure(
        {"ours": lambda: step(ours), "eager": lambda: step(theirs)}, "cpu", rounds
    )
    return {
        "row": "packed training", "rows_packed": sum(lengths), "rows_padded": BATCH * max(lengths), "losses": losses,
        **_timed(times, BATCH, "samples"),
    }  # fmt: skip


def questions(model: MMLLM, eager: EagerMMLLM, rounds: int) -> dict[str, Any]:
    """16 questions of 20 tokens on one image of 576 rows, 16 tokens each."""
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, ASKED_SIDE, ASKED_SIDE), dtype=torch.uint8, generator=g)
    words = torch.randint(97, 123, (QUESTIONS, 20), generator=g)
    rows = (ASKED_SIDE // 14) ** 2

    def serve(share: bool) -> list[list[int]]:
        engine = Engine(model, num_pages=1024, chunk=1024, share=share)
        asked = [engine.submit(bytes(w.tolist()).decode(), [("image", image)], NEW) for w in words]
        engine.run()
        return [r.tokens for r in asked]

    def padded() -> list[list[int]]:
        prompts = [
            model.tokenizer.encode_prompt("<image>" + bytes(w.tolist()).decode()) for w in words
        ]
        ids = [p.repeat_interleave(torch.where(p == IMAGE, rows, 1)) for p in prompts]
        features = eager.features(image.expand(QUESTIONS, -1, -1, -1))
        return eager.generate(ids, features.flatten(0, 1), NEW)

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: serve(True), "not shared": lambda: serve(False), "eager": padded,
    }  # fmt: skip
    shared, alone, theirs = serve(True), serve(False), padded()
    if any(len(tokens) != NEW for tokens in (*shared, *alone, *theirs)):
        raise SystemExit("an answer ended early: not the same work")
    same, as_eager = (
        sum(a == b for a, b in zip(shared, other, strict=True)) for other in (alone, theirs)
    )
    print(
        f"questions: of {QUESTIONS} answers {same} equal without sharing, {as_eager} eager's",
        flush=True,
    )
    times = timing.measure(variants, "cpu", rounds)
    return {
        "row": "16 questions on one image",
        "equal_answers": same,
        "equal_to_eager": as_eager,
        **_timed(times, QUESTIONS, "questions"),
    }


def _timed(times: dict[str, timing.Timing], n: int, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"median": t.median, "p20": t.p20, "p80": t.p80, f"{what}_per_s": n / t.median}
        for name, t in times.items()
    }
    found["speedup"] = {
        name: timing.ratio(t, times["ours"]) for name, t in times.items() if name != "ours"
    }
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, help="one alone")
    args = parser.parse_args(argv)
    found = []
    for dtype in [args.dtype] if args.dtype else DTYPES:
        for measure, side in ((training, SIDE), (questions, ASKED_SIDE)):
            torch.manual_seed(0)
            model = MMLLM(config(side, merge=side == SIDE)).to(DTYPES[dtype])
            eager = EagerMMLLM(model)
            row = {"dtype": dtype, **measure(model, eager, args.rounds)}
            found.append(row)
            print(json.dumps(row), flush=True)
    run = asdict(new_run({"rounds": args.rounds}, [])) | {"rows": found}
    args.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
