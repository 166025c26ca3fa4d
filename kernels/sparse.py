"""Triton: raw student logits against the teacher's top k. Forward, backward, both in one.

    row_kernel   a row in registers, R rows a program; the gradient too, if asked for
    loop_kernel  a row in tiles, one running maximum for 8 neighbours: 9/8 exponentials a logit
    grad_kernel  the gradient from the logits and STATS numbers a row, tile by tile

The gradient of the named classes is stored over that of the tail after a barrier; their logits
are read again, so that q - p is formed in float32. The bucket's mass excludes the named classes
from its sum (never 1 - sum, which cancels): a histogram of the classes over the tile says which.
`README.md` derives the formulas; `dispatch.py` holds blocks and warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdcache.kernels import layout
from kdcache.kernels.launch import Form, given
from kdcache.kernels.problem import TAIL_CODES, Problem
from kdcache.kernels.rows import LOW, edges, factors, load_row, start_of, store_row
from kdcache.kernels.teacher import BUCKET, UNIFORM, named_classes, row_loss


@triton.jit
def _gradient(z, rest_top, s, flat, scale):
    """[R, N] from logits, as if no class were named; s and flat hold all factors of the row."""
    return tl.exp2((z - rest_top[:, None]) * scale) * s[:, None] - flat[:, None]


@triton.jit
def _store_edges(
    g_ptr,
    z_ptr,
    row,
    start,
    in_R,
    rest_top,
    s,
    flat,
    scale,
    C: tl.constexpr,
    ZS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of the tile that `store_row` leaves where rows begin between lines."""
    base, off = start_of(row, ZS, VEC)
    g_base, _ = start_of(row, GS, VEC)
    at, own = edges(off, start, in_R, C, VEC, BLOCK)
    z = tl.load(z_ptr + base[:, None] + at, mask=own, other=0.0).to(tl.float32)
    g = _gradient(z, rest_top, s, flat, scale)
    tl.store(g_ptr + g_base[:, None] + at, g.to(g_ptr.dtype.element_ty), mask=own)


@triton.jit
def _store_named(
    g_ptr,
    z_ptr,
    row,
    off,
    start,
    idx,
    p,
    live,
    top,
    total,
    mass,
    soft,
    scale,
    ZS: tl.constexpr,
    GS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Over the tail's gradient of the same columns, in the tile that has them."""
    col = idx + off[:, None]
    own = live & (col >= start) & (col < start + BLOCK)
    # Read again, so that q - p is not formed of a rounded gradient.
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=own, other=float("-inf")).to(tl.float32)
    q = tl.exp2((zk - top[:, None]) * scale) / total[:, None]
    g = soft[:, None] * (q * mass[:, None] - p)
    # Another thread of the program has stored the tail's gradient at these places.
    tl.debug_barrier()
    tl.store(g_ptr + row[:, None] * GS + idx, g.to(g_ptr.dtype.element_ty), mask=own)


