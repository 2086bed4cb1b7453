# SPDX-License-Identifier: Apache-2.0
"""What the two fine-tuning examples share: some steps with and without ``mmkernels.patch``, and what they cost."""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import mmkernels

Batch = dict[str, torch.Tensor]


def arguments(about: str) -> argparse.Namespace:
    """``--model FOLDER`` takes a checkpoint on disk; without it a tiny random model."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--model", metavar="FOLDER", help="a checkpoint folder (default: tiny, random)"
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


def load(folder: str | None, tiny: Callable[[], Any], dtype: str) -> Any:
    """The checkpoint, or the tiny model; ready to be trained."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    model = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=kind)
        if folder
        else tiny().to(kind)
    )
    return model.train()


def train(model: Any, batches: list[Batch]) -> tuple[list[float], list[float], int]:
    """Losses, seconds of each step, and the most bytes torch held in one step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)

    def step(batch: Batch) -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        losses.append(step(batch))
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step(batches[0])
    held, most = 0, 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return losses, seconds, most


def compare(model: Any, batches: list[Batch]) -> None:
    """The same steps from the same weights, first as the model is, then patched; prints a table."""
    patched = copy.deepcopy(model)
    mmkernels.patch(patched).report()
    found = {"as it is": train(model, batches), "patched": train(patched, batches)}
    print(f"\n{'':<10}{'step ms':>10}{'peak MB':>10}{'first loss':>12}{'last loss':>12}")
    for name, (losses, seconds, most) in found.items():
        ms = 1e3 * statistics.median(seconds)
        print(f"{name:<10}{ms:>10.1f}{most / 1e6:>10.1f}{losses[0]:>12.5f}{losses[-1]:>12.5f}")
    pairs = zip(found["as it is"][0], found["patched"][0], strict=True)
    print(f"largest difference of a loss: {max(abs(a - b) / a for a, b in pairs):.2g} of it")
