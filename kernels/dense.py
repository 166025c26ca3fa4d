"""Triton: raw student logits against raw teacher logits. Forward, backward, both in one.

As `sparse.py`, with a second row in place of the named classes: the same tiles and stores.
A class of no teacher mass contributes nothing, even where the student has -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kdcache.kernels import layout
from kdcache.kernels.launch import Form
from kdcache.kernels.problem import Problem
from kdcache.kernels.rows import LOW, edges, factors, load_row, start_of, store_row


@triton.jit
def _gradient(z, t, top, t_top, s, t_s, scale):
    g = tl.exp2((z - top[:, None]) * scale) * s[:, None]
    g -= tl.exp2((t - t_top[:, None]) * scale) * t_s[:, None]
    return g


@triton.jit
def _store_all(
    z_ptr,
    t_ptr,
    g_ptr,
    row,
    start,
    in_R,
    z,
    t,
    top,
    t_top,
    s,
    t_s,
    scale,
    C: tl.constexpr,
    ZS: tl.constexpr,
    TS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of a tile: z and t its logits, s and t_s the factors of both softmaxes."""
    base, off = start_of(row, ZS, VEC)
    g_base, _ = start_of(row, GS, VEC)
    PEEL: tl.constexpr = ZS % VEC != 0
    col = start + tl.arange(0, BLOCK)
    g = _gradient(z, t, top, t_top, s, t_s, scale)
    store_row(g_ptr, g_base, off, col, in_R, g, C, VEC, PEEL)
    if PEEL:
        t_base, _ = start_of(row, TS, VEC)
        at, own = edges(off, start, in_R, C, VEC, BLOCK)
        ze = tl.load(z_ptr + base[:, None] + at, mask=own, other=0.0).to(tl.float32)
        te = tl.load(t_ptr + t_base[:, None] + at, mask=own, other=0.0).to(tl.float32)
        ge = _gradient(ze, te, top, t_top, s, t_s, scale)
        tl.store(g_ptr + g_base[:, None] + at, ge.to(g_ptr.dtype.element_ty), mask=own)


@triton.jit
def _store_stats(stats_ptr, B, row, in_R, top, total, t_top, t_total):
    """What `grad_kernel` needs of a row."""
    tl.store(stats_ptr + row, top, mask=in_R)
    tl.store(stats_ptr + B + row, total, mask=in_R)
    tl.store(stats_ptr + 2 * B + row, t_top, mask=in_R)
    tl.store(stats_ptr + 3 * B + row, t_total, mask=in_R)


