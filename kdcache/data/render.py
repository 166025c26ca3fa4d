"""Views compiled for FFCV: token in, pixels out, with numba.

In: tokens (view << 40 | sample), FFCV's metadata and memory map, and the view spec as numbers.
Out: one row of bytes for each token: the pixels of the view, then a trailer with the CRC-32 of the
stored payload and a status. A damaged sample thus reports itself in the row that it would have
spoiled, without any state shared between threads.

What stays true: draws and boxes equal those of `views/` bit for bit (tests compare them).

Cost: one scratch image for each lane, whatever the batch size. Kernels compile once and are cached
on disk, so they take everything as arguments, call C through named symbols (a ctypes pointer would
be baked into the code), and get the view spec as one record: numba would compile anew for each
literal that a closure holds.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import llvmlite.binding
import numpy as np
from numba import njit, prange, types
from numpy.typing import NDArray

from kdcache.data.ffcv import AllocationQuery, IntDecoder, Operation, libffcv
from kdcache.views.crops import CROP_ATTEMPTS, TABLE_ENTRIES, aspect_ratios
from kdcache.views.philox import MULTIPLIERS, ROUNDS, SAMPLE_BITS, WEYL, Purpose
from kdcache.views.spec import ViewSpec

TRAILER_BYTES = 8
OK, BAD_SAMPLE, BAD_POINTER, BAD_JPEG, BAD_RAW, BAD_SIDES = range(6)
STATUS = {
    BAD_SAMPLE: "its index is out of range",
    BAD_POINTER: "its data lies outside the file",
    BAD_JPEG: "its JPEG does not decode",
    BAD_RAW: "its pixels have the wrong size",
    BAD_SIDES: "its JPEG is of another size than was recorded",
}
INCEPTION, RANDOM, CENTER, WHOLE = range(4)
CROP_CODES = {"inception": INCEPTION, "random": RANDOM, "center": CENTER, "whole": WHOLE}
JPEG_MODE = 0

# The view spec, and how to run, as the kernel reads them.
SETTINGS = np.dtype(
    [
        ("seed", np.uint64),
        ("size", np.int64),
        ("crop", np.int64),
        ("min_scale", np.float64),
        ("flip", np.int64),
        ("lanes", np.int64),
        ("scratch_bytes", np.int64),
        ("ratios", np.float64, (TABLE_ENTRIES,)),
    ]
)

_libffcv = ctypes.CDLL(libffcv.__file__)
# zlib's own function: `convert` took the checksums with Python's zlib, which calls the same one.
_libz = ctypes.CDLL("libz.so.1")
# Names for LLVM's table, which the whole process shares: the prefix keeps them apart from others.
for _name, _function in (
    ("kdcache_imdecode", _libffcv.imdecode),
    ("kdcache_resize", _libffcv.resize),
    ("kdcache_crc32", _libz.crc32),
):
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_address, _u32, _i64 = types.uintp, types.uint32, types.int64
_imdecode = types.ExternalFunction(
    "kdcache_imdecode", types.int32(_address, types.uint64, _u32, _u32, _address, *[_u32] * 8)
)
_resize = types.ExternalFunction("kdcache_resize", types.void(*[_i64] * 11))
_crc32 = types.ExternalFunction("kdcache_crc32", types.uint64(types.uint64, _address, _u32))

_SHIFT = np.uint64(SAMPLE_BITS)
_MASK = np.uint64((1 << SAMPLE_BITS) - 1)
_LOW = np.uint64(0xFFFFFFFF)
_16, _31, _32 = np.uint64(16), np.uint64(31), np.uint64(32)
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_CROP, _FLIP = np.uint64(Purpose.CROP), np.uint64(Purpose.FLIP)

# fastmath stays off: crop boxes rest on the exact rounding of IEEE multiply, divide and sqrt.
_jit = njit(nogil=True, error_model="numpy", cache=True)


@_jit
def draw_one(seed, view, index, purpose, attempt):
    """`philox.draw` for one index."""
    # Cast first: numba makes float64 of a uint64 with an int64.
    seed, index = np.uint64(seed), np.uint64(index)
    c0, c1 = index & _LOW, (index >> _32) | (np.uint64(purpose) << _16)
    c2, c3 = np.uint64(view), np.uint64(attempt)
    k0, k1 = seed & _LOW, seed >> _32
    for _ in range(ROUNDS):
        p0 = _M0 * c0
        p1 = _M1 * c2
        c0, c2 = (p1 >> _32) ^ c1 ^ k0, (p0 >> _32) ^ c3 ^ k1
        c1, c3 = p1 & _LOW, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@_jit
def crop_box_one(settings, view, sample, height, width):
    """`crops.crop_boxes` for one sample: top, left, height, width."""
    seed, min_scale, ratios = settings["seed"], settings["min_scale"], settings["ratios"]
    h_image, w_image = np.int64(height), np.int64(width)
    if settings["crop"] == INCEPTION:
        for attempt in range(CROP_ATTEMPTS):
            r0, r1, r2, r3 = draw_one(seed, view, sample, _CROP, attempt)
            share = min_scale + np.float64(r0) * 2.0**-32 * (1 - min_scale)
            # The operations and their order are those of `views/crops.py`, so that both round
            # alike.
            area = np.float64(h_image * w_image) * share
            ratio = ratios[(r1 * np.uint64(len(ratios))) >> _32]
            w = np.int64(np.floor(np.sqrt(area * ratio) + 0.5))
            h = np.int64(np.floor(np.sqrt(area / ratio) + 0.5))
            if 1 <= w <= w_image and 1 <= h <= h_image:
                top = np.int64((r2 * np.uint64(h_image - h + 1)) >> _32)
                left = np.int64((r3 * np.uint64(w_image - w + 1)) >> _32)
                return top, left, h, w
        w = min(w_image, np.int64(np.floor(h_image * ratios[-1] + 0.5)))
        h = min(h_image, np.int64(np.floor(w_image / ratios[0] + 0.5)))
        return (h_image - h) // 2, (w_image - w) // 2, h, w
    if settings["crop"] == WHOLE:
        return np.int64(0), np.int64(0), h_image, w_image
    side = np.int64(np.floor(np.sqrt(min_scale) * min(h_image, w_image) + 0.5))
    side = max(side, np.int64(1))
    top, left = (h_image - side) // 2, (w_image - side) // 2
    if settings["crop"] == RANDOM:
        _, _, r2, r3 = draw_one(seed, view, sample, _CROP, 0)
        top = np.int64((r2 * np.uint64(h_image - side + 1)) >> _32)
        left = np.int64((r3 * np.uint64(w_image - side + 1)) >> _32)
    return top, left, side, side


@_jit
def _mirror(image):
    for y in range(image.shape[0]):
        row = image[y].reshape(-1)
        i, j = 0, len(row) - 3
        while i < j:
            r, g, b = row[i], row[i + 1], row[i + 2]
            row[i], row[i + 1], row[i + 2] = row[j], row[j + 1], row[j + 2]
            row[j], row[j + 1], row[j + 2] = r, g, b
            i, j = i + 3, j - 3


@_jit
def _put(four_bytes, value):
    """A 32-bit number, little-endian."""
    for i in range(4):
        four_bytes[i] = np.uint8((np.uint32(value) >> np.uint32(8 * i)) & np.uint32(255))


@_jit
def jpeg_sides(data):
    """Height and width that a JPEG's frame header gives (ITU-T T.81, B.2.2); 0, 0 without one."""
    i = np.int64(2)
    while i + 8 < len(data):
        if data[i] != 0xFF:
            return 0, 0
        marker = data[i + 1]
        if marker == 0xFF:  # a fill byte
            i += 1
            continue
        # SOF0 to SOF15, among which are the markers of tables: DHT, JPG and DAC.
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            height = np.int64(data[i + 5]) << 8 | np.int64(data[i + 6])
            return height, np.int64(data[i + 7]) << 8 | np.int64(data[i + 8])
        i += 2 + (np.int64(data[i + 2]) << 8 | np.int64(data[i + 3]))
    return 0, 0


