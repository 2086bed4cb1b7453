# SPDX-License-Identifier: Apache-2.0
"""``mmkernels info``: versions, build, load errors, and which kernel each op takes on each device."""

import argparse
import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from mmkernels import OPS, __version__, backends


def collect() -> dict[str, Any]:
    """Everything a bug report needs, as plain data."""
    return {
        "versions": {
            "mmkernels": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "transformers", "safetensors")},
        },
        "machine": {
            "platform": platform.platform(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "build": backends.build_info(),
        "native_library": {
            "path": str(backends.NATIVE_PATH),
            "loaded": not backends.native_error(),
            "error": backends.native_error(),
        },
        "environment": {k: v for k, v in os.environ.items() if k.startswith("MMKERNELS_")},
        "kernels": {op: {d: _kernel(op, d) for d in ("cpu", "cuda")} for op in OPS},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernel(op: str, device: str) -> dict[str, str]:
    both = {}
    for direction, name in (("forward", op), ("backward", f"{op}_backward")):
        if not hasattr(torch.ops.mmkernels, name):
            both[direction] = "none: inference only"
            continue
        kernel, why = backends.chosen_kernel(name, device)
        both[direction] = f"{kernel} ({why})" if why else kernel
    return both


def main(args: argparse.Namespace) -> int:
    """Prints ``collect()``; ends with a verdict and, where something is missing, what to do."""
    found = collect()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for section in ("versions", "machine", "build", "native_library", "environment"):
        print(f"{section}:")
        for key, value in found[section].items():
            print(f"  {key}: {value}")
    print("kernels:")
    for op, devices in found["kernels"].items():
        for device, both in devices.items():
            print(f"  {op:17} {device:5} forward: {both['forward']}; backward: {both['backward']}")
    print(verdict())
    return 0


def verdict() -> str:
    """One sentence: are the kernels in, and if not, what to do."""
    if not backends.native_error():
        gpu = "" if torch.cuda.is_available() else " No GPU is visible to torch."
        return f"The native kernels are in.{gpu} `mmkernels doctor` checks them on this machine."
    return f"The native kernels are NOT in: {backends.native_error()}. {backends.REMEDY}"
