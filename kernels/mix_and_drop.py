"""Token mixing fused with the row gather: only the kept rows of the mixed tokens are ever written.

    out[b, k] = x[b, n] + gate[b] * (w2[n] @ H[b] + b2[n]),   n = subset[b, k]
    H = gelu(A),   A = w1 @ (LayerNorm(x) * (1 + scale) + shift) + b1      (T, D) per image, along the token axis

The modulation is constant along the tokens, so it leaves the product: with Z = w1 @ LayerNorm(x),
A = Z * (1 + scale) + rowsum(w1) * shift + b1. Everything then falls into tiles of D. Two launches forward:

    statistics  reads x, writes the mean and 1/std of each row
    mix         reads x by (image, tile of D), keeps Z and H on the chip, writes the kept rows

and two or three backward, which recompute H (only the statistics are saved). Q = w2[kept]^T @ dout, S = dA (1 + scale):

    hidden      reads x and dout by (image, tile of D): dgate = sum(H Q) + sum(b2 dout), dA = gate Q gelu'(A),
                dshift = sum(rowsum(w1) dA), dscale = sum(Z dA); writes H, S (T, D) and each token's sum of
                LayerNorm(x) * dLayerNorm(x) over the tile
    tokens      reads x, dout, H, S by (tile of N, images): dw1, dw2, db2, summed over D and a few images in registers;
                dx = dout + rstd (w1^T S - mean(w1^T S) - LayerNorm(x) mean(LayerNorm(x) w1^T S)).
                Two launches where T > 128
    sums        adds the partial weight gradients in a fixed order (torch.sum), so a run repeats bit for bit

Products take operands in one dtype, x's or autocast's, and accumulate in float32; all else is float32.
"""

import torch

from . import reference
from .runtime import (
    FLOATS,
    INDICES,
    INTERPRET,
    WARP_SIZE,
    check_interpretable,
    check_subset,
    check_tensor,
    jit,
    kernel_op,
    rows_contiguous,
    tl,
    use_triton,
    wrap_triton,
)
from .tuning import choose

OP = "mix_and_drop"
EPS = 1e-6
MAX_HIDDEN = 1024  # A wider hidden layer does not fit on the chip: it takes the reference path on a GPU, too.

# ---- Kernels -----------------------------------------------------------------------------------------------------


