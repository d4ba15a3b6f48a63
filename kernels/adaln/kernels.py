"""The two kernels of the three operations, and the second stage of their sums.

    y = x[subset] + gate * branch                        RESIDUAL; without it y = x[subset]
    u = LayerNorm(y) * (1 + scale) + shift               NORM; LayerNorm without affine

forward_kernel computes y and u, and saves the mean and 1/std of each row. With g = du (1 + scale) and n = LayerNorm(y),
backward_kernel reads dy, du, y and branch once and computes

    dY = dy + rstd (g - mean(g) - n mean(g n)),  dx = dY,  dbranch = gate dY
    dshift = sum(du),  dscale = sum(n du),  dgate = sum(branch dY)                     over the rows of an image

dx has N rows. A program owns rows of x and looks each of them up in the subset, so the rows outside the subset are set
to zero in the same pass. A program sums over its ROWS rows in registers and writes one partial sum per vector;
sums_kernel adds the partial sums of an image in a fixed order. No atomics are used, so results are reproducible bit for
bit.

A whole row is held in registers, as a tuple of tiles of BLOCK columns. BLOCK is the number of elements that the lanes
of a row load with 16 bytes each, so a row of 1152 takes 5 tiles of 256 instead of a power of two. Where one warp holds
a row, warps do not wait for each other before the end of the program. Arithmetic is in float32.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(offs, SIZE: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr):
    """Mask of the tile's columns that lie inside the row; a constant where all do."""
    if START + BLOCK <= SIZE:
        return tl.full((BLOCK,), 1, tl.int1)
    else:
        return offs < SIZE


@triton.jit
def _load_rows(base, at, live, D: tl.constexpr, BLOCK: tl.constexpr):
    """Load the rows that begin at offsets `at` (ROWS,), as a tuple of (ROWS, BLOCK) tiles; masked elements are 0."""
    tiles = ()
    for d in tl.static_range(0, D, BLOCK):
        cols = d + tl.arange(0, BLOCK)
        mask = live[:, None] & _inside(cols, D, BLOCK, d)[None, :]
        tiles = tiles + (tl.load(base + (at[:, None] + cols[None, :]), mask=mask, other=0.0),)
    return tiles


