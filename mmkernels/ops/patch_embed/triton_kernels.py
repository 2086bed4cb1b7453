# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of patch embedding; ``triton.py`` launches them and says what they share.

Images reach a kernel in one of three ways (``KIND``):
"dense"   a batch of one shape: its numbers are scalar arguments, rows run over all images;
"packed"  images of different shapes: their numbers are rows of ``table``, a tile of rows belongs to one
          image (``tiles``: its number and the first row's place in it), so that they are scalars again;
"ragged"  rows of patches with grids only the device knows: each row searches its image in ``table``.
"""

import triton
import triton.language as tl

WIDTH = tl.constexpr(16)  # numbers of an image in the table, then where each is
POINTER = tl.constexpr(0)
STRIDE_C, STRIDE_T, STRIDE_H, STRIDE_W = (tl.constexpr(i) for i in range(1, 5))
FRAMES, HEIGHT, PIXELS_W = (tl.constexpr(i) for i in range(5, 8))
GRID_T, GRID_H, GRID_W = (tl.constexpr(i) for i in range(8, 11))
FIRST_TOKEN, FIRST_PATCH = tl.constexpr(11), tl.constexpr(12)


@triton.jit
def _field(table, image, FIELD: tl.constexpr):
    return tl.load(table + image * WIDTH + FIELD)


@triton.jit
def _search(table, images, steps, token):
    """The last image that starts at or before each token."""
    image = tl.zeros(token.shape, tl.int32)
    for step in range(steps):
        later = image + (1 << (steps - 1 - step))
        start = tl.load(table + later * WIDTH + FIRST_TOKEN, mask=later < images, other=0)
        image = tl.where((later < images) & (start <= token), later, image)
    return image


@triton.jit
def _rows(
    tile, table, tiles, images, steps, M, N, R, grid_h, grid_w,
    KIND: tl.constexpr, PREFIX_LAST: tl.constexpr, PATCHES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile of rows: token, image, place p among its patches (not in 0…N: a prefix token), its grid.

    ``PATCHES``: the rows of a dense batch are its patches, not its tokens.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first = 0 if PREFIX_LAST else R
    if KIND == "packed":
        image = tl.load(tiles + 2 * tile)
        p = tl.load(tiles + 2 * tile + 1).to(tl.int32) + tl.arange(0, BLOCK_M)
        token = _field(table, image, FIRST_TOKEN) + p
        grid_h = _field(table, image, GRID_H).to(tl.int32)
        grid_w = _field(table, image, GRID_W).to(tl.int32)
        N = _field(table, image, GRID_T).to(tl.int32) * grid_h * grid_w
        exists = p < N + R
        p -= first
    elif KIND == "ragged":
        exists = m < M
        token = m.to(tl.int64)
        image = _search(table, images, steps, token)
        grid_h = _field(table, image, GRID_H)
        grid_w = _field(table, image, GRID_W)
        N = _field(table, image, GRID_T) * grid_h * grid_w
        p = token - _field(table, image, FIRST_TOKEN) - first
    elif PATCHES:
        exists = m < M
        image, p = m // N, m % N
        token = image.to(tl.int64) * (R + N) + first + p
    else:
        exists = m < M
        token = m.to(tl.int64)
        image = m // (R + N)
        p = m % (R + N) - first
    return token, image, p, exists, N, grid_h, grid_w


@triton.jit
def _on_grid(p, grid_h, grid_w, MERGE: tl.constexpr, STILL: tl.constexpr):
    """Frame, row and column of the patch at place p of the sequence. ``STILL``: there is one frame."""
    t, rest = 0 * p, p
    if not STILL:
        area = tl.maximum(grid_h * grid_w, 1)
        t, rest = p // area, p % area
    if MERGE == 1:
        across = tl.maximum(grid_w, 1)
        return t, rest // across, rest % across
    across = tl.maximum(grid_w // MERGE, 1)
    block, inside = rest // (MERGE * MERGE), rest % (MERGE * MERGE)
    return t, block // across * MERGE + inside // MERGE, block % across * MERGE + inside % MERGE


@triton.jit
def _in_sequence(t, y, x, grid_h, grid_w, MERGE: tl.constexpr):
    """The inverse of ``_on_grid``."""
    if MERGE == 1:
        return (t * grid_h + y) * grid_w + x
    block = y // MERGE * (grid_w // MERGE) + x // MERGE
    return t * grid_h * grid_w + (block * MERGE + y % MERGE) * MERGE + x % MERGE


@triton.jit
def _pixels(
    pixels, table, image, T, H, W, stride_c, stride_t, stride_h, stride_w,
    KIND: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Where a tile's pixels are. ``UNIT``: pixels of a line touch; ``ALIGN`` divides all other steps."""
    if KIND == "packed":
        address = tl.multiple_of(_field(table, image, POINTER), ALIGN)
        pixels = address.to(tl.pointer_type(pixels.dtype.element_ty))
        stride_c = tl.multiple_of(_field(table, image, STRIDE_C), ALIGN)
        stride_t = tl.multiple_of(_field(table, image, STRIDE_T), ALIGN)
        stride_h = tl.multiple_of(_field(table, image, STRIDE_H), ALIGN)
        stride_w = 1 if UNIT else _field(table, image, STRIDE_W)
        T = _field(table, image, FRAMES).to(tl.int32)
        H = _field(table, image, HEIGHT).to(tl.int32)
        W = _field(table, image, PIXELS_W).to(tl.int32)
    return pixels, T, H, W, stride_c, stride_t, stride_h, stride_w


@triton.jit
def _origin(
    table, image, p, t, y, x, stride_b, stride_t, stride_h, stride_w,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    KIND: tl.constexpr, PAD_TIME: tl.constexpr, STILL: tl.constexpr,
):  # fmt: skip
    """Offset of the first pixel of each patch; its frame is added per value where time is padded."""
    if KIND == "ragged":
        return (_field(table, image, FIRST_PATCH) + p) * stride_w
    offset = y.to(tl.int64) * S_h * stride_h + x.to(tl.int64) * S_w * stride_w
    if not PAD_TIME and not STILL:
        offset += t.to(tl.int64) * S_t * stride_t
    if KIND == "dense":
        offset += image.to(tl.int64) * stride_b
    return offset


@triton.jit
def _value(
    k, affine, C: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    AFFINE: tl.constexpr,
):  # fmt: skip
    """Of value k of a patch: its channel, frame, row and column, and its channel's affine."""
    c, dt = k // (P_t * P_h * P_w), k // (P_h * P_w) % P_t
    dy, dx = k // P_w % P_h, k % P_w
    scale_hi = tl.zeros(k.shape, tl.float32)
    scale_lo, shift_hi, shift_lo = scale_hi, scale_hi, scale_hi
    if AFFINE == "numbers":
        for i in tl.static_range(C):
            scale_hi = tl.where(c == i, affine[4 * i], scale_hi)
            scale_lo = tl.where(c == i, affine[4 * i + 1], scale_lo)
            shift_hi = tl.where(c == i, affine[4 * i + 2], shift_hi)
            shift_lo = tl.where(c == i, affine[4 * i + 3], shift_lo)
    if AFFINE == "same":  # in all channels
        scale_hi, scale_lo = scale_hi + affine[0], scale_lo + affine[1]
        shift_hi, shift_lo = shift_hi + affine[2], shift_lo + affine[3]
    if AFFINE == "table":
        scale_hi = tl.load(affine + 4 * c, mask=c < C, other=0)
        scale_lo = tl.load(affine + 4 * c + 1, mask=c < C, other=0)
        shift_hi = tl.load(affine + 4 * c + 2, mask=c < C, other=0)
        shift_lo = tl.load(affine + 4 * c + 3, mask=c < C, other=0)
    return c, dt, dy, dx, scale_hi, scale_lo, shift_hi, shift_lo


@triton.jit
def _places(
    origin, t, y, x, valid, c, dt, dy, dx, T, H, W, stride_c, stride_t, stride_h, stride_w,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr,
    PAD_TIME: tl.constexpr, PAD_SPACE: tl.constexpr,
):  # fmt: skip
    """Offsets of a tile of values and which are in their image; time goes on with its last frame."""
    offset = c.to(tl.int64) * stride_c + dy.to(tl.int64) * stride_h + dx.to(tl.int64) * stride_w
    if not PAD_TIME:
        offset += dt.to(tl.int64) * stride_t
    places = origin[:, None] + offset[None, :]
    if PAD_TIME:
        frame = tl.minimum((t * S_t)[:, None] + dt[None, :], T - 1)
        places += frame.to(tl.int64) * stride_t
    if PAD_SPACE:
        valid = valid & ((y * S_h)[:, None] + dy[None, :] < H)
        valid = valid & ((x * S_w)[:, None] + dx[None, :] < W)
    return places, valid


@triton.jit
def _normalised(
    pixels, places, valid, scale_hi, scale_lo, shift_hi, shift_lo,
    AFFINE: tl.constexpr, PAD_SPACE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A tile of patches. Beside the image 0; otherwise not valid: met by a zero of the other factor."""
    v = tl.load(pixels + places, mask=valid, other=0).to(tl.float32)
    if AFFINE != "none":
        # Hi and lo apart: the rounding of one product would not cancel next to the mean.
        v = tl.fma(v, scale_hi[None, :], shift_hi[None, :]) + tl.fma(
            v, scale_lo[None, :], shift_lo[None, :]
        )
        if PAD_SPACE:
            v = tl.where(valid, v, 0.0)
    return v.to(DTYPE)


@triton.jit
def _scale(y, n_out, n_in, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr):
    """Resampling as integers: tap j is (2j+odd)·b - at away from place y, where a tap's step is 2b.

    Antialiased filters are as wide as the larger step. There are none with ``ALIGN_CORNERS``.
    """
    a, b = n_in, n_out + 0 * n_in
    if ALIGN_CORNERS:
        a, b = tl.where(n_out > 1, n_in - 1, 0), tl.maximum(n_out - 1, 1)
    odd: tl.constexpr = 0 if ALIGN_CORNERS else 1
    return (2 * y + odd) * a, b, (2 * tl.maximum(a, b) if ANTIALIAS else 2 * b)


@triton.jit
def _divide(a, b):
    """a / b to the last bit or next to it, for ordinary numbers: without the call of an exact division."""
    inverse = 1.0 / b
    quotient = a * inverse
    return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def _filter(
    j, at, b, step, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):
    """Weight of tap j. Distances are exact integers and the cubics factored, so nothing cancels."""
    odd: tl.constexpr = 0 if ALIGN_CORNERS else 1
    distance = tl.abs((2 * j + odd) * b - at)
    unit = (step + 0 * distance).to(tl.float32)
    if MODE == "bilinear":
        return _divide(tl.maximum(step - distance, 0).to(tl.float32), unit)
    A: tl.constexpr = -0.5 if ANTIALIAS else -0.75
    is_near = distance < step
    passed = tl.where(is_near, distance, distance - step)  # since the last tap, and to the next
    t = _divide(passed.to(tl.float32), unit)
    u = _divide(tl.maximum(step - passed, 0).to(tl.float32), unit)
    return u * tl.where(is_near, 1.0 + t - (A + 2.0) * t * t, A * t * u)


@triton.jit
def _taps(
    at, b, step, n_in, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):
    """First tap and the one after the last (before it is clamped, unless antialiased)."""
    radius: tl.constexpr = 2 if MODE == "bicubic" else 1
    odd: tl.constexpr = 0 if ALIGN_CORNERS else 1
    before = at - odd * b
    if ANTIALIAS:
        first = (tl.maximum(before - radius * step, -2 * b) + 2 * b) // (2 * b)
        end = tl.minimum((before + radius * step + 2 * b - 1) // (2 * b), n_in)
        return first, end
    # Plus and minus one step, for division rounds towards zero.
    base = (before + 2 * b) // (2 * b) - 1
    return base - (radius - 1), base + radius + 1


@triton.jit
def _total(
    first, end, at, b, step, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):  # fmt: skip
    """What the weights of an antialiased place sum to before they are made to sum to 1."""
    total = tl.zeros(at.shape, tl.float32)
    for tap in range(tl.max(end - first)):
        w = _filter(first + tap, at, b, step, MODE, ALIGN_CORNERS, ANTIALIAS)
        total += tl.where(first + tap < end, w, 0.0)
    return tl.maximum(total, 1e-30)


@triton.jit
def _add_positions(
    acc, position, position_columns, is_patch, exists, p, t, y, x, d, N, R, D, grid_h, grid_w,
    rows, columns,
    POSITION: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    PREFIX_LAST: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Adds to each patch the weighted rows of the table that make its position."""
    here = d.to(tl.int64)[None, :]
    inside = is_patch[:, None] & (d < D)[None, :]
    if POSITION == "fixed":
        raster = p if MERGE == 1 else (t * grid_h + y) * grid_w + x
        if PREFIX_LAST:  # the first N rows are the patches', then those of the first prefix tokens
            s = tl.where(is_patch, raster, p)
            has_row = exists & (s >= 0) & (s < rows)
        else:  # the last N
            s = tl.where(is_patch, rows - N + raster, p + R)
            has_row = exists & (s >= 0) & tl.where(is_patch, s < rows, s < rows - N)
        acc += tl.load(
            position + s.to(tl.int64)[:, None] * D + here,
            mask=has_row[:, None] & (d < D)[None, :],
            other=0,
        ).to(tl.float32)
    elif POSITION == "factorised":
        i = tl.minimum(y, rows - 1).to(tl.int64)
        j = tl.minimum(x, columns - 1).to(tl.int64)
        acc += tl.load(position + i[:, None] * D + here, mask=inside, other=0).to(tl.float32)
        acc += tl.load(position_columns + j[:, None] * D + here, mask=inside, other=0).to(
            tl.float32
        )
    elif POSITION == "nearest":
        i = tl.minimum(y.to(tl.int64) * rows // tl.maximum(grid_h, 1), rows - 1)
        j = tl.minimum(x.to(tl.int64) * columns // tl.maximum(grid_w, 1), columns - 1)
        row = i * columns + j
        acc += tl.load(position + row[:, None] * D + here, mask=inside, other=0).to(tl.float32)
    elif POSITION != "none":
        # Places of other rows (prefix tokens, the tile's tail) count as 0: their loops must end, too.
        y, x = tl.where(is_patch, y, 0).to(tl.int32), tl.where(is_patch, x, 0).to(tl.int32)
        high, wide = tl.maximum(grid_h, 1).to(tl.int32), tl.maximum(grid_w, 1).to(tl.int32)
        at_y, b_y, step_y = _scale(y, high, rows, ALIGN_CORNERS, ANTIALIAS)
        at_x, b_x, step_x = _scale(x, wide, columns, ALIGN_CORNERS, ANTIALIAS)
        first_y, end_y = _taps(at_y, b_y, step_y, rows, POSITION, ALIGN_CORNERS, ANTIALIAS)
        first_x, end_x = _taps(at_x, b_x, step_x, columns, POSITION, ALIGN_CORNERS, ANTIALIAS)
        taps_y = 4 if POSITION == "bicubic" else 2
        taps_x = 4 if POSITION == "bicubic" else 2
        share = tl.where(is_patch, 1.0, 0.0)
        if ANTIALIAS:
            taps_y, taps_x = tl.max(end_y - first_y), tl.max(end_x - first_x)
            share /= _total(
                first_y, end_y, at_y, b_y, step_y, POSITION, ALIGN_CORNERS, ANTIALIAS
            ) * _total(first_x, end_x, at_x, b_x, step_x, POSITION, ALIGN_CORNERS, ANTIALIAS)
        for tap_y in range(taps_y):
            j_y = first_y + tap_y
            w_y = _filter(j_y, at_y, b_y, step_y, POSITION, ALIGN_CORNERS, ANTIALIAS)
            w_y = tl.where(j_y < end_y, w_y, 0.0) * share
            row = tl.minimum(tl.maximum(j_y, 0), rows - 1) * columns
            for tap_x in range(taps_x):
                j_x = first_x + tap_x
                w = w_y * _filter(j_x, at_x, b_x, step_x, POSITION, ALIGN_CORNERS, ANTIALIAS)
                w = tl.where(j_x < end_x, w, 0.0)
                cell = row + tl.minimum(tl.maximum(j_x, 0), columns - 1)
                value = tl.load(
                    position + cell.to(tl.int64)[:, None] * D + here, mask=inside, other=0
                )
                acc += w[:, None] * value.to(tl.float32)
    return acc


# Numbers of a call: specialising on 1 or on multiples of 16 would compile again for every shape.
ROWS = ["images", "steps", "M", "N", "R", "grid_h", "grid_w"]
CUT = [*ROWS, "count", "T", "H", "W"]
TABLE = [*ROWS, "images_per_split", "tokens", "rows", "columns", "grid_t"]


@triton.jit(do_not_specialize=[*CUT, "rows", "columns"])
def _patch_embed_kernel(
    pixels, weight_DK, bias, position, position_columns, prefix_RD, out_MD, affine, table, tiles,
    images, steps, M, N, R, rows, columns, count, D, T, H, W, grid_h, grid_w,
    stride_b, stride_c, stride_t, stride_h, stride_w,
    C: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr, MERGE: tl.constexpr,
    STILL: tl.constexpr, KIND: tl.constexpr, AFFINE: tl.constexpr, PAD_TIME: tl.constexpr, PAD_SPACE: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PREFIX_LAST: tl.constexpr,
    POSITION: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * P_t * P_h * P_w
    tiles_d = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    # Neighbouring programs share their pixels; the weight stays in L2 anyway.
    d = pid % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    token, image, p, exists, N, grid_h, grid_w = _rows(
        pid // tiles_d, table, tiles, images, steps, M, N, R, grid_h, grid_w,
        KIND, PREFIX_LAST, False, BLOCK_M,
    )  # fmt: skip
    is_patch = exists & (p >= 0) & (p < N)
    t, y, x = _on_grid(p, grid_h, grid_w, MERGE, STILL)
    pixels, T, H, W, stride_c, stride_t, stride_h, stride_w = _pixels(
        pixels, table, image, T, H, W, stride_c, stride_t, stride_h, stride_w, KIND, UNIT, ALIGN
    )
    origin = _origin(
        table, image, p, t, y, x, stride_b, stride_t, stride_h, stride_w,
        S_t, S_h, S_w, KIND, PAD_TIME, STILL,
    )  # fmt: skip
    if KIND == "ragged":  # the grids may tell of more patches than there are
        is_patch &= _field(table, image, FIRST_PATCH) + p < count
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        c, dt, dy, dx, scale_hi, scale_lo, shift_hi, shift_lo = _value(
            k, affine, C, P_t, P_h, P_w, AFFINE
        )
        places, valid = _places(
            origin, t, y, x, is_patch[:, None] & (k < K)[None, :], c, dt, dy, dx,
            T, H, W, stride_c, stride_t, stride_h, stride_w, S_t, S_h, S_w, PAD_TIME, PAD_SPACE,
        )  # fmt: skip
        v = _normalised(
            pixels, places, valid, scale_hi, scale_lo, shift_hi, shift_lo,
            AFFINE, PAD_SPACE, weight_DK.dtype.element_ty,
        )  # fmt: skip
        w = tl.load(
            weight_DK + d.to(tl.int64)[None, :] * K + k[:, None],
            mask=(d < D)[None, :] & (k < K)[:, None],
            other=0,
        )
        acc = tl.dot(v, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + d, mask=d < D, other=0).to(tl.float32)[None, :]
    here = d.to(tl.int64)[None, :]
    in_width = (d < D)[None, :]
    if HAS_PREFIX:
        r = p - N if PREFIX_LAST else p + R
        is_prefix = exists & (r >= 0) & (r < R)
        prefix = tl.load(
            prefix_RD + r.to(tl.int64)[:, None] * D + here,
            mask=is_prefix[:, None] & in_width,
            other=0,
        )
        acc = tl.where(is_prefix[:, None], prefix.to(tl.float32), acc)
    acc = _add_positions(
        acc, position, position_columns, is_patch, exists, p, t, y, x, d, N, R, D, grid_h, grid_w,
        rows, columns, POSITION, ALIGN_CORNERS, ANTIALIAS, PREFIX_LAST, MERGE,
    )  # fmt: skip
    out = acc.to(out_MD.dtype.element_ty)
    tl.store(out_MD + token[:, None] * D + here, out, mask=exists[:, None] & in_width)


@triton.jit(do_not_specialize=["images", "R", "count"])
def _ragged_table_kernel(grid_thw, table, images, R, count, BLOCK: tl.constexpr):
    """The columns of the table that the device knows alone.

    Grids past all reason are cut to 0…2²⁰ and to all ``count`` patches, so that no sum overflows.
    """
    tokens = tl.zeros((), tl.int64)
    patches = tl.zeros((), tl.int64)
    for first in range(0, images, BLOCK):
        i = first + tl.arange(0, BLOCK)
        is_image = i < images
        t = tl.load(grid_thw + 3 * i, mask=is_image, other=0).to(tl.int64)
        h = tl.load(grid_thw + 3 * i + 1, mask=is_image, other=0).to(tl.int64)
        w = tl.load(grid_thw + 3 * i + 2, mask=is_image, other=0).to(tl.int64)
        t = tl.minimum(tl.maximum(t, 0), 1 << 20)
        h = tl.minimum(tl.maximum(h, 0), 1 << 20)
        w = tl.minimum(tl.maximum(w, 0), 1 << 20)
        own = tl.minimum(t * h * w, count)
        before = tl.cumsum(own, 0) - own
        row = table + i * WIDTH
        tl.store(row + GRID_T, t, mask=is_image)
        tl.store(row + GRID_H, h, mask=is_image)
        tl.store(row + GRID_W, w, mask=is_image)
        tl.store(row + FIRST_PATCH, patches + before, mask=is_image)
        tl.store(row + FIRST_TOKEN, tokens + before + (i - first) * R, mask=is_image)
        patches += tl.sum(own, 0)
        tokens += tl.sum(own, 0) + BLOCK * R


@triton.jit(do_not_specialize=[*CUT, "tile_count", "tiles_per_split"])
def _grad_weight_kernel(
    grad, pixels, partial_DK, affine, table, tiles,
    images, steps, M, N, R, count, D, T, H, W, grid_h, grid_w,
    stride_b, stride_c, stride_t, stride_h, stride_w, tile_count, tiles_per_split,
    C: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr, MERGE: tl.constexpr,
    STILL: tl.constexpr, KIND: tl.constexpr, AFFINE: tl.constexpr, PAD_TIME: tl.constexpr, PAD_SPACE: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PREFIX_LAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of ``grad`` transposed times the patches, over the rows of one split."""
    K: tl.constexpr = C * P_t * P_h * P_w
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    d = tl.program_id(0) // tiles_k * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    c, dt, dy, dx, scale_hi, scale_lo, shift_hi, shift_lo = _value(
        k, affine, C, P_t, P_h, P_w, AFFINE
    )
    acc = tl.zeros((BLOCK_D, BLOCK_K), tl.float32)
    start = split * tiles_per_split
    for tile in range(start, tl.minimum(start + tiles_per_split, tile_count)):
        token, image, p, exists, N_i, h, w = _rows(
            tile, table, tiles, images, steps, M, N, R, grid_h, grid_w,
            KIND, PREFIX_LAST, True, BLOCK_M,
        )  # fmt: skip
        is_patch = exists & (p >= 0) & (p < N_i)
        t, y, x = _on_grid(p, h, w, MERGE, STILL)
        source, T_i, H_i, W_i, step_c, step_t, step_h, step_w = _pixels(
            pixels, table, image, T, H, W, stride_c, stride_t, stride_h, stride_w,
            KIND, UNIT, ALIGN,
        )  # fmt: skip
        origin = _origin(
            table, image, p, t, y, x, stride_b, step_t, step_h, step_w,
            S_t, S_h, S_w, KIND, PAD_TIME, STILL,
        )  # fmt: skip
        if KIND == "ragged":
            is_patch &= _field(table, image, FIRST_PATCH) + p < count
        g = tl.load(
            grad + token[:, None] * D + d[None, :],
            mask=is_patch[:, None] & (d < D)[None, :],
            other=0,
        )
        places, valid = _places(
            origin, t, y, x, is_patch[:, None] & (k < K)[None, :], c, dt, dy, dx,
            T_i, H_i, W_i, step_c, step_t, step_h, step_w, S_t, S_h, S_w, PAD_TIME, PAD_SPACE,
        )  # fmt: skip
        v = _normalised(
            source, places, valid, scale_hi, scale_lo, shift_hi, shift_lo, AFFINE, PAD_SPACE, DTYPE
        )
        acc = tl.dot(tl.trans(g), v, acc, input_precision="ieee")
    out_rows = split.to(tl.int64) * D + d
    tl.store(
        partial_DK + out_rows[:, None] * K + k[None, :],
        acc.to(partial_DK.dtype.element_ty),
        mask=(d < D)[:, None] & (k < K)[None, :],
    )


@triton.jit(do_not_specialize=CUT)
def _grad_patches_kernel(
    grad, weight_DK, grad_pixels, affine, table, tiles,
    images, steps, M, N, R, count, D, T, H, W, grid_h, grid_w,
    stride_b, stride_c, stride_t, stride_h, stride_w,
    C: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr, MERGE: tl.constexpr,
    STILL: tl.constexpr, KIND: tl.constexpr, AFFINE: tl.constexpr, PAD_TIME: tl.constexpr, PAD_SPACE: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PREFIX_LAST: tl.constexpr, TO_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``grad`` times the weight, scaled by channel: to the pixels if each is in one patch at most,
    otherwise (and of rows) to rows ``[patches, K]``."""
    K: tl.constexpr = C * P_t * P_h * P_w
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    token, image, p, exists, N, grid_h, grid_w = _rows(
        tile, table, tiles, images, steps, M, N, R, grid_h, grid_w,
        KIND, PREFIX_LAST, True, BLOCK_M,
    )  # fmt: skip
    is_patch = exists & (p >= 0) & (p < N)
    if KIND == "ragged":
        is_patch &= _field(table, image, FIRST_PATCH) + p < count
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        g = tl.load(
            grad + token[:, None] * D + d[None, :],
            mask=is_patch[:, None] & (d < D)[None, :],
            other=0,
        )
        w = tl.load(
            weight_DK + d.to(tl.int64)[:, None] * K + k[None, :],
            mask=(d < D)[:, None] & (k < K)[None, :],
            other=0,
        )
        acc = tl.dot(g, w, acc, input_precision="ieee")
    valid = is_patch[:, None] & (k < K)[None, :]
    c, dt, dy, dx, scale_hi, _, _, _ = _value(k, affine, C, P_t, P_h, P_w, AFFINE)
    if AFFINE != "none":
        acc *= scale_hi[None, :]
    if TO_ROWS:
        if KIND == "dense":
            row = image.to(tl.int64) * N + p
        else:
            row = _field(table, image, FIRST_PATCH) + p
        places = row[:, None] * K + k[None, :]
    else:
        t, y, x = _on_grid(p, grid_h, grid_w, MERGE, STILL)
        grad_pixels, T, H, W, stride_c, stride_t, stride_h, stride_w = _pixels(
            grad_pixels, table, image, T, H, W, stride_c, stride_t, stride_h, stride_w,
            KIND, UNIT, ALIGN,
        )  # fmt: skip
        origin = _origin(
            table, image, p, t, y, x, stride_b, stride_t, stride_h, stride_w,
            S_t, S_h, S_w, KIND, PAD_TIME, STILL,
        )  # fmt: skip
        places, valid = _places(
            origin, t, y, x, valid, c, dt, dy, dx,
            T, H, W, stride_c, stride_t, stride_h, stride_w, S_t, S_h, S_w, PAD_TIME, PAD_SPACE,
        )  # fmt: skip
    tl.store(grad_pixels + places, acc.to(grad_pixels.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N", "T", "H", "W", "grid_t", "grid_h", "grid_w", "blocks"])
def _gather_pixels_kernel(
    rows_MK, grad_pixels, table, N, T, H, W, grid_t, grid_h, grid_w, blocks,
    C: tl.constexpr, P_t: tl.constexpr, P_h: tl.constexpr, P_w: tl.constexpr,
    S_t: tl.constexpr, S_h: tl.constexpr, S_w: tl.constexpr, MERGE: tl.constexpr,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each pixel of contiguous images sums the patches that hold it, in order."""
    K: tl.constexpr = C * P_t * P_h * P_w
    image = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first_patch = image * N
    if KIND == "packed":
        grad_pixels = _field(table, image, POINTER).to(
            tl.pointer_type(grad_pixels.dtype.element_ty)
        )
        T = _field(table, image, FRAMES)
        H = _field(table, image, HEIGHT)
        W = _field(table, image, PIXELS_W)
        grid_t = _field(table, image, GRID_T)
        grid_h = _field(table, image, GRID_H)
        grid_w = _field(table, image, GRID_W)
        first_patch = _field(table, image, FIRST_PATCH)
    else:
        grad_pixels += image * C * T * H * W
    size = tl.cast(C, tl.int64) * T * H * W
    inside = place < size
    x, y = place % W, place // W % H
    t, c = place // W // H % T, place // W // H // T
    total = tl.zeros((BLOCK,), tl.float32)
    for dt in range(P_t):
        # The patch whose frame dt is frame t; of the last frame, or goes on with it: the first such.
        gt = (tl.maximum(t - dt, 0) + S_t - 1) // S_t
        frame = gt * S_t + dt
        fits = inside & (gt < grid_t) & ((frame == t) | ((t == T - 1) & (frame > t)))
        for back_y in range((P_h + S_h - 1) // S_h):
            gy = y // S_h - back_y
            dy = y - gy * S_h
            fits_y = fits & (gy >= 0) & (gy < grid_h) & (dy < P_h)
            for back_x in range((P_w + S_w - 1) // S_w):
                gx = x // S_w - back_x
                dx = x - gx * S_w
                p = first_patch + _in_sequence(gt, gy, gx, grid_h, grid_w, MERGE)
                k = ((c * P_t + dt) * P_h + dy) * P_w + dx
                total += tl.load(
                    rows_MK + p * K + k,
                    mask=fits_y & (gx >= 0) & (gx < grid_w) & (dx < P_w),
                    other=0,
                )
    tl.store(grad_pixels + place, total.to(grad_pixels.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ROWS)
def _sum_patches_kernel(
    grad, partial, table, tiles, images, steps, M, N, R, D, grid_h, grid_w,
    KIND: tl.constexpr, PREFIX_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums the rows of ``grad`` of a tile that are patches."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // tiles_d
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    token, _, p, exists, N, _, _ = _rows(
        tile, table, tiles, images, steps, M, N, R, grid_h, grid_w,
        KIND, PREFIX_LAST, False, BLOCK_M,
    )  # fmt: skip
    is_patch = exists & (p >= 0) & (p < N)
    g = tl.load(
        grad + token[:, None] * D + d[None, :],
        mask=is_patch[:, None] & (d < D)[None, :],
        other=0,
    )
    tl.store(partial + tile.to(tl.int64) * D + d, tl.sum(g.to(tl.float32), 0), mask=d < D)


@triton.jit
def _ceil_div(a, b):
    """Of an ``a`` that may be negative, for division rounds towards zero."""
    return tl.where(a > 0, (a + b - 1) // b, a // b)


@triton.jit
def _reached(
    i, n_out, n_in, MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr
):
    """The range of places to whose position row i of an axis of the table contributes."""
    if MODE == "nearest":
        return _ceil_div(i * n_out, n_in), _ceil_div((i + 1) * n_out, n_in)
    radius: tl.constexpr = 2 if MODE == "bicubic" else 1
    odd: tl.constexpr = 0 if ALIGN_CORNERS else 1
    _, b, step = _scale(0, n_out, n_in, ALIGN_CORNERS, ANTIALIAS)
    a = tl.where(n_out > 1, n_in - 1, 0) if ALIGN_CORNERS else n_in
    # |(2i+odd)·b - (2y+odd)·a| < radius·step, solved for y; a = 0: every y or none, the weight says.
    low = (2 * i + odd) * b - radius * step - odd * a
    high = (2 * i + odd) * b + radius * step - odd * a
    start = tl.where(a > 0, _ceil_div(low, tl.maximum(2 * a, 1)), 0)
    end = tl.where(a > 0, _ceil_div(high, tl.maximum(2 * a, 1)), n_out)
    if not ANTIALIAS:  # taps beside the table are its first and last row
        start = tl.where(i == 0, 0, start)
        end = tl.where(i == n_in - 1, n_out, end)
    return tl.minimum(tl.maximum(start, 0), n_out), tl.minimum(tl.maximum(end, 0), n_out)


@triton.jit
def _weight_at(
    y, i, n_out, n_in,
    MODE: tl.constexpr, ALIGN_CORNERS: tl.constexpr, ANTIALIAS: tl.constexpr,
):  # fmt: skip
    """The share of row i of an axis of the table in position y."""
    at, b, step = _scale(y, n_out, n_in, ALIGN_CORNERS, ANTIALIAS)
    w = _filter(i, at, b, step, MODE, ALIGN_CORNERS, ANTIALIAS)
    if ANTIALIAS:
        first, end = _taps(at, b, step, n_in, MODE, ALIGN_CORNERS, ANTIALIAS)
        w = _divide(w, _total(first, end, at, b, step, MODE, ALIGN_CORNERS, ANTIALIAS))
    else:  # taps beside the table are its first and last row
        for beside in tl.static_range(1, 3 if MODE == "bicubic" else 2):
            if i == 0:
                w += _filter(-beside, at, b, step, MODE, ALIGN_CORNERS, ANTIALIAS)
            if i == n_in - 1:
                w += _filter(n_in - 1 + beside, at, b, step, MODE, ALIGN_CORNERS, ANTIALIAS)
    return w


@triton.jit(do_not_specialize=TABLE)
def _grad_table_kernel(
    grad, partial, table, images, images_per_split, tokens, R, D, rows, columns,
    grid_t, grid_h, grid_w,
    KIND: tl.constexpr, POSITION: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    ANTIALIAS: tl.constexpr, MERGE: tl.constexpr, PREFIX_LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of a table: the sum, image by image, of all patches whose position it is part of."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    i = tl.program_id(0) // tiles_d // columns
    j = tl.program_id(0) // tiles_d % columns
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    start = split * images_per_split
    for image in range(start, tl.minimum(start + images_per_split, images)):
        first = tl.cast(0 if PREFIX_LAST else R, tl.int64)
        t, h, w = grid_t, grid_h, grid_w
        if KIND != "dense":
            t = _field(table, image, GRID_T).to(tl.int32)
            h = _field(table, image, GRID_H).to(tl.int32)
            w = _field(table, image, GRID_W).to(tl.int32)
            first += _field(table, image, FIRST_TOKEN)
        y0, y1, x0, x1 = i, tl.minimum(i + 1, h), j, tl.minimum(j + 1, w)
        if POSITION == "rows":
            x0, x1 = 0 * w, w
        elif POSITION == "columns":
            y0, y1 = 0 * h, h
        else:
            y0, y1 = _reached(i, h, rows, POSITION, ALIGN_CORNERS, ANTIALIAS)
            x0, x1 = _reached(j, w, columns, POSITION, ALIGN_CORNERS, ANTIALIAS)
        high, wide = tl.maximum(y1 - y0, 0), tl.maximum(x1 - x0, 0)
        places = tl.minimum(tl.cast(t, tl.int64) * high * wide, tokens).to(tl.int32)
        for q0 in range(0, places, BLOCK_Q):
            q = q0 + tl.arange(0, BLOCK_Q)
            y = y0 + q // tl.maximum(wide, 1) % tl.maximum(high, 1)
            x = x0 + q % tl.maximum(wide, 1)
            p = _in_sequence(q // tl.maximum(wide * high, 1), y, x, h, w, MERGE)
            token = first + p
            mask = (q < places) & (token >= 0) & (token < tokens)
            g = tl.load(
                grad + token[:, None] * D + d[None, :],
                mask=mask[:, None] & (d < D)[None, :],
                other=0,
            ).to(tl.float32)
            if POSITION != "rows" and POSITION != "columns" and POSITION != "nearest":
                share = _weight_at(y, i, h, rows, POSITION, ALIGN_CORNERS, ANTIALIAS)
                share *= _weight_at(x, j, w, columns, POSITION, ALIGN_CORNERS, ANTIALIAS)
                g *= tl.where(mask, share, 0.0)[:, None]
            acc += tl.sum(g, 0)
    row = (split.to(tl.int64) * rows + i) * columns + j
    tl.store(partial + row * D + d, acc, mask=d < D)


@triton.jit(do_not_specialize=["images", "tokens", "R", "rows"])
def _grad_fixed_kernel(
    grad, out, table, images, tokens, R, D, rows,
    MERGE: tl.constexpr, PREFIX_LAST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of a table that is not resampled: the sum of its one token in every image."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    s = tl.program_id(0) // tiles_d
    d = tl.program_id(0) % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, images, BLOCK_Q):
        image = first + tl.arange(0, BLOCK_Q)
        row = table + image * WIDTH
        is_image = image < images
        t = tl.load(row + GRID_T, mask=is_image, other=1)
        h = tl.load(row + GRID_H, mask=is_image, other=MERGE)
        w = tl.load(row + GRID_W, mask=is_image, other=MERGE)
        N = t * h * w
        raster = s - (0 * N if PREFIX_LAST else rows - N)
        is_patch = (raster >= 0) & (raster < N)
        area, wide = tl.maximum(h * w, 1), tl.maximum(w, 1)
        p = _in_sequence(raster // area, raster % area // wide, raster % wide, h, w, MERGE)
        of_patch = p + (0 if PREFIX_LAST else R)
        token = tl.load(row + FIRST_TOKEN, mask=is_image, other=0) + tl.where(is_patch, of_patch, s)
        g = tl.load(
            grad + token[:, None] * D + d[None, :],
            mask=(is_image & (token >= 0) & (token < tokens))[:, None] & (d < D)[None, :],
            other=0,
        )
        acc += tl.sum(g.to(tl.float32), 0)
    tl.store(out + s.to(tl.int64) * D + d, acc.to(out.dtype.element_ty), mask=d < D)