@_jit
def _render(token, image, trailer, scratch, metadata, memory, pointers, sizes, settings):
    """Decode, crop, resize and mirror one sample into `image`; the status of the attempt."""
    sample, view = token & _MASK, token >> _SHIFT
    # Compiled code checks no bounds: FFCV hangs or crashes on an index beyond the table.
    if sample >= np.uint64(len(metadata)):
        return BAD_SAMPLE
    entry = metadata[sample]
    height, width, start = np.int64(entry["height"]), np.int64(entry["width"]), entry["data_ptr"]
    # The metadata has a payload's address and not its size, which is in the allocation table.
    k = np.searchsorted(pointers, start)
    if k >= len(pointers) or pointers[k] != start or start + sizes[k] > np.uint64(len(memory)):
        return BAD_POINTER
    payload = memory[start : start + sizes[k]]
    # Many damaged JPEGs decode without an error; their checksum differs.
    _put(trailer[:4], _crc32(np.uint64(0), payload.ctypes.data, np.uint32(len(payload))))
    source = payload.ctypes.data
    if entry["mode"] == JPEG_MODE:
        # The decoder writes as many pixels as it is told: never beyond this lane's scratch.
        if 3 * height * width > len(scratch):
            return BAD_POINTER
        # Else it would leave pixels of the image before, or write fewer than it is told.
        found_height, found_width = jpeg_sides(payload)
        if found_height != height or found_width != width:
            return BAD_SIDES
        source = scratch.ctypes.data
        h, w = np.uint32(height), np.uint32(width)
        if (
            _imdecode(
                payload.ctypes.data, np.uint64(len(payload)), h, w, source, h, w, 0, 0, 1, 1, 0, 0
            )
            != 0
        ):
            return BAD_JPEG
    elif len(payload) != 3 * height * width:
        return BAD_RAW
    top, left, h, w = crop_box_one(settings, view, sample, height, width)
    _resize(
        0,
        np.int64(source),
        height,
        width,
        top,
        top + h,
        left,
        left + w,
        np.int64(image.ctypes.data),
        image.shape[0],
        image.shape[1],
    )
    # The highest bit of the draw, as in `flip_draws`.
    if settings["flip"] and draw_one(settings["seed"], view, sample, _FLIP, 0)[0] >> _31 != 0:
        _mirror(image)
    return OK


