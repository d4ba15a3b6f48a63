"""Token mixing fused with the row gather: only the kept rows of the mixed tokens are written.

    out[b, k] = x[b, n] + gate[b] * (w2[n] @ H[b] + b2[n]),   n = subset[b, k]
    H = gelu(A),   A = w1 @ (LayerNorm(x) * (1 + scale) + shift) + b1      (T, D) per image, along the token axis

The modulation is constant along the tokens, so it can be applied after the product: with Z = w1 @ LayerNorm(x), A = Z *
(1 + scale) + rowsum(w1) * shift + b1. All of this is independent for every column of D. The forward is two launches:

    statistics  reads x, writes the mean and 1/std of each row
    mix         reads x by (image, tile of D), holds Z and H on the chip, writes the kept rows

The backward is three or four launches, which recompute H (only the statistics are saved). With
Q = w2[kept]^T @ dout and S = dA (1 + scale):

    hidden      reads x and dout by (image, tile of D): dgate = sum(H Q) + sum(b2 dout), dA = gate Q gelu'(A),
                dshift = sum(rowsum(w1) dA), dscale = sum(Z dA); writes gate H and S (T, D), and each kept row's sum of
                gate dout over the tile
    tokens      reads x, dout, gate H, S by (tile of N, images): first dw1 = S LayerNorm(x)^T, from which follows
                mean(LayerNorm(x) w1^T S) = sum(w1 dw1) / D; then, reading x and S again from L2, dw2, db2 and
                dx = dout + rstd (w1^T S - mean(w1^T S) - LayerNorm(x) mean(LayerNorm(x) w1^T S)).
                These are two launches where T > 128 or the products are in float32
    sums        adds the partial sums of dw1, db1, dw2 and db2 in a fixed order, so results are reproducible bit for
                bit, and writes them in the dtypes of the weights

Products take both operands in one dtype, x's or autocast's, and accumulate in float32; all other arithmetic is float32.
"""

import triton
import triton.language as tl


