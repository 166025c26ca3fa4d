"""The distillation loss, forward and backward: kdcache's forms against others.

    python -m benchmarks.bench_loss [--save] [--rounds 100] [--shape 512x1000 ...]
    python -m benchmarks.bench_loss --write      (docs/losses.md and its picture, from saved lines)

Every form gets the same raw student logits and the same target, and has to compute the loss and
the logits' gradient; one that differs from float64 is printed as FAIL and not timed. Sparse ones
compute the `renormalise` loss of k = 16 shifted logits at T = 4, dense ones the dense loss.
`copy` reads the logits and writes as much, in the same rounds: nothing that computes a gradient
can be faster. Before a warm measurement the same form has just run; before a cold one 256 MB have
been written. On a GPU times are events on the device, and small shapes run as a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import harness
from benchmarks.loss_report import write
from kdcache.batch import Target, dense_target
from kdcache.cache.codecs import TopK
from kdcache.kernels import reference
from kdcache.kernels.problem import Problem
from kdcache.losses.distillation import distillation_loss

T, K = 4.0, 16
CPU_SHAPES = ((512, 1000), (256, 21841))
GPU_SHAPES = (
    (1024, 1000),
    (4096, 1000),
    (4096, 1008),
    (1024, 21841),
    (1024, 21848),
    (4096, 32000),
    (1024, 151936),
)
FLUSH_BYTES = 256 << 20
GRAPH_UP_TO = 32 << 20  # logits: above, a launch is nothing

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    z: torch.Tensor
    sparse: Target
    dense: Target

    @staticmethod
    def make(B: int, C: int, dtype: torch.dtype, device: str) -> Case:
        g = torch.Generator().manual_seed(0)
        teacher = torch.randn(B, C, generator=g) * 3
        z = (torch.randn(B, C, generator=g) * 2).to(dtype).to(device).requires_grad_()
        where = torch.device(device)
        codec = TopK(K, "float32")
        dense, sparse = dense_target(teacher), codec.decode(codec.encode(teacher), C)
        return Case(z, sparse.to(where), dense.to(where))


def class_ids_of(t: Target) -> torch.Tensor | None:
    return t.class_ids_BK


def eager_dense(z: torch.Tensor, t: Target) -> torch.Tensor:
    """As in torchdistill and most recipes."""
    p = F.softmax(t.logits_BK / T, 1)
    return F.kl_div(F.log_softmax(z.float() / T, 1), p, reduction="batchmean") * T**2


def eager_dense_log(z: torch.Tensor, t: Target) -> torch.Tensor:
    log_q, log_p = F.log_softmax(z.float() / T, 1), F.log_softmax(t.logits_BK / T, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * T**2


def eager_sparse(z: torch.Tensor, t: Target) -> torch.Tensor:
    x = z.float() / T
    log_q = x.gather(1, class_ids_of(t)) - x.logsumexp(1, keepdim=True)
    log_p = F.log_softmax(t.logits_BK / T, 1)
    return (log_p.exp() * (log_p - log_q)).sum() * (T**2 / len(z))


def densify(z: torch.Tensor, t: Target) -> torch.Tensor:
    p = torch.zeros(z.shape, device=z.device)
    p.scatter_(1, class_ids_of(t), F.softmax(t.logits_BK / T, 1))
    return F.kl_div(F.log_softmax(z.float() / T, 1), p, reduction="batchmean") * T**2


def ours(**options: Any) -> Callable[[torch.Tensor, Target], torch.Tensor]:
    def loss(z: torch.Tensor, t: Target) -> torch.Tensor:
        return distillation_loss(z, t, temperature=T, **options)

    return loss


def liger() -> Callable[[torch.Tensor, Target], torch.Tensor] | None:
    """Liger's KL, with the log-softmax that its caller needs. `pip install liger-kernel`."""
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return None
    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(z: torch.Tensor, t: Target) -> torch.Tensor:
        return kl(F.log_softmax(z.float() / T, 1), F.log_softmax(t.logits_BK / T, 1)) * T**2

    return loss