@triton.jit
def _load_vector(base, live, D: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr):
    """Load BLOCK columns of one vector for every row. Each warp loads them itself, all but the first time from L1."""
    cols = START + tl.arange(0, BLOCK)
    mask = live[:, None] & _inside(cols, D, BLOCK, START)[None, :]
    at = tl.zeros((live.shape[0], 1), tl.int32) + cols[None, :]
    return tl.load(base + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(base, at, values, live, D: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr):
    cols = START + tl.arange(0, BLOCK)
    mask = live[:, None] & _inside(cols, D, BLOCK, START)[None, :]
    tl.store(base + (at[:, None] + cols[None, :]), values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(tiles, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and 1/std of rows, in two passes over the registers.

    The row's first element is subtracted first, so a constant row of any size has variance 0 exactly.
    """
    head = tl.where((tl.arange(0, BLOCK) == 0)[None, :], tiles[0].to(tl.float32), 0.0)
    first = tl.sum(head, axis=1)
    total = tl.zeros(tiles[0].shape, tl.float32)
    for s in tl.static_range(len(tiles)):
        inside = _inside(s * BLOCK + tl.arange(0, BLOCK), D, BLOCK, s * BLOCK)[None, :]
        total += tl.where(inside, tiles[s].to(tl.float32) - first[:, None], 0.0)
    mu = tl.sum(total, axis=1) / D
    total = tl.zeros(tiles[0].shape, tl.float32)
    for s in tl.static_range(len(tiles)):
        inside = _inside(s * BLOCK + tl.arange(0, BLOCK), D, BLOCK, s * BLOCK)[None, :]
        centered = tl.where(inside, tiles[s].to(tl.float32) - first[:, None] - mu[:, None], 0.0)
        total += centered * centered
    variance = tl.sum(total, axis=1) / D
    return first + mu, tl.rsqrt(variance + eps)


@triton.jit
def forward_kernel(
    x, branch, gate, shift, scale, subset, y, u, mean, rstd,
    stride_xb, stride_xn, stride_bb, stride_bk, stride_gate, stride_shift, stride_scale, stride_subset, K, eps,
    D: tl.constexpr, HAS_SUBSET: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one image's output; grid (images * ceil(K / ROWS),)."""
    groups = tl.cdiv(K, ROWS)
    b = (tl.program_id(0) // groups).to(tl.int64)
    k = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)
    live = k < K
    if HAS_SUBSET:
        n = tl.load(subset + b * stride_subset + k, mask=live, other=0)
    else:
        n = k
    out = (b * K + k) * D
    tiles = _load_rows(x, b * stride_xb + n.to(tl.int64) * stride_xn, live, D, BLOCK)
    if RESIDUAL:
        added = _load_rows(branch, b * stride_bb + k.to(tl.int64) * stride_bk, live, D, BLOCK)
        sums = ()
        for s in tl.static_range(len(tiles)):
            gates = _load_vector(gate + b * stride_gate, live, D, BLOCK, s * BLOCK)
            total = tiles[s].to(tl.float32) + gates * added[s].to(tl.float32)
            sums = sums + (
                total.to(y.dtype.element_ty),
            )  # Rounded as stored: the backward normalizes the stored values.
            _store(y, out, sums[s], live, D, BLOCK, s * BLOCK)
        tiles = sums
    if NORM:
        mu, inverse = _statistics(tiles, eps, D, BLOCK)
        tl.store(mean + b * K + k, mu, mask=live)
        tl.store(rstd + b * K + k, inverse, mask=live)
        for s in tl.static_range(len(tiles)):
            shifts = _load_vector(shift + b * stride_shift, live, D, BLOCK, s * BLOCK)
            modulation = 1.0 + _load_vector(scale + b * stride_scale, live, D, BLOCK, s * BLOCK)
            normed = (tiles[s].to(tl.float32) - mu[:, None]) * inverse[:, None]
            _store(u, out, normed * modulation + shifts, live, D, BLOCK, s * BLOCK)


@triton.jit
def _add(sums, s: tl.constexpr, value):
    """The tuple `sums` with `value` added to its entry s."""
    out = ()
    for i in tl.static_range(len(sums)):
        if i == s:
            out = out + (sums[i] + value,)
        else:
            out = out + (sums[i],)
    return out


@triton.jit
def _zeros(D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(0, D, BLOCK):
        tiles = tiles + (tl.zeros((ROWS, BLOCK), tl.float32),)
    return tiles


@triton.jit
def _store_part(base, sums, D: tl.constexpr, BLOCK: tl.constexpr):
    for s in tl.static_range(len(sums)):
        cols = s * BLOCK + tl.arange(0, BLOCK)
        tl.store(base + cols, tl.sum(sums[s], axis=0), mask=_inside(cols, D, BLOCK, s * BLOCK))


@triton.jit
def backward_kernel(
    dy, du, y, branch, gate, scale, mean, rstd, subset, dx, dbranch, parts,
    stride_dyb, stride_dyk, stride_dub, stride_duk, stride_yb, stride_yn, stride_bb, stride_bk,
    stride_gate, stride_scale, stride_subset, N, K,
    D: tl.constexpr, HAS_SUBSET: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DX: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x of one image, TILE at a time; grid (images * ceil(N / ROWS),).

    y is the input of the normalization: (B, K, D) with RESIDUAL, else x itself, (B, N, D). `parts` is (images, groups,
    2 * NORM + RESIDUAL, D) and receives the partial sums of dshift, dscale and dgate.
    """
    groups = tl.cdiv(N, ROWS)
    b = (tl.program_id(0) // groups).to(tl.int64)
    begin = (tl.program_id(0) % groups) * ROWS
    dshift = _zeros(D, TILE, BLOCK)
    dscale = _zeros(D, TILE, BLOCK)
    dgate = _zeros(D, TILE, BLOCK)
    for i in tl.range(0, ROWS, TILE, num_stages=STAGES):
        n = begin + i + tl.arange(0, TILE)
        owned = n < N
        if HAS_SUBSET:
            # The position of each row in the subset, or -1. Comparing is cheaper than an inverse table. This is inlined
            # because torch.compile would conclude from a function's result that the subset is written to.
            k = tl.full((TILE,), -1, tl.int32)
            for start in range(0, K, BLOCK_K):
                place = start + tl.arange(0, BLOCK_K)
                kept = tl.load(subset + b * stride_subset + place, mask=place < K, other=-1).to(tl.int32)
                found = tl.where(kept[None, :] == n[:, None], place[None, :], -1)
                k = tl.maximum(k, tl.max(found, axis=1))
            live = owned & (k >= 0)
        else:
            k = n
            live = owned
        at = k.to(tl.int64)
        if HAS_DY:
            residual = _load_rows(dy, b * stride_dyb + at * stride_dyk, live, D, BLOCK)
        if RESIDUAL:
            added = _load_rows(branch, b * stride_bb + at * stride_bk, live, D, BLOCK)
        if NORM:
            grads = _load_rows(du, b * stride_dub + at * stride_duk, live, D, BLOCK)
            source = at if RESIDUAL else n.to(tl.int64)
            tiles = _load_rows(y, b * stride_yb + source * stride_yn, live, D, BLOCK)
            mu = tl.load(mean + b * K + at, mask=live, other=0.0)[:, None]
            inverse = tl.load(rstd + b * K + at, mask=live, other=0.0)[:, None]
            along = tl.zeros((TILE, BLOCK), tl.float32)
            middle = tl.zeros((TILE, BLOCK), tl.float32)
            for s in tl.static_range(len(tiles)):
                modulation = 1.0 + _load_vector(scale + b * stride_scale, live, D, BLOCK, s * BLOCK)
                grad = grads[s].to(tl.float32)
                normed = (tiles[s].to(tl.float32) - mu) * inverse
                dshift = _add(dshift, s, grad)
                dscale = _add(dscale, s, grad * normed)
                middle += grad * modulation
                along += grad * modulation * normed
            middle = tl.sum(middle, axis=1)[:, None] / D
            along = tl.sum(along, axis=1)[:, None] / D
        for s in tl.static_range(0, (D + BLOCK - 1) // BLOCK):
            total = tl.zeros((TILE, BLOCK), tl.float32)
            if NORM:
                modulation = 1.0 + _load_vector(scale + b * stride_scale, live, D, BLOCK, s * BLOCK)
                normed = (tiles[s].to(tl.float32) - mu) * inverse
                total = inverse * (grads[s].to(tl.float32) * modulation - middle - normed * along)
            if HAS_DY:
                total += residual[s].to(tl.float32)
            if RESIDUAL:
                gates = _load_vector(gate + b * stride_gate, live, D, BLOCK, s * BLOCK)
                _store(dbranch, (b * K + at) * D, total * gates, live, D, BLOCK, s * BLOCK)
                dgate = _add(dgate, s, total * added[s].to(tl.float32))
            if HAS_DX:
                _store(dx, (b * N + n) * D, total, owned, D, BLOCK, s * BLOCK)
    parts += tl.program_id(0).to(tl.int64) * ((2 * NORM + RESIDUAL) * D)
    if NORM:
        _store_part(parts, dshift, D, BLOCK)
        _store_part(parts + D, dscale, D, BLOCK)
    if RESIDUAL:
        _store_part(parts + 2 * NORM * D, dgate, D, BLOCK)


@triton.jit
def sums_kernel(
    parts, first, second, third, groups,
    D: tl.constexpr, VECTORS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a tile of one vector over the partial sums of its image; grid (images * VECTORS * tiles of D,)."""
    tiles: tl.constexpr = (D + BLOCK - 1) // BLOCK
    b = (tl.program_id(0) // (VECTORS * tiles)).to(tl.int64)
    vector = tl.program_id(0) // tiles % VECTORS
    cols = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < D
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for start in range(0, groups, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = ((b * groups + p) * VECTORS + vector)[:, None] * D + cols[None, :]
        total += tl.load(parts + at, mask=(p < groups)[:, None] & inside[None, :], other=0.0)
    summed = tl.sum(total, axis=0)
    if vector == 0:
        tl.store(first + b * D + cols, summed.to(first.dtype.element_ty), mask=inside)
    if VECTORS > 1:  # torch.compile takes every pointer that occurs in a store for a result, so absent ones must not.
        if vector == 1:
            tl.store(second + b * D + cols, summed.to(second.dtype.element_ty), mask=inside)
    if VECTORS > 2:
        if vector == 2:
            tl.store(third + b * D + cols, summed.to(third.dtype.element_ty), mask=inside)
