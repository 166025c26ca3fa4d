"""The losses of `reference.rows` and their gradient on the CPU, compiled by numba.

In: float32 logits in memory, any row stride. Out: the loss of each row, and the gradient of its
weighted sum if asked for. One pass over a row that stays in the cache; rows are independent, so
the result does not depend on the number of threads.

Cost: one exponential a logit (two with a label and T != 1, or a dense teacher). numba's own exp
stays scalar without Intel's SVML, so 2^x is a polynomial here that the compiler vectorises.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

# torch keeps libgomp's threads; numba's other layers then fight them for the cores.
numba.config.THREADING_LAYER = "omp"

TAILS = {"renormalise": 0, "none": 1, "uniform": 2, "bucket": 3}
RENORMALISE, NONE, UNIFORM, BUCKET = range(4)
# No nnan and no ninf: -inf is a legitimate logit.
FLAGS = {"reassoc", "contract", "nsz"}
LOG2E = math.log2(math.e)
F32 = np.float32
I32 = np.int32
# Below this share the tail's own maximum replaces the row's, lest its exponentials underflow.
SMALL_TAIL = 1e-20
# Several, so that a thread which a neighbour disturbs has fewer rows to do.
LANES_PER_THREAD = 8


@intrinsic
def _bits_as_float(context, bits):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def _float_as_bits(context, x):
    def code(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), code


@intrinsic
def _truncate(context, x):
    # numba's own int32(x) goes through int64, which halves the lanes twice.
    def code(context, builder, signature, args):
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float32), code


@njit(fastmath=FLAGS, inline="always")
def _exp2_of(t, n):
    """2^(t + n) for |t| <= 1/2 to 2.2e-7."""
    r = F32(1.5403530393381609954e-4)
    r = r * t + F32(1.3333558146428443423e-3)
    r = r * t + F32(9.6181291076284771619e-3)
    r = r * t + F32(5.5504108664821579953e-2)
    r = r * t + F32(2.4022650695910071233e-1)
    r = r * t + F32(6.9314718055994530942e-1)
    r = r * t + F32(1.0)
    return r * _bits_as_float((n + I32(127)) << I32(23))


@njit(fastmath=FLAGS, inline="always")
def _exp2(x):
    """2^x for x <= 0; 0 below -126, for -inf and for NaN."""
    y = x if x > F32(-126.0) else F32(-126.0)
    n = _truncate(y - F32(0.5))
    r = _exp2_of(y - F32(n), n)
    return r if x > F32(-126.0) else F32(0.0)


@njit(fastmath=FLAGS, inline="always")
def _exp(x):
    """e^x of a float64 as a float32, without the rounding of x that float32 has for large |x|."""
    y = min(max(x * LOG2E, -126.0), 127.0)
    n = math.floor(y + 0.5)
    r = _exp2_of(F32(y - n), _truncate(F32(n)))
    return r if x * LOG2E > -126.0 else F32(0.0)


@njit(fastmath=FLAGS, inline="always")
def _row_max(x):
    # Through integers of the same order: the compiler vectorises that without being told nnan.
    top = I32(-2147483648)
    for j in range(x.size):
        bits = _float_as_bits(x[j])
        key = bits ^ ((bits >> I32(31)) & I32(0x7FFFFFFF))
        top = key if key > top else top
    return _bits_as_float(top ^ ((top >> I32(31)) & I32(0x7FFFFFFF)))


@njit(fastmath=FLAGS, inline="always")
def _exponentials(x, top, scale, out):
    """out = 2^((x - top) scale), and its sum."""
    total = F32(0.0)
    for j in range(x.size):
        e = _exp2((x[j] - top) * scale)
        out[j] = e
        total += e
    return total


@njit(fastmath=FLAGS, inline="always")
def _sum(x):
    total = F32(0.0)
    for j in range(x.size):
        total += x[j]
    return total


@njit(fastmath=FLAGS, inline="always")
def _sum_below_of(x, top):
    total = F32(0.0)
    for j in range(x.size):
        total += x[j] - top
    return total


@njit(fastmath=FLAGS)
def _sum_below(x, top):
    # In pieces: one float32 sum of 20,000 large terms loses more than the bounds allow.
    total = 0.0
    for start in range(0, x.size, 1024):
        total += _sum_below_of(x[start : start + 1024], top)
    return total


@njit(fastmath=FLAGS, inline="always")
def _logsumexp(values, factor):
    top = np.float64(values[0])
    for k in range(values.size):
        top = max(top, np.float64(values[k]))
    total = 0.0
    for k in range(values.size):
        total += _exp((np.float64(values[k]) - top) * factor)
    return top * factor + math.log(total)


@njit(fastmath=FLAGS)
def _temper(values, tail, left, inverse_t, log_p):
    """`reference.temper` of one row into log_p; returns log r."""
    log_total = _logsumexp(values, inverse_t)
    log_r = -np.inf
    if tail.size == 3 and left > 0:
        mean, half, start = np.float64(tail[1]), tail[2] / 2.0, math.log(left)
        cubic = tail[0] - start - mean - half
        log_r = start + inverse_t * (mean + inverse_t * (half + inverse_t * cubic))
        # Where any K must lie; a comparison with NaN keeps the NaN.
        low = max(start + inverse_t * mean, inverse_t * tail[0])
        chord = start + inverse_t * (tail[0] - start)
        log_r = low if log_r < low else log_r
        log_r = chord if log_r > chord else log_r
        high = max(log_r, log_total)
        log_total = high + math.log(math.exp(log_r - high) + math.exp(log_total - high))
        log_r -= log_total
    for k in range(values.size):
        log_p[k] = values[k] * inverse_t - log_total
    return log_r


@njit(fastmath=FLAGS)
def _take_log_p(values, tail, renormalise, log_p):
    """The same for values that are log-probabilities at T already."""
    shift = _logsumexp(values, 1.0) if renormalise else 0.0
    for k in range(values.size):
        log_p[k] = values[k] - shift
    return np.float64(tail[0]) if tail.size == 1 else -np.inf


@njit(fastmath=FLAGS)
def _rest(x, e, top, scale):
    """Sum of the classes not named (named ones hold e = -1), relative to their own maximum."""
    high = F32(-np.inf)
    for j in range(x.size):
        if e[j] >= 0 and x[j] > high:
            high = x[j]
    if high == -np.inf:
        high = top
    total = F32(0.0)
    for j in range(x.size):
        e[j] = _exp2((x[j] - high) * scale) if e[j] >= 0 else F32(0.0)
        total += e[j]
    return high, total


@njit(fastmath=FLAGS, parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _sparse(
    z, stride, width, values, classes, tail, labels, weights,
    temperature, label_weight, mode, tempered, coefficient, want_gradient, lanes, loss, gradient,
):  # fmt: skip
    rows, kept = values.shape
    inverse_t = 1.0 / temperature
    scale = F32(inverse_t * LOG2E)
    bad = 0
    for lane in prange(lanes):
        # Scratch for a lane of rows: an allocation a row would cost as much as its exponentials.
        log_p = np.empty(kept, np.float64)
        p = np.empty(kept, np.float32)
        gap = np.empty(kept, np.float32)
        spare = np.empty(0 if want_gradient else width, np.float32)
        once = np.empty(width if label_weight > 0 else 0, np.float32)
        for r in range(rows * lane // lanes, rows * (lane + 1) // lanes):
            x = z[r * stride : r * stride + width]
            e = gradient[r] if want_gradient else spare
            label = labels[r] if labels.size > 0 else -1
            wrong = label >= width
            for k in range(kept):
                wrong |= classes[r, k] < 0 or classes[r, k] >= width
            if wrong:
                bad += 1
                continue
            if tempered:
                log_r = _take_log_p(values[r], tail[r], mode == RENORMALISE, log_p)
            else:
                empty = tail[r, :0] if mode == RENORMALISE else tail[r]
                log_r = _temper(values[r], empty, width - kept, inverse_t, log_p)
            live = 0
            p_sum = 0.0
            for k in range(kept):
                live += log_p[k] > -np.inf
                p[k] = _exp(log_p[k])
                p_sum += p[k]
            left = width - live
            tail_p = math.exp(log_r) if mode >= UNIFORM and left > 0 else 0.0

            top = _row_max(x)
            total = _exponentials(x, top, scale, e)
            for k in range(kept):
                gap[k] = x[classes[r, k]] - top
            # Everything of the tail is relative to rest_top and rest_sum.
            rest_top, rest_sum = top, total
            if mode == BUCKET:
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        e[classes[r, k]] = 0.0
                rest_sum = _sum(e)
                total = rest_sum
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        total += _exp2(gap[k] * scale)
                if rest_sum < SMALL_TAIL:
                    for k in range(kept):
                        if log_p[k] > -np.inf:
                            e[classes[r, k]] = -1.0
                    rest_top, rest_sum = _rest(x, e, top, scale)
            log_total = math.log(np.float64(total))

            kl = 0.0
            named_log_q = 0.0
            for k in range(kept):
                log_q = gap[k] * inverse_t - log_total
                named_log_q += log_q if log_p[k] > -np.inf else 0.0
                kl += p[k] * (log_p[k] - log_q) if p[k] > 0 else 0.0
            mass = p_sum + tail_p
            each = 0.0
            rest_mass = mass
            if mode == UNIFORM and tail_p > 0:
                each = tail_p / left
                all_log_q = _sum_below(x, top) * inverse_t - width * log_total
                kl += tail_p * (log_r - math.log(left)) - each * (all_log_q - named_log_q)
            if mode == BUCKET:
                log_rest = -np.inf
                if rest_sum > 0:
                    log_rest = (np.float64(rest_top) - top) * inverse_t
                    log_rest += math.log(np.float64(rest_sum)) - log_total
                if tail_p > 0:
                    kl += tail_p * (log_r - log_rest)
                rest_mass = mass * math.exp(log_rest) - tail_p

            hard = label_weight if label >= 0 else 0.0
            soft_weight = (1.0 - label_weight) * temperature * temperature
            cross_entropy = 0.0
            # At T = 1 the exponentials of the label's softmax are there already.
            again = hard > 0 and (temperature != 1.0 or mode == BUCKET)
            total_once = total
            if again:
                total_once = _exponentials(x, top, F32(LOG2E), once)
            if hard > 0:
                cross_entropy = math.log(np.float64(total_once)) - (np.float64(x[label]) - top)
            weight = np.float64(weights[r]) if weights.size > 0 else 1.0
            weight *= coefficient
            loss[r] = weight * (soft_weight * kl + hard * cross_entropy)
            if want_gradient:
                soft = weight * (1.0 - label_weight) * temperature
                hard *= weight
                s = F32(soft * rest_mass / rest_sum) if rest_sum > 0 else F32(0.0)
                flat = F32(soft * each)
                s_once = F32(hard / total_once)
                if again:
                    for j in range(width):
                        e[j] = e[j] * s - flat + once[j] * s_once
                else:
                    if hard > 0:
                        s += s_once
                    for j in range(width):
                        e[j] = e[j] * s - flat
                for k in range(kept):
                    if log_p[k] > -np.inf:
                        q = np.float64(_exp2(gap[k] * scale)) / total
                        g = soft * (q * mass - p[k])
                        if hard > 0:
                            g += s_once * _exp2(gap[k] * F32(LOG2E))
                        e[classes[r, k]] = g
                if hard > 0:
                    e[label] -= F32(hard)
    return bad


@njit(fastmath=FLAGS, parallel=True, error_model="numpy", boundscheck=False, cache=True)
def _dense(
    z, stride, width, t, t_stride, labels, weights,
    temperature, label_weight, coefficient, want_gradient, lanes, loss, gradient,
):  # fmt: skip
    inverse_t = 1.0 / temperature
    scale = F32(inverse_t * LOG2E)
    bad = 0
    rows = loss.size
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
            top, y_top = _row_max(x), _row_max(y)
            total = _exponentials(x, top, scale, e)
            y_total = _exponentials(y, y_top, scale, p)
            cross = F32(0.0)
            for j in range(width):
                gap = (y[j] - y_top) - (x[j] - top)
                cross += p[j] * gap if p[j] > 0 else F32(0.0)
            kl = np.float64(cross) / y_total * inverse_t
            kl += math.log(np.float64(total)) - math.log(np.float64(y_total))

            hard = label_weight if label >= 0 else 0.0
            soft_weight = (1.0 - label_weight) * temperature * temperature
            again = hard > 0 and temperature != 1.0
            total_once = total
            cross_entropy = 0.0
            if again:
                total_once = _exponentials(x, top, F32(LOG2E), once)
            if hard > 0:
                cross_entropy = math.log(np.float64(total_once)) - (np.float64(x[label]) - top)
            weight = np.float64(weights[r]) if weights.size > 0 else 1.0
            weight *= coefficient
            loss[r] = weight * (soft_weight * kl + hard * cross_entropy)
            if want_gradient:
                soft = weight * (1.0 - label_weight) * temperature
                hard *= weight
                s, y_s, s_once = F32(soft / total), F32(soft / y_total), F32(hard / total_once)
                if again:
                    for j in range(width):
                        e[j] = e[j] * s - p[j] * y_s + once[j] * s_once
                else:
                    if hard > 0:
                        s += s_once
                    for j in range(width):
                        e[j] = e[j] * s - p[j] * y_s
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
    z, stride = _lines(student_BC)
    labels = _NO_LABELS if labels_B is None else _array(labels_B, torch.int64)
    weights = _NO_WEIGHTS if weights_B is None else _array(weights_B, torch.float32)
    out = loss_B.numpy(), gradient_BC.numpy()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    lanes = min(B, LANES_PER_THREAD * threads)
    if classes_BK is None:
        t, t_stride = _lines(values)
        bad = _dense(
            z, stride, C, t, t_stride, labels, weights,
            temperature, label_weight, coefficient, gradient, lanes, *out,
        )  # fmt: skip
    else:
        kept = _array(values, torch.float32)
        summary = _no_tail(B) if tail_values is None else _array(tail_values, torch.float32)
        summary = summary.reshape(B, summary.size // max(B, 1))
        bad = _sparse(
            z, stride, C, kept, _array(classes_BK, torch.int64), summary, labels, weights,
            temperature, label_weight, TAILS[tail], tempered, coefficient, gradient, lanes,
            *out,
        )  # fmt: skip
    if bad:
        raise IndexError(f"{bad} of {B} rows name a class or a label outside 0 to {C - 1}")
    return loss_B, gradient_BC


_NO_LABELS = np.empty(0, np.int64)
_NO_WEIGHTS = np.empty(0, np.float32)


def _no_tail(rows: int) -> np.ndarray:
    return np.empty((rows, 0), np.float32)


def _array(x: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    return x.detach().to(dtype).contiguous().numpy()


def _lines(x: torch.Tensor) -> tuple[np.ndarray, int]:
    """All memory of a float32 matrix as one line, and its row stride: rows stay contiguous."""
    x = x.detach().float()
    if x.is_contiguous() or x.stride(1) != 1:
        x = x.contiguous()
        return x.numpy().reshape(-1), x.shape[1]
    length = (x.shape[0] - 1) * x.stride(0) + x.shape[1] if x.numel() else 0
    return x.as_strided((length,), (1,)).numpy(), x.stride(0)