@triton.jit
def row_kernel(
    z_ptr,
    val_ptr,
    idx_ptr,
    tail_ptr,
    w_ptr,
    go_ptr,
    loss_ptr,
    stats_ptr,
    g_ptr,
    B,
    T,
    inverse_t,
    scale,
    coefficient,
    C: tl.constexpr,
    K: tl.constexpr,
    ZS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_N: tl.constexpr,
    TEMPERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_GO: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    # int64: a row's offset in elements may pass 2^31.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    col = tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    idx, log_p, p, live, log_r, wrong = named_classes(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    # Rows beyond the batch are all -inf; a top of 0 keeps their differences from being NaN.
    top = tl.where(in_R, tl.max(z, axis=1), 0.0)
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=live, other=float("-inf")).to(tl.float32)
    dk = zk - top[:, None]
    gap_sum = tl.zeros_like(top)
    rest = z
    if TAIL == BUCKET:
        # One histogram for all rows of the program: each row has BLOCK bins of its own.
        bins = tl.arange(0, ROWS)[:, None] * BLOCK + idx + off[:, None]
        named = tl.histogram(
            tl.reshape(bins, [ROWS * BK]), ROWS * BLOCK, mask=tl.reshape(live, [ROWS * BK])
        )
        rest = tl.where(tl.reshape(named, [ROWS, BLOCK]) > 0, float("-inf"), z)
        rest_top = tl.max(rest, axis=1)
        # No class is left, or all of them are -inf: the differences must not be NaN.
        rest_top = tl.where(rest_top > float("-inf"), rest_top, top)
        e = tl.exp2((rest - rest_top[:, None]) * scale)
        rest_sum = tl.sum(e, axis=1)
        ek = tl.where(live, tl.exp2(dk * scale), 0.0)
        total = rest_sum * tl.exp2((rest_top - top) * scale) + tl.sum(ek, axis=1)
    else:
        rest_top = top
        e = tl.exp2((z - top[:, None]) * scale)
        rest_sum = tl.sum(e, axis=1)
        total = rest_sum
        # Columns that fill the tile are -inf, and this sum is the only one where they would count.
        if TAIL == UNIFORM:
            inside = (col[None, :] >= off[:, None]) & (col[None, :] < off[:, None] + C)
            gap_sum = tl.sum(tl.where(inside, z - top[:, None], 0.0), axis=1)
    kl, rest_mass, each, mass = row_loss(
        log_p, p, live, log_r, dk, rest_top - top, rest_sum, total, gap_sum, inverse_t, C, TAIL
    )
    # The whole gradient row becomes NaN, not only its loss: a kernel cannot raise an error.
    rest_mass = tl.where(wrong, float("nan"), rest_mass)
    mass = tl.where(wrong, float("nan"), mass)
    w, soft = factors(w_ptr, go_ptr, row, in_R, T, coefficient, WEIGHTED, 0, HAS_GO)
    tl.store(loss_ptr + row, tl.where(wrong, float("nan"), w * (T * T * kl)), mask=in_R)
    if GRADIENT:
        PEEL: tl.constexpr = ZS % VEC != 0
        s = soft * rest_mass / rest_sum
        flat = soft * each
        g = e * s[:, None] - flat[:, None]
        g_base, _ = start_of(row, GS, VEC)
        store_row(g_ptr, g_base, off, col, in_R, g, C, VEC, PEEL)
        if PEEL:
            _store_edges(
                g_ptr, z_ptr, row, 0, in_R, rest_top, s, flat, scale, C, ZS, GS, VEC, BLOCK
            )
        _store_named(
            g_ptr, z_ptr, row, off, 0, idx, p, live, top, total, mass, soft, scale, ZS, GS, BLOCK
        )
    else:
        _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass)


@triton.jit
def _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass):
    """What `grad_kernel` needs of a row."""
    tl.store(stats_ptr + row, top, mask=in_R)
    tl.store(stats_ptr + B + row, total, mask=in_R)
    tl.store(stats_ptr + 2 * B + row, rest_top, mask=in_R)
    tl.store(stats_ptr + 3 * B + row, rest_sum, mask=in_R)
    tl.store(stats_ptr + 4 * B + row, rest_mass, mask=in_R)
    tl.store(stats_ptr + 5 * B + row, each, mask=in_R)
    tl.store(stats_ptr + 6 * B + row, mass, mask=in_R)


