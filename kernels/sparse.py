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

import triton
import triton.language as tl

from kdcache.kernels import layout
from kdcache.kernels.launch import Form, given
from kdcache.kernels.rows import (
    LOG2E,
    LOW,
    edges,
    factors,
    label_of,
    load_row,
    start_of,
    store_row,
)  # fmt: skip

TAILS = {"renormalise": 0, "none": 1, "uniform": 2, "bucket": 3}
UNIFORM, BUCKET = tl.constexpr(2), tl.constexpr(3)

@triton.jit
def _teacher(
    val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, TAIL: tl.constexpr, TAIL_N: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Named classes [R, K], their log p and p, which are live, log r [R], which rows are wrong."""
    k = tl.arange(0, BK)[None, :]
    mask = in_R[:, None] & (k < K)
    v = tl.load(val_ptr + row[:, None] * K + k, mask=mask, other=float("-inf")).to(tl.float32)
    idx = tl.load(idx_ptr + row[:, None] * K + k, mask=mask, other=0).to(tl.int64)
    if not TEMPERED:
        v = v * inverse_t
    log_r = tl.full([row.shape[0]], float("-inf"), tl.float32)
    if (not TEMPERED) or TAIL == 0:
        top = tl.max(v, axis=1)
        top = tl.where(in_R, top, 0.0)
        log_all = top + tl.log(tl.sum(tl.exp(v - top[:, None]), axis=1))
        if (TAIL_N == 3) and (TAIL != 0):
            at_one = tl.load(tail_ptr + row * 3, mask=in_R, other=0.0).to(tl.float32)
            mean = tl.load(tail_ptr + row * 3 + 1, mask=in_R, other=0.0).to(tl.float32)
            half = tl.load(tail_ptr + row * 3 + 2, mask=in_R, other=0.0).to(tl.float32) * 0.5
            begin = tl.log(tl.full([row.shape[0]], C - K, tl.float32))
            cubic = at_one - begin - mean - half
            log_r = begin + inverse_t * (mean + inverse_t * (half + inverse_t * cubic))
            # Where any K must lie; a comparison with NaN keeps the NaN.
            low = tl.maximum(begin + inverse_t * mean, inverse_t * at_one)
            chord = begin + inverse_t * (at_one - begin)
            log_r = tl.where(log_r < low, low, log_r)
            log_r = tl.where(log_r > chord, chord, log_r)
            high = tl.maximum(log_r, log_all)
            log_all = high + tl.log(tl.exp(log_r - high) + tl.exp(log_all - high))
            log_r = log_r - log_all
        v = v - log_all[:, None]
    if TEMPERED and (TAIL_N == 1):
        log_r = tl.load(tail_ptr + row, mask=in_R, other=float("-inf")).to(tl.float32)
    # NaN is live, and makes its row NaN: else it would pass for a class of no mass.
    live = mask & (v != float("-inf"))
    fine = (idx >= 0) & (idx < C)
    wrong = tl.max((mask & (fine == 0)).to(tl.int32), axis=1) > 0
    live = live & fine
    p = tl.where(live, tl.exp(v), 0.0)
    return idx.to(tl.int32), tl.where(live, v, 0.0), p, live, log_r, wrong


@triton.jit
def _row_loss(
    log_p, p, live, log_r, dk, rest_gap, rest_sum, total, gap_sum, inverse_t,
    C: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """KL [R], and the gradient's coefficients: tail mass A, tail constant u, named mass."""
    log_total = tl.log(total)
    log_q = dk * inverse_t - log_total[:, None]
    kl = tl.sum(tl.where(p != 0, p * (log_p - log_q), 0.0), axis=1)
    mass = tl.sum(p, axis=1)
    each = tl.zeros_like(mass)
    rest_mass = mass
    if TAIL >= UNIFORM:
        left = C - tl.sum(live.to(tl.int32), axis=1)
        r = tl.where(left > 0, tl.exp(log_r), 0.0)
        n = tl.maximum(left, 1).to(tl.float32)
        mass += r
        rest_mass = mass
        if TAIL == UNIFORM:
            each = r / n
            named = tl.sum(tl.where(live, log_q, 0.0), axis=1)
            rest = gap_sum * inverse_t - C * log_total - named
            kl += tl.where(r != 0, r * (log_r - tl.log(n)) - each * rest, 0.0)
        else:
            log_rest = rest_gap * inverse_t + tl.log(rest_sum) - log_total
            kl += tl.where(r != 0, r * (log_r - log_rest), 0.0)
            rest_mass = mass * tl.exp(log_rest) - r
    return kl, rest_mass, each, mass


@triton.jit
def _gradient(z, y_here, rest_top, top, s, flat, s_once, hard, scale, HARD: tl.constexpr):
    """[R, N] from logits; s, flat, s_once and hard hold all factors of the row."""
    g = tl.exp2((z - rest_top[:, None]) * scale) * s[:, None] - flat[:, None]
    if HARD:
        g += tl.exp2((z - top[:, None]) * LOG2E) * s_once[:, None]
        g -= tl.where(y_here, hard[:, None], 0.0)
    return g


@triton.jit
def _store_named(
    g_ptr, z_ptr, row, off, start, idx, p, live, y, top, total, mass, soft, s_once, hard, scale,
    ZS: tl.constexpr, GS: tl.constexpr, BLOCK: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Over the tail's gradient of the same columns, in the tile that has them."""
    col = idx + off[:, None]
    own = live & (col >= start) & (col < start + BLOCK)
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=own, other=float("-inf")).to(tl.float32)
    q = tl.exp2((zk - top[:, None]) * scale) / total[:, None]
    g = soft[:, None] * (q * mass[:, None] - p)
    if HARD:
        g += tl.exp2((zk - top[:, None]) * LOG2E) * s_once[:, None]
        g -= tl.where(idx == y[:, None], hard[:, None], 0.0)
    tl.debug_barrier()
    tl.store(g_ptr + row[:, None] * GS + idx, g.to(g_ptr.dtype.element_ty), mask=own)


@triton.jit
def row_kernel(
    z_ptr, val_ptr, idx_ptr, tail_ptr, y_ptr, w_ptr, go_ptr, loss_ptr, stats_ptr, g_ptr,
    B, T, inverse_t, scale, label_weight, coefficient,
    C: tl.constexpr, K: tl.constexpr, ZS: tl.constexpr, GS: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr,
    TAIL_N: tl.constexpr, TEMPERED: tl.constexpr, HARD: tl.constexpr, WEIGHTED: tl.constexpr,
    HAS_GO: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    col = tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    idx, log_p, p, live, log_r, wrong = _teacher(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    top = tl.where(in_R, tl.max(z, axis=1), 0.0)
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=live, other=float("-inf")).to(tl.float32)
    dk = zk - top[:, None]
    gap_sum = tl.zeros_like(top)
    rest = z
    if TAIL == BUCKET:
        bins = tl.arange(0, ROWS)[:, None] * BLOCK + idx + off[:, None]
        named = tl.histogram(
            tl.reshape(bins, [ROWS * BK]), ROWS * BLOCK, mask=tl.reshape(live, [ROWS * BK])
        )
        rest = tl.where(tl.reshape(named, [ROWS, BLOCK]) > 0, float("-inf"), z)
        rest_top = tl.max(rest, axis=1)
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
        if TAIL == UNIFORM:
            inside = (col[None, :] >= off[:, None]) & (col[None, :] < off[:, None] + C)
            gap_sum = tl.sum(tl.where(inside, z - top[:, None], 0.0), axis=1)
    kl, rest_mass, each, mass = _row_loss(
        log_p, p, live, log_r, dk, rest_top - top, rest_sum, total, gap_sum, inverse_t, C, TAIL
    )
    y = tl.full([ROWS], -1, tl.int32)
    once = tl.full([ROWS], 1.0, tl.float32)
    ce = tl.zeros_like(top)
    if HARD:
        y, zy, no_class = label_of(y_ptr, z_ptr, row, in_R, C, ZS)
        wrong = wrong | no_class
        once = tl.sum(tl.exp2((z - top[:, None]) * LOG2E), axis=1)
        ce = tl.where(y >= 0, tl.log(once) - (zy - top), 0.0)
    rest_mass = tl.where(wrong, float("nan"), rest_mass)
    mass = tl.where(wrong, float("nan"), mass)
    w, soft, hard = factors(
        w_ptr, go_ptr, row, in_R, y, T, label_weight, coefficient, WEIGHTED, 0, HAS_GO
    )
    loss = w * ((1.0 - label_weight) * T * T * kl + label_weight * ce)
    tl.store(loss_ptr + row, tl.where(wrong, float("nan"), loss), mask=in_R)
    if GRADIENT:
        PEEL: tl.constexpr = ZS % VEC != 0
        s = soft * rest_mass / rest_sum
        s_once = hard / once
        flat = soft * each
        g = e * s[:, None] - flat[:, None]
        if HARD:
            g += tl.exp2((z - top[:, None]) * LOG2E) * s_once[:, None]
            g -= tl.where(col[None, :] == (y + off)[:, None], hard[:, None], 0.0)
            # A row without a label: y + off may be a column outside the row, and hard is 0.
        g_base, _ = start_of(row, GS, VEC)
        store_row(g_ptr, g_base, off, col, in_R, g, C, VEC, PEEL)
        if PEEL:
            at, own = edges(off, 0, in_R, C, VEC, BLOCK)
            ze = tl.load(z_ptr + base[:, None] + at, mask=own, other=0.0).to(tl.float32)
            ge = _gradient(
                ze, at == (y + off)[:, None], rest_top, top, s, flat, s_once, hard, scale, HARD
            )
            tl.store(g_ptr + g_base[:, None] + at, ge.to(g_ptr.dtype.element_ty), mask=own)
        _store_named(
            g_ptr, z_ptr, row, off, 0, idx, p, live, y, top, total, mass, soft, s_once, hard,
            scale, ZS, GS, BLOCK, HARD,
        )  # fmt: skip
    else:
        _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass,
                     once)  # fmt: skip


@triton.jit
def _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass,
                 once):  # fmt: skip
    tl.store(stats_ptr + row, top, mask=in_R)
    tl.store(stats_ptr + B + row, total, mask=in_R)
    tl.store(stats_ptr + 2 * B + row, rest_top, mask=in_R)
    tl.store(stats_ptr + 3 * B + row, rest_sum, mask=in_R)
    tl.store(stats_ptr + 4 * B + row, rest_mass, mask=in_R)
    tl.store(stats_ptr + 5 * B + row, each, mask=in_R)
    tl.store(stats_ptr + 6 * B + row, mass, mask=in_R)
    tl.store(stats_ptr + 7 * B + row, once, mask=in_R)


