"""The losses of `reference.rows` and their gradient on the CPU, compiled by numba.

In: float32 logits in memory, any row stride. Out: the loss of each row, and the gradient of its
weighted sum if asked for. One pass over a row that stays in the cache; rows are independent, so
the result does not depend on the number of threads.

Cost: one exponential a logit (two with a label and T != 1, or a dense teacher), see `vector.py`.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from numba import carray, njit, prange

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

# torch's OpenMP is numba's too; threads of its other layers fight torch's for the cores.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]

TAILS = {"renormalise": 0, "none": 1, "uniform": 2, "bucket": 3}
RENORMALISE, NONE, UNIFORM, BUCKET = range(4)
# Below this share the tail's own maximum replaces the row's, lest its exponentials underflow.
SMALL_TAIL = 1e-20


@njit
def _tensors(rows, width, z_at, stride, labels_at, weights_at, loss_at, gradient_at, gradient):
    """Memory as arrays: of z all in one line, so that its rows stay contiguous; absent ones empty.

    Addresses, because each array that crosses from Python costs as much as several rows.
    """
    return (
        carray(floats_at(z_at), ((rows - 1) * stride + width,)),
        carray(integers_at(labels_at), (rows if labels_at else 0,)),
        carray(floats_at(weights_at), (rows if weights_at else 0,)),
        carray(floats_at(loss_at), (rows,)),
        carray(floats_at(gradient_at), (rows if gradient else 0, width)),
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
    whether the teacher is numbers: NaN where it is not would pass for a class of no mass."""
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
    high = F32(-np.inf)
    for j in range(x.size):
        high = maximum(high, x[j]) if e[j] >= 0 else high
    if high == -np.inf:
        high = top
    for j in range(x.size):
        e[j] = exp2((x[j] - high) * scale) if e[j] >= 0 else F32(0.0)
    return high, total_of(e)


