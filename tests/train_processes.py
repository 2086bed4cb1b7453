# SPDX-License-Identifier: Apache-2.0
"""``torchrun --nproc-per-node N tests/train_processes.py YAML OUT [BATCH]``: a run by a file; BATCH: dies after it."""

import os
import sys
from pathlib import Path

import torch
from test_training import Sums

from mmkernels.train import distributed, run, torchrun, trainer

trainer.fast_bf16 = lambda: False  # what is compared are sums in another order, in fp32
torch.set_num_threads(1)


class Dies(Sums):
    """A stream that ends its process."""

    def __next__(self) -> list[run.Sample]:
        if self.at == int(sys.argv[3]):
            os._exit(9)
        return super().__next__()


torchrun.train(
    run.read_config(Path(sys.argv[1])), Path(sys.argv[2]), Dies if len(sys.argv) > 3 else Sums
)
distributed.leave()
