# SPDX-License-Identifier: Apache-2.0
"""The resampler of MiniCPM-V and Qwen-VL: constant queries read projected, normed, positioned features."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels.nn.attention_pool import multihead_attention
from mmkernels.ops.cross_attention.absorbed import position_scores


def sincos_tables(
    width: int, rows: int, columns: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[rows, width]`` and ``[columns, width]``: the position of (y, x) is the sum of row y and column x.

    The first half of the width encodes x, the second y (MAE's ``get_2d_sincos_pos_embed``).
    """
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def half(n: int) -> torch.Tensor:
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    of_y, of_x = half(rows), half(columns)
    return F.pad(of_y, (width // 2, 0)).float(), F.pad(of_x, (0, width // 2)).float()


@dataclass(frozen=True)
class Folded:
    """The layer as one attention over raw features: see ``Resampler.fold``."""

    query: torch.Tensor  # [Q, D]
    key_weight: torch.Tensor  # [D, X]
    value_weight: torch.Tensor  # [D, X]
    value_bias: torch.Tensor  # [D]
    spread: torch.Tensor  # [X, X]: |spread · x|² / D is the variance of the projected x


class Resampler(nn.Module):
    """``proj(ln_post(attention(ln_q(query) [+ pos], ln_kv(kv_proj(x)) + pos, ln_kv(kv_proj(x)))))``.

    Submodules and parameters are named as in MiniCPM-V's ``Resampler`` (and Qwen-VL's, which has no ``ln_post`` and
    ``proj``: ``post=False``, and adds positions to its queries: ``query_grid``).

    Args:
        num_queries: Q.
        embed_dim: D, width of the language model; num_heads divides it.
        kv_dim: X, width of the features; no ``kv_proj`` if it is D.
        query_grid: Positions of a square grid are added to the queries (Qwen-VL).
        post: ``ln_post`` and ``proj`` follow.
        eps: Of every LayerNorm.
    Source: MiniCPM-V (Yao et al. 2024), Qwen-VL (Bai et al. 2023).
    """

    def __init__(
        self,
        num_queries: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int,
        *,
        query_grid: bool = False,
        post: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_queries, embed_dim) * 0.02)
        self.kv_proj = (
            nn.Identity() if kv_dim == embed_dim else nn.Linear(kv_dim, embed_dim, bias=False)
        )
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q, self.ln_kv = nn.LayerNorm(embed_dim, eps), nn.LayerNorm(embed_dim, eps)
        self.query_grid, self.post = query_grid, post
        if post:
            self.ln_post = nn.LayerNorm(embed_dim, eps)
            self.proj = nn.Parameter(torch.randn(embed_dim, embed_dim) * embed_dim**-0.5)
        self._folded: Folded | None = None

    def forward(
        self,
        features: torch.Tensor,
        grid: tuple[int, int],
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[B, h·w, X]`` of images of the same grid (h, w) → ``[B, Q, D]``; the mask is ``[B, n]``, non-zero =
        attend."""
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        rows, columns = sincos_tables(self.query.shape[1], *grid, features.device)
        position = (rows.to(features.dtype), columns.to(features.dtype))
        if self._folded is not None:
            out = self.attn.out_proj(self._attend_folded(self._folded, features, position, mask))
        else:
            x = self.ln_kv(self.kv_proj(features))
            # Projected: the position joins K after its projection, which is linear.
            out = multihead_attention(
                self.attn,
                self._queries(),
                x,
                mask=mask,
                key_position=position,
                algorithm="projected",
            )
        if self.post:
            out = self.ln_post(out) @ self.proj
        result: torch.Tensor = out
        return result

    def _queries(self) -> torch.Tensor:
        q: torch.Tensor = self.ln_q(self.query)
        if self.query_grid:
            side = round(len(q) ** 0.5)
            rows, columns = sincos_tables(q.shape[1], side, side, q.device)
            q = q + (rows[:, None] + columns[None]).flatten(0, 1).to(q.dtype)
        return q

    @torch.no_grad()
    def fold(self) -> "Resampler":
        """For inference: constant queries are projected once, and ``kv_proj`` and ``ln_kv`` go into K and V.

        ``LN(W x)`` is ``γ (W_c x) r + β`` with W_c the centred W and r = 1/√(|W_c x|²/D + eps); |W_c x| = |R x| with
        W_c = Q R. So with ``y = r x`` the layer is an attention over y: ``K = W_k γ W_c``, ``V = W_v γ W_c``, bias
        ``b_v + W_v β``, and positions add to the scores. ``unfold`` takes it back, and so do ``train()``, loading a
        state and moving or casting the module, after which the folded weights would not be its own.
        """
        wide = torch.float64
        w_q, w_k, w_v = self.attn.in_proj_weight.to(wide).chunk(3)
        b_q, _, b_v = self.attn.in_proj_bias.to(wide).chunk(3)
        gamma, beta = self.ln_kv.weight.to(wide), self.ln_kv.bias.to(wide)
        D = len(gamma)
        kv = (
            self.kv_proj.weight.to(wide)
            if isinstance(self.kv_proj, nn.Linear)
            else torch.eye(D, dtype=wide, device=gamma.device)
        )
        centred = kv - kv.mean(0)
        found = (
            F.linear(self._queries().to(wide), w_q, b_q), (w_k * gamma) @ centred, (w_v * gamma) @ centred,
            b_v + w_v @ beta, torch.linalg.qr(centred, mode="r").R,
        )  # fmt: skip
        self._folded = Folded(*(t.to(self.query.dtype) for t in found))
        return self

    def unfold(self) -> "Resampler":
        """Back to the layers as they are named."""
        self._folded = None
        return self

    def train(self, mode: bool = True) -> "Resampler":
        if mode:
            self.unfold()
        super().train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Resampler":
        self.unfold()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfold()
        super()._load_from_state_dict(*args, **kwargs)

    def _attend_folded(
        self,
        folded: Folded,
        features: torch.Tensor,
        position: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        D, A = self.query.shape[1], self.attn.num_heads
        squares = F.linear(features, folded.spread).float().square().sum(-1, keepdim=True)
        scaled = features * torch.rsqrt(squares / D + self.ln_kv.eps).to(features.dtype)
        w_k = self.attn.in_proj_weight[D : 2 * D]  # positions join K after the norm: as they are
        scores = position_scores(folded.query, position, w_k, A, (D // A) ** -0.5)
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf)
        return mmkernels.cross_attention(
            folded.query, scaled, folded.key_weight, folded.value_weight, None, folded.value_bias,
            num_heads=A, attention_mask=scores,
        )  # fmt: skip
