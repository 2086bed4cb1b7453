# SPDX-License-Identifier: Apache-2.0
"""Input projectors: blocks behind one another, each from features to features, by configuration.

Dimensions: B items or frames, n their tokens, X width of the features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels.models import config as c
from mmkernels.models.attention import Packed
from mmkernels.models.decoder import SwiGLU as GatedMLP
from mmkernels.models.features import Features, padded, take_part
from mmkernels.models.vision import EncoderBlock, patch_positions, sincos
from mmkernels.nn import CrossAttention, PerceiverResampler
from mmkernels.nn import QFormer as QFormerLayers
from mmkernels.nn import Resampler as ResamplerLayer

ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x, "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
}  # fmt: skip


class Projector(nn.Module):
    """A chain of blocks from ``width`` to ``self.width``."""

    def __init__(self, blocks: Sequence[c.Block], width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for config in blocks:
            block = BLOCKS[type(config)](config, width)
            self.blocks.append(block)
            width = getattr(block, "width", width)
        self.width = width

    def forward(self, features: Features) -> Features:
        for block in self.blocks:
            features = block(features)
        return features


class Place(nn.Module):
    """Where a patch is: telling digits apart, an encoder may forget it."""

    def __init__(self, config: c.PlaceConfig, width: int) -> None:
        super().__init__()
        self.side = config.side
        if config.side:
            self.position_embed = nn.Parameter(patch_positions(config.side, width))

    def forward(self, features: Features) -> Features:
        if not self.side:
            return self._sines(features)
        if any((h, w) != (self.side, self.side) for _, h, w in features.grids):
            raise ValueError(
                f"Place: every grid must be {self.side}×{self.side}, got {list(features.grids)}"
            )
        position = F.pad(self.position_embed, (0, 0, features.prefix, 0))
        places = position.repeat(len(features.frames), 1)
        return features._replace(tokens=features.tokens + places)

    def _sines(self, features: Features) -> Features:
        _no_prefix("Place", features)
        tokens, width = features.tokens, features.tokens.shape[1]
        rows = [patch_positions(h, width, w).repeat(t, 1) for t, h, w in features.grids]
        return (
            features._replace(tokens=tokens + torch.cat([*rows, rows[0][:0]]).to(tokens))
            if rows
            else features
        )


class FramePlace(nn.Module):
    """When a frame is."""

    def __init__(self, config: c.FramePlaceConfig, width: int) -> None:
        super().__init__()
        self.frame_embed = nn.Parameter(0.5 * torch.randn(config.frames, width))

    def forward(self, features: Features) -> Features:
        most = max((t for t, _, _ in features.grids), default=0)
        if most > len(self.frame_embed):
            raise ValueError(
                f"FramePlace: at most {len(self.frame_embed)} frames are placed, got {most}"
            )
        frame = torch.tensor([i for t, _, _ in features.grids for i in range(t)], dtype=torch.int64)
        lengths = torch.tensor(features.frames, dtype=torch.int64)
        rows = torch.repeat_interleave(frame, lengths).to(features.tokens.device)
        return features._replace(tokens=features.tokens + self.frame_embed[rows])


class DropPrefix(nn.Module):
    """The grid alone."""

    def __init__(self, config: c.DropPrefixConfig, width: int) -> None:
        super().__init__()

    def forward(self, features: Features) -> Features:
        if not features.prefix:
            return features
        lengths = torch.tensor(features.frames, dtype=torch.int64)
        first = lengths.cumsum(0) - lengths
        at = torch.arange(int(lengths.sum())) - torch.repeat_interleave(first, lengths)
        keep = (at >= features.prefix).to(features.tokens.device)
        return features._replace(tokens=features.tokens[keep], prefix=0)


class Norm(nn.Module):
    """Over the width."""

    def __init__(self, config: c.NormConfig, width: int) -> None:
        super().__init__()
        kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norm: nn.Module = kinds[_known("norm", config.norm, kinds)](width, eps=config.eps)
        self.act = ACTS[_known("act", config.act, ACTS)]

    def forward(self, features: Features) -> Features:
        return features._replace(tokens=self.act(self.norm(features.tokens)))


class Linear(nn.Module):
    """One layer of an MLP."""

    def __init__(self, config: c.LinearConfig, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, config.width, bias=config.bias)
        self.act, self.width = ACTS[_known("act", config.act, ACTS)], config.width

    def forward(self, features: Features) -> Features:
        return features._replace(tokens=self.act(self.linear(features.tokens)))


class SwiGLU(nn.Module):
    """The decoder's MLP (CogVLM, Idefics2, Cohere)."""

    def __init__(self, config: c.SwiGLUConfig, width: int) -> None:
        super().__init__()
        self.mlp = GatedMLP(width, config.intermediate_size, config.width)
        self.width = config.width

    def forward(self, features: Features) -> Features:
        return features._replace(tokens=self.mlp(features.tokens))


