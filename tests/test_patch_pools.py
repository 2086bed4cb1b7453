# SPDX-License-Identifier: Apache-2.0
"""Attention pools of open_clip and timm patched and not, in fp64, in every form the packages write them."""

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels.hf import pools

ADAPTERS = str(Path(__file__).parents[1] / "examples" / "adapters")


def adapter(name: str) -> Any:
    """An example's module, whose imports are beside it."""
    sys.path.insert(0, ADAPTERS)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(ADAPTERS)


op = mmkernels.cross_attention
clip, timm = adapter("open_clip_vit"), adapter("timm_layers")


class Tower(nn.Module):
    """The name of the place is what tells a pooler's attention from a block's."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.attn_pool = clip.AttentionalPooler(**sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn_pool(x)


def older(**changes: Any) -> nn.Module:
    pooler = clip.AttentionalPooler(24, 32, 4, 6, old=True)
    pooler.attn = nn.MultiheadAttention(24, 4, kdim=32, vdim=32, batch_first=True, **changes)
    return pooler


class LengthFirst(clip.AttentionalPooler):  # type: ignore[misc]
    """open_clip before 2.24 (``src/open_clip/transformer.py``): the attention has the batch second."""

    def __init__(self) -> None:
        super().__init__(32, 32, 4, 6, old=True)
        self.attn = nn.MultiheadAttention(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.ln_k(x).permute(1, 0, 2)
        q = self.ln_q(self.query).unsqueeze(1).expand(-1, x.shape[1], -1)
        return self.attn(q, x, x, need_weights=False)[0].permute(1, 0, 2)


POOLS = {
    "open_clip": lambda: Tower(d_model=24, context_dim=32, n_head=4, n_queries=6),
    "open_clip_older": older,
    "open_clip_no_bias": lambda: older(bias=False),
    "open_clip_length_first": LengthFirst,
    "timm": lambda: timm.AttentionPoolLatent(32, 4, norm_layer=nn.LayerNorm),
    "timm_qk_norm": lambda: timm.AttentionPoolLatent(32, 4, qk_norm=True),
    "timm_average": lambda: timm.AttentionPoolLatent(32, 4, latent_len=3, pool_type="avg"),
    "timm_all_latents": lambda: timm.AttentionPoolLatent(32, 4, latent_len=3, pool_type=""),
    "timm_positions": lambda: timm.AttentionPoolLatent(32, 4, feat_size=7),
}


def ran(model: nn.Module, *inputs: Any) -> dict[str, torch.Tensor]:
    """Output and all gradients."""
    out = model(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    model.zero_grad()
    (out * weights).sum().backward()
    return {
        "out": out.detach(),
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


def tokens(B: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, 7, 32, generator=g, dtype=torch.float64)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name] - t).abs().max() <= 1e-9 * t.abs().max().clamp(min=1e-3), name


@pytest.mark.parametrize("name", POOLS)
def test_patched_equals_unpatched(name: str, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = POOLS[name]().double()
    patched = copy.deepcopy(model)
    report = mmkernels.patch(patched, strict=True)
    assert [line.op for line in report.lines] == ["cross_attention"], str(report)
    theirs = ran(model, tokens())
    calls = []
    for module in (pools, mmkernels):
        monkeypatch.setattr(
            module, "cross_attention", lambda *a, **k: calls.append(1) or op(*a, **k)
        )
    same(ran(patched, tokens()), theirs)
    assert len(calls) == 1
    same(ran(patched, tokens(1)), ran(model, tokens(1)))
    assert patched(tokens(0)).shape == model(tokens(0)).shape


def test_a_mask_reaches_the_op() -> None:
    torch.manual_seed(0)
    model = timm.AttentionPoolLatent(32, 4).double()
    patched = copy.deepcopy(model)
    mmkernels.patch(patched)
    allowed = torch.arange(7) < torch.tensor([[4], [6]])
    for mask in (allowed[:, None, None], torch.randn(2, 4, 1, 7).double(), allowed[:1]):
        same(ran(patched, tokens(), mask), ran(model, tokens(), mask))
    x = tokens()
    x[0, 4:] += 100  # not attended
    with torch.no_grad():
        out = patched(x, allowed[:, None, None])
    assert (out - model(tokens(), allowed[:, None, None])).abs().max() <= 1e-9


def test_self_attention_and_two_contexts_go_to_the_module() -> None:
    torch.manual_seed(0)
    model = Tower(d_model=32, context_dim=32, n_head=4, n_queries=6).double()
    patched = copy.deepcopy(model)
    mmkernels.patch(patched)
    ours, theirs = patched.attn_pool.attn, model.attn_pool.attn
    x, y = tokens(), tokens().flip(1)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours(x, y, x), theirs(x, y, x))
    assert not torch.equal(theirs(x, y, y), theirs(x, y, x))
    assert (ours(x, y, y) - theirs(x, y, y)).abs().max() <= 1e-12


def test_what_is_left_alone() -> None:
    with pytest.raises(mmkernels.NothingToPatch, match="keys of its own"):
        mmkernels.patch(older(add_bias_kv=True))
    model = Tower(d_model=24, context_dim=32)
    model.attn_pool.attn.ln_k = nn.LayerNorm(3)
    with pytest.raises(mmkernels.NothingToPatch, match="norms or scales its heads"):
        mmkernels.patch(model)

    class Doubled(timm.AttentionPoolLatent):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, attn_mask: Any = None) -> torch.Tensor:
            return 2 * super().forward(x, attn_mask)

    with pytest.raises(mmkernels.NothingToPatch, match="a trial call differs"):
        mmkernels.patch(Doubled(32, 4))


def test_adapters_on_a_pool_count() -> None:
    """LoRA around ``kv``, after the patch: the layer must be called."""
    peft = pytest.importorskip("peft")
    model = timm.AttentionPoolLatent(32, 4).double()
    patched = mmkernels.patch(model)
    before = model(tokens())
    config = peft.LoraConfig(r=2, target_modules=["kv", "proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double()
    ours = ran(adapted, tokens())
    patched.remove()
    same(ours, ran(adapted, tokens()))
    assert (ours["out"] - before).abs().max() > 1e-3
    assert all(ours[n].abs().max() > 0 for n in ours if "lora" in n)