@triton.jit
def _row_piece(start, d, live, D, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load (STEPS, ROWS, BLOCK_D) values of the rows from column d on, in float32, with the mask of valid values."""
    offs_d = d + tl.arange(0, STEPS)[:, None, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    inside = live[None, :, None] & (offs_d < D)
    return tl.load(start[None, :, None] + offs_d, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def _row_sums(v):
    return tl.sum(tl.sum(v, axis=0), axis=1)


@triton.jit
def statistics_kernel(
    x, mean, rstd, stride_xb, stride_xn, total, N, D, eps,
    WHOLE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; one pass over memory where a row fits STEPS * BLOCK_D columns (WHOLE), several otherwise.

    A row is cut into STEPS pieces that one warp loads with 16 bytes per lane. The tile is (STEPS, ROWS, BLOCK_D), so
    each warp has rows of its own, sums stay within a warp, and all loads of a row are in flight together.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < total
    start = x + (row // N) * stride_xb + (row % N) * stride_xn
    v, inside = _row_piece(start, 0, live, D, STEPS, ROWS, BLOCK_D)
    # The row's first element is subtracted first, so a constant row of any size has variance 0 exactly.
    at_start = (tl.arange(0, STEPS)[:, None, None] == 0) & (tl.arange(0, BLOCK_D)[None, None, :] == 0)
    first = _row_sums(tl.where(at_start, v, 0.0))
    v = tl.where(inside, v - first[None, :, None], 0.0)
    mu = _row_sums(v)
    if WHOLE:
        mu = mu / D
        v = tl.where(inside, v - mu[None, :, None], 0.0)
        var = _row_sums(v * v)
    else:
        for d in range(STEPS * BLOCK_D, D, STEPS * BLOCK_D):
            v, inside = _row_piece(start, d, live, D, STEPS, ROWS, BLOCK_D)
            mu += _row_sums(tl.where(inside, v - first[None, :, None], 0.0))
        mu = mu / D
        var = tl.zeros((ROWS,), tl.float32)
        for d in range(0, D, STEPS * BLOCK_D):
            v, inside = _row_piece(start, d, live, D, STEPS, ROWS, BLOCK_D)
            v = tl.where(inside, v - first[None, :, None] - mu[None, :, None], 0.0)
            var += _row_sums(v * v)
    tl.store(mean + row, first + mu, mask=live)
    tl.store(rstd + row, tl.rsqrt(var / D + eps), mask=live)


@triton.jit
def _dot(a, b, total, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, with operands rounded to PRODUCT_DTYPE and accumulation in float32."""
    a = a.to(PRODUCT_DTYPE)
    b = b.to(PRODUCT_DTYPE)
    if PRECISION == "widened":  # Triton's interpreter multiplies the bit patterns of bfloat16 operands.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _dot_vector(a, vector, total, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ vector, repeated in 16 columns for the matrix units, which read `a` directly from shared memory.

    Where `a` has to be converted, or split for TF32, it is in registers anyway, and is summed there.
    """
    if a.dtype == PRODUCT_DTYPE and PRODUCT_DTYPE != tl.float32:
        columns = tl.broadcast_to(vector.to(PRODUCT_DTYPE)[:, None], (vector.shape[0], 16))
        return _dot(a, columns, total, PRODUCT_DTYPE, PRECISION)
    else:
        return total + tl.sum(a.to(PRODUCT_DTYPE).to(tl.float32) * vector[None, :], axis=1)[:, None]


@triton.jit
def _column(columns):
    """The vector that is repeated in 16 equal columns."""
    return tl.sum(columns, axis=1) / 16


@triton.jit
def _gelu(a):
    """GELU, tanh form: a * sigmoid(2 z), z = sqrt(2 / pi) (a + 0.044715 a^3)."""
    return a * tl.sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * a * a))


@triton.jit
def _gelu_and_slope(a):
    s = tl.sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * a * a))
    # Beyond |a| = 15 the sigmoid is 0 or 1 and its slope 0; the clamp avoids inf * 0 in the product.
    c = tl.minimum(tl.maximum(a, -15.0), 15.0)
    slope = s + s * (1.0 - s) * 1.5957691216057308 * c * (1.0 + 0.134145 * c * c)
    return a * s, slope


@triton.jit
def _inside(offs, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Mask of a block's offsets below SIZE; a constant where SIZE is a multiple of BLOCK."""
    if SIZE % BLOCK == 0:
        return tl.full((BLOCK,), 1, tl.int1)
    else:
        return offs < SIZE


@triton.jit
def _load_rows(base, offs_n, offs_d, stride_n, in_n, in_d):
    """Load a tile of token rows; masked elements are 0."""
    at = offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    return tl.load(base + at, mask=in_n[:, None] & in_d[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, offs_n, offs_d, stride_n, in_n, in_d):
    """Store a tile of token rows as its transpose.

    AMD's compiler would otherwise store 8 bytes at a time, because of the layout of the product in registers.
    """
    at = offs_n.to(tl.int64)[None, :] * stride_n + offs_d[:, None]
    tl.store(base + at, tl.trans(rows.to(base.dtype.element_ty)), mask=in_n[None, :] & in_d[:, None])


@triton.jit
def _load_matrix(base, offs_r, offs_c, pitch, in_r, in_c):
    """Load a tile of a small dense matrix; masked elements are 0."""
    return tl.load(base + offs_r[:, None] * pitch + offs_c[None, :], mask=in_r[:, None] & in_c[None, :], other=0.0)


@triton.jit
def _load_vector(base, offs, inside):
    return tl.load(base + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _kept_rows(subset, offs_k, K, HAS_SUBSET: tl.constexpr):
    """The token index of each kept row."""
    if HAS_SUBSET:
        rows = tl.load(subset + offs_k, mask=offs_k < K, other=0)
    else:
        rows = offs_k
    return rows.to(tl.int32)


@triton.jit
def _first_product(
    x, mean, rstd, w1, stride_xn, offs_d, in_d, offs_t, in_t,
    N: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Z = w1 @ LayerNorm(x) for a tile of D, and the row sums of w1."""
    z = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    w1_sum = tl.zeros((BLOCK_T, 16), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        in_n = _inside(offs_n, N, BLOCK_N)
        rows = _load_rows(x, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
        normed = (rows - _load_vector(mean, offs_n, in_n)[:, None]) * _load_vector(rstd, offs_n, in_n)[:, None]
        w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n)
        z = _dot(w1_tile, normed, z, PRODUCT_DTYPE, PRECISION)
        w1_sum = _dot_vector(w1_tile, tl.full((BLOCK_N,), 1.0, tl.float32), w1_sum, PRODUCT_DTYPE, PRECISION)
    return z, _column(w1_sum)


@triton.jit
def mix_kernel(
    x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, subset, out,
    stride_xb, stride_xn, stride_shift, stride_scale, stride_gate, stride_subset, K,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute a tile of D of one image; grid (images * tiles of D,), with the tiles of an image next to each other.

    The images are taken in reverse order, because the last ones that `statistics` has read are still in L2.
    """
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (place // tiles).to(tl.int64)
    offs_d = (place % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    in_d = _inside(offs_d, D, BLOCK_D)
    in_t = _inside(offs_t, T, BLOCK_T)
    x += b * stride_xb
    z, w1_sum = _first_product(
        x, mean + b * N, rstd + b * N, w1, stride_xn, offs_d, in_d, offs_t, in_t, N, PRODUCT_DTYPE, PRECISION,
        BLOCK_N, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    modulation = 1.0 + _load_vector(scale + b * stride_scale, offs_d, in_d)
    shifts = _load_vector(shift + b * stride_shift, offs_d, in_d)
    bias_t = _load_vector(b1, offs_t, in_t)
    h = _gelu(z * modulation[None, :] + w1_sum[:, None] * shifts[None, :] + bias_t[:, None]).to(PRODUCT_DTYPE)

    gates = _load_vector(gate + b * stride_gate, offs_d, in_d)
    out += b * K * D
    if HAS_SUBSET:
        subset += b * stride_subset
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        kept = _kept_rows(subset, offs_k, K, HAS_SUBSET)
        w2_tile = _load_matrix(w2, kept, offs_t, T, in_k, in_t)
        y = _load_vector(b2, kept, in_k)[:, None] + tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        y = gates[None, :] * _dot(w2_tile, h, y, PRODUCT_DTYPE, PRECISION)
        y += _load_rows(x, kept, offs_d, stride_xn, in_k, in_d).to(tl.float32)
        _store_rows(out, y, offs_k, offs_d, D, in_k, in_d)


@triton.jit
def hidden_grad_kernel(
    dout, x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, subset,
    dshift, dscale, dgate, hidden, ds, sums, gated,
    stride_gb, stride_gk, stride_xb, stride_xn, stride_shift, stride_scale, stride_gate, stride_subset, K,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of D of one image; grid (images * tiles of D,)."""
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part = tl.program_id(0).to(tl.int64)
    b = part // tiles
    offs_d = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    in_d = _inside(offs_d, D, BLOCK_D)
    in_t = _inside(offs_t, T, BLOCK_T)
    x += b * stride_xb
    dout += b * stride_gb
    gated += part * K
    if HAS_SUBSET:
        subset += b * stride_subset
    gates = _load_vector(gate + b * stride_gate, offs_d, in_d)
    modulation = 1.0 + _load_vector(scale + b * stride_scale, offs_d, in_d)
    shifts = _load_vector(shift + b * stride_shift, offs_d, in_d)
    bias_t = _load_vector(b1, offs_t, in_t)

    q = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    biased = tl.zeros((BLOCK_D, 16), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        kept = _kept_rows(subset, offs_k, K, HAS_SUBSET)
        bias_k = _load_vector(b2, kept, in_k)
        grads = _load_rows(dout, offs_k, offs_d, stride_gk, in_k, in_d)
        w2_tile = _load_matrix(w2, kept, offs_t, T, in_k, in_t).to(PRODUCT_DTYPE)
        q = _dot(tl.trans(w2_tile), grads, q, PRODUCT_DTYPE, PRECISION)
        biased = _dot_vector(tl.trans(grads), bias_k, biased, PRODUCT_DTYPE, PRECISION)
        along_d = _dot_vector(grads, gates, tl.zeros((BLOCK_K, 16), tl.float32), PRODUCT_DTYPE, PRECISION)
        tl.store(gated + offs_k, _column(along_d), mask=in_k)

    z, w1_sum = _first_product(
        x, mean + b * N, rstd + b * N, w1, stride_xn, offs_d, in_d, offs_t, in_t, N, PRODUCT_DTYPE, PRECISION,
        BLOCK_N, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    h, slope = _gelu_and_slope(z * modulation[None, :] + w1_sum[:, None] * shifts[None, :] + bias_t[:, None])
    dgates = _column(biased) + tl.sum(h * q, axis=0)
    tl.store(dgate + b * D + offs_d, dgates.to(dgate.dtype.element_ty), mask=in_d)
    at = b * T * D + (offs_t[:, None] * D + offs_d[None, :])
    tl.store(hidden + at, (h * gates[None, :]).to(PRODUCT_DTYPE), mask=in_t[:, None] & in_d[None, :])

    da = q * gates[None, :] * slope
    dshifts = tl.sum(da * w1_sum[:, None], axis=0)
    tl.store(dshift + b * D + offs_d, dshifts.to(dshift.dtype.element_ty), mask=in_d)
    tl.store(dscale + b * D + offs_d, tl.sum(da * z, axis=0).to(dscale.dtype.element_ty), mask=in_d)
    sums += part * 3 * T + offs_t
    tl.store(sums, tl.sum(da, axis=1), mask=in_t)
    tl.store(sums + T, tl.sum(da * shifts[None, :], axis=1), mask=in_t)
    s = (da * modulation[None, :]).to(PRODUCT_DTYPE)
    # The sums are of the rounded S, so that the mean which LayerNorm's gradient subtracts is exactly that of S.
    tl.store(sums + 2 * T, tl.sum(s.to(tl.float32), axis=1), mask=in_t)
    tl.store(ds + at, s, mask=in_t[:, None] & in_d[None, :])


@triton.jit
def token_grad_kernel(
    dout, x, mean, rstd, w1, subset, hidden, ds, sums, gated, dx, dw1, db1, dw2, db2,
    stride_gb, stride_gk, stride_xb, stride_xn, stride_subset, B, K, tiles, images,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a tile of tokens for a few images; grid (groups of images * tiles of N,).

    FIRST computes dx, dw1 and db1, the gradients through the first product. SECOND computes dw2 and db2. Every product
    has T or BLOCK_D rows, so that a tile of few tokens also fills Hopper's matrix instructions. It reads S and H
    directly from shared memory, and dout too where no conversion is needed.
    """
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    BLOCK_P: tl.constexpr = 32  # Partial sums of `hidden` added at a time, so that their loads overlap.
    group = tl.program_id(0) // blocks
    tile = tl.program_id(0) % blocks
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    in_n = _inside(offs_n, N, BLOCK_N)
    in_t = _inside(offs_t, T, BLOCK_T)
    if FIRST:
        if tile == 0:  # The sum of dA, for all programs of the group. Before the loop, which needs all registers.
            db1_part = tl.zeros((BLOCK_T,), tl.float32)
            start = group.to(tl.int64) * images * tiles
            parts = tl.minimum(images, B - group * images) * tiles
            for p in range(0, parts, BLOCK_P):
                offs_p = p + tl.arange(0, BLOCK_P)
                at = (start + offs_p)[:, None] * 3 * T + offs_t[None, :]
                inside = (offs_p < parts)[:, None] & in_t[None, :]
                db1_part += tl.sum(tl.load(sums + at, mask=inside, other=0.0), axis=0)
            tl.store(db1 + group.to(tl.int64) * T + offs_t, db1_part, mask=in_t)
        w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT_DTYPE)
        dw1_tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if SECOND:
        dw2_tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        db2_tile = tl.zeros((BLOCK_N,), tl.float32)
    for image in range(0, tl.minimum(images, B - group * images)):
        b = group.to(tl.int64) * images + image
        if FIRST:
            mu = _load_vector(mean + b * N, offs_n, in_n)
            inverse = _load_vector(rstd + b * N, offs_n, in_n)
        # The position of each token in the subset, or -1. Comparing is cheaper than an inverse table in memory.
        if HAS_SUBSET:
            slot = tl.full((BLOCK_N,), -1, tl.int32)
            for k in range(0, K, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                kept = tl.load(subset + b * stride_subset + offs_k, mask=offs_k < K, other=-1).to(tl.int32)
                found = tl.where(kept[None, :] == offs_n[:, None], offs_k[None, :], -1)
                slot = tl.maximum(slot, tl.max(found, axis=1))
        else:
            slot = offs_n
        is_kept = (slot >= 0) & in_n
        shifted = tl.zeros((BLOCK_T,), tl.float32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        for p in range(0, tiles, BLOCK_P):
            offs_p = p + tl.arange(0, BLOCK_P)
            in_p = offs_p < tiles
            part = b * tiles + offs_p
            if SECOND:
                at = part[:, None] * K + slot[None, :]
                db2_tile += tl.sum(tl.load(gated + at, mask=in_p[:, None] & is_kept[None, :], other=0.0), axis=0)
            if FIRST:
                at = part[:, None] * 3 * T + offs_t[None, :]
                shifted += tl.sum(tl.load(sums + T + at, mask=in_p[:, None] & in_t[None, :], other=0.0), axis=0)
                total += tl.sum(tl.load(sums + 2 * T + at, mask=in_p[:, None] & in_t[None, :], other=0.0), axis=0)
        if FIRST:
            mean_grad = tl.sum(w1_tile.to(tl.float32) * total[:, None], axis=0) / D
            s_normed = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                in_d = _inside(offs_d, D, BLOCK_D)
                s = _load_matrix(ds + b * T * D, offs_t, offs_d, D, in_t, in_d)
                rows = _load_rows(x + b * stride_xb, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
                normed = (rows - mu[:, None]) * inverse[:, None]
                s_normed = _dot(s, tl.trans(normed.to(PRODUCT_DTYPE)), s_normed, PRODUCT_DTYPE, PRECISION)
            dw1_tile += s_normed + shifted[:, None]
            if BLOCK_T > 128:  # An operand of this width would spill if it were kept in registers across the loops.
                w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT_DTYPE)
            # The mean of LayerNorm(x) w1^T S along D follows from the product, without a second pass over N x D.
            mean_normed_grad = tl.sum(w1_tile.to(tl.float32) * s_normed, axis=0) / D

        # Second reading of x and S: the rows of this program are still in L2.
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            in_d = _inside(offs_d, D, BLOCK_D)
            grads = _load_rows(dout + b * stride_gb, slot, offs_d, stride_gk, is_kept, in_d)
            if SECOND:
                h = _load_matrix(hidden + b * T * D, offs_t, offs_d, D, in_t, in_d)
                dw2_tile = _dot(h, tl.trans(grads.to(PRODUCT_DTYPE)), dw2_tile, PRODUCT_DTYPE, PRECISION)
            if FIRST:
                s = _load_matrix(ds + b * T * D, offs_t, offs_d, D, in_t, in_d)
                if BLOCK_T > 128:
                    w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT_DTYPE)
                if BLOCK_N >= 64:
                    dnormed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                    dnormed = _dot(tl.trans(w1_tile), s, dnormed, PRODUCT_DTYPE, PRECISION)
                else:  # Too few rows for the matrix instructions: compute the transpose.
                    dnormed = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
                    dnormed = tl.trans(_dot(tl.trans(s), w1_tile, dnormed, PRODUCT_DTYPE, PRECISION))
                rows = _load_rows(x + b * stride_xb, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
                normed = (rows - mu[:, None]) * inverse[:, None]
                dnormed -= mean_grad[:, None] + normed * mean_normed_grad[:, None]
                grad_x = grads.to(tl.float32) + inverse[:, None] * dnormed
                _store_rows(dx + b * N * D, grad_x, offs_n, offs_d, D, in_n, in_d)
    if FIRST:
        dw1 += group.to(tl.int64) * T * N
        tl.store(dw1 + offs_t[:, None] * N + offs_n[None, :], dw1_tile, mask=in_t[:, None] & in_n[None, :])
    if SECOND:
        dw2 += group.to(tl.int64) * T * N
        tl.store(dw2 + offs_n[None, :] * T + offs_t[:, None], dw2_tile, mask=in_t[:, None] & in_n[None, :])
        tl.store(db2 + group.to(tl.int64) * N + offs_n, db2_tile, mask=in_n)


@triton.jit
def _add_parts(parts, out, tile, groups, SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """Compute a tile of the sum over the first dimension of parts (groups, SIZE)."""
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    inside = _inside(cols, SIZE, BLOCK)
    total = tl.zeros((BLOCK_P, BLOCK), tl.float32)
    for start in range(0, groups, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64)[:, None] * SIZE + cols[None, :]
        total += tl.load(parts + at, mask=(p < groups)[:, None] & inside[None, :], other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def weight_sums_kernel(
    dw1_parts, db1_parts, dw2_parts, db2_parts, dw1, db1, dw2, db2, first_groups, second_groups,
    N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of one of the four weight gradients; grid (weight_sums_programs(N, T),).

    dw1 and db1 have `first_groups` partial sums (one for each group of images), dw2 and db2 have `second_groups`.
    """
    matrix: tl.constexpr = (T * N + BLOCK - 1) // BLOCK
    tokens: tl.constexpr = (N + BLOCK - 1) // BLOCK
    place = tl.program_id(0)
    if place < matrix:
        _add_parts(dw1_parts, dw1, place, first_groups, T * N, BLOCK_P, BLOCK)
    elif place < 2 * matrix:
        _add_parts(dw2_parts, dw2, place - matrix, second_groups, N * T, BLOCK_P, BLOCK)
    elif place < 2 * matrix + tokens:
        _add_parts(db2_parts, db2, place - 2 * matrix, second_groups, N, BLOCK_P, BLOCK)
    else:
        _add_parts(db1_parts, db1, place - 2 * matrix - tokens, first_groups, T, BLOCK_P, BLOCK)
