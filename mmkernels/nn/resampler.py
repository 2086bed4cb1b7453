# SPDX-License-Identifier: Apache-2.0
"""The resampler of MiniCPM-V and Qwen-VL: constant queries read projected, normed, positioned features."""

import math
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

    The first half of the width encodes x, the second y, at whole places: MAE's ``get_2d_sincos_pos_embed``
    (facebookresearch/mae, util/pos_embed.py), which MiniCPM-V's ``resampler.py`` takes for a grid of any size.
    """
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def half(n: int) -> torch.Tensor:
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], 1)

    of_y, of_x = half(rows), half(columns)
    return F.pad(of_y, (width // 2, 0)).float(), F.pad(of_x, (0, width // 2)).float()


def resized(table: torch.Tensor, size: int) -> torch.Tensor:
    """``[side, width]`` → ``[size, width]`` in fp32: one side of a table that is resized bicubically as a picture.

    Qwen-VL's ``get_abs_pos`` (huggingface.co/Qwen/Qwen-VL, visual.py) resizes the positions of its square of queries
    to the square of keys. Weights of a bicubic sum to 1 and act side by side, so rows and columns are resized alone.
    """
    picture = table.float().t()[None, :, :, None]
    grown = F.interpolate(picture, (size, 1), mode="bicubic", align_corners=False)
    return grown[0, :, :, 0].t()


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
        query_grid: The queries are a square with positions, and keys have the positions of that square,
            resized bicubically to their own grid (Qwen-VL). Otherwise keys lie at whole places (MiniCPM-V).
        post: ``ln_post`` and ``proj`` follow.
        eps: Of every LayerNorm.
    Source: MiniCPM-V (Yao et al. 2024), ``resampler.py`` of openbmb/MiniCPM-V-2_6; Qwen-VL (Bai et al. 2023),
        ``visual.py`` of Qwen/Qwen-VL. Qwen-VL's checkpoints also hold ``pos_embed``, which is made here.
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
        if query_grid and math.isqrt(num_queries) ** 2 != num_queries:
            raise ValueError(
                f"Resampler: num_queries must be a square with query_grid, got {num_queries}"
            )
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
        position = self._positions(grid, features)
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

    def _positions(
        self, grid: tuple[int, int], features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows and of the columns of the keys."""
        width, dtype = self.query.shape[1], features.dtype
        if not self.query_grid:
            rows, columns = sincos_tables(width, *grid, features.device)
            return rows.to(dtype), columns.to(dtype)
        side = math.isqrt(len(self.query))
        # Qwen-VL keeps the table as a parameter: it is rounded to the dtype before it is resized, and after.
        tables = [t.to(dtype) for t in sincos_tables(width, side, side, features.device)]
        rows, columns = (resized(t, n).to(dtype) for t, n in zip(tables, grid, strict=True))
        return rows, columns

    def _queries(self) -> torch.Tensor:
        return self._with_places(self.ln_q(self.query))

    def _with_places(self, q: torch.Tensor) -> torch.Tensor:
        if self.query_grid:
            side = math.isqrt(len(q))
            rows, columns = sincos_tables(q.shape[1], side, side, q.device)
            places = (rows[:, None] + columns[None]).flatten(0, 1)
            q = q + places.to(self.query.dtype).to(q.dtype)
        return q

    @torch.no_grad()
    def fold(self) -> "Resampler":
        """For inference: constant queries are projected once, and ``kv_proj`` and ``ln_kv`` go into K and V.

        ``LN(W x)`` is ``γ (W_c x) r + β`` with W_c the centred W and r = 1/√(|W_c x|²/D + eps); |W_c x| = |R x| with
        W_c = Q R. So with ``y = r x`` the layer is an attention over y: ``K = W_k γ W_c``, ``V = W_v γ W_c``, bias
        ``b_v + W_v β``, and positions add to the scores. ``unfold`` takes it back, and so do ``train()``, loading a
        state and moving or casting the module, after which the folded weights would not be its own.

        Numerics: norm and projection of the queries, products and R are fp64 whatever the parameters are; each result
        rounds once, to the parameters' dtype. At run time r is fp32 at least (fp64 of fp64 features) and rounds once to
        the features' dtype, as does ``y``. Positions round as in the unfolded layer.
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
        norm = self.ln_q
        query = F.layer_norm(
            self.query.to(wide), (D,), norm.weight.to(wide), norm.bias.to(wide), norm.eps
        )
        found = (
            F.linear(self._with_places(query), w_q, b_q), (w_k * gamma) @ centred, (w_v * gamma) @ centred,
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
        spread = F.linear(features, folded.spread)
        wide = spread.to(torch.promote_types(spread.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        scaled = features * torch.rsqrt(squares / D + self.ln_kv.eps).to(features.dtype)
        w_k = self.attn.in_proj_weight[D : 2 * D]  # positions join K after the norm: as they are
        scores = position_scores(folded.query, position, w_k, A, (D // A) ** -0.5)
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf)
        return mmkernels.cross_attention(
            folded.query, scaled, folded.key_weight, folded.value_weight, None, folded.value_bias,
            num_heads=A, attention_mask=scores,
        )  # fmt: skip