@triton.jit
def loop_kernel(
    z_ptr,
    val_ptr,
    idx_ptr,
    tail_ptr,
    w_ptr,
    loss_ptr,
    stats_ptr,
    B,
    T,
    inverse_t,
    scale,
    coefficient,
    C: tl.constexpr,
    K: tl.constexpr,
    ZS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_N: tl.constexpr,
    TEMPERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    idx, log_p, p, live, log_r, wrong = named_classes(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    # A running maximum for 8 neighbours: they are in one thread, so no exchange, and 9/8
    # exponentials a logit where a maximum for each lane would need 2.
    m = tl.full([BLOCK // 8], LOW, tl.float32)
    d = tl.zeros([BLOCK // 8], tl.float32)
    gaps = tl.zeros([BLOCK // 8], tl.float32)
    count = tl.zeros([BLOCK // 8], tl.float32)
    REACH: tl.constexpr = C if ZS % VEC == 0 else C + VEC - 1
    for start in range(0, REACH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = load_row(z_ptr, base, off, col, in_R, C, VEC)
        if TAIL == BUCKET:
            bins = tl.reshape(idx + off[:, None] - start, [BK])
            here = tl.reshape(live, [BK]) & (bins >= 0) & (bins < BLOCK)
            named = tl.histogram(bins, BLOCK, mask=here)
            z = tl.where(tl.reshape(named, [1, BLOCK]) > 0, float("-inf"), z)
        z = tl.reshape(z, [BLOCK // 8, 8])
        high = tl.maximum(m, tl.max(z, axis=1))
        d = d * tl.exp2((m - high) * scale) + tl.sum(tl.exp2((z - high[:, None]) * scale), axis=1)
        if TAIL == UNIFORM:
            inside = (col >= tl.sum(off, axis=0)) & (col < tl.sum(off, axis=0) + C)
            inside = tl.reshape(inside, [BLOCK // 8, 8])
            # The sum so far is relative to the old maximum.
            gaps += count * (m - high)
            gaps += tl.sum(tl.where(inside, z - high[:, None], 0.0), axis=1)
            count += tl.sum(inside.to(tl.float32), axis=1)
        m = high
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=live, other=float("-inf")).to(tl.float32)
    rest_top = tl.max(m, axis=0)
    # From a scalar to [1], the shape of one row that `row_loss` takes.
    top = rest_top + tl.zeros([1], tl.float32)
    if TAIL == BUCKET:
        top = tl.maximum(top, tl.max(zk, axis=1))
        rest_top = tl.where(rest_top > LOW, rest_top, tl.max(top, axis=0))
    rest_sum = tl.sum(d * tl.exp2((m - rest_top) * scale), axis=0) + tl.zeros([1], tl.float32)
    rest_top = rest_top + tl.zeros([1], tl.float32)
    dk = zk - top[:, None]
    total = rest_sum
    if TAIL == BUCKET:
        ek = tl.where(live, tl.exp2(dk * scale), 0.0)
        total = rest_sum * tl.exp2((rest_top - top) * scale) + tl.sum(ek, axis=1)
    gap_sum = tl.sum(gaps + count * (m - tl.max(top, axis=0)), axis=0) + tl.zeros([1], tl.float32)
    kl, rest_mass, each, mass = row_loss(
        log_p, p, live, log_r, dk, rest_top - top, rest_sum, total, gap_sum, inverse_t, C, TAIL
    )
    rest_mass = tl.where(wrong, float("nan"), rest_mass)
    mass = tl.where(wrong, float("nan"), mass)
    # The upstream gradient is a factor of the backward pass alone; its pointer is not read.
    w, _ = factors(w_ptr, w_ptr, row, in_R, T, coefficient, WEIGHTED, 0, False)
    tl.store(loss_ptr + row, tl.where(wrong, float("nan"), w * (T * T * kl)), mask=in_R)
    _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass)


@triton.jit
def grad_kernel(
    z_ptr,
    val_ptr,
    idx_ptr,
    tail_ptr,
    w_ptr,
    go_ptr,
    stats_ptr,
    g_ptr,
    B,
    T,
    inverse_t,
    scale,
    coefficient,
    C: tl.constexpr,
    K: tl.constexpr,
    ZS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_N: tl.constexpr,
    TEMPERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GO_STRIDE: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    # Tiles are independent here: a row's sums are in its statistics.
    start = tl.program_id(1) * BLOCK
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    g_base, _ = start_of(row, GS, VEC)
    top = tl.load(stats_ptr + row, mask=in_R, other=0.0)
    total = tl.load(stats_ptr + B + row, mask=in_R, other=1.0)
    rest_top = tl.load(stats_ptr + 2 * B + row, mask=in_R, other=0.0)
    rest_sum = tl.load(stats_ptr + 3 * B + row, mask=in_R, other=1.0)
    rest_mass = tl.load(stats_ptr + 4 * B + row, mask=in_R, other=0.0)
    each = tl.load(stats_ptr + 5 * B + row, mask=in_R, other=0.0)
    mass = tl.load(stats_ptr + 6 * B + row, mask=in_R, other=0.0)
    _, soft = factors(w_ptr, go_ptr, row, in_R, T, coefficient, WEIGHTED, GO_STRIDE, True)
    s = soft * rest_mass / rest_sum
    flat = soft * each
    PEEL: tl.constexpr = ZS % VEC != 0
    col = start + tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    g = _gradient(z, rest_top, s, flat, scale)
    store_row(g_ptr, g_base, off, col, in_R, g, C, VEC, PEEL)
    if PEEL:
        _store_edges(
            g_ptr, z_ptr, row, start, in_R, rest_top, s, flat, scale, C, ZS, GS, VEC, BLOCK
        )
    idx, _, p, live, _, _ = named_classes(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    _store_named(
        g_ptr, z_ptr, row, off, start, idx, p, live, top, total, mass, soft, scale, ZS, GS, BLOCK
    )


def _teacher_arguments(problem: Problem, z: torch.Tensor):
    values = problem.values.contiguous()
    B, K = values.shape
    tensors = {
        "val_ptr": values,
        "idx_ptr": problem.class_ids_BK.contiguous(),
        "tail_ptr": given(problem.tail_values, values),
    }
    constants = {
        "K": K,
        "BK": triton.next_power_of_2(K),
        "VEC": layout.vector(z),
        "TAIL": TAIL_CODES[problem.tail],
        "TAIL_N": 0 if problem.tail_values is None else problem.tail_values.numel() // max(B, 1),
        "TEMPERED": problem.tempered,
    }
    return tensors, constants


FORM = Form("sparse", row_kernel, loop_kernel, grad_kernel, _teacher_arguments)
