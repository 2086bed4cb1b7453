# SPDX-License-Identifier: Apache-2.0
"""When absorbing the K and V projections pays: the one rule behind ``algorithm="auto"``.

Per image and head, in multiply-adds: projecting costs ``2·n·d·X + 2·Q·n·d``; absorbing costs
``2·Q·d·X`` (q' and the output) ``+ 2·Q·n·X`` (scores and P·X), each charged more than projected work of equal size
(its GEMMs are smaller, and q' and P stay fp32 or hi + lo), and, whatever Q, a reading of the weights (``d·X``) and
of the context (``n·X``). The rule sees shapes, dtype, device and whether there will be a backward, never batch or
threads. Fitted to ``benchmarks/queries.py``.
"""

import torch

from mmkernels.backends import ENVIRONMENT

# (of a multiply-add, of a weight, of a value of the context). CPU: an AMX Xeon, 2026-11-26, whose 16-bit GEMMs in torch
# are about five times faster than fp32; fp32 a Zen3. GPU: not measured.
_CHARGES = {
    ("cpu", False, False): (1.2, 10, 5),
    ("cpu", False, True): (1.55, 10, 12),
    ("cpu", True, False): (6.6, 10, 30),
    ("cpu", True, True): (4.4, 5, 65),
}
# Forward in bf16 on AMX, where both algorithms multiply bf16 (2026-11-30); a context larger than a core's second cache
# comes from the third for every group of heads.
_HALVES = (2.2, 20, 25)
_HALVES_FAR = (2.2, 20, 60)
_SECOND_CACHE = 1 << 20  # values of bf16: 2 MB
_GPU = {False: (1.3, 0, 0), True: (4.5, 0, 0)}


def _slow_on_cpu() -> frozenset[torch.dtype]:
    """What torch multiplies without vectors here (bf16 without AVX-512, fp16 without AVX512-FP16): 200 times slower
    than in fp32, which our kernel multiplies in."""
    asks = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    known = {dtype: getattr(torch.ops.mkldnn, ask, None) for dtype, ask in asks.items()}
    return frozenset(dtype for dtype, supported in known.items() if supported and not supported())


SLOW_ON_CPU = _slow_on_cpu()
# Whether csrc/cross_attention/halves.h runs: by what the CPU and MMKERNELS_ISA say, as the kernel itself does.
HALVES = torch.cpu._is_amx_tile_supported() and ENVIRONMENT["MMKERNELS_ISA"] in ("", "amx_bf16")


def absorbs(
    Q: int, n: int, d: int, X: int, dtype: torch.dtype, device: str = "cpu", training: bool = False
) -> bool:
    """Whether the absorbed algorithm is expected to be the faster one; ``training``: with its backward."""
    if device == "cpu" and dtype in SLOW_ON_CPU:
        return True
    half = dtype in (torch.float16, torch.bfloat16)
    charges = _CHARGES.get((device, half, training), _GPU[half])
    if HALVES and device == "cpu" and dtype == torch.bfloat16 and not training:
        charges = _HALVES_FAR if n * X > _SECOND_CACHE else _HALVES
    work, of_weights, of_context = charges
    projected = 2 * n * d * X + 2 * Q * n * d
    absorbed = work * (2 * Q * d * X + 2 * Q * n * X) + of_weights * d * X + of_context * n * X
    return absorbed < projected
