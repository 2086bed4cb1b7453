# SPDX-License-Identifier: Apache-2.0
"""Projectors of the merging kind: neighbours side by side, then an MLP."""

from collections.abc import Callable

import torch
from torch import nn

from mmkernels import Norm, patch_merge
from mmkernels.ops.patch_merge.layout import Grid


class MLPProjector(nn.Module):
    """``linear_2(act(linear_1(x)))``, LLaVA's projector; submodules named as in ``LlavaMultiModalProjector``.

    Args:
        in_features, out_features: Widths of the encoder and of the language model.
        hidden_features: Default ``out_features``.
        act: Between the layers.
        bias: Of both layers.
    Source: LLaVA-1.5 (Liu et al. 2023).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: int | None = None,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = out_features if hidden_features is None else hidden_features
        self.linear_1 = nn.Linear(in_features, hidden, bias=bias)
        self.act = act()
        self.linear_2 = nn.Linear(hidden, out_features, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """``[…, in_features]`` → ``[…, out_features]``."""
        out: torch.Tensor = self.linear_2(self.act(self.linear_1(image_features)))
        return out


class PatchMerger(nn.Module):
    """Norm, ``m×m`` neighbours side by side, MLP: Qwen2-VL's merger and its kin.

    Submodules are named as in ``PatchMerger`` of Qwen2-VL (``ln_q``, ``mlp.0``, ``mlp.2``), so its state_dict loads.

    Args:
        dim: Width of the language model.
        context_dim: C, width of a token.
        merge_size: m, or (m_h, m_w).
        norm: ``"layer"``, ``"rms"`` or None; ``norm_after``: over the m·m·C merged features, not over C.
        blocks: Tokens lie block after block (Qwen's order), else in raster order.
        order, pad: As in ``mmkernels.patch_merge``.
        hidden_dim: Of the MLP, default m·m·C.
        eps: Of the norm.
        bias: Of the MLP.
    Source: Qwen2-VL (Wang et al. 2024), InternVL 1.5 (Chen et al. 2024), Pixtral (2024).
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        merge_size: int | tuple[int, int] = 2,
        *,
        norm: str | None = "layer",
        norm_after: bool = False,
        blocks: bool = True,
        order: str = "kkc",
        pad: bool = False,
        hidden_dim: int | None = None,
        eps: float = 1e-6,
        bias: bool = True,
    ) -> None:
        super().__init__()
        m_h, m_w = (merge_size, merge_size) if isinstance(merge_size, int) else merge_size
        merged = context_dim * m_h * m_w
        width = merged if norm_after else context_dim
        kinds: dict[str | None, Callable[[], nn.Module]] = {
            "layer": lambda: nn.LayerNorm(width, eps=eps),
            "rms": lambda: nn.RMSNorm(width, eps=eps),
            None: nn.Identity,
        }
        self.ln_q = kinds[norm]()
        self.norm_kind, self.norm_after, self.eps = norm, norm_after, eps
        self.merge_size, self.blocks, self.order, self.pad = (m_h, m_w), blocks, order, pad
        hidden = merged if hidden_dim is None else hidden_dim
        self.mlp = nn.Sequential(
            nn.Linear(merged, hidden, bias=bias), nn.GELU(), nn.Linear(hidden, dim, bias=bias)
        )

    def forward(self, features: torch.Tensor, grid_thw: Grid | None = None) -> torch.Tensor:
        """``[tokens, C]`` → ``[tokens / m², dim]`` (raster order: with ``grid_thw``); ``[B, H, W, C]`` →
        ``[B, M, dim]``."""
        norm = None
        if self.norm_kind is not None:
            bias = getattr(self.ln_q, "bias", None)
            norm = Norm(self.norm_kind, self.ln_q.weight, bias, self.eps)  # type: ignore[arg-type]
        merged = patch_merge(
            features, self.merge_size, grid_thw=grid_thw, blocks=self.blocks and features.dim() == 2,
            order=self.order, pad=self.pad, norm=norm, norm_after=self.norm_after,
        )  # fmt: skip
        out: torch.Tensor = self.mlp(merged)
        return out
