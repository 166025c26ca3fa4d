"""How rows lie in memory, and the gradient's beside them, so that accesses can be 128 bits wide.

A row of 21841 bf16 logits begins at any multiple of 2 bytes. The kernels see each row from the
16-byte line below its start (`VEC` elements a line), read whole lines, and mask by column. The
gradient's row stride is congruent to the logits' modulo 8, so both sit alike in their lines: equal
to C for contiguous logits, a multiple of 8 for rows padded to one.
"""

from __future__ import annotations

import torch

LINE_BYTES = 16
# Elements of 16 bits in a line, the smallest type of a logit.
MOST_IN_LINE = 8
STATS = 7  # numbers that a forward leaves for its backward for each row, at most


def gradient_stride(num_classes: int, row_stride: int) -> int:
    """The smallest stride that holds a row and sits in its lines as the logits' does."""
    return num_classes + (row_stride - num_classes) % MOST_IN_LINE


def row_stride(x_BC: torch.Tensor) -> int:
    return x_BC.stride(0) if x_BC.stride(1) == 1 else x_BC.shape[1]


def empty_gradient(student_BC: torch.Tensor) -> torch.Tensor:
    B, C = student_BC.shape
    stride = gradient_stride(C, row_stride(student_BC))
    return student_BC.new_empty(B * stride).as_strided((B, C), (stride, 1))


def rows_in_place(x_BC: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its rows are contiguous, else a copy."""
    return x_BC if x_BC.stride(1) == 1 else x_BC.contiguous()


def vector(*tensors_BC: torch.Tensor) -> int:
    """Elements of a line; 1 where lines cannot be had: a pointer between them, unlike strides.

    Reading whole lines never leaves memory that belongs to the tensor's pages: a line that holds
    one of its elements lies in one page.
    """
    size = LINE_BYTES // min(x.element_size() for x in tensors_BC)
    first = row_stride(tensors_BC[0])
    for x in tensors_BC:
        if x.data_ptr() % (size * x.element_size()) or (row_stride(x) - first) % size:
            return 1
    return size


def reach(constants: dict[str, int]) -> int:
    """The columns of a kernel's row, counted from the line below its start."""
    return constants["C"] + (constants["VEC"] - 1 if constants["ZS"] % constants["VEC"] else 0)
