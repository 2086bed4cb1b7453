# SPDX-License-Identifier: Apache-2.0
"""``torchrun --nproc-per-node 2 tests/dtensor_processes.py``: ops on DTensors give what they give on tensors."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import implicit_replication

import mmkernels
from mmkernels.train import sharding


def check(ours: DTensor, theirs: torch.Tensor, placement: object) -> None:
    assert ours.placements == (placement,), (ours.placements, placement)
    torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-9, atol=1e-12)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    sharding.register()
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    everywhere = lambda t: distribute_tensor(t, mesh, [Replicate()])
    split = lambda t, dim=0: distribute_tensor(t, mesh, [Shard(dim)])

    plain = [new(4, 3, 8), new(4, 5, 6), new(8, 6), new(8, 6), new(8), new(8)]
    lie = [split, split, *[everywhere] * 4]
    outs, grads = [], []
    for tensors in (plain, [put(t) for put, t in zip(lie, plain, strict=True)]):
        tensors = [t.detach().requires_grad_() for t in tensors]
        q, x, w_k, w_v, b_k, b_v = tensors
        out = mmkernels.cross_attention(q, x, w_k, w_v, b_k, b_v, num_heads=2, algorithm="absorbed")
        outs.append(out)
        grads.append(torch.autograd.grad(out.square().sum(), tensors))
    check(outs[1], outs[0], Shard(0))
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, rtol=1e-9, atol=1e-12)

    features = new(2, 4, 4, 3)
    with implicit_replication():
        merged = mmkernels.patch_merge(everywhere(features), 2)
    check(merged, mmkernels.patch_merge(features, 2), Replicate())
    ids, weight = torch.tensor([[1, 7, 2], [7, 0, 3]]), new(8, 4)
    rows = new(2, 4)
    merged = mmkernels.merge_embeddings(
        everywhere(ids), everywhere(weight), [everywhere(rows)], feature_token_ids=[7]
    )
    check(
        merged, mmkernels.merge_embeddings(ids, weight, [rows], feature_token_ids=[7]), Replicate()
    )
    dist.barrier()
    dist.destroy_process_group()


main()
