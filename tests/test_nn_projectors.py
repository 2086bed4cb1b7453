# SPDX-License-Identifier: Apache-2.0
"""Projector modules against plain PyTorch transcriptions of their published math, and what folding must keep."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmkernels
from mmkernels import Norm
from mmkernels.nn import AttentionPool, MLPProjector, PatchMerger, PerceiverResampler, Resampler
from mmkernels.nn.resampler import sincos_tables
from mmkernels.ops.cross_attention import cost

Tensors = dict[str, torch.Tensor]


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).eval()


def gradients(out: torch.Tensor, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    wanted = [p for n, p in module.named_parameters()]
    return list(torch.autograd.grad(out, [*inputs, *wanted], torch.randn(out.shape).to(out)))


def mae_positions(width: int, h: int, w: int) -> torch.Tensor:
    """``get_2d_sincos_pos_embed`` of facebookresearch/mae, ``util/pos_embed.py``: [h·w, width], x in the first half.

    MiniCPM-V's ``resampler.py`` and Qwen-VL's ``visual.py`` copy it.
    """

    def one(half: int, at: torch.Tensor) -> torch.Tensor:
        omega = 1.0 / 10000 ** (torch.arange(half // 2).double() / (half / 2))
        angle = at.flatten().double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.cat([one(width // 2, x), one(width // 2, y)], 1)


def test_two_small_tables_are_the_positions_of_a_grid() -> None:
    rows, columns = sincos_tables(24, 5, 7)
    together = (rows[:, None] + columns[None]).flatten(0, 1)
    torch.testing.assert_close(together, mae_positions(24, 5, 7).float(), rtol=0, atol=1e-6)


def plain_resampler(module: Resampler, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """``Resampler.forward`` as published, with nn.MultiheadAttention.

    MiniCPM-V: ``resampler.py`` of openbmb/MiniCPM-V-2_6, whose ``forward`` cuts ``pos_embed[:h, :w]`` from the table of
    the largest grid, which is to say whole places. Qwen-VL: ``visual.py`` of Qwen/Qwen-VL, whose ``get_abs_pos``
    resizes the table of the queries in fp32, bicubic, ``align_corners=False``; ``forward`` adds the table itself to the
    queries. Both tables are fp32 in the checkpoint's code and take its dtype.
    """
    x = module.ln_kv(module.kv_proj(x)).transpose(0, 1)
    q = module.ln_q(module.query)
    if module.query_grid:
        side, D = math.isqrt(len(q)), q.shape[1]
        table = mae_positions(D, side, side).float().to(x)
        q, picture = q + table, table.float().view(1, side, side, D).permute(0, 3, 1, 2)
        picture = F.interpolate(picture, size=(h, w), mode="bicubic", align_corners=False)
        position = picture.permute(0, 2, 3, 1).flatten(0, 2).to(x)
    else:
        position = mae_positions(q.shape[1], h, w).float().to(x)
    keys = x + position[:, None]
    out = module.attn(q[:, None].expand(-1, x.shape[1], -1), keys, x, need_weights=False)[0]
    out = out.transpose(0, 1)
    return module.ln_post(out) @ module.proj if module.post else out


@pytest.mark.parametrize("grid", [(3, 3), (3, 5), (8, 8)])
@pytest.mark.parametrize("qwen", [False, True], ids=["minicpm_v", "qwen_vl"])
@pytest.mark.parametrize("kv_dim", [20, 48])
def test_resampler(qwen: bool, kv_dim: int, grid: tuple[int, int]) -> None:
    module = randomised(Resampler(9, 48, 4, kv_dim, query_grid=qwen, post=not qwen))
    n = grid[0] * grid[1]
    x = torch.randn(3, n, kv_dim, dtype=torch.float64, requires_grad=True)
    expected, got = plain_resampler(module, x, *grid), module(x, grid)
    # A table is resized in fp32, as published; theirs in two dimensions at once rounds otherwise than ours by sides.
    within = 1e-6 if qwen and grid != (3, 3) else 1e-7
    torch.testing.assert_close(got, expected, rtol=within, atol=within)
    for a, b in zip(gradients(got, module, x), gradients(expected, module, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())
    with torch.no_grad():
        mask = torch.arange(n) < torch.tensor([n, n - 2, 4])[:, None]
        unfolded = [module(x, grid, m) for m in (None, mask)]
        module.fold()
        for m, value in zip((None, mask), unfolded, strict=True):
            torch.testing.assert_close(module(x, grid, m), value, rtol=1e-12, atol=1e-12)


def test_qwen_vl_at_its_own_size() -> None:
    """256 queries are a square of 16, a picture of 448 pixels is one of 32: in fp32 and in bf16."""
    for dtype, within in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        module = randomised(Resampler(256, 64, 2, 40, query_grid=True, post=False), dtype)
        x = torch.randn(1, 1024, 40).to(dtype)
        with torch.no_grad():
            expected, got = plain_resampler(module, x, 32, 32), module(x, (32, 32))
        torch.testing.assert_close(got, expected, rtol=within, atol=within * 2)


def test_a_square_of_queries_is_asked_for() -> None:
    with pytest.raises(ValueError, match="num_queries must be a square with query_grid, got 8"):
        Resampler(8, 16, 2, 16, query_grid=True)


def test_folded_in_16_bits_is_as_near_as_unfolded() -> None:
    module = randomised(Resampler(16, 64, 4, 40), torch.bfloat16)
    x = torch.randn(4, 24, 40).bfloat16()
    with torch.no_grad():
        wide = Resampler(16, 64, 4, 40).double().eval()
        wide.load_state_dict(module.state_dict())
        truth = plain_resampler(wide, x.double(), 4, 6)
        eager = (plain_resampler(module, x, 4, 6).double() - truth).abs()
        folded = (module.fold()(x, (4, 6)).double() - truth).abs()
    assert (
        folded.max() <= 1.5 * eager.max()
        and folded.square().mean() <= 1.1**2 * eager.square().mean()
    )


def test_training_unfolds_and_folding_leaves_the_state_alone() -> None:
    module = randomised(Resampler(4, 16, 2, 12))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    module.fold()
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    changed = {n: 2 * t for n, t in before.items()}
    module.load_state_dict(changed)
    with torch.no_grad():
        torch.testing.assert_close(module(x, (2, 3)), plain_resampler(module, x, 2, 3))
    assert module.fold().float()(x.float(), (2, 3)).dtype == torch.float32
    module.double().fold().train()
    out = module(torch.randn(1, 6, 12, dtype=torch.float64), (2, 3))
    assert out.requires_grad


def flamingo(weights: Tensors, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """``PerceiverAttention.forward`` of mlfoundations/open_flamingo, ``src/helpers.py`` (after lucidrains).

    Each source has its LayerNorm, keys and values come of both together by one ``to_kv``.
    """
    media = F.layer_norm(x, x.shape[-1:], weights["media_w"], weights["media_b"])
    normed = F.layer_norm(latents, latents.shape[-1:], weights["latents_w"], weights["latents_b"])
    q = normed @ weights["q"].T
    k, v = (torch.cat([media, normed], 1) @ weights["kv"].T).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    out = (scores - scores.amax(-1, keepdim=True).detach()).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2) @ weights["out"].T


@pytest.mark.parametrize("algorithm", ["projected", "absorbed"])
def test_flamingo(algorithm: str) -> None:
    torch.manual_seed(0)
    make = lambda *s: torch.randn(*s, dtype=torch.float64, requires_grad=True)
    shapes = {"media_w": (24,), "media_b": (24,), "latents_w": (24,), "latents_b": (24,), "q": (32, 24),
              "kv": (64, 24), "out": (24, 32)}  # fmt: skip
    weights = {n: make(*s) for n, s in shapes.items()}
    x, latents = make(2, 11, 24), make(2, 5, 24)
    expected = flamingo(weights, x, latents)
    normed = F.layer_norm(latents, (24,), weights["latents_w"], weights["latents_b"])
    out = mmkernels.cross_attention(
        normed @ weights["q"].T, x, *weights["kv"].chunk(2), num_heads=4, latents=normed, algorithm=algorithm,
        context_norm=Norm("layer", weights["media_w"], weights["media_b"], 1e-5),
    ) @ weights["out"].T  # fmt: skip
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    grad, leaves = torch.randn_like(out), [x, latents, *weights.values()]
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad) for o in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_dropout_keeps_the_mean_and_its_gradient() -> None:
    torch.manual_seed(0)
    q, x, w = torch.randn(2, 3, 8), torch.randn(2, 6, 10), torch.randn(2, 8, 10)
    for algorithm in ("projected", "absorbed"):
        run = lambda p, a=algorithm: mmkernels.cross_attention(
            q, x, *w, num_heads=2, dropout_p=p, algorithm=a
        )
        draws = torch.stack([run(0.3) for _ in range(2000)])
        assert ((draws.mean(0) - run(0.0)).abs() < 6 * draws.std(0) / 2000**0.5).all()
        assert not torch.equal(run(0.3), run(0.3))


def test_dropout_of_the_absorbed_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    make = lambda *s: torch.randn(*s, dtype=torch.float64)
    keep = torch.rand(2, 2, 3, 6) > 0.4
    tensors = [make(2, 3, 8), make(2, 6, 10), make(8, 10), make(8, 10), make(8)]

    def op(
        q: torch.Tensor, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        arguments = (q, x, None, k, v, None, b, None, keep, None, 0, 2, 0.5, 0.4)
        return torch.ops.mmkernels.cross_attention(*arguments)[0]

    def plain(
        q: torch.Tensor, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        heads = lambda t: t.unflatten(-1, (2, -1)).transpose(1, 2)
        p = (heads(q) @ heads(x @ k.T).transpose(-1, -2) * 0.5).softmax(-1) * keep / 0.6
        return (p @ heads(x @ v.T + b)).transpose(1, 2).flatten(2)

    leaves = [t.requires_grad_() for t in tensors]
    expected, got = plain(*leaves), op(*leaves)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    grad = make(*got.shape)
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad) for o in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_flops_are_counted_and_few() -> None:
    """One query of SigLIP's head: 69 times fewer than projecting (performance.md B.3)."""
    counts = {}
    for algorithm in ("projected", "absorbed"):
        q, x = (
            torch.randn(1, 1152, requires_grad=True),
            torch.randn(2, 729, 1152, requires_grad=True),
        )
        w = torch.randn(2, 1152, 1152, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            out = mmkernels.cross_attention(q, x, *w, num_heads=16, algorithm=algorithm)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        counts[algorithm] = forward, counter.get_total_flops()
    through, scores = 2 * 1152 * 1152, 2 * 2 * 16 * 729 * 1152
    assert counts["absorbed"] == (3 * through + 2 * scores, 8 * through + 6 * scores)
    assert counts["projected"][0] > 60 * counts["absorbed"][0]


def test_no_width_and_no_rows() -> None:
    assert mmkernels.patch_merge(torch.zeros(1, 2, 2, 0)).shape == (1, 1, 0)
    assert mmkernels.patch_merge(torch.zeros(0, 2, 2, 3), norm=Norm("rms")).shape == (0, 1, 12)


def test_packed_context_equals_each_sample_alone() -> None:
    torch.manual_seed(0)
    lengths, q = (4, 9, 1), torch.randn(3, 2, 8, dtype=torch.float64)
    context = torch.randn(14, 6, dtype=torch.float64)
    w = torch.randn(2, 8, 6, dtype=torch.float64)
    offsets = torch.tensor([0, 4, 13, 14])
    packed = mmkernels.cross_attention(q, context, *w, num_heads=2, cu_seqlens=offsets)
    for i, piece in enumerate(context.split(lengths)):
        alone = mmkernels.cross_attention(q[i : i + 1], piece[None], *w, num_heads=2)
        torch.testing.assert_close(packed[i : i + 1], alone)


@pytest.mark.skipif(not cost.HALVES, reason="the CPU has no AMX")
@pytest.mark.parametrize("case", ["perceiver", "packed", "many_samples", "long", "one_of_each"])
def test_halves_give_a_sample_the_same_bits_alone(case: str) -> None:
    """In bf16 on AMX: whatever group of heads and however many samples a row is computed with."""
    B, Q, n, X, A, d = {
        "perceiver": (9, 24, 37, 48, 4, 12), "packed": (3, 2, 9, 64, 4, 32), "many_samples": (40, 3, 15, 64, 4, 16),
        "long": (2, 5, 729, 96, 3, 24), "one_of_each": (2, 1, 1, 1, 1, 1),
    }[case]  # fmt: skip
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g).bfloat16()
    query, context, latents = (
        new(B, Q, A * d),
        new(B, n, X),
        new(B, 2, X) if case == "perceiver" else None,
    )
    w_k, w_v = new(A * d, X), new(A * d, X)
    run = functools.partial(mmkernels.cross_attention, num_heads=A, algorithm="absorbed")
    whole = run(query, context, w_k, w_v, latents=latents)
    for b in range(B):
        more = None if latents is None else latents[b : b + 1]
        alone = run(query[b : b + 1], context[b : b + 1], w_k, w_v, latents=more)
        assert torch.equal(alone[0], whole[b]), b