@njit(parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _sparse(
    rows, width, z_at, stride, labels_at, weights_at, temperature, label_weight, coefficient,
    want_gradient, lanes, loss_at, gradient_at, kept, values_at, classes_at, tail_at, tail_size,
    mode, tempered,
):  # fmt: skip
    z, labels, weights, loss, gradient = _tensors(
        rows, width, z_at, stride, labels_at, weights_at, loss_at, gradient_at, want_gradient
    )
    values = carray(floats_at(values_at), (rows, kept))
    classes = carray(integers_at(classes_at), (rows, kept))
    tail = carray(floats_at(tail_at), (rows, tail_size))
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
        once = np.empty(width if label_weight > 0 else 0, np.float32)
        for r in range(rows * lane // lanes, rows * (lane + 1) // lanes):
            x = z[r * stride : r * stride + width]
            e = gradient[r] if want_gradient else spare
            named = classes[r]
            label = labels[r] if labels.size > 0 else -1
            wrong = label >= width
            for k in range(kept):
                wrong |= named[k] < 0 or named[k] >= width
            if wrong:
                bad += 1
                continue
            log_r, fine = _teacher(
                values[r], tail[r], width - kept, inverse_t, mode, tempered, log_p, p
            )
            live = 0
            for k in range(kept):
                live += log_p[k] > -np.inf
            left = width - live
            if not fine or (mode >= UNIFORM and left > 0 and not log_r < np.inf):
                loss[r] = np.nan
                e[:] = np.nan
                continue
            tail_p = math.exp(log_r) if mode >= UNIFORM and left > 0 else 0.0

            top = largest(x)
            total = exponentials(x, top, scale, e)
            for k in range(kept):
                gap[k] = x[named[k]] - top
                ek[k] = e[named[k]]
            # Everything of the tail is relative to rest_top and rest_sum.
            rest_top, rest_sum = top, total
            if mode == BUCKET:
                for k in range(kept):
                    if log_p[k] > -np.inf:
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
                rest_mass = mass * math.exp(log_rest) - tail_p

            hard = label_weight if label >= 0 else 0.0
            # At T = 1 the exponentials of the label's softmax are there, unless named ones are not.
            again = hard > 0 and (temperature != 1.0 or mode == BUCKET)
            total_once = exponentials(x, top, F32(LOG2E), once) if again else total
            weight = coefficient * (weights[r] if weights.size > 0 else 1.0)
            loss[r] = weight * (1.0 - label_weight) * temperature * temperature * kl
            if hard > 0:
                below = np.float64(x[label]) - top
                loss[r] += weight * hard * (math.log(np.float64(total_once)) - below)
            if want_gradient:
                soft = weight * (1.0 - label_weight) * temperature
                hard *= weight
                s = F32(soft * rest_mass / rest_sum) if rest_sum > 0 else F32(0.0)
                flat = F32(soft * each)
                s_once = F32(hard / total_once)
                if again:
                    for j in range(width):
                        e[j] = multiply_add(once[j], s_once, multiply_add(e[j], s, -flat))
                else:
                    s += s_once
                    for j in range(width):
                        e[j] = multiply_add(e[j], s, -flat)
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        g = soft * (ek[k] / np.float64(total) * mass - p[k])
                        e[named[k]] = g + s_once * (once[named[k]] if again else ek[k])
                if hard > 0:
                    e[label] -= F32(hard)
    return bad


@njit(parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _dense(
    rows, width, z_at, stride, labels_at, weights_at, temperature, label_weight, coefficient,
    want_gradient, lanes, loss_at, gradient_at, t_at, t_stride,
):  # fmt: skip
    z, labels, weights, loss, gradient = _tensors(
        rows, width, z_at, stride, labels_at, weights_at, loss_at, gradient_at, want_gradient
    )
    t = carray(floats_at(t_at), ((rows - 1) * t_stride + width,))
    inverse_t = 1.0 / temperature
    scale = F32(inverse_t * LOG2E)
    bad = 0
    for lane in prange(lanes):
        p = np.empty(width, np.float32)
        spare = np.empty(0 if want_gradient else width, np.float32)
        once = np.empty(width if label_weight > 0 else 0, np.float32)
        for r in range(rows * lane // lanes, rows * (lane + 1) // lanes):
            x = z[r * stride : r * stride + width]
            y = t[r * t_stride : r * t_stride + width]
            label = labels[r] if labels.size > 0 else -1
            if label >= width:
                bad += 1
                continue
            e = gradient[r] if want_gradient else spare
            top, y_top = largest(x), largest(y)
            total = exponentials(x, top, scale, e)
            y_total = exponentials(y, y_top, scale, p)
            kl = np.float64(cross_of(p, y, y_top, x, top)) / y_total * inverse_t
            kl += math.log(np.float64(total)) - math.log(np.float64(y_total))

            hard = label_weight if label >= 0 else 0.0
            again = hard > 0 and temperature != 1.0
            total_once = exponentials(x, top, F32(LOG2E), once) if again else total
            weight = coefficient * (weights[r] if weights.size > 0 else 1.0)
            loss[r] = weight * (1.0 - label_weight) * temperature * temperature * kl
            if hard > 0:
                below = np.float64(x[label]) - top
                loss[r] += weight * hard * (math.log(np.float64(total_once)) - below)
            if want_gradient:
                soft = weight * (1.0 - label_weight) * temperature
                hard *= weight
                s, y_s, s_once = F32(soft / total), F32(soft / y_total), F32(hard / total_once)
                if again:
                    for j in range(width):
                        soft_gradient = multiply_add(e[j], s, -p[j] * y_s)
                        e[j] = multiply_add(once[j], s_once, soft_gradient)
                else:
                    s += s_once
                    for j in range(width):
                        e[j] = multiply_add(e[j], s, -p[j] * y_s)
                if hard > 0:
                    e[label] -= F32(hard)
    return bad


def rows(
    student_BC: torch.Tensor,
    values: torch.Tensor,
    classes_BK: torch.Tensor | None,
    tail_values: torch.Tensor | None,
    labels_B: torch.Tensor | None,
    weights_B: torch.Tensor | None,
    temperature: float,
    label_weight: float,
    tail: str,
    tempered: bool,
    coefficient: float,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """coefficient * `reference.rows` [B], and the gradient of its sum, float32 [B, C] (or [0, 0]).

    Raises IndexError for a class or a label that is C or more.
    """
    B, C = student_BC.shape
    loss_B = torch.empty(B)
    gradient_BC = torch.empty(student_BC.shape if gradient else (0, 0))
    if B == 0:
        return loss_B, gradient_BC
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    z, labels, weights = _rows(student_BC), _flat(labels_B, torch.int64), _flat(weights_B)
    common = (
        B, C, z.data_ptr(), z.stride(0), _address(labels), _address(weights), temperature,
        label_weight, coefficient, gradient, min(B, threads), loss_B.data_ptr(),
        gradient_BC.data_ptr(),
    )  # fmt: skip
    if classes_BK is None:
        t = _rows(values)
        bad = _dense(*common, t.data_ptr(), t.stride(0))
    else:
        kept, classes, summary = _flat(values), _flat(classes_BK, torch.int64), _flat(tail_values)
        size = 0 if summary is None else summary.numel() // B
        bad = _sparse(
            *common, kept.shape[1], _address(kept), _address(classes), _address(summary), size,
            TAILS[tail], tempered,
        )  # fmt: skip
    if bad:
        raise IndexError(f"{bad} of {B} rows name a class or a label outside 0 to {C - 1}")
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
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