class Merge(nn.Module):
    """Neighbours side by side."""

    def __init__(self, config: c.MergeConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width * config.rows * config.columns

    def forward(self, features: Features) -> Features:
        _no_prefix("Merge", features)
        rows, columns = self.config.rows, self.config.columns
        grids = torch.tensor(features.grids, dtype=torch.int64).view(-1, 3)
        tokens = mmkernels.patch_merge(
            features.tokens, (rows, columns), grid_thw=grids, blocks=False, order=self.config.order,
            pad=self.config.pad,
        )  # fmt: skip
        return Features(
            tokens, tuple((t, -(-h // rows), -(-w // columns)) for t, h, w in features.grids)
        )


class Pool(nn.Module):
    """Means of tokens."""

    def __init__(self, config: c.PoolConfig, width: int) -> None:
        super().__init__()
        self.over = _known("over", config.over, ("item", "frame", "time_and_space", "prefix"))

    def forward(self, features: Features) -> Features:
        items = features.tokens.split(features.counts)
        pooled = []
        for item, (t, _, _) in zip(items, features.grids, strict=True):
            frames = item.view(t, -1, item.shape[-1])
            grid = frames[:, features.prefix :]
            pooled.append({
                "item": lambda g=grid: g.mean((0, 1))[None],
                "frame": lambda g=grid: g.mean(1),
                "time_and_space": lambda g=grid: torch.cat((g.mean(1), g.mean(0))),
                "prefix": lambda f=frames: f[:, 0],
            }[self.over]())  # fmt: skip
        framewise = self.over in ("frame", "prefix")
        grids = tuple((len(p), 1, 1) if framewise else (1, 1, len(p)) for p in pooled)
        return Features(torch.cat(pooled or [features.tokens]), grids)


class Spread(nn.Module):
    """One vector, several tokens."""

    def __init__(self, config: c.SpreadConfig, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, config.tokens * config.width)
        self.tokens, self.width = config.tokens, config.width

    def forward(self, features: Features) -> Features:
        _no_prefix("Spread", features)
        tokens = self.linear(features.tokens).view(-1, self.width)
        return Features(tokens, tuple((t, h, w * self.tokens) for t, h, w in features.grids))


class Wrap(nn.Module):
    """Where an item begins and ends."""

    def __init__(self, config: c.WrapConfig, width: int) -> None:
        super().__init__()
        self.ends = nn.Parameter(0.02 * torch.randn(2, width))

    def forward(self, features: Features) -> Features:
        first, last = self.ends.to(features.tokens.dtype).split(1)
        parts = features.tokens.split(features.counts)
        rows = [x for item in parts for x in (first, item, last)]
        tokens = torch.cat(rows) if rows else take_part(features.tokens, self.ends)
        return Features(tokens, tuple((1, 1, n + 2) for n in features.counts))


class Transformer(nn.Module):
    """``EncoderBlock`` after ``EncoderBlock`` over each item."""

    def __init__(self, config: c.TransformerConfig, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderBlock(width, config.num_heads, config.intermediate_size)
            for _ in range(config.num_layers)
        )

    def forward(self, features: Features) -> Features:
        ends = torch.tensor([0, *features.counts]).cumsum(0).int()
        items = Packed(ends, max(features.counts, default=0), causal=False)
        tokens = features.tokens
        for layer in self.layers:
            tokens = layer(tokens, items)
        return features._replace(tokens=tokens)


class QFormer(nn.Module):
    """Parameters of ``qformer`` and ``query_tokens`` are named as in ``Blip2Model``."""

    def __init__(self, config: c.QFormerConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, config.hidden_size
        self.query_tokens = nn.Parameter(_start(config)[None])
        self.qformer = QFormerLayers(
            hidden_size=config.hidden_size, num_heads=config.num_heads, num_layers=config.num_layers,
            intermediate_size=config.intermediate_size, encoder_hidden_size=width,
            cross_attention_frequency=config.cross_attention_frequency,
        )  # fmt: skip
        for module in self.qformer.modules():
            alike = config.ordered_side and width == config.hidden_size
            if isinstance(module, CrossAttention) and alike:
                nn.init.normal_(module.query.weight, std=width**-0.5)
                module.key.weight.data.copy_(module.query.weight)

    def forward(self, features: Features) -> Features:
        read = lambda tokens, mask: self.qformer(self.query_tokens, tokens, mask)
        return _queried(features, self.config.per, self.config.num_query_tokens, read)


class Perceiver(nn.Module):
    """``nn.PerceiverResampler``."""

    def __init__(self, config: c.PerceiverConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.resampler = PerceiverResampler(
            width, num_latents=config.num_latents, num_layers=config.num_layers, num_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim,
            intermediate_size=config.intermediate_size, norm=config.norm, mlp=config.mlp,
        )  # fmt: skip
        nn.init.normal_(self.resampler.latents)  # ones, as Idefics2's class makes them, stay alike

    def forward(self, features: Features) -> Features:
        return _queried(features, self.config.per, self.config.num_latents, self.resampler)


class Resampler(nn.Module):
    """``nn.Resampler``, frames of one grid at a time."""

    def __init__(self, config: c.ResamplerConfig, width: int) -> None:
        super().__init__()
        self.num_queries, self.width = config.num_queries, config.width
        self.resampler = ResamplerLayer(
            config.num_queries, config.width, config.num_heads, width,
            query_grid=config.query_grid, post=config.post,
        )  # fmt: skip

    def forward(self, features: Features) -> Features:
        _no_prefix("Resampler", features)
        grids = [(h, w) for t, h, w in features.grids for _ in range(t)]
        frames = features.tokens.split(features.frames)
        out: list[Any] = [None] * len(frames)
        for grid in dict.fromkeys(grids):
            mine = [i for i, g in enumerate(grids) if g == grid]
            read = self.resampler(torch.stack([frames[i] for i in mine]), grid)
            for i, tokens in zip(mine, read, strict=True):
                out[i] = tokens
        if not out:
            none = features.tokens.new_empty(0, self.width)
            return Features(take_part(none, features.tokens, *self.parameters()), ())
        tokens = torch.cat(out)
        return Features(tokens, tuple((t, 1, self.num_queries) for t, _, _ in features.grids))


BLOCKS: dict[type[Any], type[Any]] = {
    c.PlaceConfig: Place, c.FramePlaceConfig: FramePlace, c.DropPrefixConfig: DropPrefix, c.NormConfig: Norm,
    c.LinearConfig: Linear, c.SwiGLUConfig: SwiGLU, c.MergeConfig: Merge, c.PoolConfig: Pool, c.SpreadConfig: Spread,
    c.WrapConfig: Wrap, c.TransformerConfig: Transformer,
    c.QFormerConfig: QFormer, c.PerceiverConfig: Perceiver, c.ResamplerConfig: Resampler,
}  # fmt: skip


def _start(config: c.QFormerConfig) -> torch.Tensor:
    Q, D = config.num_query_tokens, config.hidden_size
    if not config.ordered_side:
        return 0.02 * torch.randn(Q, D)
    columns = torch.linspace(0, config.ordered_side - 1, Q)
    queries = sincos(torch.zeros_like(columns), columns, D)
    queries[:, : D // 2] = 0  # any row
    return queries + 0.5 * torch.randn_like(queries)


def _queried(
    features: Features,
    per: str,
    queries: int,
    read: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> Features:
    """``queries`` tokens from each item, or from each frame of it."""
    framewise = _known("per", per, ("item", "frame")) == "frame"
    dense, mask = padded(features.tokens, features.frames if framewise else features.counts)
    tokens = read(dense, mask).flatten(0, 1)
    return Features(
        tokens, tuple((t if framewise else 1, 1, queries) for t, _, _ in features.grids)
    )


def _no_prefix(block: str, features: Features) -> None:
    if features.prefix:
        raise ValueError(
            f"{block}: features must have no prefix tokens (DropPrefix first), got {features.prefix}"
        )


def _known(name: str, value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"projector: {name} must be one of {list(known)}, got {value!r}")
    return value
