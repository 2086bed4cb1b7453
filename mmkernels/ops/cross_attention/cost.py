# SPDX-License-Identifier: Apache-2.0
"""When absorbing the K and V projections pays: the one rule behind ``algorithm="auto"``.

Per image and head, in multiply-adds: projecting costs ``2·n·d·X + 2·Q·n·d``; absorbing costs
``2·Q·d·X`` (q' and the output) ``+ 2·Q·n·X`` (scores and P·X). The rule sees shapes and dtype only, never
batch or threads, so a model's numbers do not depend on how it is run.
"""

import torch

# Absorbed work is charged this much more than projected work of equal size: its GEMMs are smaller, and
# in 16-bit dtypes q' and P·X stay fp32 (CPU) or hi+lo (GPU). Measured by benchmarks/run.py.
_CHARGE = {torch.float32: 1.3, torch.float64: 1.3, torch.bfloat16: 4.5, torch.float16: 4.5}


def absorbs(Q: int, n: int, d: int, X: int, dtype: torch.dtype) -> bool:
    """Whether the absorbed algorithm is expected to be the faster one."""
    projected = 2 * n * d * X + 2 * Q * n * d
    absorbed = 2 * Q * d * X + 2 * Q * n * X
    return absorbed * _CHARGE[dtype] < projected
