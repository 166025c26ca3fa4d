"""Every entry of the dispatch table, compiled for sm_80, sm_90 and sm_100: its machine code.

What has to hold with every release of Triton (`check`):

    no spills: no local memory, no stack, no instruction that accesses either
    no float64 arithmetic, which is up to 64 times slower
    every access of logits and gradient that can be 128 bits wide is
    a program fits: its registers and its shared memory are within what an SM has

Registers, instructions and exponentials change with each release of Triton, and say little by
themselves. kernel_budgets.json has them for the shapes that matter most on sm_90, with the release
that they were recorded with: with that release they are upper bounds (times SLACK), so that a
change of a kernel that makes it slower is seen; with any other they are not looked at.
`python -m tests.test_kernels_static` records them anew.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kdcache.kernels import dispatch, layout
from tests.loss_cases import problem

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)
if os.environ.get("TRITON_INTERPRET") != "1":
    from kdcache.kernels import dense, sparse
    from tests.sass import Code, compiled

BUDGETS = Path(__file__).parent / "kernel_budgets.json"
ARCHS = (80, 90, 100)
BUDGETED = ("registers", "instructions", "exponentials")
SLACK = 1.1
REGISTERS = 1 << 16  # of an SM
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Shapes for each entry of a table, by reach; the shapes that matter first.
CLASSES = {
    32: 10,
    128: 100,
    256: 200,
    512: 500,
    1024: 1000,
    2048: 2000,
    4096: 4096,
    8192: 8192,
    dispatch.ANY: 21841,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    form: str
    kernel: str
    C: int
    dtype: str = "bf16"
    tail: str = "bucket"
    K: int = 16
    gradient: bool = False

    def __str__(self) -> str:
        parts = [self.form, self.kernel, str(self.C), self.dtype]
        parts += [self.tail, f"k{self.K}"] if self.form == "sparse" else []
        return "-".join(parts + ["gradient"] * self.gradient)


def cases() -> Iterator[Case]:
    for table, form in (("sparse", "sparse"), ("dense", "dense")):
        for e in dispatch.TABLES[table]:
            C = CLASSES[e.up_to]
            for dtype in ("bf16", "fp32"):
                yield Case(form, e.kernel, C, dtype, K=min(16, C))
                if e.kernel == "row":
                    yield Case(form, e.kernel, C, dtype, K=min(16, C), gradient=True)
            if form == "sparse":
                gradient = e.kernel == "row"
                yield Case(form, e.kernel, C, tail="uniform", K=min(16, C), gradient=gradient)
        for e in dispatch.BACKWARD:
            for dtype in ("bf16", "fp32"):
                yield Case(form, "grad", CLASSES[e.up_to], dtype, K=min(16, CLASSES[e.up_to]))
    for C in (1000, 21841):
        for tail in ("renormalise", "uniform"):
            yield Case("sparse", "row" if C == 1000 else "loop", C, tail=tail)
            yield Case("sparse", "grad", C, tail=tail)
    yield Case("sparse", "loop", 32000)
    yield Case("sparse", "loop", 151936)
    # As many named classes as there may be: up to 128, and above.
    for e in dispatch.SPARSE_FORWARD:
        C = CLASSES[e.up_to]
        for K in {min(C, dispatch.MANY_NAMED), min(C, e.kept)} - {min(C, 16)}:
            yield Case("sparse", e.kernel, C, K=K, gradient=e.kernel == "row")
    for C in (1000, 21841):
        yield Case("sparse", "grad", C, K=min(C, dispatch.MOST_NAMED))
        yield Case("sparse", "grad", C, "fp16")
        yield Case("dense", "grad", C, "fp16")
    yield Case("sparse", "row", 1000, "fp16", gradient=True)
    yield Case("sparse", "loop", 21841, "fp16")
    yield Case("sparse", "row", 1000, K=1000)
    yield Case("sparse", "row", 1000, K=100, gradient=True)


CASES = list(dict.fromkeys(cases()))
QUICK = [c for c in CASES if c.C in (1000, 21841) and c.dtype == "bf16"]


def code_of(case: Case, arch: int, **changes: Any) -> Code:
    """What a launch for this case compiles to."""
    form = sparse if case.form == "sparse" else dense
    K = case.K if case.form == "sparse" else None
    index = torch.uint16 if case.C < 1 << 16 else torch.int32
    p = problem(4, case.C, K, tail=case.tail, dtype=DTYPES[case.dtype], index=index)
    tensors, numbers, constants = form.FORM.arguments(p, 1.0)
    table = "backward" if case.kernel == "grad" else case.form
    entry = dispatch.entry(table, layout.reach(constants), constants.get("K", 0))
    kernel = getattr(form, f"{case.kernel}_kernel")
    g = layout.empty_gradient(p.student_BC)
    number = torch.empty(64)
    given = (
        tensors
        | numbers
        | constants
        | dict(
            go_ptr=number,
            loss_ptr=number,
            stats_ptr=number,
            g_ptr=g,
            GS=g.stride(0),
            ROWS=entry.rows,
            HAS_GO=case.gradient,
            GRADIENT=case.gradient,
            GO_STRIDE=0,
            BLOCK=entry.block,
        )
        | changes
    )
    wanted = inspect.signature(kernel.fn).parameters
    arguments = {n: v for n, v in given.items() if n in wanted}
    return compiled(kernel, arch, arguments, given.get("warps", entry.warps))


def entry_of(case: Case) -> dispatch.Entry:
    table = "backward" if case.kernel == "grad" else case.form
    line = 16 // DTYPES[case.dtype].itemsize
    reach = case.C + (line - 1 if case.C % line else 0)
    return dispatch.entry(table, reach, case.K if case.form == "sparse" else 0)


def lines_of_a_thread(case: Case) -> int:
    """128-bit accesses of the logits that a thread of a program needs, if all are wide."""
    entry = entry_of(case)
    return entry.rows * entry.block * DTYPES[case.dtype].itemsize // (16 * 32 * entry.warps)


def check(case: Case, arch: int, code: Code) -> None:
    assert code.spills == 0, f"{code.spills} bytes or instructions of spills"
    assert code.doubles == 0, f"{code.doubles} float64 instructions"
    assert code.shared <= SHARED_LIMIT[arch]
    assert code.registers * 32 * entry_of(case).warps <= REGISTERS
    lines = lines_of_a_thread(case)
    assert lines > 0 or case.C < 1000, "no thread has as much as 128 bits of a row"
    # A dense teacher is float32 here.
    loads = lines * (1 + (4 // DTYPES[case.dtype].itemsize if case.form == "dense" else 0))
    assert code.wide_loads >= loads, f"{code.wide_loads} of {loads} loads are 128 bits wide"
    if case.gradient or case.kernel == "grad":
        assert code.wide_stores >= lines, f"{code.wide_stores} of {lines} stores are wide"


def check_budget(case: Case, code: Code) -> None:
    recorded = json.loads(BUDGETS.read_text())
    if recorded["triton"] != triton.__version__:
        return
    for name, most in recorded["sm_90"][str(case)].items():
        value = getattr(code, name)
        assert value <= most * SLACK, f"{name}: {value}, its budget is {most}"


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_shapes_that_matter_most(case: Case) -> None:
    code = code_of(case, 90)
    check(case, 90, code)
    check_budget(case, code)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_entry(case: Case, arch: int) -> None:
    check(case, arch, code_of(case, arch))


if os.environ.get("TRITON_INTERPRET") != "1":

    @triton.jit
    def naive_kernel(z_ptr, g_ptr, stride, width, BLOCK: tl.constexpr):
        """As most kernels are written: width and stride at run time."""
        row = tl.program_id(0).to(tl.int64)
        col = tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * stride + col, mask=col < width, other=float("-inf"))
        z = z.to(tl.float32)
        e = tl.exp(z - tl.max(z, axis=0))
        g = e / tl.sum(e, axis=0)
        tl.store(g_ptr + row * stride + col, g.to(g_ptr.dtype.element_ty), mask=col < width)


def test_a_naive_kernel_fails_for_its_narrow_loads() -> None:
    z = torch.empty(4, 1000, dtype=torch.bfloat16)
    arguments = dict(z_ptr=z, g_ptr=z, stride=1000, width=1000, BLOCK=1024)
    code = compiled(naive_kernel, 90, arguments, 1)
    assert code.narrow >= 32
    with pytest.raises(AssertionError, match="0 of 4 loads are 128 bits wide"):
        check(Case("sparse", "row", 1000), 90, code)


def test_too_many_elements_a_thread_fail_for_their_spills() -> None:
    case = Case("sparse", "row", 8192, gradient=True)
    with pytest.raises(AssertionError, match="of spills"):
        check(case, 90, code_of(case, 90, warps=1))


def test_float64_arithmetic_fails() -> None:
    case = Case("sparse", "row", 1000)
    code = replace(code_of(case, 90), doubles=1)
    with pytest.raises(AssertionError, match="1 float64 instructions"):
        check(case, 90, code)


def test_a_budget_binds_the_release_that_it_was_recorded_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case("sparse", "row", 1000)
    code = code_of(case, 90)
    path = tmp_path / "budgets.json"
    monkeypatch.setattr("tests.test_kernels_static.BUDGETS", path)
    budget = {"sm_90": {str(case): {"instructions": code.instructions // 2}}}
    path.write_text(json.dumps({"triton": triton.__version__} | budget))
    with pytest.raises(AssertionError, match=r"instructions: .* its budget is"):
        check_budget(case, code)
    path.write_text(json.dumps({"triton": "3.4.0"} | budget))
    check_budget(case, code)


def test_only_a_pointer_between_lines_has_no_wide_accesses() -> None:
    """A view one element into its memory: its accesses are narrow, and its results the same."""
    p = problem(4, 1000, 16, shift=1, dtype=torch.bfloat16)
    assert layout.vector(p.student_BC) == 1
    assert layout.vector(problem(4, 21841, 16, dtype=torch.bfloat16).student_BC) == 8


def write_budgets() -> None:
    lines = []
    for case in QUICK:
        code = code_of(case, 90)
        lines.append(f'    "{case}": {json.dumps({n: getattr(code, n) for n in BUDGETED})}')
        print(case, code, flush=True)
    cases = ",\n".join(lines)
    text = f'{{\n  "triton": "{triton.__version__}",\n  "sm_90": {{\n{cases}\n  }}\n}}\n'
    BUDGETS.write_text(text)


if __name__ == "__main__":
    write_budgets()