@pytest.mark.skipif(not cost.HALVES, reason="the CPU has no AMX")
def test_halves_are_what_runs() -> None:
    """Sums of scores are near those of the fp32 kernel, which a lesser instruction set takes, and have other bits."""
    code = (
        "import torch, mmkernels; g = torch.Generator().manual_seed(0)\n"
        "new = lambda *s: torch.randn(s, generator=g).bfloat16()\n"
        "x = (new(4, 8, 192), new(4, 57, 640), None, new(192, 640), new(192, 640), *[None] * 5, 0, 3, 0.01, 0.0)\n"
        "print(torch.ops.mmkernels.cross_attention(*x)[1].flatten().tolist())"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "MMKERNELS_ISA": isa},
                       capture_output=True, text=True, check=True).stdout
        for isa in ("amx_bf16", "avx512")
    ]  # fmt: skip
    ours, fp32 = (torch.tensor(json.loads(text)) for text in said)
    assert not torch.equal(ours, fp32)
    torch.testing.assert_close(ours, fp32, rtol=2e-5, atol=2e-5)


def test_modules_run_under_autocast_and_compile() -> None:
    x = torch.randn(2, 12, 16)
    modules = [
        (AttentionPool(16, 2, 24), (x,)), (PerceiverResampler(16, num_latents=3, num_layers=1, num_heads=2,
         num_key_value_heads=1, head_dim=8), (x,)), (Resampler(4, 16, 2, 16), (x, (3, 4))),
        (MLPProjector(16, 20), (x,)), (PatchMerger(20, 16), (x.flatten(0, 1),)),
        (PatchMerger(20, 16, blocks=False, norm="rms", norm_after=True), (x.view(2, 2, 6, 16),)),
    ]  # fmt: skip
    for module, inputs in modules:
        expected = module(*inputs)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)
        torch.testing.assert_close(compiled, expected)
        with torch.autocast("cpu", torch.bfloat16):
            low = module(*inputs)
        assert low.dtype == torch.bfloat16 or type(module) is PerceiverResampler
        torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "offsets",
    [[0, 9, 12], [0, 4, 5], [1, 4, 6], [0, 5, 4, 6], [0, 6, 6], []],
    ids=["past", "short", "late", "falling", "longer", "none"],
)
def test_the_op_itself_refuses_offsets_that_would_leave_its_context(offsets: list[int]) -> None:
    """``max_seqlen`` is 5, the context has 6 tokens: what the public call checks, the kernel checks again."""
    B = max(len(offsets) - 1, 0)
    call = (
        torch.zeros(B, 2, 8), torch.zeros(6, 10), None, torch.zeros(8, 10), torch.zeros(8, 10), None, None, None, None,
        torch.tensor(offsets, dtype=torch.int64), 5, 2, 0.5, 0.0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="cross_attention: cu_seqlens must"):
        torch.ops.mmkernels.cross_attention(*call)