@njit(nogil=True, error_model="numpy", cache=True, parallel=True)
def render_rows(tokens, rows, metadata, memory, pointers, sizes, settings_1):
    """Fill rows[i] with the view of tokens[i] and its trailer (CRC-32, status)."""
    settings = settings_1[0]
    size, lanes = settings["size"], settings["lanes"]
    pixels = size * size * 3
    scratch = np.empty((lanes, settings["scratch_bytes"]), np.uint8)
    # Fixed lanes rather than thread ids: those are a ctypes pointer inside numba, not cacheable.
    for lane in prange(lanes):
        first = np.int64(lane)
        for i in range(first, len(tokens), lanes):
            image = rows[i, :pixels].reshape(size, size, 3)
            trailer = rows[i, pixels:]
            # Rows are used again: an early return must not leave the status of the sample before.
            trailer[:] = 0
            status = _render(
                tokens[i],
                image,
                trailer,
                scratch[first],
                metadata,
                memory,
                pointers,
                sizes,
                settings_1[0],
            )
            _put(trailer[4:], status)


@_jit
def _mix(images, weights, out):
    for i in range(len(images)):
        partner = i ^ 1
        if weights[i] == 0 or partner >= len(images):
            partner = i
        # 16 bits are enough, as the weight is at most 128: 128 * 255 + 127 is the largest value.
        w = np.int16(weights[i])
        for y in range(images.shape[1]):
            own, other, row = images[i, y], images[partner, y], out[i, y]
            for x in range(len(row)):
                a = np.int16(own[x])
                row[x] = np.uint8(a + np.int16(w * (np.int16(other[x]) - a) + 127 >> 8))


