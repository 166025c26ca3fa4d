"""What the sparse and the dense Triton kernels share: where a row is, its factors, the stores.

Shapes in kernels: R rows of a program, N columns of a tile, K named classes. `col` counts from
the line below a row's start (layout.py): class + `off`. VEC divides BLOCK.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Below any logit that matters, and finite, so that differences stay finite.
LOW = tl.constexpr(-1e30)


@triton.jit
def start_of(row, STRIDE: tl.constexpr, VEC: tl.constexpr):
    """The first line of each row, and how far into it the row begins."""
    # Whole lines of 16 bytes are 128-bit accesses; a row may begin anywhere within one.
    first = row * STRIDE
    base = first // VEC * VEC
    return base, (first - base).to(tl.int32)


@triton.jit
def load_row(ptr, base, off, col, in_R, C: tl.constexpr, VEC: tl.constexpr):
    """float32 [R, N] of whole lines; -inf outside the row."""
    # The mask is constant over a line, or Triton would split the load into single elements.
    lines = (off + C + VEC - 1) // VEC
    mask = in_R[:, None] & (col[None, :] // VEC < lines[:, None])
    x = tl.load(ptr + base[:, None] + col[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    inside = (col[None, :] >= off[:, None]) & (col[None, :] < off[:, None] + C)
    return tl.where(inside & in_R[:, None], x, float("-inf"))


@triton.jit
def store_row(ptr, base, off, col, in_R, g, C: tl.constexpr, VEC: tl.constexpr, PEEL: tl.constexpr):
    """The whole lines of a row. Where rows begin on a line, the gradient is padded to one."""
    # Lines that two rows share are left to `edges`: each row stores its own elements.
    if PEEL:
        begin, end = (off + VEC - 1) // VEC, (off + C) // VEC
    else:
        begin, end = off, (off + C + VEC - 1) // VEC
    line = col[None, :] // VEC
    mask = in_R[:, None] & (line >= begin[:, None]) & (line < end[:, None])
    tl.store(ptr + base[:, None] + col[None, :], g.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def edges(off, start, in_R, C: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """Columns [R, 2 VEC] of a row's first and last line, and which it has there without a whole
    line: those that `store_row` leaves."""
    lane = tl.arange(0, 2 * VEC)[None, :]
    begin, end = off[:, None], (off + C)[:, None]
    col = tl.where(lane < VEC, lane, end // VEC * VEC + lane - VEC)
    own = (col >= begin) & (col < end) & (col >= start) & (col < start + BLOCK)
    first = (begin > 0) & (end >= VEC)
    return col, own & ((lane >= VEC) | first) & in_R[:, None]


@triton.jit
def factors(
    w_ptr,
    go_ptr,
    row,
    in_R,
    T,
    coefficient,
    WEIGHTED: tl.constexpr,
    GO_STRIDE: tl.constexpr,
    HAS_GO: tl.constexpr,
):
    """What the loss of a row is multiplied by, and q - p for its gradient [R]."""
    w = tl.zeros_like(row).to(tl.float32) + coefficient
    if WEIGHTED:
        w *= tl.load(w_ptr + row, mask=in_R, other=0.0).to(tl.float32)
    up = w
    if HAS_GO:
        up = w * tl.load(go_ptr + row * GO_STRIDE, mask=in_R, other=0.0).to(tl.float32)
    return w, up * T


@triton.jit
def rescale_kernel(
    g_ptr,
    go_ptr,
    expected_ptr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    GO_STRIDE: tl.constexpr,
    HAS_EXPECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g *= gradient / expected, row by row; a row where they agree is left alone."""
    row = tl.program_id(0).to(tl.int64)
    ratio = tl.load(go_ptr + row * GO_STRIDE).to(tl.float32)
    if HAS_EXPECTED:
        ratio = ratio / tl.load(expected_ptr).to(tl.float32)
    # Decided here and not on the host, which would have to wait for the device.
    if ratio != 1.0:
        for start in range(0, C, BLOCK):
            col = start + tl.arange(0, BLOCK)
            at = g_ptr + row * STRIDE + col
            g = tl.load(at, mask=col < C, other=0.0).to(tl.float32)
            tl.store(at, (g * ratio).to(g_ptr.dtype.element_ty), mask=col < C)