@triton.jit
def loop_kernel(
    z_ptr, val_ptr, idx_ptr, tail_ptr, y_ptr, w_ptr, loss_ptr, stats_ptr,
    B, T, inverse_t, scale, label_weight, coefficient,
    C: tl.constexpr, K: tl.constexpr, ZS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
    BK: tl.constexpr, TAIL: tl.constexpr, TAIL_N: tl.constexpr, TEMPERED: tl.constexpr,
    HARD: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    idx, log_p, p, live, log_r, wrong = _teacher(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    m = tl.full([BLOCK // 8], LOW, tl.float32)
    d = tl.zeros([BLOCK // 8], tl.float32)
    d_once = tl.zeros([BLOCK // 8], tl.float32)
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
        if HARD:
            d_once *= tl.exp2((m - high) * LOG2E)
            d_once += tl.sum(tl.exp2((z - high[:, None]) * LOG2E), axis=1)
        if TAIL == UNIFORM:
            inside = (col >= tl.sum(off, axis=0)) & (col < tl.sum(off, axis=0) + C)
            inside = tl.reshape(inside, [BLOCK // 8, 8])
            gaps += count * (m - high)
            gaps += tl.sum(tl.where(inside, z - high[:, None], 0.0), axis=1)
            count += tl.sum(inside.to(tl.float32), axis=1)
        m = high
    zk = tl.load(z_ptr + row[:, None] * ZS + idx, mask=live, other=float("-inf")).to(tl.float32)
    rest_top = tl.max(m, axis=0)
    top = rest_top + tl.zeros([1], tl.float32)
    if TAIL == BUCKET:
        top = tl.maximum(top, tl.max(zk, axis=1))
        rest_top = tl.where(rest_top > LOW, rest_top, tl.max(top, axis=0))
    rest_sum = tl.sum(d * tl.exp2((m - rest_top) * scale), axis=0) + tl.zeros([1], tl.float32)
    once_sum = tl.sum(d_once * tl.exp2((m - rest_top) * LOG2E), axis=0)
    rest_top = rest_top + tl.zeros([1], tl.float32)
    dk = zk - top[:, None]
    total = rest_sum
    once = once_sum + tl.zeros([1], tl.float32)
    if TAIL == BUCKET:
        ek = tl.where(live, tl.exp2(dk * scale), 0.0)
        total = rest_sum * tl.exp2((rest_top - top) * scale) + tl.sum(ek, axis=1)
        ek = tl.where(live, tl.exp2(dk * LOG2E), 0.0)
        once = once * tl.exp2((rest_top - top) * LOG2E) + tl.sum(ek, axis=1)
    gap_sum = tl.sum(gaps + count * (m - tl.max(top, axis=0)), axis=0) + tl.zeros([1], tl.float32)
    kl, rest_mass, each, mass = _row_loss(
        log_p, p, live, log_r, dk, rest_top - top, rest_sum, total, gap_sum, inverse_t, C, TAIL
    )
    y = tl.full([1], -1, tl.int32)
    ce = tl.zeros([1], tl.float32)
    if HARD:
        y, zy, no_class = label_of(y_ptr, z_ptr, row, in_R, C, ZS)
        wrong = wrong | no_class
        ce = tl.where(y >= 0, tl.log(once) - (zy - top), 0.0)
    rest_mass = tl.where(wrong, float("nan"), rest_mass)
    mass = tl.where(wrong, float("nan"), mass)
    w, _, _ = factors(
        w_ptr, w_ptr, row, in_R, y, T, label_weight, coefficient, WEIGHTED, 0, False
    )
    loss = w * ((1.0 - label_weight) * T * T * kl + label_weight * ce)
    tl.store(loss_ptr + row, tl.where(wrong, float("nan"), loss), mask=in_R)
    _store_stats(stats_ptr, B, row, in_R, top, total, rest_top, rest_sum, rest_mass, each, mass,
                 once)  # fmt: skip


@triton.jit
def grad_kernel(
    z_ptr, val_ptr, idx_ptr, tail_ptr, y_ptr, w_ptr, go_ptr, stats_ptr, g_ptr,
    B, T, inverse_t, scale, label_weight, coefficient,
    C: tl.constexpr, K: tl.constexpr, ZS: tl.constexpr, GS: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr,
    TAIL_N: tl.constexpr, TEMPERED: tl.constexpr, HARD: tl.constexpr, WEIGHTED: tl.constexpr,
    GO_STRIDE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
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
    once = tl.load(stats_ptr + 7 * B + row, mask=in_R, other=1.0)
    y = tl.full([ROWS], -1, tl.int32)
    if HARD:
        y = tl.load(y_ptr + row, mask=in_R, other=-1).to(tl.int32)
    _, soft, hard = factors(
        w_ptr, go_ptr, row, in_R, y, T, label_weight, coefficient, WEIGHTED, GO_STRIDE, True
    )
    s = soft * rest_mass / rest_sum
    s_once = hard / once
    flat = soft * each
    PEEL: tl.constexpr = ZS % VEC != 0
    col = start + tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    at_y = tl.where(y >= 0, y + off, -1)
    g = _gradient(
        z, col[None, :] == at_y[:, None], rest_top, top, s, flat, s_once, hard, scale, HARD
    )
    store_row(g_ptr, g_base, off, col, in_R, g, C, VEC, PEEL)
    if PEEL:
        at, own = edges(off, start, in_R, C, VEC, BLOCK)
        ze = tl.load(z_ptr + base[:, None] + at, mask=own, other=0.0).to(tl.float32)
        ge = _gradient(ze, at == at_y[:, None], rest_top, top, s, flat, s_once, hard, scale, HARD)
        tl.store(g_ptr + g_base[:, None] + at, ge.to(g_ptr.dtype.element_ty), mask=own)
    idx, _, p, live, _, _ = _teacher(
        val_ptr, idx_ptr, tail_ptr, row, in_R, inverse_t, C, K, BK, TAIL, TAIL_N, TEMPERED
    )
    _store_named(
        g_ptr, z_ptr, row, off, start, idx, p, live, y, top, total, mass, soft, s_once, hard,
        scale, ZS, GS, BLOCK, HARD,
    )  # fmt: skip


def _teacher_arguments(z, values, classes_BK, tail_values, tail, tempered):
    values = values.contiguous()
    tensors = dict(
        val_ptr=values, idx_ptr=classes_BK.contiguous(), tail_ptr=given(tail_values, values)
    )
    constants = dict(
        K=values.shape[1], BK=triton.next_power_of_2(values.shape[1]), VEC=layout.vector(z),
        TAIL=TAILS[tail], TEMPERED=tempered,
        TAIL_N=0 if tail_values is None else tail_values.numel() // max(z.shape[0], 1),
    )  # fmt: skip
    return tensors, constants


FORM = Form("sparse", row_kernel, loop_kernel, grad_kernel, _teacher_arguments)