@triton.jit
def row_kernel(
    z_ptr,
    t_ptr,
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
    ZS: tl.constexpr,
    TS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_GO: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    # int64: a row's offset in elements may pass 2^31.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    t_base, _ = start_of(row, TS, VEC)
    col = tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    t = load_row(t_ptr, t_base, off, col, in_R, C, VEC)
    # Rows beyond the batch are all -inf; a top of 0 keeps their differences from being NaN.
    top = tl.where(in_R, tl.max(z, axis=1), 0.0)
    t_top = tl.where(in_R, tl.max(t, axis=1), 0.0)
    total = tl.sum(tl.exp2((z - top[:, None]) * scale), axis=1)
    e = tl.exp2((t - t_top[:, None]) * scale)
    t_total = tl.sum(e, axis=1)
    # Relative to both maxima: the sum of e (t - z) cancels where the logits are large.
    gap = (t - t_top[:, None]) - (z - top[:, None])
    # A class without teacher mass adds nothing, also where the gap is infinite or NaN.
    cross = tl.sum(tl.where(e > 0, e * gap, 0.0), axis=1)
    kl = cross / t_total * inverse_t + tl.log(total) - tl.log(t_total)
    w, soft = factors(w_ptr, go_ptr, row, in_R, T, coefficient, WEIGHTED, 0, HAS_GO)
    tl.store(loss_ptr + row, w * (T * T * kl), mask=in_R)
    if GRADIENT:
        s, t_s = soft / total, soft / t_total
        _store_all(
            z_ptr,
            t_ptr,
            g_ptr,
            row,
            0,
            in_R,
            z,
            t,
            top,
            t_top,
            s,
            t_s,
            scale,
            C,
            ZS,
            TS,
            GS,
            VEC,
            BLOCK,
        )
    else:
        _store_stats(stats_ptr, B, row, in_R, top, total, t_top, t_total)


@triton.jit
def loop_kernel(
    z_ptr,
    t_ptr,
    w_ptr,
    loss_ptr,
    stats_ptr,
    B,
    T,
    inverse_t,
    scale,
    coefficient,
    C: tl.constexpr,
    ZS: tl.constexpr,
    TS: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    t_base, _ = start_of(row, TS, VEC)
    # A running maximum for 8 neighbours, which lie in one thread: see `sparse.loop_kernel`.
    GROUPS: tl.constexpr = BLOCK // 8
    m = tl.full([GROUPS], LOW, tl.float32)
    t_m = tl.full([GROUPS], LOW, tl.float32)
    d = tl.zeros([GROUPS], tl.float32)
    t_d = tl.zeros([GROUPS], tl.float32)
    cross = tl.zeros([GROUPS], tl.float32)
    REACH: tl.constexpr = C if ZS % VEC == 0 else C + VEC - 1
    for start in range(0, REACH, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.reshape(load_row(z_ptr, base, off, col, in_R, C, VEC), [GROUPS, 8])
        t = tl.reshape(load_row(t_ptr, t_base, off, col, in_R, C, VEC), [GROUPS, 8])
        high = tl.maximum(m, tl.max(z, axis=1))
        t_high = tl.maximum(t_m, tl.max(t, axis=1))
        d = d * tl.exp2((m - high) * scale) + tl.sum(tl.exp2((z - high[:, None]) * scale), axis=1)
        e = tl.exp2((t - t_high[:, None]) * scale)
        gap = (t - t_high[:, None]) - (z - high[:, None])
        # sum e (t - z) cancels where both are large, so it too is kept relative to the maxima.
        decay = tl.exp2((t_m - t_high) * scale)
        # Moving both maxima adds t_d times their difference; there is nothing to move at the first
        # tile.
        cross = decay * (cross + tl.where(t_d > 0, t_d * ((t_m - t_high) - (m - high)), 0.0))
        cross += tl.sum(tl.where(e > 0, e * gap, 0.0), axis=1)
        t_d = t_d * decay + tl.sum(e, axis=1)
        m = high
        t_m = t_high
    one = tl.zeros([1], tl.float32)
    top, t_top = tl.max(m, axis=0), tl.max(t_m, axis=0)
    total = tl.sum(d * tl.exp2((m - top) * scale), axis=0) + one
    decay = tl.exp2((t_m - t_top) * scale)
    t_total = tl.sum(t_d * decay, axis=0) + one
    moved = tl.where(t_d > 0, t_d * ((t_m - t_top) - (m - top)), 0.0)
    cross_sum = tl.sum(tl.where(decay > 0, decay * (cross + moved), 0.0), axis=0) + one
    kl = cross_sum / t_total * inverse_t + tl.log(total) - tl.log(t_total)
    w, _ = factors(w_ptr, w_ptr, row, in_R, T, coefficient, WEIGHTED, 0, False)
    tl.store(loss_ptr + row, w * (T * T * kl), mask=in_R)
    _store_stats(stats_ptr, B, row, in_R, top + one, total, t_top + one, t_total)


@triton.jit
def grad_kernel(
    z_ptr,
    t_ptr,
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
    ZS: tl.constexpr,
    TS: tl.constexpr,
    GS: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GO_STRIDE: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    in_R = row < B
    base, off = start_of(row, ZS, VEC)
    t_base, _ = start_of(row, TS, VEC)
    top = tl.load(stats_ptr + row, mask=in_R, other=0.0)
    total = tl.load(stats_ptr + B + row, mask=in_R, other=1.0)
    t_top = tl.load(stats_ptr + 2 * B + row, mask=in_R, other=0.0)
    t_total = tl.load(stats_ptr + 3 * B + row, mask=in_R, other=1.0)
    _, soft = factors(w_ptr, go_ptr, row, in_R, T, coefficient, WEIGHTED, GO_STRIDE, True)
    col = start + tl.arange(0, BLOCK)
    z = load_row(z_ptr, base, off, col, in_R, C, VEC)
    t = load_row(t_ptr, t_base, off, col, in_R, C, VEC)
    s, t_s = soft / total, soft / t_total
    _store_all(
        z_ptr,
        t_ptr,
        g_ptr,
        row,
        start,
        in_R,
        z,
        t,
        top,
        t_top,
        s,
        t_s,
        scale,
        C,
        ZS,
        TS,
        GS,
        VEC,
        BLOCK,
    )


def _teacher_arguments(problem: Problem, z: torch.Tensor):
    t = layout.rows_in_place(problem.values)
    return {"t_ptr": t}, {"TS": layout.row_stride(t), "VEC": layout.vector(z, t)}


FORM = Form("dense", row_kernel, loop_kernel, grad_kernel, _teacher_arguments)
