"""From tensors to launches: what the sparse and the dense form share on the host.

A form has three kernels: `row` (a row in registers, with the gradient if asked), `loop` (a row in
tiles) and `grad` (the gradient from what a forward left). `dispatch.py` says which serves a shape.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kdcache.kernels import dispatch, layout
from kdcache.kernels.rows import LOG2E, rescale_kernel


@dataclass(frozen=True)
class Form:
    """table: its name in `dispatch`. arguments: (values, classes, tail values, tail, tempered) to
    the teacher's tensors and constants of a launch."""

    table: str
    row: Any
    loop: Any
    grad: Any
    teacher: Callable[..., tuple[dict[str, torch.Tensor], dict[str, Any]]]

    def arguments(
        self, student_BC, values, classes_BK, tail_values, labels_B, weights_B, temperature,
        label_weight, tail, tempered, coefficient,
    ):  # fmt: skip
        """Tensors, numbers and constants of a launch; an absent tensor is any other's pointer."""
        z = layout.rows_in_place(student_BC)
        tensors, constants = self.teacher(z, values, classes_BK, tail_values, tail, tempered)
        tensors |= dict(z_ptr=z, y_ptr=given(labels_B, z), w_ptr=given(weights_B, z))
        numbers = dict(
            B=z.shape[0], T=temperature, inverse_t=1 / temperature,
            scale=LOG2E.value / temperature, label_weight=label_weight, coefficient=coefficient,
        )  # fmt: skip
        constants |= dict(
            C=z.shape[1], ZS=layout.row_stride(z), HARD=labels_B is not None,
            WEIGHTED=weights_B is not None,
        )  # fmt: skip
        return tensors, numbers, constants

    def forward(self, *problem):
        """coefficient * loss [B], and the numbers that `backward` needs [STATS, B]."""
        tensors, numbers, constants = self.arguments(*problem)
        z = tensors["z_ptr"]
        B = z.shape[0]
        loss_B = torch.empty(B, dtype=torch.float32, device=z.device)
        stats = torch.empty(layout.STATS, B, dtype=torch.float32, device=z.device)
        entry = self._entry(constants)
        common = tensors | numbers | constants | dict(loss_ptr=loss_B, stats_ptr=stats)
        if B and entry.kernel == "loop":
            launch(self.loop, (B,), entry, **common)
        elif B:
            launch(self.row, (triton.cdiv(B, entry.rows),), entry, **common, go_ptr=loss_B,
                   g_ptr=loss_B, GS=constants["ZS"], ROWS=entry.rows, HAS_GO=False,
                   GRADIENT=False)  # fmt: skip
        return loss_B, stats

    def backward(self, gradient_B, stats, *problem):
        """The gradient [B, C] of sum(gradient_B * loss_B), in the logits' dtype."""
        tensors, numbers, constants = self.arguments(*problem)
        g = layout.empty_gradient(problem[0])
        if g.numel():
            reach = layout.reach(constants)
            entry = dispatch.entry("backward", reach, constants.get("K", 0))
            grid = triton.cdiv(g.shape[0], entry.rows), triton.cdiv(reach, entry.block)
            launch(self.grad, grid, entry, **tensors, **numbers, **constants, go_ptr=gradient_B,
                   stats_ptr=stats, g_ptr=g, GS=g.stride(0), ROWS=entry.rows,
                   GO_STRIDE=gradient_B.stride(0))  # fmt: skip
        return g

    def forward_with_gradient(self, *arguments):
        """The loss [B] and its sum's gradient times `expected` (the last argument; None: 1)."""
        *problem, expected = arguments
        tensors, numbers, constants = self.arguments(*problem)
        z = tensors["z_ptr"]
        entry = self._entry(constants)
        if entry.kernel == "loop":
            # A row that does not fit in registers is read twice either way.
            loss_B, stats = self.forward(*problem)
            ones = torch.ones((), device=z.device) if expected is None else expected
            return loss_B, self.backward(ones.expand(len(loss_B)), stats, *problem)
        loss_B = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        g = layout.empty_gradient(problem[0])
        if z.shape[0]:
            launch(self.row, (triton.cdiv(z.shape[0], entry.rows),), entry, **tensors, **numbers,
                   **constants, go_ptr=given(expected, loss_B), loss_ptr=loss_B,
                   stats_ptr=loss_B, g_ptr=g, GS=g.stride(0), ROWS=entry.rows,
                   HAS_GO=expected is not None, GRADIENT=True)  # fmt: skip
        return loss_B, g

    def _entry(self, constants):
        return dispatch.entry(self.table, layout.reach(constants), constants.get("K", 0))


def given(x, other):
    return other if x is None else x.contiguous()


def launch(kernel, grid, entry, **arguments):
    with torch.cuda.device_of(arguments["z_ptr"]):
        # Triton 3.10 changes the default of FP fusion, and with it the machine code.
        kernel[grid](**arguments, BLOCK=entry.block, num_warps=entry.warps, enable_fp_fusion=True)


def rescale(g, gradient_B, expected):
    """g *= gradient_B / expected in place, decided on the device."""
    if g.numel() == 0:
        return
    with torch.cuda.device_of(g):
        rescale_kernel[(g.shape[0],)](
            g, gradient_B, gradient_B if expected is None else expected, C=g.shape[1],
            STRIDE=g.stride(0), GO_STRIDE=gradient_B.stride(0), HAS_EXPECTED=expected is not None,
            BLOCK=2048, num_warps=8,
        )  # fmt: skip
