"""From tensors to launches: what the sparse and the dense form share on the host.

A form has three kernels: `row` (a row in registers, with the gradient if wanted), `loop` (a row in
tiles) and `grad` (the gradient from the numbers that a forward left). `dispatch.py` has the kernel
of each shape. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kdcache.kernels import dispatch, layout
from kdcache.kernels.problem import Problem
from kdcache.kernels.rows import LOG2E, rescale_kernel

Tensors, Constants = dict[str, torch.Tensor], dict[str, Any]


@dataclass(frozen=True)
class Form:
    """table: its name in `dispatch`. teacher: from a problem and its student's logits to the
    teacher's tensors and constants of a launch."""

    table: str
    row: Any
    loop: Any
    grad: Any
    teacher: Callable[[Problem, torch.Tensor], tuple[Tensors, Constants]]

    def arguments(self, problem: Problem, coefficient: float):
        """Tensors, numbers and constants of a launch; an absent tensor is any other's pointer."""
        z = layout.rows_in_place(problem.student_BC)
        T = problem.temperature
        tensors, constants = self.teacher(problem, z)
        tensors |= {"z_ptr": z, "w_ptr": given(problem.row_weights_B, z)}
        numbers = {
            "B": z.shape[0],
            "T": T,
            "inverse_t": 1 / T,
            "scale": LOG2E.value / T,
            "coefficient": coefficient,
        }
        # Constants of the compilation: Triton gives 16-bit loads for a length that it cannot prove
        # to be a multiple of 8.
        constants |= {
            "C": z.shape[1],
            "ZS": layout.row_stride(z),
            "WEIGHTED": problem.row_weights_B is not None,
        }
        return tensors, numbers, constants

    def forward(self, problem: Problem, coefficient: float):
        """coefficient * loss [B], and the numbers that `backward` needs [STATS, B]."""
        tensors, numbers, constants = self.arguments(problem, coefficient)
        z = tensors["z_ptr"]
        B = z.shape[0]
        loss_B = torch.empty(B, dtype=torch.float32, device=z.device)
        stats = torch.empty(layout.STATS, B, dtype=torch.float32, device=z.device)
        entry = self._entry(constants)
        common = tensors | numbers | constants | {"loss_ptr": loss_B, "stats_ptr": stats}
        if B and entry.kernel == "loop":
            launch(self.loop, (B,), entry, **common)
        elif B:
            absent = {"go_ptr": loss_B, "g_ptr": loss_B, "GS": constants["ZS"], "HAS_GO": False}
            self._launch_rows(entry, **common, **absent, GRADIENT=False)
        return loss_B, stats

    def backward(self, gradient_B, stats, problem: Problem, coefficient: float):
        """The gradient [B, C] of sum(gradient_B * loss_B), in the logits' dtype."""
        tensors, numbers, constants = self.arguments(problem, coefficient)
        g = layout.empty_gradient(problem.student_BC)
        if g.numel():
            reach = layout.reach(constants)
            entry = dispatch.entry("backward", reach, constants.get("K", 0))
            grid = triton.cdiv(g.shape[0], entry.rows), triton.cdiv(reach, entry.block)
            outputs = {"stats_ptr": stats, "g_ptr": g, "GS": g.stride(0), "ROWS": entry.rows}
            upstream = {"go_ptr": gradient_B, "GO_STRIDE": gradient_B.stride(0)}
            launch(self.grad, grid, entry, **tensors, **numbers, **constants, **outputs, **upstream)
        return g

    def forward_with_gradient(self, problem: Problem, coefficient: float, expected):
        """The loss [B], and its sum's gradient times `expected` (None: 1)."""
        tensors, numbers, constants = self.arguments(problem, coefficient)
        z = tensors["z_ptr"]
        entry = self._entry(constants)
        if entry.kernel == "loop":
            # A row that does not fit in registers is read twice either way.
            loss_B, stats = self.forward(problem, coefficient)
            ones = torch.ones((), device=z.device) if expected is None else expected
            return loss_B, self.backward(ones.expand(len(loss_B)), stats, problem, coefficient)
        loss_B = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        g = layout.empty_gradient(problem.student_BC)
        if z.shape[0]:
            # No statistics: the gradient is complete, and the pointer is not read.
            common = tensors | numbers | constants | {"loss_ptr": loss_B, "stats_ptr": loss_B}
            upstream = {"go_ptr": given(expected, loss_B), "HAS_GO": expected is not None}
            outputs = {"g_ptr": g, "GS": g.stride(0), "GRADIENT": True}
            self._launch_rows(entry, **common, **upstream, **outputs)
        return loss_B, g

    def _entry(self, constants):
        return dispatch.entry(self.table, layout.reach(constants), constants.get("K", 0))

    def _launch_rows(self, entry, **arguments):
        grid = (triton.cdiv(arguments["B"], entry.rows),)
        launch(self.row, grid, entry, **arguments, ROWS=entry.rows)


def given(x, other):
    return other if x is None else x.contiguous()


def launch(kernel, grid, entry, **arguments):
    # Triton launches on the current device, which need not be the logits' own.
    with torch.cuda.device_of(arguments["z_ptr"]):
        # Triton 3.10 changes the default of FP fusion, and with it the machine code.
        kernel[grid](**arguments, BLOCK=entry.block, num_warps=entry.warps, enable_fp_fusion=True)


def rescale(g, gradient_B, expected):
    """g *= gradient_B / expected in place, decided on the device."""
    if g.numel() == 0:
        return
    with torch.cuda.device_of(g):
        rescale_kernel[(g.shape[0],)](
            g,
            gradient_B,
            gradient_B if expected is None else expected,
            C=g.shape[1],
            STRIDE=g.stride(0),
            GO_STRIDE=gradient_B.stride(0),
            HAS_EXPECTED=expected is not None,
            BLOCK=2048,
            num_warps=8,
        )
