"""Stencils of packed rows, and the product and moments that follow: the body of ``fan_out``.

A *column* is an image, a group of ``ROWS`` output rows and a horizontal position. A program makes
``BLOCK_P`` columns. A loaded input row feeds every output row of the group that it takes part in;
rows of a dilated convolution are spaced so that they share input rows too.

The loop over horizontal taps stays a loop at run time, and z goes through memory on its way into
the product: sums that are only registers are recomputed for every layout an operand asks for,
which spills.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(x_ptr, PAIRS: tl.constexpr):
    """Pointer by which a channels-last array is loaded; PAIRS: of bfloat16, two channels at a time.

    A shift and a mask widen both of an int32, where the compiler spends an instruction more on
    every second bfloat16 that it unpacks.
    """
    pointer = x_ptr
    if PAIRS:
        pointer = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    return pointer


@triton.jit
def load_words(x, m, FILL: tl.constexpr):
    """What ``words`` points at, fp32 [BLOCK_P, lanes(, 2)]; FILL, 0, 9 or -inf, without m."""
    if x.dtype.element_ty == tl.int32:
        # Two times the bits of FILL.
        OTHER: tl.constexpr = 0 if FILL == 0.0 else 0x41104110 if FILL == 9.0 else -0x7F0080
        word = tl.load(x, mask=m, other=OTHER)
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -0x10000).to(tl.float32, bitcast=True)
        value = tl.join(low, high)
    else:
        value = tl.load(x, mask=m, other=FILL).to(tl.float32)
    return value


@triton.jit
def _load_row(x, row, H, m, RELU: tl.constexpr, FILL: tl.constexpr):
    """One input row under every column, like ``load_words``; FILL outside of the image."""
    value = load_words(x, m & ((row >= 0) & (row < H))[:, None], FILL)
    if RELU:
        value = tl.maximum(value, 0.0)
    return value


@triton.jit
def _tap_lanes(taps, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [1, BLOCK]."""
    lanes = tl.arange(0, BLOCK)[None, :]
    # Without padding no mask: the predicate would take a register too many.
    if LANES == BLOCK:
        tap = tl.load(taps + lanes)
    else:
        tap = tl.load(taps + lanes, mask=lanes < LANES, other=0.0)
    return tap


