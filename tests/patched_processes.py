# SPDX-License-Identifier: Apache-2.0
"""``torchrun --nproc-per-node N tests/patched_processes.py``: three steps of a Llava, sharded and patched if N > 1."""

import torch
import torch.distributed as dist
from packed_models import MODELS, samples
from test_packed_models import padded
from torch.distributed.fsdp import fully_shard

import mmkernels
from mmkernels.train import distributed


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = MODELS[0].build().double()
    if world > 1:
        handle = mmkernels.patch(model)
        assert handle.replaced
        for layer in list(model.modules()):  # their place differs by release
            if type(layer).__name__.endswith(("EncoderLayer", "DecoderLayer")):
                fully_shard(layer)
        fully_shard(model)
        late = MODELS[0].build().double()
        fully_shard(late)
        told = mmkernels.patch(late, projector=False, positions=False)
        assert any("DTensor" in line.why_not for line in told.lines), str(told)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    rows = [samples(MODELS[0])[i] for i in (1, 2, 1, 2)]
    for _ in range(3):
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows[rank::world]:
            batch = padded([row])
            batch["pixel_values"] = batch["pixel_values"].double()
            loss = loss + model(**batch).logits.square().mean() / len(rows) * world
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shared = loss.detach() / world
        dist.all_reduce(shared)
        losses.append(shared.item())
    if rank == 0:
        print("losses", *losses)
    dist.barrier()
    dist.destroy_process_group()


main()
distributed.leave()