def contestants(case: Case, device: str) -> dict[str, tuple[Step, str]]:
    """Name to a step that gives loss and gradient, and the loss it computes."""
    losses: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
        "kdcache sparse": (ours(tail="renormalise"), "renormalise"),
        "kdcache sparse, bucket": (ours(tail="bucket"), "bucket"),
        "kdcache sparse, uniform": (ours(tail="uniform"), "uniform"),
        "kdcache dense": (ours(), "dense"),
        "eager sparse": (eager_sparse, "renormalise"),
        "eager densify": (densify, "renormalise"),
        "eager dense": (eager_dense, "dense"),
        "eager dense, log target": (eager_dense_log, "dense"),
        "compile sparse": (torch.compile(eager_sparse, dynamic=False), "renormalise"),
        "compile densify": (torch.compile(densify, dynamic=False), "renormalise"),
        "compile dense": (torch.compile(eager_dense, dynamic=False), "dense"),
        "compile dense, log target": (torch.compile(eager_dense_log, dynamic=False), "dense"),
    }
    if device == "cuda":
        one_pass = ours(tail="renormalise", gradient_in_forward=True)
        losses["kdcache sparse, in forward"] = (one_pass, "renormalise")
        if kl := liger():
            losses["Liger KL"] = (kl, "dense")

    def step(loss: Callable[..., torch.Tensor], kind: str) -> Step:
        target = case.dense if kind == "dense" else case.sparse

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            case.z.grad = None
            value = loss(case.z, target)
            value.backward()  # type: ignore[no-untyped-call]
            assert case.z.grad is not None
            return value, case.z.grad

        return run

    return {name: (step(loss, kind), kind) for name, (loss, kind) in losses.items()}


def correct(case: Case, step: Step, kind: str) -> bool:
    """Against float64: the loss to 1e-4, the gradient to 1e-5 of the largest or a 16-bit rounding.

    Wide enough for the arithmetic of all forms; the tests hold ours to far less.
    """
    z = case.z.detach().double().requires_grad_()
    t, tail = (case.dense, "none") if kind == "dense" else (case.sparse, kind)
    tail_B3 = None if t.tail_B3 is None else t.tail_B3.double()
    problem = Problem(z, t.logits_BK.double(), class_ids_of(t), tail_B3, None, T, tail)
    true = reference.reduce(reference.rows(problem), "mean")
    (true_gradient,) = torch.autograd.grad(true, z)
    loss, gradient = step()
    close = abs(loss.item() / true.item() - 1) < 1e-4
    wide = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[case.z.dtype]
    worst = (gradient.double() - true_gradient).abs().amax() / true_gradient.abs().amax()
    return bool(close and worst < wide)


class Clock:
    """Microseconds of a step; on a GPU by events, so without the wait for them.

    warm: the same step has just run. cold: FLUSH_BYTES have just been written.
    """

    def __init__(self, device: str, cold: bool) -> None:
        self.device = device
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cold else None

    def __call__(self, step: Callable[[], object]) -> float:
        if self.flushed is None:
            step()
        else:
            self.flushed.zero_()
        if self.device == "cpu":
            start = time.perf_counter()
            step()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # No wait here: the device is still at work on the above while Python launches the step.
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e3


def graphed(step: Step) -> Callable[[], object]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_bytes(case: Case, step: Step, device: str) -> int:
    """Beyond what there was before, gradient included."""
    step()
    case.z.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    level = most = 0
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    for event in results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


