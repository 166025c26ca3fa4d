"""Every shipped entry of the dispatch table, compiled for sm_80, sm_90 and sm_100, and read.

No spills; 128-bit loads and stores of logits and gradient; registers, shared memory, exponentials
and instructions within tests/kernel_budgets.json. `python -m tests.test_kernels_static [PART]`
writes the budgets (of cases whose name has PART) anew: for a new Triton; look at the difference.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
SLACK = 1.1
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Shapes for each entry of a table, by reach; the shapes that matter first.
CLASSES = {32: 10, 128: 100, 256: 200, 512: 500, 1024: 1000, 2048: 2000, 4096: 4096, 8192: 8192,
           dispatch.ANY: 21841}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    form: str
    kernel: str
    C: int
    dtype: str = "bf16"
    tail: str = "bucket"
    K: int = 16
    labels: bool = False
    gradient: bool = False

    def __str__(self) -> str:
        parts = [self.form, self.kernel, str(self.C), self.dtype]
        parts += [self.tail, f"k{self.K}"] if self.form == "sparse" else []
        return "-".join(parts + ["labels"] * self.labels + ["gradient"] * self.gradient)


def cases() -> Iterator[Case]:
    for table, form in (("sparse", "sparse"), ("dense", "dense")):
        for e in dispatch.TABLES[table]:
            C = CLASSES[e.up_to]
            for dtype in ("bf16", "fp32"):
                yield Case(form, e.kernel, C, dtype, K=min(16, C))
                if e.kernel == "row":
                    yield Case(form, e.kernel, C, dtype, K=min(16, C), gradient=True)
            # The most that a row is asked for: a label's exponentials beside its gradient.
            labels = {"labels": True, "gradient": e.kernel == "row"}
            yield Case(form, e.kernel, C, K=min(16, C), **labels)
            if form == "sparse":
                yield Case(form, e.kernel, C, tail="uniform", K=min(16, C), **labels)
        for e in dispatch.BACKWARD:
            for dtype in ("bf16", "fp32"):
                yield Case(form, "grad", CLASSES[e.up_to], dtype, K=min(16, CLASSES[e.up_to]))
    for C in (1000, 21841):
        for tail in ("renormalise", "uniform"):
            yield Case("sparse", "row" if C == 1000 else "loop", C, tail=tail, labels=True)
            yield Case("sparse", "grad", C, tail=tail, labels=True)
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
QUICK = [c for c in CASES if c.C in (1000, 21841) and c.dtype == "bf16" and not c.labels]


def code_of(case: Case, arch: int, **changes: Any) -> Code:
    """What a launch for this case compiles to."""
    form = sparse if case.form == "sparse" else dense
    K = case.K if case.form == "sparse" else None
    p = problem(4, case.C, K, tail=case.tail, labels=case.labels, dtype=DTYPES[case.dtype],
                index=torch.uint16 if case.C < 1 << 16 else torch.int32)  # fmt: skip
    tensors, numbers, constants = form.FORM.arguments(*p.arguments, 1.0)
    table = "backward" if case.kernel == "grad" else case.form
    entry = dispatch.entry(table, layout.reach(constants), constants.get("K", 0))
    kernel = getattr(form, f"{case.kernel}_kernel")
    g = layout.empty_gradient(p.student_BC)
    number = torch.empty(64)
    given = tensors | numbers | constants | dict(
        go_ptr=number, loss_ptr=number, stats_ptr=number, g_ptr=g, GS=g.stride(0), ROWS=entry.rows,
        HAS_GO=case.gradient, GRADIENT=case.gradient, GO_STRIDE=0, BLOCK=entry.block,
    ) | changes  # fmt: skip
    wanted = inspect.signature(kernel.fn).parameters
    arguments = {n: v for n, v in given.items() if n in wanted}
    return compiled(kernel, arch, arguments, given.get("warps", entry.warps))


def lines_of_a_thread(case: Case) -> int:
    """128-bit accesses of the logits that a thread of a program needs, if all are wide."""
    table = "backward" if case.kernel == "grad" else case.form
    size = DTYPES[case.dtype].itemsize
    reach = case.C + (16 // size - 1 if case.C % (16 // size) else 0)
    entry = dispatch.entry(table, reach, case.K if case.form == "sparse" else 0)
    return entry.rows * entry.block * size // (16 * 32 * entry.warps)


def check(case: Case, arch: int, code: Code) -> None:
    assert code.spills == 0, f"{code.spills} bytes or instructions of spills"
    assert code.shared <= SHARED_LIMIT[arch]
    if case.C >= 1000:
        lines = lines_of_a_thread(case)
        assert lines > 0, "no thread has as much as 128 bits of a row"
        # A dense teacher is float32 here.
        loads = lines * (1 + (4 // DTYPES[case.dtype].itemsize if case.form == "dense" else 0))
        assert code.wide_loads >= loads, f"{code.wide_loads} of {loads} loads are 128 bits wide"
        if case.gradient or case.kernel == "grad":
            assert code.wide_stores >= lines, f"{code.wide_stores} of {lines} stores are wide"
    budget = json.loads(BUDGETS.read_text())[f"{case}-sm{arch}"]
    for name, most in budget.items():
        found = getattr(code, name)
        assert found <= most * SLACK, f"{name}: {found}, its budget is {most}"


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_shapes_that_matter_most(case: Case) -> None:
    check(case, 90, code_of(case, 90))


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


def test_a_shrunken_budget_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case("sparse", "row", 1000)
    budgets = json.loads(BUDGETS.read_text())
    budgets[f"{case}-sm90"]["instructions"] //= 2
    (tmp_path / "b.json").write_text(json.dumps(budgets))
    monkeypatch.setattr("tests.test_kernels_static.BUDGETS", tmp_path / "b.json")
    with pytest.raises(AssertionError, match=r"instructions: .* its budget is"):
        check(case, 90, code_of(case, 90))


def test_only_a_pointer_between_lines_has_no_wide_accesses() -> None:
    """A view one element into its memory cannot; it stays correct, and this shows we would see."""
    p = problem(4, 1000, 16, shift=1, dtype=torch.bfloat16)
    assert layout.vector(p.student_BC) == 1
    assert layout.vector(problem(4, 21841, 16, dtype=torch.bfloat16).student_BC) == 8


def write_budgets(part: str) -> None:
    names = ("registers", "shared", "instructions", "exponentials")
    budgets = json.loads(BUDGETS.read_text()) if part else {}
    for case in (c for c in CASES if part in str(c)):
        for arch in ARCHS:
            code = code_of(case, arch)
            budgets[f"{case}-sm{arch}"] = {n: getattr(code, n) for n in names}
            print(f"{case}-sm{arch}", code, "lines", lines_of_a_thread(case), flush=True)
    lines = [f'  "{name}": {json.dumps(budget)}' for name, budget in budgets.items()]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_budgets("".join(sys.argv[1:]))
