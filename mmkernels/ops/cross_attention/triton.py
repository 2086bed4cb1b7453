# SPDX-License-Identifier: Apache-2.0
"""Absorbed cross-attention on CUDA: q' = scale·q·W_k, S = q'·Xᵀ, Z = P·X with P = softmax(S), out = Z·W_vᵀ + ΣP·b_v.

Neither K nor V is formed. Dimensions: B batch, Q queries, n context tokens, X context width, A heads,
d head width; R = Q·A score rows a sample, query first: row = query·A + head, so that [Q, A·d] is [R, d].

What rounds where: q', Z and their gradients stay fp32 and meet the tensor cores as hi + lo; in the
forward the probabilities round to the dtype and are summed rounded; the softmax is fp32; fp32 products
are IEEE. No atomics: the same bits in every run. The batch is cut into groups whose intermediates
stay in L2.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from mmkernels.ops.cross_attention.arguments import over_latents, seen_keys
from mmkernels.ops.cross_attention.ragged import packed, padded

_GROUP_BYTES = 40 * 2**20  # of an H200's 50 MB L2
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _dot(a, b, acc, DTYPE: tl.constexpr):
    """``acc + a·b`` to fp32 accuracy: an fp32 factor of a 16-bit op goes as hi + lo."""
    if DTYPE == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        a_hi, b_hi = a.to(DTYPE), b.to(DTYPE)
        if a.dtype == tl.float32:
            acc = tl.dot((a - a_hi.to(tl.float32)).to(DTYPE), b_hi, acc)
        if b.dtype == tl.float32:
            acc = tl.dot(a_hi, (b - b_hi.to(tl.float32)).to(DTYPE), acc)
        acc = tl.dot(a_hi, b_hi, acc)
    return acc


@triton.jit
def _masked(
    s, mask, b, r, j, R, n, A, m_stride_b, m_stride_a, m_stride_q, m_stride_n, MASK: tl.constexpr
):
    """Scores with the mask; -inf for a forbidden key and past the last one."""
    inside = (r < R)[:, None] & (j < n)[None, :]
    if MASK != "none":
        head, query = (r % A).to(tl.int64), (r // A).to(tl.int64)
        row = b * m_stride_b + head * m_stride_a + query * m_stride_q
        place = row[:, None] + (j.to(tl.int64) * m_stride_n)[None, :]
        value = tl.load(mask + place, mask=inside, other=0)
        if MASK == "bool":
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _read(seen_Bn, b, j, n, HAS_SEEN: tl.constexpr):
    """Keys to be read: those that some query may attend to. The others are 0, whatever they hold."""
    if HAS_SEEN:
        read = tl.load(seen_Bn + b * (tl.cdiv(n, 128) * 128) + j) != 0  # it ends in whole tiles
    else:
        read = j < n
    return read


@triton.jit
def _product_kernel(
    a_HIK, b_HKJ, c_HIJ, add_HIJ, bias_HJ, of_rows_BHQ, seen_HK,
    I, J, K, H, Q, alpha,
    a_stride_h, a_stride_i, a_stride_k, b_stride_h, b_stride_k, b_stride_j,
    c_stride_h, c_stride_i, c_stride_j, add_stride_h, add_stride_i, add_stride_j,
    DTYPE: tl.constexpr, HAS_ADD: tl.constexpr, BIAS: tl.constexpr, HAS_SEEN: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``c = alpha·a·b (+ add) (+ bias)``, for each h; of b only rows that are seen.

    ``BIAS``: "none", "whole" in rows that attended to something, whose lse is ``of_rows``, or a "share" of
    alpha·of_rows.
    """
    tiles_i, tiles_j = tl.cdiv(I, BLOCK_I), tl.cdiv(J, BLOCK_J)
    pid = tl.program_id(0)
    h = (pid // (tiles_i * tiles_j)).to(tl.int64)
    i = pid // tiles_j % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)
    j = pid % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)
    i_64, j_64 = i.to(tl.int64)[:, None], j.to(tl.int64)[None, :]
    inside = (i < I)[:, None] & (j < J)[None, :]
    acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_64 = k.to(tl.int64)
        a = tl.load(
            a_HIK + h * a_stride_h + i_64 * a_stride_i + k_64[None, :] * a_stride_k,
            mask=(i < I)[:, None] & (k < K)[None, :],
            other=0,
        )
        read = _read(seen_HK, h, k, K, HAS_SEEN)
        b = tl.load(
            b_HKJ + h * b_stride_h + k_64[:, None] * b_stride_k + j_64 * b_stride_j,
            mask=read[:, None] & (j < J)[None, :],
            other=0,
        )
        acc = _dot(a, b, acc, DTYPE)
    acc *= alpha
    if HAS_ADD:
        place = h * add_stride_h + i_64 * add_stride_i + j_64 * add_stride_j
        acc += tl.load(add_HIJ + place, mask=inside, other=0)
    if BIAS != "none":
        place = ((i // Q).to(tl.int64) * H + h) * Q + i % Q
        of_row = tl.load(of_rows_BHQ + place, mask=i < I, other=0)[:, None]
        bias = tl.load(bias_HJ + h * J + j, mask=j < J, other=0).to(tl.float32)[None, :]
        if BIAS == "whole":
            acc += tl.where(of_row > float("-inf"), bias, 0.0)
        else:
            acc += alpha * of_row * bias
    tl.store(
        c_HIJ + h * c_stride_h + i_64 * c_stride_i + j_64 * c_stride_j,
        acc.to(c_HIJ.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _scores_kernel(
    q_BRX, x_BnX, mask, p_BRn, max_BRt, sum_BRt,
    R, n, X, A, row, q_stride_b, x_stride_b, x_stride_n, x_stride_x,
    m_stride_b, m_stride_a, m_stride_q, m_stride_n,
    DTYPE: tl.constexpr, MASK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One tile of ``exp(S - max of the tile)``, with that maximum and the sum of each row."""
    tiles_r, tiles_n = tl.cdiv(R, BLOCK_R), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (tiles_r * tiles_n)).to(tl.int64)
    tile = pid % tiles_n
    r = pid // tiles_n % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    r_64, j_64 = r.to(tl.int64), j.to(tl.int64)
    s = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for x0 in range(0, X, BLOCK_X):
        x = x0 + tl.arange(0, BLOCK_X)
        q = tl.load(
            q_BRX + b * q_stride_b + r_64[:, None] * X + x[None, :],
            mask=(r < R)[:, None] & (x < X)[None, :],
            other=0,
        )
        keys = tl.load(
            x_BnX
            + b * x_stride_b
            + j_64[None, :] * x_stride_n
            + x.to(tl.int64)[:, None] * x_stride_x,
            mask=(j < n)[None, :] & (x < X)[:, None],
            other=0,
        )
        s = _dot(q, keys, s, DTYPE)
    s = _masked(s, mask, b, r, j, R, n, A, m_stride_b, m_stride_a, m_stride_q, m_stride_n, MASK)
    largest = tl.max(s, 1)
    p = tl.exp(s - tl.where(largest == float("-inf"), 0.0, largest)[:, None]).to(DTYPE)
    p_row = (b * R + r_64) * row
    tl.store(p_BRn + p_row[:, None] + j[None, :], p, mask=(r < R)[:, None] & (j < row)[None, :])
    place = (b * R + r_64) * tiles_n + tile
    tl.store(max_BRt + place, largest, mask=r < R)
    tl.store(sum_BRt + place, tl.sum(p.to(tl.float32), 1), mask=r < R)


@triton.jit
def _values_kernel(
    p_BRn, max_BRt, sum_BRt, x_BnX, z_BRX, lse_BAQ,
    R, n, X, A, row, x_stride_b, x_stride_n, x_stride_x,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One tile of Z, the tiles of the probabilities brought to one maximum as they come."""
    tiles_r, tiles_n = tl.cdiv(R, BLOCK_R), tl.cdiv(n, BLOCK_N)
    tiles_x = tl.maximum(tl.cdiv(X, BLOCK_X), 1)
    pid = tl.program_id(0)
    b = (pid // (tiles_r * tiles_x)).to(tl.int64)
    r = pid // tiles_x % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    x = pid % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
    r_64, x_64 = b * R + r, x.to(tl.int64)
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_X), tl.float32)
    for tile in range(0, tiles_n):
        j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        p = tl.load(
            p_BRn + (r_64 * row)[:, None] + j[None, :],
            mask=(r < R)[:, None] & (j < row)[None, :],
            other=0,
        )
        keys = tl.load(
            x_BnX
            + b * x_stride_b
            + j.to(tl.int64)[:, None] * x_stride_n
            + x_64[None, :] * x_stride_x,
            mask=(j < n)[:, None] & (x < X)[None, :],
            other=0,
        )
        place = r_64 * tiles_n + tile
        tile_max = tl.load(max_BRt + place, mask=r < R, other=float("-inf"))
        tile_sum = tl.load(sum_BRt + place, mask=r < R, other=0)
        new_max = tl.maximum(largest, tile_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        before, now = tl.exp(largest - shift), tl.exp(tile_max - shift)
        product = _dot(p, keys, tl.zeros((BLOCK_R, BLOCK_X), tl.float32), DTYPE)
        acc = acc * before[:, None] + product * now[:, None]
        total = total * before + tile_sum * now
        largest = new_max
    # A row that attended to nothing: total is 0, Z is 0, lse is -inf.
    acc *= tl.where(total == 0, 0.0, 1.0 / total)[:, None]
    tl.store(z_BRX + r_64[:, None] * X + x[None, :], acc, mask=(r < R)[:, None] & (x < X)[None, :])
    lse = tl.where(total == 0, float("-inf"), largest + tl.log(total))
    place = (b * A + r % A) * (R // A) + r // A
    tl.store(lse_BAQ + place, lse, mask=(r < R) & (pid % tiles_x == 0))


@triton.jit
def _grad_scores_kernel(
    q_BRX, dz_BRX, x_BnX, mask, seen_Bn, lse_BAQ, p_BRn, dp_BRn,
    R, n, X, A, q_stride_b, x_stride_b, x_stride_n, x_stride_x,
    m_stride_b, m_stride_a, m_stride_q, m_stride_n,
    DTYPE: tl.constexpr, MASK: tl.constexpr, HAS_SEEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One tile of the probabilities, recomputed, and of their gradient."""
    tiles_r, tiles_n = tl.cdiv(R, BLOCK_R), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // (tiles_r * tiles_n)).to(tl.int64)
    r = pid // tiles_n % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    j = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r_64, j_64 = r.to(tl.int64), j.to(tl.int64)
    read = _read(seen_Bn, b, j, n, HAS_SEEN)
    s = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    dp = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for x0 in range(0, X, BLOCK_X):
        x = x0 + tl.arange(0, BLOCK_X)
        rows = r_64[:, None] * X + x[None, :]
        valid = (r < R)[:, None] & (x < X)[None, :]
        q = tl.load(q_BRX + b * q_stride_b + rows, mask=valid, other=0)
        dz = tl.load(dz_BRX + b * R * X + rows, mask=valid, other=0)
        keys = tl.load(
            x_BnX
            + b * x_stride_b
            + j_64[None, :] * x_stride_n
            + x.to(tl.int64)[:, None] * x_stride_x,
            mask=read[None, :] & (x < X)[:, None],
            other=0,
        )
        s = _dot(q, keys, s, DTYPE)
        dp = _dot(dz, keys, dp, DTYPE)
    s = _masked(s, mask, b, r, j, R, n, A, m_stride_b, m_stride_a, m_stride_q, m_stride_n, MASK)
    place = (b * A + r % A) * (R // A) + r // A
    lse = tl.load(lse_BAQ + place, mask=r < R, other=float("-inf"))
    p = tl.exp(s - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    place = ((b * R + r_64) * n)[:, None] + j[None, :]
    inside = (r < R)[:, None] & (j < n)[None, :]
    tl.store(p_BRn + place, p, mask=inside)
    tl.store(dp_BRn + place, dp, mask=inside)


def _tile(size: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(size)))


def _warps(rows: int, columns: int) -> int:
    return 8 if rows * columns > 64 * 64 else 4


def product_config(I: int, J: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the batched product."""
    if dtype == torch.float32:
        tile = {"BLOCK_I": _tile(I, 64), "BLOCK_J": _tile(J, 64), "BLOCK_K": 16}
        return {**tile, "num_warps": 8, "num_stages": 2}
    tile = {"BLOCK_I": _tile(I, 128), "BLOCK_J": _tile(J, 128), "BLOCK_K": 32}
    return {**tile, "num_warps": _warps(tile["BLOCK_I"], tile["BLOCK_J"]), "num_stages": 3}


def scores_config(R: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the scores; its BLOCK_N is also the step of the values."""
    if dtype == torch.float32:
        tile = {"BLOCK_R": _tile(R, 64), "BLOCK_N": _tile(n, 32), "BLOCK_X": 16}
        return {**tile, "num_warps": 8, "num_stages": 2}
    tile = {"BLOCK_R": _tile(R, 128), "BLOCK_N": _tile(n, 128), "BLOCK_X": 32}
    return {**tile, "num_warps": _warps(tile["BLOCK_R"], tile["BLOCK_N"]), "num_stages": 3}


def values_config(R: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of Z."""
    scores = scores_config(R, n, dtype)
    BLOCK_X = 64 if dtype == torch.float32 else 128
    warps = 8 if dtype == torch.float32 or scores["BLOCK_R"] == 128 else 4
    return {**scores, "BLOCK_X": BLOCK_X, "num_warps": warps, "num_stages": 2}


def grad_scores_config(R: int, n: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of the gradient of the scores: two accumulators, so half the tile of the scores."""
    if dtype == torch.float32:
        return scores_config(R, n, dtype)
    BLOCK_R, BLOCK_N = _tile(R, 64), _tile(n, 128)
    return {"BLOCK_R": BLOCK_R, "BLOCK_N": BLOCK_N, "BLOCK_X": 32, "num_warps": 8, "num_stages": 3}


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
    *,
    alpha: float = 1.0,
    add: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    share: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out [H, I, J] = alpha · a [H, I, K] · b [H, K, J] (+ add) (+ bias)``, any strides; ``dtype`` is the op's.

    ``bias`` needs ``lse`` or ``share``, ``[·, H, Q]`` with I = ·Q; of b those rows count that ``seen`` [H, K] says.
    """
    (H, I, K), J = a.shape, b.shape[2]
    if out.numel() == 0:
        return out
    config = product_config(I, J, dtype)
    grid = (H * triton.cdiv(I, config["BLOCK_I"]) * triton.cdiv(J, config["BLOCK_J"]),)
    of_rows = lse if share is None else share
    BIAS = "none" if bias is None else "whole" if share is None else "share"
    _product_kernel[grid](
        a, b, out, add, bias, of_rows, seen, I, J, K, H, 1 if of_rows is None else of_rows.shape[2], alpha,
        *a.stride(), *b.stride(), *out.stride(), *(out if add is None else add).stride(),
        DTYPE=_DTYPES[dtype], HAS_ADD=add is not None, BIAS=BIAS, HAS_SEEN=seen is not None, **config,
    )  # fmt: skip
    return out


def _by_head(rows: torch.Tensor, A: int) -> torch.Tensor:
    """``[..., A·d]`` as ``[A, rows, d]``."""
    return rows.reshape(-1, rows.shape[-1]).unflatten(1, (A, -1)).transpose(0, 1)


def _through(rows: torch.Tensor, weight: torch.Tensor, A: int, alpha: float = 1.0) -> torch.Tensor:
    """``alpha · rows_h · weight_h`` of ``[..., Q, A·d]`` and ``[A·d, X]``: fp32 ``[..., Q·A, X]``."""
    *batch, Q, _ = rows.shape
    X = weight.shape[1]
    out = torch.empty((*batch, Q * A, X), dtype=torch.float32, device=rows.device)
    heads_ARX = out.view(-1, A, X).transpose(0, 1)
    _product(_by_head(rows, A), weight.unflatten(0, (A, -1)), heads_ARX, rows.dtype, alpha=alpha)
    return out


def _groups(B: int, bytes_per_sample: int) -> Iterator[slice]:
    size = max(1, _GROUP_BYTES // max(bytes_per_sample, 1))
    return (slice(first, min(first + size, B)) for first in range(0, B, size))


def _mask_arguments(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, ...], str]:
    if mask is None:
        return None, (0, 0, 0, 0), "none"
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), mask.stride(), "bool"
    return mask, mask.stride(), "additive"


def cross_attention(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.cross_attention``; ``key_bias`` cancels in the softmax and is not read."""
    seen = _seen(attention_mask)
    if cu_seqlens is not None:
        context, attention_mask = _padded(
            query, context, latents, cu_seqlens, max_seqlen, num_heads
        )
    if latents is not None:
        context = torch.cat([context, latents], 1)
    (B, n, X), A, dtype = context.shape, num_heads, query.dtype
    Q, R = query.shape[-2], query.shape[-2] * num_heads
    out = query.new_empty(B, Q, value_weight.shape[0])
    lse = query.new_empty(B, A, Q, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    bias = None if value_bias is None else value_bias.contiguous()
    share = None if bias is None or dropout_mask is None else torch.empty_like(lse)
    shared = _through(query, key_weight, A, scale)[None] if query.dim() == 2 else None
    size = context.element_size()
    for samples in _groups(B, (n * X + R * n) * size + 8 * R * X):
        q = _through(query[samples], key_weight, A, scale) if shared is None else shared
        mask = None if attention_mask is None else attention_mask[samples]
        keep = _keep(dropout_mask, samples)
        x, kept = context[samples], None if share is None else share[samples]
        if seen is not None:  # copied here, for the kernel of Z has no register free to skip rows
            x = torch.where(seen[samples, :n, None] != 0, x, 0)
        z_BRX = _attend(q, x, mask, keep, lse[samples], kept, R, A)
        _product(
            z_BRX.view(-1, A, X).transpose(0, 1),
            value_weight.unflatten(0, (A, -1)).transpose(1, 2),
            _by_head(out[samples], A), dtype, alpha=1 / (1 - dropout_p), bias=bias,
            lse=lse[samples], share=kept,
        )  # fmt: skip
    return out, lse


def _seen(mask_BAQn: torch.Tensor | None) -> torch.Tensor | None:
    """The keys that some query may attend to, of an expanded mask, whose copies are not read.

    ``[B, n]``, with 0 behind up to a multiple of 128, which every tile divides.
    """
    if mask_BAQn is None:
        return None
    for dim in (1, 2):
        if mask_BAQn.stride(dim) == 0 and mask_BAQn.shape[dim] > 0:
            mask_BAQn = mask_BAQn.narrow(dim, 0, 1)
    return F.pad(seen_keys(mask_BAQn).view(torch.uint8), (0, -mask_BAQn.shape[3] % 128))


def _padded(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    A: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """These kernels take a batch: ``[B, n, X]`` and its mask, ``[B, A, Q, n]`` with latents."""
    dense, inside = padded(context, cu_seqlens, max_seqlen)
    mask = over_latents(inside, latents)
    assert mask is not None
    return dense, mask.expand(len(dense), A, query.shape[-2], mask.shape[-1])


def _keep(dropout_mask: torch.Tensor | None, samples: slice) -> torch.Tensor | None:
    """``[B, A, Q, n]`` of some samples as score rows, ``[B, R, n]``."""
    return None if dropout_mask is None else dropout_mask[samples].transpose(1, 2).flatten(1, 2)


def _attend(
    q_BRX: torch.Tensor,
    context: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    lse: torch.Tensor,
    share: torch.Tensor | None,
    R: int,
    A: int,
) -> torch.Tensor:
    """``softmax(q' · contextᵀ + mask) · context`` in fp32; writes ``lse`` and ``share``."""
    B, n, X = context.shape
    DTYPE = _DTYPES[context.dtype]
    config = scores_config(R, n, context.dtype)
    tiles_r, tiles_n = triton.cdiv(R, config["BLOCK_R"]), triton.cdiv(n, config["BLOCK_N"])
    row = triton.cdiv(n, 16) * 16  # aligned rows, so that whole vectors are read
    p_BRn = context.new_empty(B, R, row)
    max_BRt, sum_BRt = torch.empty((2, B, R, tiles_n), dtype=torch.float32, device=context.device)
    if n > 0:
        mask, strides, MASK = _mask_arguments(mask)
        _scores_kernel[(B * tiles_r * tiles_n,)](
            q_BRX, context, mask, p_BRn, max_BRt, sum_BRt, R, n, X, A, row,
            q_BRX.stride(0) if q_BRX.shape[0] > 1 else 0, *context.stride(), *strides,
            DTYPE=DTYPE, MASK=MASK, **config,
        )  # fmt: skip
    if keep is not None:  # dropped after they were summed
        p_BRn[..., :n].mul_(keep)
    if share is not None and n == 0:
        share.zero_()
    elif share is not None:
        kept_BR = _kept(p_BRn[..., :n], max_BRt, sum_BRt, config["BLOCK_N"])
        share.copy_(kept_BR.unflatten(1, (-1, A)).transpose(1, 2))
    z_BRX = torch.empty((B, R, X), dtype=torch.float32, device=context.device)
    config = values_config(R, n, context.dtype)
    _values_kernel[(B * tiles_r * max(triton.cdiv(X, config["BLOCK_X"]), 1),)](
        p_BRn, max_BRt, sum_BRt, context, z_BRX, lse, R, n, X, A, row, *context.stride(),
        DTYPE=DTYPE, **config,
    )  # fmt: skip
    return z_BRX


def _kept(
    p_BRn: torch.Tensor, max_BRt: torch.Tensor, sum_BRt: torch.Tensor, BLOCK_N: int
) -> torch.Tensor:
    """What dropout left of the sum of each row's probabilities, ``[B, R]``. The kernel has no register free for it."""
    n, tiles = p_BRn.shape[2], max_BRt.shape[2]
    left_BRt = F.pad(p_BRn, (0, tiles * BLOCK_N - n)).unflatten(-1, (tiles, BLOCK_N))
    weight_BRt = torch.exp(max_BRt - max_BRt.amax(-1, keepdim=True))  # to one maximum
    left = (left_BRt.sum(-1, dtype=torch.float32) * weight_BRt).sum(-1)
    return (left / (sum_BRt * weight_BRt).sum(-1)).nan_to_num_(0.0)  # a row of no key


def cross_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """As ``reference.cross_attention_backward``; K, V and their gradients are never formed."""
    total, seen = context.shape[0], _seen(attention_mask)
    if cu_seqlens is not None:
        context, attention_mask = _padded(
            query, context, latents, cu_seqlens, max_seqlen, num_heads
        )
    own = context.shape[1]
    if latents is not None:
        context = torch.cat([context, latents], 1)
    (B, n, X), A, dtype = context.shape, num_heads, query.dtype
    R = query.shape[-2] * num_heads
    wide = {"dtype": torch.float32, "device": query.device}
    empty = query.new_empty(0)
    d_query, d_context = (
        torch.empty(t.shape, dtype=dtype, device=t.device) for t in (query, context)
    )
    d_w_k, d_w_v = (
        torch.zeros(w.shape, **wide).unflatten(0, (A, -1)) for w in (key_weight, value_weight)
    )
    is_shared = query.dim() == 2
    q_shared = _through(query, key_weight, A, scale)[None] if is_shared else empty
    dq_shared = torch.zeros((R, X), **wide) if is_shared else empty
    lse = lse.contiguous()
    d_mask = lse.new_empty((*lse.shape, n) if needs[6] else 0)
    drops_bias = value_bias is not None and dropout_mask is not None
    share = torch.zeros_like(lse) if drops_bias else None
    for samples in _groups(B, n * X * context.element_size() + 8 * R * n + 12 * R * X):
        x, d_out = context[samples], grad[samples]
        q = q_shared if is_shared else _through(query[samples], key_weight, A, scale)
        dz = _through(d_out, value_weight, A)
        mask = None if attention_mask is None else attention_mask[samples]
        visible = None if seen is None else seen[samples]
        p, ds = _grad_scores(q, dz, x, mask, visible, lse[samples], R, A)
        if value_bias is not None and share is not None:
            ds.add_(_bias_in_scores(d_out, value_bias, A))
        p, ds = _through_softmax(p, ds, _keep(dropout_mask, samples), dropout_p)
        if share is not None:
            share[samples] = p.sum(-1).unflatten(1, (-1, A)).transpose(1, 2)
        if needs[6]:
            d_mask[samples] = ds.unflatten(1, (-1, A)).transpose(1, 2)
        if needs[0] or needs[3]:
            dq = _product(ds, x, torch.empty_like(dz), dtype, alpha=scale, seen=visible)
            if is_shared:
                dq_shared += dq.sum(0)
            else:
                _finish_query(dq, query[samples], key_weight, d_query[samples], d_w_k, A, needs)
        if needs[1] or needs[2]:
            part = torch.empty(x.shape, **wide)
            _product(p.transpose(1, 2), dz, part, dtype)
            q = q.expand(x.shape[0], R, X)
            _product(ds.transpose(1, 2), q, d_context[samples], dtype, add=part)
        if needs[4]:
            z_BRX = _product(p, x, dz, dtype, seen=visible)
            heads = z_BRX.view(-1, A, X).transpose(0, 1)
            _product(_by_head(d_out, A).transpose(1, 2), heads, d_w_v, dtype, add=d_w_v)
    if is_shared and (needs[0] or needs[3]):
        _finish_query(dq_shared, query, key_weight, d_query, d_w_k, A, needs)
    d_latents = d_context[:, own:].contiguous()
    if latents is not None:
        d_context = d_context[:, :own].contiguous()
    if cu_seqlens is not None:
        d_context = packed(d_context, cu_seqlens, total)
    grads = (d_query, d_context, d_latents, d_w_k.flatten(0, 1), d_w_v.flatten(0, 1))
    d_bias = _grad_bias(grad, lse, share, A) if needs[5] else empty
    found = [
        g.to(dtype) if need else empty for g, need in zip((*grads, d_bias), needs, strict=False)
    ]
    return (*found, d_mask)


def _grad_scores(
    q_BRX: torch.Tensor,
    dz_BRX: torch.Tensor,
    context: torch.Tensor,
    mask: torch.Tensor | None,
    seen: torch.Tensor | None,
    lse: torch.Tensor,
    R: int,
    A: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities and their gradient, fp32, not yet normalised."""
    B, n, X = context.shape
    p_BRn, dp_BRn = torch.empty((2, B, R, n), dtype=torch.float32, device=context.device)
    if p_BRn.numel() == 0:
        return p_BRn, dp_BRn
    config = grad_scores_config(R, n, context.dtype)
    mask, strides, MASK = _mask_arguments(mask)
    grid = (B * triton.cdiv(R, config["BLOCK_R"]) * triton.cdiv(n, config["BLOCK_N"]),)
    _grad_scores_kernel[grid](
        q_BRX, dz_BRX, context, mask, seen, lse, p_BRn, dp_BRn, R, n, X, A,
        q_BRX.stride(0) if q_BRX.shape[0] > 1 else 0, *context.stride(), *strides,
        DTYPE=_DTYPES[context.dtype], MASK=MASK, HAS_SEEN=seen is not None, **config,
    )  # fmt: skip
    return p_BRn, dp_BRn


def _bias_in_scores(d_out: torch.Tensor, value_bias: torch.Tensor, A: int) -> torch.Tensor:
    """``dO · b_v`` of each score row, ``[B, R, 1]``: a part of dP, which without dropout cancels in dS."""
    terms = d_out.float() * value_bias.float()
    return terms.unflatten(-1, (A, -1)).sum(-1).flatten(1)[..., None]


def _through_softmax(
    p_BRn: torch.Tensor,
    dp_BRn: torch.Tensor,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place: the probabilities, after dropout, and the gradient of the scores."""
    if p_BRn.numel() == 0:
        return p_BRn, dp_BRn
    total = p_BRn.sum(-1, keepdim=True)
    p_BRn.div_(total.masked_fill_(total == 0, 1.0))
    if keep is not None:
        dp_BRn.mul_(keep).mul_(1 / (1 - dropout_p))
    # From P·dP, not from dO·out: its rounding is that of dP and cancels where a row attends to one key.
    delta = (p_BRn * dp_BRn).sum(-1, keepdim=True)
    dp_BRn.sub_(delta).mul_(p_BRn)
    if keep is not None:
        p_BRn.mul_(keep).mul_(1 / (1 - dropout_p))
    return p_BRn, dp_BRn


def _finish_query(
    dq: torch.Tensor,
    query: torch.Tensor,
    key_weight: torch.Tensor,
    d_query: torch.Tensor,
    d_w_k: torch.Tensor,
    A: int,
    needs: list[bool],
) -> None:
    """From the gradient of q' to those of query (written) and key_weight (added to)."""
    heads_ARX = dq.reshape(-1, A, dq.shape[-1]).transpose(0, 1)
    if needs[0]:
        weight = key_weight.unflatten(0, (A, -1)).transpose(1, 2)
        _product(heads_ARX, weight, _by_head(d_query, A), query.dtype)
    if needs[3]:
        _product(_by_head(query, A).transpose(1, 2), heads_ARX, d_w_k, query.dtype, add=d_w_k)


def _grad_bias(
    grad: torch.Tensor, lse: torch.Tensor, share: torch.Tensor | None, A: int
) -> torch.Tensor:
    """The sum of ``grad`` over the rows that attended to something, times what dropout left of each."""
    if share is not None:
        rows_BQAd = grad.unflatten(-1, (A, -1)) * share.transpose(1, 2)[..., None]
        return rows_BQAd.sum((0, 1)).flatten()
    kept_BQA = (lse > -torch.inf).transpose(1, 2)[..., None]
    return (
        torch.where(kept_BQA, grad.unflatten(-1, (A, -1)), 0)
        .sum((0, 1), dtype=torch.float32)
        .flatten()
    )
