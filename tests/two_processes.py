# SPDX-License-Identifier: Apache-2.0
"""``torchrun --nproc-per-node N tests/two_processes.py OUT``: five steps over the same samples, dealt to N ranks."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_lora import _samples
from tiny_models import tiny_config

from mmkernels.models import MMLLM
from mmkernels.train import distributed, stages
from mmkernels.train.sample import AnswerLoss


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with distributed.process_group() as rank:
        torch.manual_seed(0)
        model = MMLLM(tiny_config(32, queries=3, qformer_layers=1, decoder_layers=2)).double()
        stages.learn_only(model, model.projectors, model.language_model)
        step = distributed.shard(AnswerLoss(model), recompute=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for _ in range(5):
            # the second rank has no image
            total, count = step(_samples()[rank :: dist.get_world_size()])
            loss = torch.div(*distributed.mean_over_all(total, count))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shared = loss.detach() / dist.get_world_size()
            dist.all_reduce(shared)
            losses.append(shared.item())
        distributed.save_sharded(out, model)
        before = distributed.whole_state(model)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0)
        distributed.load_sharded(out, model)
        after = distributed.whole_state(model)
        assert all(torch.equal(before[n], after[n]) for n in before)
        if rank == 0:
            (out / "losses.json").write_text(json.dumps(losses))


main(Path(sys.argv[1]))
distributed.leave()