@triton.jit
def load_tap(taps, C: tl.constexpr, BLOCK_C: tl.constexpr, PAIRS: tl.constexpr):
    """Weights of one tap, fp32 [1, lanes(, 2)]; PAIRS: even channels lie before odd ones."""
    if PAIRS:
        low = _tap_lanes(taps, C // 2, BLOCK_C // 2)
        tap = tl.join(low, _tap_lanes(taps + C // 2, C // 2, BLOCK_C // 2))
    else:
        tap = _tap_lanes(taps, C, BLOCK_C)
    return tap


@triton.jit
def full(BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, VALUE: tl.constexpr, PAIRS: tl.constexpr):
    """Like what ``load_words`` returns, with one value everywhere."""
    if PAIRS:
        value = tl.full([BLOCK_P, BLOCK_C // 2, 2], VALUE, dtype=tl.float32)
    else:
        value = tl.full([BLOCK_P, BLOCK_C], VALUE, dtype=tl.float32)
    return value


@triton.jit
def _columns(p, N, H_OUT, W_OUT, spacing, ROWS: tl.constexpr):
    """Image, first output row and horizontal position of columns p.

    Rows of a group are ``spacing`` apart; groups that interleave follow one another.
    """
    w = p % W_OUT
    rest = p // W_OUT
    groups = tl.cdiv(H_OUT, ROWS * spacing) * spacing
    g = rest % groups
    first = (g // spacing) * (ROWS * spacing) + g % spacing
    return rest // groups, first, w


@triton.jit
def _write_rows(
    y_ptr, row_ptr, y_slot, z0, z1, z2, z3, tile, N, H_OUT, W_OUT, c, m_c,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, SPACING: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the rows of a group, rounded to storage.

    Places are computed anew, from a zero that the compiler must read: kept from before the loop
    over taps they would take registers that the loop needs.

    Args:
        row_ptr: The item in the table.
    """
    p = (tile + tl.load(row_ptr + 15)) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, first, w = _columns(p, N, H_OUT, W_OUT, SPACING, ROWS)
    base = ((n.to(tl.int64) * H_OUT + first) * W_OUT + w) * C
    step = W_OUT * (SPACING * C)
    base += tl.load(row_ptr + 2).to(tl.int64) * y_slot
    y = y_ptr + base[:, None] + c[None, :]
    m = (n < N)[:, None] & m_c[None, :]
    STORAGE: tl.constexpr = y_ptr.dtype.element_ty
    z0, z1 = tl.reshape(z0, [BLOCK_P, BLOCK_C]), tl.reshape(z1, [BLOCK_P, BLOCK_C])
    tl.store(y, z0.to(STORAGE), mask=m & (first < H_OUT)[:, None])
    tl.store(y + step, z1.to(STORAGE), mask=m & (first + SPACING < H_OUT)[:, None])
    if ROWS == 4:
        z2, z3 = tl.reshape(z2, [BLOCK_P, BLOCK_C]), tl.reshape(z3, [BLOCK_P, BLOCK_C])
        tl.store(y + 2 * step, z2.to(STORAGE), mask=m & (first + 2 * SPACING < H_OUT)[:, None])
        tl.store(y + 3 * step, z3.to(STORAGE), mask=m & (first + 3 * SPACING < H_OUT)[:, None])


@triton.jit
def _product(
    value, z, matrix_ptr, inside, m_c, rectify,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """value + z W^T for the output channels m_c. z: pointers to pixels; RELU: some to rectify."""
    c = tl.arange(0, BLOCK_C)
    for start in range(0, BLOCK_C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m_k = k < C
        rows = tl.load(z[:, None] + k[None, :], mask=inside[:, None] & m_k[None, :], other=0.0)
        if RELU:  # noqa: SIM102
            if rectify:
                rows = tl.maximum(rows.to(tl.float32), 0.0).to(z.dtype.element_ty)
        # [C in, C out]: the matrix is stored [C out, C in].
        matrix = tl.load(
            matrix_ptr + c[None, :] * C + k[:, None],
            mask=m_c[None, :] & m_k[:, None],
            other=0.0,
        )
        value = tl.dot(rows.to(OPERAND), matrix.to(OPERAND), value, input_precision=PRECISION)
    return value


@triton.jit
def _product_and_moments(
    y_ptr, matrix_ptr, partial_ptr, tile, spacing, has_product, N, H_OUT, W_OUT,
    x_ptr, x_pixel, H, W, half, is_reduce,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, REDUCES: tl.constexpr, PRECISION: tl.constexpr, OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """y = W z in place, BLOCK_M pixels at a time, and the moments of y as it is stored.

    REDUCES: items may be factorized reduces, whose z is relu of the even pixels of x for the first
    ``half`` channels of y, of the odd pixels for the others.
    """
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    count = 0.0
    mean = tl.zeros([BLOCK_C], dtype=tl.float32)
    second = tl.zeros([BLOCK_C], dtype=tl.float32)
    for chunk in range(ROWS * BLOCK_P // BLOCK_M):
        q = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
        p = tile * BLOCK_P + q % BLOCK_P
        n, first, w = _columns(p, N, H_OUT, W_OUT, spacing, ROWS)
        row = first + (q // BLOCK_P) * spacing
        inside = (n < N) & (row < H_OUT)
        m = inside[:, None] & m_c[None, :]
        place = ((n.to(tl.int64) * H_OUT + row) * W_OUT + w) * C
        y = y_ptr + place[:, None] + c[None, :]
        if has_product:
            value = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
            if REDUCES:
                parts, split = 1, C
                z_ptr, z_place, m_odd = y_ptr, place, inside
                if is_reduce:
                    parts, split, z_ptr = 2, half, x_ptr
                    z_place = ((n.to(tl.int64) * H + 2 * row) * W + 2 * w) * x_pixel
                    m_odd = inside & (2 * row + 1 < H) & (2 * w + 1 < W)
                for part in range(parts):
                    value = _product(
                        value, z_ptr + z_place + part * (W + 1) * x_pixel, matrix_ptr,
                        inside & ((part == 0) | m_odd), m_c & ((c < split) == (part == 0)),
                        is_reduce, C, BLOCK_C, BLOCK_K, True, PRECISION, OPERAND,
                    )  # fmt: skip
            else:
                value = _product(
                    value, y_ptr + place, matrix_ptr, inside, m_c, False,
                    C, BLOCK_C, BLOCK_K, False, PRECISION, OPERAND,
                )  # fmt: skip
            stored = value.to(y_ptr.dtype.element_ty)
            tl.debug_barrier()  # all have read what is overwritten now
            tl.store(y, stored, mask=m)
            value = stored.to(tl.float32)
        else:
            value = tl.load(y, mask=m, other=0.0).to(tl.float32)
        more = tl.sum(inside.to(tl.float32), 0)
        total = tl.maximum(count + more, 1.0)
        chunk_mean = tl.sum(value, 0) / tl.maximum(more, 1.0)
        deviation = tl.where(m, value - chunk_mean[None, :], 0.0)
        delta = chunk_mean - mean
        mean += delta * (more / total)
        second += tl.sum(deviation * deviation, 0) + delta * delta * (count * more / total)
        count += more
    tl.store(partial_ptr + c, mean * 0.0 + count, mask=m_c)
    tl.store(partial_ptr + C + c, mean, mask=m_c)
    tl.store(partial_ptr + 2 * C + c, second, mask=m_c)


@triton.jit
def _convolve(
    x_ptr, y_ptr, taps_ptr, row_ptr, x_pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    SPACING: tl.constexpr = 2 if D == 2 and STRIDE == 1 else 1
    UNIT: tl.constexpr = D if D == SPACING * STRIDE else 1  # rows from one input row to the next
    STEP: tl.constexpr = SPACING * STRIDE // UNIT  # input rows from one output row to the next
    PAD: tl.constexpr = D * (K - 1) // 2
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n, first, w = _columns(p, N, H_OUT, W_OUT, SPACING, ROWS)
    top = first * STRIDE - PAD
    start = (n.to(tl.int64) * H + top) * W * x_pixel
    PAIRS: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    SHIFT: tl.constexpr = 1 if PAIRS else 0
    source = words(x_ptr, PAIRS)
    lanes = tl.arange(0, BLOCK_C >> SHIFT)[None, :]
    m_lanes = lanes < (C >> SHIFT)
    step = (W * x_pixel * UNIT) >> SHIFT
    z0 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    z1 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    z2 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    z3 = full(BLOCK_P, BLOCK_C, 0.0, PAIRS)
    for j in range(K):
        col = w * STRIDE + j * D - PAD
        m = ((col >= 0) & (col < W) & (n < N))[:, None] & m_lanes
        column = source + ((start + col * x_pixel) >> SHIFT)[:, None] + lanes
        taps = taps_ptr + j * C
        for r in tl.static_range((ROWS - 1) * STEP + K):
            x = _load_row(column + r * step, top + r * UNIT, H, m, RELU, 0.0)
            if r < K:
                z0 += x * load_tap(taps + r * K * C, C, BLOCK_C, PAIRS)
            if r >= STEP and r - STEP < K:
                z1 += x * load_tap(taps + (r - STEP) * K * C, C, BLOCK_C, PAIRS)
            if ROWS == 4 and r >= 2 * STEP and r - 2 * STEP < K:
                z2 += x * load_tap(taps + (r - 2 * STEP) * K * C, C, BLOCK_C, PAIRS)
            if ROWS == 4 and r >= 3 * STEP and r - 3 * STEP < K:
                z3 += x * load_tap(taps + (r - 3 * STEP) * K * C, C, BLOCK_C, PAIRS)
    _write_rows(
        y_ptr,
        row_ptr,
        y_slot,
        z0,
        z1,
        z2,
        z3,
        tile,
        N,
        H_OUT,
        W_OUT,
        c,
        m_c,
        C,
        BLOCK_C,
        BLOCK_P,
        SPACING,
        ROWS,
    )


@triton.jit
def _pool(
    x_ptr, y_ptr, row_ptr, x_pixel, y_slot, tile, N, H, W, H_OUT, W_OUT,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, STRIDE: tl.constexpr,
    MAX: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    FILL: tl.constexpr = float("-inf") if MAX else 0.0
    c = tl.arange(0, BLOCK_C)
    m_c = c < C
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n, first, w = _columns(p, N, H_OUT, W_OUT, 1, ROWS)
    top = first * STRIDE - 1
    start = (n.to(tl.int64) * H + top) * W * x_pixel
    PAIRS: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    SHIFT: tl.constexpr = 1 if PAIRS else 0
    source = words(x_ptr, PAIRS)
    lanes = tl.arange(0, BLOCK_C >> SHIFT)[None, :]
    m_lanes = lanes < (C >> SHIFT)
    step = (W * x_pixel) >> SHIFT
    y0 = full(BLOCK_P, BLOCK_C, FILL, PAIRS)
    y1 = full(BLOCK_P, BLOCK_C, FILL, PAIRS)
    y2 = full(BLOCK_P, BLOCK_C, FILL, PAIRS)
    y3 = full(BLOCK_P, BLOCK_C, FILL, PAIRS)
    for j in range(3):
        col = w * STRIDE + j - 1
        m = ((col >= 0) & (col < W) & (n < N))[:, None] & m_lanes
        column = source + ((start + col * x_pixel) >> SHIFT)[:, None] + lanes
        for r in tl.static_range((ROWS - 1) * STRIDE + 3):
            x = _load_row(column + r * step, top + r, H, m, False, FILL)
            if r < 3:
                y0 = tl.maximum(y0, x) if MAX else y0 + x
            if r >= STRIDE and r - STRIDE < 3:
                y1 = tl.maximum(y1, x) if MAX else y1 + x
            if ROWS == 4 and r >= 2 * STRIDE and r - 2 * STRIDE < 3:
                y2 = tl.maximum(y2, x) if MAX else y2 + x
            if ROWS == 4 and r >= 3 * STRIDE and r - 3 * STRIDE < 3:
                y3 = tl.maximum(y3, x) if MAX else y3 + x
    if not MAX:
        p = (tile + tl.load(row_ptr + 15)) * BLOCK_P + tl.arange(0, BLOCK_P)
        n, first, w = _columns(p, N, H_OUT, W_OUT, 1, ROWS)
        left = w * STRIDE
        across = tl.minimum(left + 2, W) - tl.maximum(left - 1, 0)
        y0 *= _share(first * STRIDE, across, H, PAIRS)
        y1 *= _share((first + 1) * STRIDE, across, H, PAIRS)
        y2 *= _share((first + 2) * STRIDE, across, H, PAIRS)
        y3 *= _share((first + 3) * STRIDE, across, H, PAIRS)
    _write_rows(
        y_ptr,
        row_ptr,
        y_slot,
        y0,
        y1,
        y2,
        y3,
        tile,
        N,
        H_OUT,
        W_OUT,
        c,
        m_c,
        C,
        BLOCK_C,
        BLOCK_P,
        1,
        ROWS,
    )


@triton.jit
def _share(top, across, H, PAIRS: tl.constexpr):
    """1 / pixels of a window around row ``top`` that lie in the image, [BLOCK_P, 1(, 1)]."""
    down = tl.minimum(top + 2, H) - tl.maximum(top - 1, 0)
    share = 1.0 / tl.maximum(across * down, 1).to(tl.float32)
    return share[:, None, None] if PAIRS else share[:, None]
