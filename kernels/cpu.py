"""The losses of `reference.rows` and their gradient on the CPU, compiled by numba.

In: float32 logits in memory, any row stride. Out: the loss of each row, and the gradient of its
weighted sum if asked for. One pass over a row that stays in the cache; rows are independent, so
the result does not depend on the number of threads.

Cost: one exponential a logit (two with a dense teacher), see `vector.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
import torch
from numba import carray, njit, prange

from kdcache.kernels.problem import TAIL_CODES, Problem
from kdcache.kernels.vector import (
    F32,
    LOG2E,
    cross_of,
    exp,
    exp2,
    exponentials,
    floats_at,
    integers_at,
    largest,
    maximum,
    multiply_add,
    total_below,
    total_of,
)

RENORMALISE, UNIFORM, BUCKET = (TAIL_CODES[t] for t in ("renormalise", "uniform", "bucket"))
# Below this share the tail's own maximum replaces the row's, lest its exponentials underflow.
SMALL_TAIL = 1e-20


class _Rows(NamedTuple):
    """Student rows, their results and their factors.

    Addresses, because each array that crosses from Python costs as much as several rows; an absent
    tensor's is 0. lanes: the parallel parts.
    """

    count: int
    width: int
    z_at: int
    z_stride: int
    row_weights_at: int
    loss_at: int
    gradient_at: int
    want_gradient: bool
    temperature: float
    coefficient: float
    lanes: int


class _Named(NamedTuple):
    """The teacher's named classes of the same rows; tail_size: numbers of a row's tail."""

    kept: int
    values_at: int
    class_ids_at: int
    tail_at: int
    tail_size: int
    mode: int
    tempered: bool


@njit
def _tensors(rows):
    """Memory as arrays: z as one vector, so that its rows stay contiguous; absent ones empty."""
    count, width = rows.count, rows.width
    return (
        # The last row ends at its width: with a whole stride the array would reach beyond the
        # tensor.
        carray(floats_at(rows.z_at), ((count - 1) * rows.z_stride + width,)),
        carray(floats_at(rows.row_weights_at), (count if rows.row_weights_at else 0,)),
        carray(floats_at(rows.loss_at), (count,)),
        carray(floats_at(rows.gradient_at), (count if rows.want_gradient else 0, width)),
    )


@njit
def _tail_log_mass(tail, left, inverse_t):
    """`reference.tail_log_mass` of one row."""
    mean, half, start = np.float64(tail[1]), tail[2] / 2.0, math.log(left)
    cubic = tail[0] - start - mean - half
    value = start + inverse_t * (mean + inverse_t * (half + inverse_t * cubic))
    # A comparison with NaN keeps the NaN.
    low = max(start + inverse_t * mean, inverse_t * tail[0])
    chord = start + inverse_t * (tail[0] - start)
    value = low if value < low else value
    return chord if value > chord else value


@njit
def _teacher(values, tail, left, inverse_t, mode, tempered, log_p, p):
    """log p and p at T of the named classes of one row; returns log r, -inf without a tail, and
    whether all values are numbers: a NaN would count as a class of no mass."""
    factor = 1.0 if tempered else inverse_t
    top = -np.inf
    fine = True
    for k in range(values.size):
        top = max(top, np.float64(values[k]))
        fine &= values[k] < np.inf
    named = 0.0
    for k in range(values.size):
        p[k] = exp((values[k] - top) * factor)
        named += p[k]
    log_total = top * factor + math.log(named)
    log_r = -np.inf
    if tempered:
        if mode != RENORMALISE:
            log_total = 0.0
            log_r = np.float64(tail[0]) if tail.size == 1 else log_r
    elif tail.size == 3 and left > 0 and mode != RENORMALISE:
        log_r = _tail_log_mass(tail, left, inverse_t)
        # The sum of two exponentials relative to the larger one, so that neither overflows.
        high = max(log_r, log_total)
        log_total = high + math.log(math.exp(log_r - high) + math.exp(log_total - high))
        log_r -= log_total
    fine &= abs(log_total) < np.inf
    share = math.exp(top * factor - log_total)
    for k in range(values.size):
        log_p[k] = values[k] * factor - log_total
        p[k] *= share
    return log_r, fine


@njit
def _rest(x, e, top, scale):
    """Sum of the classes not named (named ones hold e = -1), relative to their own maximum."""
    # The tail may lie far below the row's maximum, where its exponentials would all be 0.
    high = F32(-np.inf)
    for j in range(x.size):
        high = maximum(high, x[j]) if e[j] >= 0 else high
    # A tail of nothing but -inf: a finite maximum keeps the differences from being NaN.
    if high == -np.inf:
        high = top
    for j in range(x.size):
        e[j] = exp2((x[j] - high) * scale) if e[j] >= 0 else F32(0.0)
    return high, total_of(e)


@njit(parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _sparse(rows, teacher):
    """Fills loss and gradient; returns how many rows name a class outside 0 to width - 1."""
    count, width, want_gradient = rows.count, rows.width, rows.want_gradient
    temperature, coefficient = rows.temperature, rows.coefficient
    lanes, stride = rows.lanes, rows.z_stride
    kept, mode, tempered = teacher.kept, teacher.mode, teacher.tempered
    z, row_weights, loss, gradient = _tensors(rows)
    values = carray(floats_at(teacher.values_at), (count, kept))
    class_ids = carray(integers_at(teacher.class_ids_at), (count, kept))
    tail = carray(floats_at(teacher.tail_at), (count, teacher.tail_size))
    inverse_t = 1.0 / temperature
    scale = F32(inverse_t * LOG2E)
    bad = 0
    for lane in prange(lanes):
        # Scratch for a lane of rows: an allocation a row would cost as much as its exponentials.
        log_p = np.empty(kept, np.float64)
        p = np.empty(kept, np.float32)
        gap = np.empty(kept, np.float32)
        ek = np.empty(kept, np.float32)
        spare = np.empty(0 if want_gradient else width, np.float32)
        # Each lane writes its own rows alone, so the number of threads does not change the result.
        for r in range(count * lane // lanes, count * (lane + 1) // lanes):
            x = z[r * stride : r * stride + width]
            e = gradient[r] if want_gradient else spare
            named = class_ids[r]
            wrong = False
            for k in range(kept):
                # Checked before anything is read by these ids: compiled code checks no bounds.
                wrong |= named[k] < 0 or named[k] >= width
            if wrong:
                bad += 1
                continue
            log_r, fine = _teacher(
                values[r], tail[r], width - kept, inverse_t, mode, tempered, log_p, p
            )
            live = 0
            for k in range(kept):
                # An entry of -inf names no class: it pads a record, and its class belongs to the
                # tail.
                live += log_p[k] > -np.inf
            left = width - live
            top = largest(x)
            # Also where the student's largest is NaN: `exp2` of a NaN is 0.
            fine &= top < np.inf
            if not fine or (mode >= UNIFORM and left > 0 and not log_r < np.inf):
                loss[r] = np.nan
                e[:] = np.nan
                continue
            tail_p = math.exp(log_r) if mode >= UNIFORM and left > 0 else 0.0

            total = exponentials(x, top, scale, e)
            for k in range(kept):
                # Kept, because the named places of `e` are overwritten below.
                gap[k] = x[named[k]] - top
                ek[k] = e[named[k]]
            # Everything of the tail is relative to rest_top and rest_sum.
            rest_top, rest_sum = top, total
            if mode == BUCKET:
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        # Taken out of the sum, not subtracted from it: the difference cancels where
                        # the tail is small.
                        e[named[k]] = 0.0
                rest_sum = total_of(e)
                total = rest_sum
                for k in range(kept):
                    total += ek[k] if log_p[k] > -np.inf else F32(0.0)
                if rest_sum < SMALL_TAIL:
                    for k in range(kept):
                        if log_p[k] > -np.inf:
                            e[named[k]] = -1.0
                    rest_top, rest_sum = _rest(x, e, top, scale)
            log_total = math.log(np.float64(total))

            kl = 0.0
            mass = tail_p
            for k in range(kept):
                log_q = gap[k] * inverse_t - log_total
                # A class without mass adds nothing, also where log_q is -inf and the product would
                # be NaN.
                kl += p[k] * (log_p[k] - log_q) if p[k] > 0 else 0.0
                mass += p[k]
            each = 0.0
            rest_mass = mass
            if mode == UNIFORM and tail_p > 0:
                each = tail_p / left
                rest_log_q = total_below(x, top) * inverse_t - left * log_total
                for k in range(kept):
                    rest_log_q -= gap[k] * inverse_t if log_p[k] > -np.inf else 0.0
                kl += tail_p * (log_r - math.log(left)) - each * rest_log_q
            if mode == BUCKET:
                log_rest = -np.inf
                if rest_sum > 0:
                    log_rest = (np.float64(rest_top) - top) * inverse_t
                    log_rest += math.log(np.float64(rest_sum)) - log_total
                if tail_p > 0:
                    kl += tail_p * (log_r - log_rest)
                # (P + r) Q - r, which stays finite as Q goes to 0 where P + r - r / Q does not
                # (README.md).
                rest_mass = mass * math.exp(log_rest) - tail_p

            weight = coefficient * (row_weights[r] if row_weights.size > 0 else 1.0)
            loss[r] = weight * temperature * temperature * kl
            if want_gradient:
                soft = weight * temperature
                s = F32(soft * rest_mass / rest_sum) if rest_sum > 0 else F32(0.0)
                flat = F32(soft * each)
                for j in range(width):
                    # As if no class were named: the named ones are few, and are overwritten next.
                    e[j] = multiply_add(e[j], s, -flat)
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        e[named[k]] = soft * (ek[k] / np.float64(total) * mass - p[k])
    return bad


@njit(parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _dense(rows, t_at, t_stride):
    count, width, want_gradient = rows.count, rows.width, rows.want_gradient
    temperature, coefficient = rows.temperature, rows.coefficient
    lanes, stride = rows.lanes, rows.z_stride
    z, row_weights, loss, gradient = _tensors(rows)
    t = carray(floats_at(t_at), ((count - 1) * t_stride + width,))
    inverse_t = 1.0 / temperature
    scale = F32(inverse_t * LOG2E)
    for lane in prange(lanes):
        p = np.empty(width, np.float32)
        spare = np.empty(0 if want_gradient else width, np.float32)
        for r in range(count * lane // lanes, count * (lane + 1) // lanes):
            x = z[r * stride : r * stride + width]
            y = t[r * t_stride : r * t_stride + width]
            e = gradient[r] if want_gradient else spare
            top, y_top = largest(x), largest(y)
            total = exponentials(x, top, scale, e)
            y_total = exponentials(y, y_top, scale, p)
            kl = np.float64(cross_of(p, y, y_top, x, top)) / y_total * inverse_t
            # The cross term is relative to both maxima, because the plain sum cancels where logits
            # are large; these logarithms are the rest of the KL.
            kl += math.log(np.float64(total)) - math.log(np.float64(y_total))

            weight = coefficient * (row_weights[r] if row_weights.size > 0 else 1.0)
            loss[r] = weight * temperature * temperature * kl
            if want_gradient:
                soft = weight * temperature
                s, y_s = F32(soft / total), F32(soft / y_total)
                for j in range(width):
                    e[j] = multiply_add(e[j], s, -p[j] * y_s)


def rows(problem: Problem, coefficient: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """coefficient * `reference.rows` [B], and the gradient of its sum, float32 [B, C] (or [0, 0]).

    Raises IndexError for a named class outside 0 to C - 1.
    """
    B, C = problem.student_BC.shape
    loss_B = torch.empty(B)
    gradient_BC = torch.empty((B, C) if gradient else (0, 0))
    if B == 0:
        return loss_B, gradient_BC
    # torch's setting holds here too, and numba refuses more threads than it started.
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    z, row_weights = _rows(problem.student_BC), _flat(problem.row_weights_B)
    students = _Rows(
        count=B,
        width=C,
        z_at=z.data_ptr(),
        z_stride=z.stride(0),
        row_weights_at=_address(row_weights),
        loss_at=loss_B.data_ptr(),
        gradient_at=gradient_BC.data_ptr(),
        want_gradient=gradient,
        temperature=problem.temperature,
        coefficient=coefficient,
        lanes=min(B, threads),
    )
    if problem.class_ids_BK is None:
        t = _rows(problem.values)
        _dense(students, t.data_ptr(), t.stride(0))
        return loss_B, gradient_BC
    values, tail_values = _flat(problem.values), _flat(problem.tail_values)
    # One type of ids for all of uint16, int32 and int64: one compiled form.
    class_ids = _flat(problem.class_ids_BK, torch.int64)
    named = _Named(
        kept=values.shape[1],
        values_at=_address(values),
        class_ids_at=_address(class_ids),
        tail_at=_address(tail_values),
        tail_size=0 if tail_values is None else tail_values.numel() // B,
        mode=TAIL_CODES[problem.tail],
        tempered=problem.tempered,
    )
    bad = _sparse(students, named)
    if bad:
        raise IndexError(f"{bad} of {B} rows name a class outside 0 to {C - 1}")
    return loss_B, gradient_BC


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _flat(x: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """In one piece and of this type; most tensors are."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32, each row in one piece, at least a row's length apart."""
    # Rows that overlap, as `expand` makes, are copied too: the kernels take a stride of at least C.
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
