"""An entropy coder for columns of small integers: rANS, with each column's own frequencies.

In: a 16-bit integer array [rows, columns]. Out: bytes; or the reverse. What stays true: equal
arrays give equal bytes on every machine; a column of one value takes no bits of the stream. Cost:
1 to 3 % above the columns' entropy in chunks of some thousand rows; a multiplication and two table
look-ups for each value of the other columns.

A column's table covers a window of at most 255 values of v >> shift; the bits that are shifted out
are kept as they are. A value outside the window is an escape, and all of its 16 bits are kept. So
an outlier costs itself some bytes, and the others nothing. The order of decoding: column by column,
in groups of 128 rows; of each group first the symbols, then the bits that are kept as they are.

Asymmetric numeral systems: J. Duda, arXiv 1311.2540; states of 32 bits, words of 16 and interleaved
lanes as in F. Giesen, arXiv 1402.3392. docs/cache-format.md has the format, and a decoder in NumPy.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 128  # rows of a group, each with a state of its own
PRECISION = 12  # frequencies of a column sum to 1 << PRECISION
TOTAL = 1 << PRECISION
MAX_WINDOW = 255
LOWEST_STATE = 1 << 16
WORD = np.uint64(0xFFFF)
# So many of 255 steps hold the middle 99 % of a wide column: finer steps would cost table entries
# for no gain, as frequencies of neighbours are alike.
WIDE_STEPS = 128


def encode(array: NDArray[Any]) -> bytes:
    """The code of an int16 or uint16 array [rows, columns]."""
    values = np.ascontiguousarray(array)
    rows, columns = values.shape
    low, shift, size = _windows(values)
    starts = np.zeros(columns + 1, np.int64)
    np.cumsum(size + 1, out=starts[1:])
    freqs = np.zeros(int(starts[-1]), np.uint16)
    # A symbol gives at most one word; an escape, or the bits of a shift, one more.
    words = np.empty(2 * values.size, np.uint16)
    states = np.full(LANES, LOWEST_STATE, np.uint64)
    first = _encode(values, low, shift, size, starts, freqs, states, words)
    parts = (low.astype("<i4"), shift.astype("u1"), size.astype("u1"), freqs.astype("<u2"))
    stream = (states.astype("<u4"), words[first:].astype("<u2"))
    return b"".join([struct.pack("<II", rows, columns), *(x.tobytes() for x in parts + stream)])


def decode(data: bytes, dtype: np.dtype[Any], shape: tuple[int, int] | None = None) -> NDArray[Any]:
    """The array that `encode` was given, of this type. Raises ValueError for other bytes.

    shape   that it must have; None: the one that the bytes tell
    """
    at = struct.calcsize("<II")
    rows, columns = found = struct.unpack_from("<II", data)
    if shape not in (None, found):
        raise ValueError(f"coded values have the shape {found}, expected {shape}")

    def take(kind: str, count: int) -> NDArray[Any]:
        nonlocal at
        found = np.frombuffer(data, kind, count, at)
        at += found.nbytes
        return found

    low, shift, size = take("<i4", columns), take("u1", columns), take("u1", columns)
    starts = np.zeros(columns + 1, np.int64)
    np.cumsum(size.astype(np.int64) + 1, out=starts[1:])
    freqs = take("<u2", int(starts[-1]))
    if (np.add.reduceat(freqs.astype(np.int64), starts[:-1]) != TOTAL).any() or (shift > 16).any():
        raise ValueError("the frequencies of a coded column do not sum to their total")
    states = take("<u4", LANES).astype(np.uint64)
    words = take("<u2", (len(data) - at) // 2)
    values = np.zeros((rows, columns), dtype)
    if not _decode(values, low, shift, size, starts, freqs, states, words):
        raise ValueError("a coded column does not end where its words do")
    return values


def _windows(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Of each column: the lowest step of its window, bits of a step, steps of the window."""
    least, most = values.min(0).astype(np.int32), values.max(0).astype(np.int32)
    low, shift, size = least.copy(), np.zeros_like(least), most - least + 1
    for j in np.flatnonzero(size > MAX_WINDOW):
        a, b = np.quantile(values[:, j], [0.005, 0.995], method="nearest").astype(np.int32)
        shift[j] = max(0, int((b - a) // WIDE_STEPS).bit_length())
        # The window around the middle, cut where the column ends.
        first = ((a + b) // 2 >> shift[j]) - MAX_WINDOW // 2
        low[j] = max(first, least[j] >> shift[j])
        size[j] = min(first + MAX_WINDOW - 1, most[j] >> shift[j]) - low[j] + 1
    return low, shift, size


@njit(nogil=True, cache=True)
def _encode(values, low, shift, size, starts, freqs, states, words):
    """Fill freqs, and words from their end; where they begin. Last value first, as rANS is LIFO."""
    rows, columns = values.shape
    for j in range(columns):
        _count(values, j, low[j], shift[j], size[j], freqs[starts[j] : starts[j + 1]])
    at = len(words)
    cumulated = np.zeros(MAX_WINDOW + 2, np.uint64)
    for j in range(columns - 1, -1, -1):
        f = freqs[starts[j] : starts[j + 1]]
        bits, steps, first = shift[j], size[j], low[j]
        wide = bits > 0 or f[steps] > 0
        if f[0] == TOTAL and bits == 0:
            continue
        for s in range(len(f)):
            cumulated[s + 1] = cumulated[s] + f[s]
        for group in range((rows - 1) // LANES * LANES, -1, -LANES):
            last = min(group + LANES, rows) - 1
            for i in range(last, group - 1 if wide else last, -1):
                value = np.int64(values[i, j])
                inside = 0 <= (value >> bits) - first < steps
                width = np.uint64(bits if inside else 16)
                x = states[i - group]
                if x >> (np.uint64(32) - width) > 0:
                    at -= 1
                    words[at] = x & WORD
                    x >>= np.uint64(16)
                raw = np.uint64(value) & ((np.uint64(1) << width) - np.uint64(1))
                states[i - group] = x << width | raw
            for i in range(last, group - 1, -1):
                symbol = (np.int64(values[i, j]) >> bits) - first
                if symbol < 0 or symbol >= steps:
                    symbol = np.int64(steps)
                frequency, x = np.uint64(f[symbol]), states[i - group]
                if x >= frequency << np.uint64(32 - PRECISION):
                    at -= 1
                    words[at] = x & WORD
                    x >>= np.uint64(16)
                quotient = x // frequency
                rest = x - quotient * frequency
                states[i - group] = (quotient << np.uint64(PRECISION)) + rest + cumulated[symbol]
    return at


@njit(nogil=True, cache=True)
def _count(values, j, first, bits, steps, out):
    """Frequencies of a column's symbols, the escape last: they sum to TOTAL, and none that occurs
    is 0."""
    rows = len(values)
    counts = np.zeros(steps + 1, np.int64)
    for i in range(rows):
        symbol = (np.int64(values[i, j]) >> bits) - first
        counts[symbol if 0 <= symbol < steps else steps] += 1
    left = TOTAL
    for s in range(steps + 1):
        if counts[s] > 0:
            out[s] = max(1, (2 * counts[s] * TOTAL + rows) // (2 * rows))
            left -= int(out[s])
    # What rounding leaves, or takes too much, is the likeliest symbol's, which feels it least.
    while left != 0:
        s = int(np.argmax(out))
        change = max(left, -(int(out[s]) // 2))
        out[s] += change
        left -= change


@njit(nogil=True, cache=True)
def _decode(values, low, shift, size, starts, freqs, states, words):
    """Fill values, which are 0; whether the stream ends where it must."""
    rows, columns = values.shape
    at = 0
    symbols, offsets = np.empty(TOTAL, np.uint8), np.empty(TOTAL, np.uint16)
    escaped = np.zeros(LANES, np.bool_)
    for j in range(columns):
        f = freqs[starts[j] : starts[j + 1]]
        first, bits, steps = np.int64(low[j]), np.int64(shift[j]), np.int64(size[j])
        if f[0] == TOTAL and bits == 0:
            if first != 0:
                values[:, j] = first
            continue
        slot = 0
        for s in range(len(f)):
            for k in range(f[s]):
                symbols[slot], offsets[slot] = s, k
                slot += 1
        for group in range(0, rows, LANES):
            end, wide = min(group + LANES, rows), bits > 0
            for i in range(group, end):
                x = states[i - group]
                slot = x & np.uint64(TOTAL - 1)
                symbol = np.int64(symbols[slot])
                x = np.uint64(f[symbol]) * (x >> np.uint64(PRECISION)) + np.uint64(offsets[slot])
                if x < LOWEST_STATE:
                    if at == len(words):
                        return False
                    x = x << np.uint64(16) | np.uint64(words[at])
                    at += 1
                states[i - group] = x
                wide |= symbol == steps
                escaped[i - group] = symbol == steps
                values[i, j] = (first + symbol) << bits
            if not wide:
                continue
            for i in range(group, end):
                width = np.uint64(16 if escaped[i - group] else bits)
                x = states[i - group]
                raw = np.int64(x & ((np.uint64(1) << width) - np.uint64(1)))
                values[i, j] = raw if escaped[i - group] else np.int64(values[i, j]) | raw
                x >>= width
                if x < LOWEST_STATE:
                    if at == len(words):
                        return False
                    x = x << np.uint64(16) | np.uint64(words[at])
                    at += 1
                states[i - group] = x
    if at != len(words):
        return False
    for lane in range(LANES):
        if states[lane] != LOWEST_STATE:
            return False
    return True