def mix_rows(images: NDArray[np.uint8], weights: NDArray[np.int16]) -> NDArray[np.uint8]:
    """`mixing.mix_pairs` of [B, H, W, 3] on the CPU, in one pass that also copies: a new array.

    One thread: the loader's and torch's already share the cores.
    """
    out = np.empty(images.shape, np.uint8)
    batch, height, width, channels = images.shape
    flat = (batch, height, width * channels)
    strides = (images.strides[0], images.strides[1], 1)
    rows = np.lib.stride_tricks.as_strided(images, flat, strides)
    _mix(rows, weights, out.reshape(flat))
    return out


def row_bytes(spec: ViewSpec) -> int:
    """Bytes of one rendered row: the pixels and the trailer."""
    return spec.size_px**2 * 3 + TRAILER_BYTES


def split_rows(
    rows: NDArray[np.uint8], size: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint32], NDArray[np.uint32]]:
    """Rendered rows as images [B, size, size, 3] (a view), checksums [B] and statuses [B]."""
    pixels = size * size * 3
    images = np.lib.stride_tricks.as_strided(
        rows, (len(rows), size, size, 3), (rows.strides[0], size * 3, 3, 1)
    )
    trailer = rows[:, pixels:].copy().view("<u4")
    return images, trailer[:, 0], trailer[:, 1]


def settings_of(spec: ViewSpec, *, lanes: int = 1, scratch_bytes: int = 1) -> NDArray[np.void]:
    """The view spec as the kernels read it: one row of SETTINGS."""
    settings = np.zeros(1, SETTINGS)
    settings[0] = (
        spec.seed,
        spec.size_px,
        CROP_CODES[spec.crop],
        spec.min_scale,
        spec.flip,
        lanes,
        scratch_bytes,
        aspect_ratios(),
    )
    return settings


def transform_rows(spec: ViewSpec, tokens: NDArray[np.uint64], rows: NDArray[np.uint8]) -> None:
    """Apply the spec's transforms to rendered rows, in place. All tokens are of one view."""
    if not spec.transforms or not len(tokens):
        return
    images, _, _ = split_rows(rows, spec.size_px)
    view = int(tokens[0] >> _SHIFT)
    sample_ids = (tokens & _MASK).astype(np.int64)
    for transform in spec.transforms:
        transform.apply(images, seed=spec.seed, view=view, sample_ids_B=sample_ids)


class ViewDecoder(Operation):
    """Image field to rendered rows."""

    def __init__(self, spec: ViewSpec, workers: int) -> None:
        super().__init__()
        self.spec = spec
        self.lanes = 2 * workers

    def declare_state_and_memory(self, state: Any) -> tuple[Any, AllocationQuery]:
        shape, dtype = (row_bytes(self.spec),), np.dtype("u1")
        after = replace(state, jit_mode=True, shape=shape, dtype=dtype)
        return after, AllocationQuery(shape, dtype)

    def generate_code(self) -> Any:
        # Raw pixels are resized from the mapped file itself, so only JPEGs need scratch.
        entries = self.metadata[self.metadata["mode"] == JPEG_MODE]
        sides = entries["height"].astype(np.int64) * entries["width"]
        settings = settings_of(
            self.spec, lanes=self.lanes, scratch_bytes=3 * int(sides.max(initial=1))
        )

        def decode(tokens: Any, rows: Any, metadata: Any, storage: Any) -> Any:
            render_rows(tokens, rows, metadata, *storage, settings)
            transform_rows(self.spec, tokens, rows)
            return rows

        return decode


class LabelDecoder(IntDecoder):
    def generate_code(self) -> Any:
        def decode(tokens: Any, labels: Any, metadata: Any, storage: Any) -> Any:
            labels[:, 0] = metadata[tokens & _MASK]
            return labels

        return decode
