"""Triton: the teacher's named classes of a row, and the loss of the row from them.

Shapes as in `rows.py`: R rows of a program, K named classes (padded to BK).
"""

import triton
import triton.language as tl

from kdcache.kernels.problem import TAIL_CODES

RENORMALISE = tl.constexpr(TAIL_CODES["renormalise"])
UNIFORM, BUCKET = tl.constexpr(TAIL_CODES["uniform"]), tl.constexpr(TAIL_CODES["bucket"])


@triton.jit
def named_classes(
    val_ptr,
    idx_ptr,
    tail_ptr,
    row,
    in_R,
    inverse_t,
    C: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_N: tl.constexpr,
    TEMPERED: tl.constexpr,
):
    """Named classes [R, K], their log p and p, which are live, log r [R], which rows are wrong."""
    k = tl.arange(0, BK)[None, :]
    mask = in_R[:, None] & (k < K)
    v = tl.load(val_ptr + row[:, None] * K + k, mask=mask, other=float("-inf")).to(tl.float32)
    idx = tl.load(idx_ptr + row[:, None] * K + k, mask=mask, other=0).to(tl.int64)
    if not TEMPERED:
        v = v * inverse_t
    log_r = tl.full([row.shape[0]], float("-inf"), tl.float32)
    if (not TEMPERED) or TAIL == RENORMALISE:
        top = tl.max(v, axis=1)
        # Rows beyond the batch are all -inf, and their differences would be NaN.
        top = tl.where(in_R, top, 0.0)
        log_all = top + tl.log(tl.sum(tl.exp(v - top[:, None]), axis=1))
        if (TAIL_N == 3) and (TAIL != RENORMALISE):
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
def row_loss(
    log_p,
    p,
    live,
    log_r,
    dk,
    rest_gap,
    rest_sum,
    total,
    gap_sum,
    inverse_t,
    C: tl.constexpr,
    TAIL: tl.constexpr,
):
    """KL [R], and the gradient's coefficients: tail mass A, tail constant u, named mass."""
    log_total = tl.log(total)
    log_q = dk * inverse_t - log_total[:, None]
    kl = tl.sum(tl.where(p != 0, p * (log_p - log_q), 0.0), axis=1)
    mass = tl.sum(p, axis=1)
    each = tl.zeros_like(mass)
    rest_mass = mass
    if TAIL >= UNIFORM:
        left = C - tl.sum(live.to(tl.int32), axis=1)
        # Where every class is named there is no tail, whatever the record says of it.
        r = tl.where(left > 0, tl.exp(log_r), 0.0)
        # At least 1, because the quotients below are computed for rows without a tail too.
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
            # (P + r) Q - r, which stays finite as Q goes to 0 where P + r - r / Q does not
            # (README.md).
            rest_mass = mass * tl.exp(log_rest) - r
    return kl, rest_mass, each, mass