@jit
def _statistics_kernel(
    x, mean, rstd, stride_xb, stride_xn, total, N, D, eps,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; one pass over memory where a row fits a block (WHOLE), two otherwise."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < total
    start = x + (row // N) * stride_xb + (row % N) * stride_xn
    offs_d = tl.arange(0, BLOCK_D)
    inside = live[:, None] & (offs_d < D)[None, :]
    v = tl.load(start[:, None] + offs_d[None, :], mask=inside, other=0.0).to(tl.float32)
    # Measured from the row's first element: a constant row has variance 0 exactly, however large it is.
    first = tl.sum(tl.where(offs_d[None, :] == 0, v, 0.0), axis=1)
    v = tl.where(inside, v - first[:, None], 0.0)
    if WHOLE:
        mu = tl.sum(v, axis=1) / D
        v = tl.where(inside, v - mu[:, None], 0.0)
        var = tl.sum(v * v, axis=1)
    else:
        mu = tl.sum(v, axis=1)
        for d in range(BLOCK_D, D, BLOCK_D):
            more = live[:, None] & (d + offs_d < D)[None, :]
            v = tl.load(start[:, None] + (d + offs_d)[None, :], mask=more, other=0.0).to(tl.float32)
            mu += tl.sum(tl.where(more, v - first[:, None], 0.0), axis=1)
        mu = mu / D
        var = tl.zeros((ROWS,), tl.float32)
        for d in range(0, D, BLOCK_D):
            more = live[:, None] & (d + offs_d < D)[None, :]
            v = tl.load(start[:, None] + (d + offs_d)[None, :], mask=more, other=0.0).to(tl.float32)
            v = tl.where(more, v - first[:, None] - mu[:, None], 0.0)
            var += tl.sum(v * v, axis=1)
    tl.store(mean + row, first + mu, mask=live)
    tl.store(rstd + row, tl.rsqrt(var / D + eps), mask=live)


@jit
def _dot(a, b, total, PRODUCT: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, operands rounded to PRODUCT, accumulated in float32."""
    a = a.to(PRODUCT)
    b = b.to(PRODUCT)
    if PRECISION == "widened":  # Triton's interpreter multiplies the bit patterns of bfloat16 operands.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def _gelu(a):
    """GELU, tanh form: a * sigmoid(2 z), z = sqrt(2 / pi) (a + 0.044715 a^3)."""
    return a * tl.sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * a * a))


@jit
def _gelu_and_slope(a):
    s = tl.sigmoid(1.5957691216057308 * a * (1.0 + 0.044715 * a * a))
    # Beyond |a| = 15 the sigmoid is 0 or 1 and its slope 0; the clamp keeps inf * 0 out of the product.
    c = tl.minimum(tl.maximum(a, -15.0), 15.0)
    slope = s + s * (1.0 - s) * 1.5957691216057308 * c * (1.0 + 0.134145 * c * c)
    return a * s, slope


@jit
def _row_statistics_kernel(x, mean, rstd, stride_xb, stride_xn, rows, N, D, eps,
                           ONE_PASS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < rows
    start = x + (row // N) * stride_xb + (row % N) * stride_xn
    offs_d = tl.arange(0, BLOCK_D)
    # Measured from the row's first element, so that a constant row has variance 0 exactly whatever its size.
    first = tl.load(start, mask=live, other=0.0).to(tl.float32)
    if ONE_PASS:
        keep = live[:, None] & (offs_d < D)[None, :]
        v = tl.load(start[:, None] + offs_d[None, :], mask=keep, other=0.0).to(tl.float32)
        v = tl.where(keep, v - first[:, None], 0.0)
        mu = tl.sum(v, axis=1) / D
        v = tl.where(keep, v - mu[:, None], 0.0)
        var = tl.sum(v * v, axis=1) / D
    else:
        mu = tl.zeros((BLOCK_R,), tl.float32)
        for d in range(0, D, BLOCK_D):
            keep = live[:, None] & (d + offs_d < D)[None, :]
            v = tl.load(start[:, None] + (d + offs_d)[None, :], mask=keep, other=0.0).to(tl.float32)
            mu += tl.sum(tl.where(keep, v - first[:, None], 0.0), axis=1)
        mu = mu / D
        var = tl.zeros((BLOCK_R,), tl.float32)
        for d in range(0, D, BLOCK_D):
            keep = live[:, None] & (d + offs_d < D)[None, :]
            v = tl.load(start[:, None] + (d + offs_d)[None, :], mask=keep, other=0.0).to(tl.float32)
            v = tl.where(keep, v - first[:, None] - mu[:, None], 0.0)
            var += tl.sum(v * v, axis=1)
        var = var / D
    tl.store(mean + row, first + mu, mask=live)
    tl.store(rstd + row, tl.rsqrt(var + eps), mask=live)


@jit
def _inside(offs, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Which of a block's offsets lie below SIZE; a constant where SIZE is a whole number of blocks."""
    if SIZE % BLOCK == 0:
        return tl.full((BLOCK,), 1, tl.int1)
    else:
        return offs < SIZE


@jit
def _load_rows(base, offs_n, offs_d, stride_n, in_n, in_d):
    """Tile of token rows; zeros outside."""
    at = offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    return tl.load(base + at, mask=in_n[:, None] & in_d[None, :], other=0.0)


@jit
def _store_rows(base, rows, offs_n, offs_d, stride_n, in_n, in_d):
    """Written as its transpose: AMD's compiler would else store 8 bytes at a time, as the product lies in registers."""
    at = offs_n.to(tl.int64)[None, :] * stride_n + offs_d[:, None]
    tl.store(base + at, tl.trans(rows.to(base.dtype.element_ty)), mask=in_n[None, :] & in_d[:, None])


@jit
def _load_matrix(base, offs_r, offs_c, pitch, in_r, in_c):
    """Tile of a small dense matrix; zeros outside."""
    return tl.load(base + offs_r[:, None] * pitch + offs_c[None, :], mask=in_r[:, None] & in_c[None, :], other=0.0)


@jit
def _load_vector(base, offs, inside):
    return tl.load(base + offs, mask=inside, other=0.0).to(tl.float32)


@jit
def _kept_rows(subset, offs_k, K, HAS_SUBSET: tl.constexpr):
    """The token that each kept row is."""
    if HAS_SUBSET:
        rows = tl.load(subset + offs_k, mask=offs_k < K, other=0)
    else:
        rows = offs_k
    return rows.to(tl.int32)


@jit
def _first_product(
    x, mean, rstd, w1, stride_xn, offs_d, in_d, offs_t, in_t,
    N: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Z = w1 @ LayerNorm(x) for a tile of D, and the row sums of w1."""
    z = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    w1_sum = tl.zeros((BLOCK_T,), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        in_n = _inside(offs_n, N, BLOCK_N)
        rows = _load_rows(x, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
        normed = (rows - _load_vector(mean, offs_n, in_n)[:, None]) * _load_vector(rstd, offs_n, in_n)[:, None]
        w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT)
        z = _dot(w1_tile, normed, z, PRODUCT, PRECISION)
        w1_sum += tl.sum(w1_tile.to(tl.float32), axis=1)
    return z, w1_sum


@jit
def _mix_kernel(
    x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, subset, out,
    stride_xb, stride_xn, stride_shift, stride_scale, stride_gate, stride_subset, K,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of D of one image; grid (tiles of D, images), so that an image's tiles run side by side."""
    b = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    in_d = _inside(offs_d, D, BLOCK_D)
    in_t = _inside(offs_t, T, BLOCK_T)
    x += b * stride_xb
    z, w1_sum = _first_product(
        x, mean + b * N, rstd + b * N, w1, stride_xn, offs_d, in_d, offs_t, in_t, N, PRODUCT, PRECISION,
        BLOCK_N, BLOCK_D, BLOCK_T,
    )  # fmt: skip
    modulation = 1.0 + _load_vector(scale + b * stride_scale, offs_d, in_d)
    shifts = _load_vector(shift + b * stride_shift, offs_d, in_d)
    bias_t = _load_vector(b1, offs_t, in_t)
    h = _gelu(z * modulation[None, :] + w1_sum[:, None] * shifts[None, :] + bias_t[:, None]).to(PRODUCT)

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
        y = gates[None, :] * _dot(w2_tile, h, y, PRODUCT, PRECISION)
        y += _load_rows(x, kept, offs_d, stride_xn, in_k, in_d).to(tl.float32)
        _store_rows(out, y, offs_k, offs_d, D, in_k, in_d)


@jit
def _hidden_grad_kernel(
    dout, x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, subset,
    dshift, dscale, dgate, hidden, ds, sums, along,
    stride_gb, stride_gk, stride_xb, stride_xn, stride_shift, stride_scale, stride_gate, stride_subset, K,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of D of one image, as in the forward."""
    b = tl.program_id(1).to(tl.int64)
    part = b * tl.num_programs(0) + tl.program_id(0)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_t = tl.arange(0, BLOCK_T)
    in_d = _inside(offs_d, D, BLOCK_D)
    in_t = _inside(offs_t, T, BLOCK_T)
    x += b * stride_xb
    mean += b * N
    rstd += b * N
    dout += b * stride_gb
    if HAS_SUBSET:
        subset += b * stride_subset

    q = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    dgates = tl.zeros((BLOCK_D,), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k = offs_k < K
        kept = _kept_rows(subset, offs_k, K, HAS_SUBSET)
        grads = _load_rows(dout, offs_k, offs_d, stride_gk, in_k, in_d)
        w2_tile = _load_matrix(w2, kept, offs_t, T, in_k, in_t).to(PRODUCT)
        q = _dot(tl.trans(w2_tile), grads, q, PRODUCT, PRECISION)
        dgates += tl.sum(grads.to(tl.float32) * _load_vector(b2, kept, in_k)[:, None], axis=0)

    z, w1_sum = _first_product(
        x, mean, rstd, w1, stride_xn, offs_d, in_d, offs_t, in_t, N, PRODUCT, PRECISION, BLOCK_N, BLOCK_D, BLOCK_T
    )
    modulation = 1.0 + _load_vector(scale + b * stride_scale, offs_d, in_d)
    shifts = _load_vector(shift + b * stride_shift, offs_d, in_d)
    bias_t = _load_vector(b1, offs_t, in_t)
    h, slope = _gelu_and_slope(z * modulation[None, :] + w1_sum[:, None] * shifts[None, :] + bias_t[:, None])
    dgates += tl.sum(h * q, axis=0)
    tl.store(dgate + b * D + offs_d, dgates.to(dgate.dtype.element_ty), mask=in_d)
    at = b * T * D + (offs_t[:, None] * D + offs_d[None, :])
    tl.store(hidden + at, h.to(PRODUCT), mask=in_t[:, None] & in_d[None, :])

    da = q * _load_vector(gate + b * stride_gate, offs_d, in_d)[None, :] * slope
    dshifts = tl.sum(da * w1_sum[:, None], axis=0)
    tl.store(dshift + b * D + offs_d, dshifts.to(dshift.dtype.element_ty), mask=in_d)
    tl.store(dscale + b * D + offs_d, tl.sum(da * z, axis=0).to(dscale.dtype.element_ty), mask=in_d)
    sums += part * 3 * T + offs_t
    tl.store(sums, tl.sum(da, axis=1), mask=in_t)
    tl.store(sums + T, tl.sum(da * shifts[None, :], axis=1), mask=in_t)
    s = (da * modulation[None, :]).to(PRODUCT)
    # Sums of S as rounded: the mean that LayerNorm's gradient subtracts then cancels what it should.
    tl.store(sums + 2 * T, tl.sum(s.to(tl.float32), axis=1), mask=in_t)
    tl.store(ds + at, s, mask=in_t[:, None] & in_d[None, :])

    # The second reading of x: the tile of this program, N rows of BLOCK_D elements, is still in L2.
    along += part * N
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        in_n = _inside(offs_n, N, BLOCK_N)
        w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT)
        dnormed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dnormed = _dot(tl.trans(w1_tile), s, dnormed, PRODUCT, PRECISION)
        rows = _load_rows(x, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
        product = tl.sum(dnormed * (rows - _load_vector(mean, offs_n, in_n)[:, None]), axis=1)
        tl.store(along + offs_n, product * _load_vector(rstd, offs_n, in_n), mask=in_n)


@jit
def _token_grad_kernel(
    dout, x, mean, rstd, gate, w1, subset, hidden, ds, sums, along, dx, dw1, dw2, db2,
    stride_gb, stride_gk, stride_xb, stride_xn, stride_gate, stride_subset, B, K, tiles, images,
    N: tl.constexpr, D: tl.constexpr, T: tl.constexpr,
    HAS_SUBSET: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of a few images; grid (tiles of N, groups of images).

    FIRST: dx and dw1, the gradients through the first product. SECOND: dw2 and db2.
    """
    group = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T)
    in_n = _inside(offs_n, N, BLOCK_N)
    in_t = _inside(offs_t, T, BLOCK_T)
    if FIRST:
        w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT)
        dw1_tile = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if SECOND:
        dw2_tile = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        db2_tile = tl.zeros((BLOCK_N,), tl.float32)
    for image in range(0, tl.minimum(images, B - group * images)):
        b = group.to(tl.int64) * images + image
        # Which kept row each token is, -1 for none: comparing is cheaper than an inverse table in memory.
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
        if FIRST:
            mu = _load_vector(mean + b * N, offs_n, in_n)
            inverse = _load_vector(rstd + b * N, offs_n, in_n)
            along_row = tl.zeros((BLOCK_N,), tl.float32)
            shifted = tl.zeros((BLOCK_T,), tl.float32)
            total = tl.zeros((BLOCK_T,), tl.float32)
            for tile in range(0, tiles):
                part = b * tiles + tile
                along_row += _load_vector(along + part * N, offs_n, in_n)
                shifted += _load_vector(sums + (part * 3 + 1) * T, offs_t, in_t)
                total += _load_vector(sums + (part * 3 + 2) * T, offs_t, in_t)
            along_row = along_row / D
            middle = tl.sum(w1_tile.to(tl.float32) * total[:, None], axis=0) / D
            dw1_tile += shifted[:, None]

        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            in_d = _inside(offs_d, D, BLOCK_D)
            grads = _load_rows(dout + b * stride_gb, slot, offs_d, stride_gk, is_kept, in_d).to(tl.float32)
            if SECOND:
                h = _load_matrix(hidden + b * T * D, offs_t, offs_d, D, in_t, in_d)
                gated = grads * _load_vector(gate + b * stride_gate, offs_d, in_d)[None, :]
                db2_tile += tl.sum(gated, axis=1)
                dw2_tile = _dot(gated, tl.trans(h), dw2_tile, PRODUCT, PRECISION)
            if FIRST:
                s = _load_matrix(ds + b * T * D, offs_t, offs_d, D, in_t, in_d)
                rows = _load_rows(x + b * stride_xb, offs_n, offs_d, stride_xn, in_n, in_d).to(tl.float32)
                normed = (rows - mu[:, None]) * inverse[:, None]
                dw1_tile = _dot(s, tl.trans(normed.to(PRODUCT)), dw1_tile, PRODUCT, PRECISION)
                if BLOCK_T > 128:  # Kept in registers across the loop, so wide an operand would spill.
                    w1_tile = _load_matrix(w1, offs_t, offs_n, N, in_t, in_n).to(PRODUCT)
                dnormed = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                dnormed = _dot(tl.trans(w1_tile), s, dnormed, PRODUCT, PRECISION)
                grad_x = grads + inverse[:, None] * (dnormed - middle[:, None] - normed * along_row[:, None])
                _store_rows(dx + b * N * D, grad_x, offs_n, offs_d, D, in_n, in_d)
    if FIRST:
        dw1 += group.to(tl.int64) * T * N
        tl.store(dw1 + offs_t[:, None] * N + offs_n[None, :], dw1_tile, mask=in_t[:, None] & in_n[None, :])
    if SECOND:
        dw2 += group.to(tl.int64) * T * N
        tl.store(dw2 + offs_n[:, None] * T + offs_t[None, :], dw2_tile, mask=in_n[:, None] & in_t[None, :])
        tl.store(db2 + group.to(tl.int64) * N + offs_n, db2_tile, mask=in_n)


# ---- Launchers ---------------------------------------------------------------------------------------------------


def _power_of_two(size):
    return 1 << max(0, size - 1).bit_length()


def _block_t(T):
    return max(16, _power_of_two(T))


def statistics_config(D):
    """Whole rows up to 8192 elements, about 4096 elements a program: 16 bytes and more per thread."""
    block = min(8192, max(16, _power_of_two(D)))
    config = {"ROWS": max(1, 4096 // block), "BLOCK_D": block, "threads": 256 if block > 4096 else 128, "stages": 1}
    return config | {"WHOLE": D <= block}


def _configs(T, product, table):
    """The rows of `table` for a hidden width: BLOCK_N, BLOCK_K, BLOCK_D, threads, stages; the first is the default.

    Compiled for every target, these are the widest tiles that spill nowhere and give each thread 16 bytes of a row.
    Float32 operands take twice the room: narrower tiles.
    """
    width = max(64, _block_t(T))
    names = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "threads", "stages")
    configs = [dict(zip(names, row, strict=True)) for row in table.get(width, [(16, 16, 16, 256, 1)])]
    if product == torch.float32:
        configs = [c | {"BLOCK_D": min(32, max(16, c["BLOCK_D"] // 2)), "stages": min(2, c["stages"])} for c in configs]
    return configs


def mix_configs(T, N, product):
    # The kept rows are read a second time from L2: the tiles in flight, N rows each, must fit there.
    narrow, middle, wide = (64, 64, 32, 256, 2), (64, 64, 64, 256, 3), (64, 64, 128, 256, 3)
    short = (32, 64, 64, 256, 2)
    table = {64: [wide, short], 128: [middle], 256: [narrow]} if N <= 512 else dict.fromkeys((64, 128, 256), [narrow])
    return _configs(T, product, table)


def hidden_configs(T, product):
    table = {64: [(64, 128, 32, 256, 2)], 128: [(64, 64, 64, 256, 1)], 256: [(128, 128, 16, 256, 1)]}
    return _configs(T, product, table)


def tokens_configs(T, product):
    return _configs(T, product, dict.fromkeys((64, 128, 256), [(32, 32, 64, 256, 2)]))


def _options(config):
    """A configuration as the keyword arguments of a launch."""
    blocks = {k: v for k, v in config.items() if k not in ("threads", "stages")}
    return blocks | {"num_warps": config["threads"] // WARP_SIZE, "num_stages": config["stages"]}


def _precision(product):
    """How float32 operands are multiplied: in three TF32 products where the machine has no float32 matrix units."""
    if INTERPRET:
        return "widened"
    return "tf32x3" if product == torch.float32 and torch.version.hip is None else "ieee"


def _tl(dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _constants(x, w1, subset, product):
    """The sizes of the model, fixed for a run, are compiled in: masks that are always true then cost nothing."""
    return {
        "N": int(x.shape[1]), "D": int(x.shape[2]), "T": int(w1.shape[0]), "HAS_SUBSET": subset is not None,
        "PRODUCT": _tl(product), "PRECISION": _precision(product), "BLOCK_T": _block_t(int(w1.shape[0])),
    }  # fmt: skip


def _cdiv(a, b):
    return (a + b - 1) // b


@kernel_op("maskalign_kernels::mix_and_drop")
def _mix_op(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor,
    w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    subset: torch.Tensor | None, product: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kept rows, and the mean and 1/std of all rows."""
    B, N, D = x.shape
    T = w1.shape[0]
    K = N if subset is None else subset.shape[1]
    mean = x.new_empty((B, N), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    out = x.new_empty((B, K, D))
    if out.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    config = statistics_config(D)
    wrap_triton(_statistics_kernel)[(_cdiv(B * N, config["ROWS"]),)](
        x, mean, rstd, x.stride(0), x.stride(1), B * N, N, D, EPS, **_options(config)
    )

    constants = _constants(x, w1, subset, product)
    index = x if subset is None else subset  # A pointer is needed even where it is not read.
    stride_subset = 0 if subset is None else subset.stride(0)

    def launch(config):
        wrap_triton(_mix_kernel)[(_cdiv(D, config["BLOCK_D"]), B)](
            x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, index, out,
            x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), gate.stride(0),
            stride_subset, K, **constants, **_options(config),
        )  # fmt: skip

    configs = mix_configs(T, constants["N"], product)
    launch(choose("mix", (constants["N"], constants["D"], T, x.dtype, product), configs, x, launch))
    return out, mean, rstd


@kernel_op("maskalign_kernels::mix_and_drop_backward")
def _mix_backward_op(
    dout: torch.Tensor, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor,
    w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    subset: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, product: torch.dtype,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """Gradients of x, shift, scale, gate, w1, b1, w2, b2."""
    B, N, D = x.shape
    T = w1.shape[0]
    K = dout.shape[1]
    if dout.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (x, shift, scale, gate, w1, b1, w2, b2))
    dx = x.new_empty((B, N, D))
    dshift, dscale, dgate = (t.new_empty((B, D)) for t in (shift, scale, gate))
    hidden = x.new_empty((B, T, D), dtype=product)
    ds = torch.empty_like(hidden)
    strides = (x.stride(0), x.stride(1))
    stride_subset = 0 if subset is None else subset.stride(0)
    constants = _constants(x, w1, subset, product)
    index = x if subset is None else subset

    config = hidden_configs(T, product)[0]
    tiles = _cdiv(D, config["BLOCK_D"])
    sums = x.new_empty((B, tiles, 3, T), dtype=torch.float32)
    along = x.new_empty((B, tiles, N), dtype=torch.float32)
    wrap_triton(_hidden_grad_kernel)[(tiles, B)](
        dout, x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, index,
        dshift, dscale, dgate, hidden, ds, sums, along,
        dout.stride(0), dout.stride(1), *strides, shift.stride(0), scale.stride(0), gate.stride(0), stride_subset,
        K, **constants, **_options(config),
    )  # fmt: skip

    config = tokens_configs(T, product)[0]
    blocks = _cdiv(N, config["BLOCK_N"])
    images = images_per_program(B, blocks, T, D)
    groups = _cdiv(B, images)
    dw1 = x.new_empty((groups, T, N), dtype=torch.float32)
    dw2 = x.new_empty((groups, N, T), dtype=torch.float32)
    db2 = x.new_empty((groups, N), dtype=torch.float32)
    for first, second, config in token_launches(T, product):
        wrap_triton(_token_grad_kernel)[(blocks, groups)](
            dout, x, mean, rstd, gate, w1, index, hidden, ds, sums, along, dx, dw1, dw2, db2,
            dout.stride(0), dout.stride(1), *strides, gate.stride(0), stride_subset,
            B, K, tiles, images, FIRST=first, SECOND=second, **constants, **_options(config),
        )  # fmt: skip
    db1 = sums[:, :, 0].sum((0, 1))
    return (
        dx, dshift, dscale, dgate, dw1.sum(0).to(w1.dtype), db1.to(b1.dtype), dw2.sum(0).to(w2.dtype),
        db2.sum(0).to(b2.dtype),
    )  # fmt: skip


def token_launches(T, product):
    """(FIRST, SECOND, configuration) of each launch of `tokens`: two where the operands are too large for one."""
    config = tokens_configs(T, product)[0]
    if _block_t(T) <= 128 and product != torch.float32:
        return [(True, True, config)]
    first = config | {"stages": 1} if product == torch.float32 else config
    return [(True, False, first), (False, True, config | {"stages": 1})]


def images_per_program(B, blocks, T, D):
    """Images whose weight gradients one program adds up, for partial sums that a small reduction finishes.

    As many as leave 512 programs to fill a GPU. Where the hidden width is large beside the model's, the partial sums
    would weigh more than a tenth of the rows: then more images, as long as 128 programs are left.
    """
    programs = B * blocks
    return max(1, programs // 512, min(round(20 * T / D), programs // 128))


# ---- Autograd and the public function ----------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    *tensors, ctx.product = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, mean, rstd)


def _backward(ctx, dout, *_):
    grads = _mix_backward_op(rows_contiguous(dout), *ctx.saved_tensors, ctx.product)
    return *grads, None, None


_mix_op.register_autograd(_backward, setup_context=_setup_context)


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None):
    """Rows `subset` of x + gate * (w2 @ gelu(w1 @ (LayerNorm(x) * (1 + scale) + shift) + b1) + b2).

    The products run along the tokens, so every kept token has seen all of them (mixer of MLP-Mixer, arXiv 2105.01601,
    modulated as in DiT's adaLN-Zero, arXiv 2212.09748). LayerNorm has no affine, eps 1e-6; GELU is the tanh form.

    Args:
        x: (B, N, D) tokens; bfloat16, float16 or float32, on the CPU float64 too. Any pitch between rows.
        shift, scale, gate: (B, D).
        w1, b1, w2, b2: (T, N), (T,), (N, T), (N,). Any of the dtypes: the matrix products run in x's dtype, or in
            autocast's where that is on, and accumulate in float32.
        subset: (B, K) int32 or int64, distinct indices in [0, N) in any order; None keeps all N tokens.

    Returns:
        (B, K, D) in x's dtype, rows in the order of `subset`; (B, N, D) where subset is None.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or (on the CPU; on a GPU with
            MASKALIGN_KERNELS_DEBUG=1) an index outside [0, N) or twice in a row.
    """
    sizes = {}
    floats = (*FLOATS, torch.float64)
    check_tensor(OP, "x", x, "BND", sizes, floats)
    for name, tensor in (("shift", shift), ("scale", scale), ("gate", gate)):
        check_tensor(OP, name, tensor, "BD", sizes, floats, x.device)
    for name, tensor, dims in (("w1", w1, "TN"), ("b1", b1, "T"), ("w2", w2, "NT"), ("b2", b2, "N")):
        check_tensor(OP, name, tensor, dims, sizes, floats, x.device)
    if subset is not None:
        check_tensor(OP, "subset", subset, "BK", sizes, INDICES, x.device)
        check_subset(OP, subset, sizes["N"], distinct=True)
    product = x.dtype
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        product = torch.get_autocast_dtype(x.device.type)
    if not use_triton(x) or sizes["T"] > MAX_HIDDEN:
        return reference.mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset, product)
    check_interpretable(OP, x=x, shift=shift, scale=scale, gate=gate, w1=w1, b1=b1, w2=w2, b2=b2)
    x, shift, scale, gate = map(rows_contiguous, (x, shift, scale, gate))
    w1, b1, w2, b2 = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    subset = None if subset is None else rows_contiguous(subset)
    return _mix_op(x, shift, scale, gate, w1, b1, w2, b2, subset, product)[0]