def measure(
    shape: tuple[int, int], dtype: torch.dtype, device: str, rounds: int
) -> list[list[dict[str, Any]]]:
    """Result lines of a warm cache, and of a cold one."""
    B, C = shape
    case = Case.make(B, C, dtype, device)
    out = torch.empty_like(case.z)
    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: torch.mul(case.z.detach(), 0.5, out=out)
    }
    launch = "graph" if device == "cuda" and B * C <= GRAPH_UP_TO else "eager"
    failures, memory = [], {}
    for name, (step, kind) in contestants(case, device).items():
        if not correct(case, step, kind):
            failures.append({"contestant": name, "result": "FAIL"})
            continue
        memory[name] = peak_bytes(case, step, device) / (B * C)
        try:
            steps[name] = graphed(step) if launch == "graph" else step
        except RuntimeError as error:  # a form that waits for the device cannot be captured
            failures.append({"contestant": name, "result": f"no graph: {str(error)[:60]}"})
            torch.cuda.synchronize()
    common = {
        "device": device,
        "shape": f"{B}x{C}",
        "dtype": str(dtype)[6:],
        "k": K,
        "T": T,
        "launch": launch,
        "rounds": rounds,
        "threads": torch.get_num_threads() if device == "cpu" else None,
    }
    found = []
    for cache in ("warm", "cold"):
        times = interleaved(steps, Clock(device, cache == "cold"), rounds)
        copy = float(np.median(times["copy"]))
        lines = list(failures)
        for name, us in times.items():
            p20, p50, p80 = (float(q) for q in np.quantile(us, [0.2, 0.5, 0.8]))
            moved = bytes_of(name, case.z.element_size(), device)
            lines.append(
                {
                    "contestant": name,
                    "p20": p20,
                    "p50": p50,
                    "p80": p80,
                    "min": min(us),
                    "bytes_per_logit": moved,
                    "gb_s": moved and moved * B * C / p50 / 1e3,
                    "of_copy": moved and moved / (2 * case.z.element_size()) * copy / p50,
                    "peak_bytes_per_logit": memory.get(name),
                }
            )
        found.append([common | {"cache": cache} | line for line in lines])
    return found


def interleaved(
    steps: dict[str, Callable[[], object]], clock: Clock, rounds: int
) -> dict[str, list[float]]:
    """Microseconds of each step in each round, in a new random order each; two rounds not kept."""
    shuffle = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        names = list(steps)
        shuffle.shuffle(names)
        for name in names:
            us = clock(steps[name])
            if number > 1:
                times[name].append(us)
    return times


def bytes_of(name: str, size: int, device: str) -> int | None:
    """Bytes a logit that a form must move, where we know: copy, and ours."""
    if name == "copy":
        return 2 * size
    if not name.startswith("kdcache"):
        return None
    # The dense teacher is float32. On a GPU backward reads again what forward read.
    reads = size + (4 if "dense" in name else 0)
    return reads * (2 if device == "cuda" and "in forward" not in name else 1) + size


def bars(lines: list[dict[str, Any]]) -> list[str]:
    """Our sparse form against eager dense and the fastest compiled one, by medians and minima."""
    found = {line["contestant"]: line for line in lines if "p50" in line}
    if "kdcache sparse" not in found or "eager dense" not in found:
        return []
    said = []
    for by in ("p50", "min"):
        us = found["kdcache sparse"][by]
        eager = found["eager dense"][by] / us
        compiled = [v[by] for n, v in found.items() if n.startswith("compile")]
        best = min(compiled, default=float("nan")) / us
        said.append(f"by {by}: {eager:.1f}x eager dense, {best:.1f}x the best compiled")
    return said


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--shape", action="append", help="ROWSxCLASSES, may be given again")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    parser.add_argument("--write", action="store_true", help="write docs/losses.md from kept lines")
    args = parser.parse_args(arguments)
    if args.write:
        write()
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shape or ()]
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    name = f"loss_{device}"
    if args.save:
        harness.start_results(name)
    for shape in shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's
            found = measure(shape, dtype, device, args.rounds)
        for lines in found:
            title = f"{shape[0]} x {shape[1]}, {lines[0]['cache']}, {args.rounds} rounds, us"
            harness.report(name, title, lines, args.save)
            for sentence in bars(lines):
                print(f"  {sentence}")
        torch.compiler.reset()


if __name__ == "__main__":
    main()
