"""Problems for the losses, and the error bounds of every fused form.

The truth is float64 autograd of `reference.rows` on the exact stored inputs. With eps = 2^-23,
p and q the target's and the student's probabilities, A the target's mass, x = z / T:

    loss      8 eps (N + A),  N the sum of the absolute terms that the loss adds up
    gradient  4 eps / T [(A q + tail)(4 + |x - max x|) + 4 p]

each times the row's factor. A dense teacher's p is computed from logits as q is, and has q's bound.
Twice as much on a GPU, whose exp2 and log2 are approximate; one rounding more where the gradient is
stored in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from kdcache.kernels import reference
from kdcache.kernels.problem import Problem

EPS = 2.0**-23
TAILS = ("renormalise", "none", "uniform", "bucket")


def moved(p: Problem, device: str) -> Problem:
    return Problem(*(x.to(device) if torch.is_tensor(x) else x for x in p))


def problem(
    B: int = 5,
    C: int = 100,
    K: int | None = 8,
    *,
    T: float = 4.0,
    tail: str = "bucket",
    tempered: bool = False,
    row_weights: bool = False,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float32,
    index: torch.dtype = torch.int64,
    stride: int | None = None,
    shift: int = 0,
    pads: int = 0,
    masked: int = 0,
    seed: int = 0,
) -> Problem:
    """K None: a dense teacher. stride, shift: of the student's rows in their memory. pads: named
    classes that are -inf; masked: student logits that are -inf, on classes without mass."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    teacher = normal(B, C) * 3
    if masked:
        teacher[:, -masked:] = -torch.inf
    memory = torch.full((B * (stride or C) + shift,), torch.nan, dtype=dtype)
    z = memory[shift:].as_strided((B, C), (stride or C, 1), shift)
    z.copy_((normal(B, C) * scale).clamp(-6e4, 6e4))
    if masked:
        z[:, -masked:] = -torch.inf
    values, class_ids, rest = teacher, None, None
    if K is not None:
        top, class_ids = (teacher - teacher.amax(1, keepdim=True)).topk(K, dim=1)
        out = teacher.scatter(1, class_ids, -torch.inf)
        if tempered:
            whole = (teacher / T).logsumexp(1)
            values = (top + teacher.amax(1, keepdim=True)) / T - whole[:, None]
            rest = (out / T).logsumexp(1) - whole
            if pads:
                values[:, -pads:] = -torch.inf
                class_ids[:, -pads:] = class_ids[:, :1]
        else:
            left = torch.where(out.isinf(), 0, out - teacher.amax(1, keepdim=True))
            count = max(C - K, 1)
            mean = left.sum(1) / count
            variance = (left.square().sum(1) / count - mean**2).clamp(min=0)
            at_one = (out - teacher.amax(1, keepdim=True)).logsumexp(1)
            values, rest = top, torch.stack([at_one, mean, variance], 1) if K < C else None
        class_ids = class_ids.to(index)
    w = torch.rand(B, generator=g) + 0.5 if row_weights else None
    return Problem(z, values, class_ids, rest, w, T, tail, tempered)


def failing_teachers(C: int, tail: str | None) -> Iterator[Problem]:
    """Three rows, of which the second has a NaN for a value, or for a number of the tail where
    that counts. tail None: a dense teacher."""
    for tempered, T in product((False, True), (1.0, 4.0)):
        options = dict(T=T, tail=tail or "none", tempered=tempered)
        for column in (0, 2, slice(None)):
            p = problem(3, C, 8 if tail else None, **options)
            p.values[1, column] = torch.nan
            yield p
        counts = tail != "renormalise" and not (tail == "none" and tempered)
        for number in range(1 if tempered else 3) if tail and counts else ():
            p = problem(3, C, 8, **options)
            p.tail_values.view(3, -1)[1, number] = torch.nan
            yield p


def truth(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [B] and its sum's gradient [B, C], in float64."""
    exact = Problem(*(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in p))
    z = exact.student_BC.detach().requires_grad_()
    loss_B = reference.rows(exact._replace(student_BC=z))
    (gradient_BC,) = torch.autograd.grad(loss_B.sum(), z)
    return loss_B.detach(), gradient_BC


def assert_close(
    p: Problem,
    loss_B: torch.Tensor,
    gradient_BC: torch.Tensor | None,
    *,
    factor: torch.Tensor | float = 1.0,
    interpreter: bool = False,
) -> None:
    """factor: what the loss's gradient was multiplied by on the way back, a number or one a row."""
    on_gpu = p.student_BC.is_cuda
    p = moved(p, "cpu")
    true_B, true_BC = truth(p)
    loss_bound, gradient_bound = _bounds(p)
    slack = 2 if on_gpu else 1
    error = (loss_B.cpu().double() - true_B).abs()
    assert bool((error <= slack * loss_bound).all()), f"loss: {(error / loss_bound).max():.2f}"
    if gradient_BC is None:
        return
    f = torch.as_tensor(factor).double().cpu().reshape(-1, 1)
    true_BC, bound = true_BC * f, slack * gradient_bound * f.abs()
    stored = gradient_BC.cpu()
    assert stored.dtype == p.student_BC.dtype
    if stored.dtype == torch.bfloat16:
        # The interpreter truncates where the hardware rounds.
        bound = bound + (true_BC.abs() + bound) * (2.0**-7 if interpreter else 2.0**-8)
    if stored.dtype == torch.float16:
        bound = bound + (true_BC.abs() + bound) * 2.0**-11 + 2.0**-25
    error = (stored.double() - true_BC).abs()
    # float32 itself ends somewhere: an exponential below 2^-126 is 0.
    bound = bound + 2.0**-126 * (1 + p.temperature * f.abs()) * (
        1 if p.row_weights_B is None else p.row_weights_B.double()[:, None]
    )
    excess = (error / bound).nan_to_num(9e9).max() if error.numel() else 0
    assert bool((error <= bound).all()), f"gradient: {excess:.2f}"


def _bounds(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    z, T = p.student_BC.double(), p.temperature
    B, C = z.shape
    log_q = reference.log_softmax(z, T)
    gap = _gap(z) / T
    q = log_q.exp()
    if p.class_ids_BK is None:
        log_p = reference.log_softmax(p.values.double(), T)
        terms = log_p.exp() * (_finite(log_p).abs() + _finite(log_q).abs())
        N, A = terms.sum(1), torch.ones(B).double()
        noise = q * (4 + gap) + log_p.exp() * (4 + _gap(p.values.double()) / T)
    else:
        class_ids = p.class_ids_BK.long()
        log_p, log_r = p.values.double(), p.tail_values
        log_r = None if log_r is None else log_r.double()
        if not p.tempered:
            log_p, log_r = reference.temper(log_p, log_r, C, T)
        live = log_p > -torch.inf
        if p.tail == "renormalise":
            log_p = log_p - log_p.logsumexp(1, keepdim=True)
        prob = log_p.exp()
        log_qk = log_q.gather(1, class_ids)
        N = (prob * (_finite(log_p).abs() + _finite(log_qk).abs())).sum(1)
        A = prob.sum(1)
        named = torch.zeros(B, C).double().scatter_add(1, class_ids, live.double()) > 0
        left = (~named).sum(1)
        r = torch.zeros(B).double()
        if log_r is not None and p.tail in ("uniform", "bucket"):
            r = torch.where(left > 0, log_r.exp(), 0)
        each = torch.zeros(B, C).double()
        if p.tail == "uniform":
            u = (r / left.clamp(min=1))[:, None]
            N = N + r * _finite(u.log()[:, 0]).abs()
            N = N + (u * _finite(log_q).abs()).masked_fill(named, 0).sum(1)
            each = u.expand(B, C)
        if p.tail == "bucket":
            log_Q = log_q.masked_fill(named, -torch.inf).logsumexp(1)
            N = N + r * (_finite(r.log()).abs() + _finite(log_Q).abs())
            each = _finite(r[:, None] * (log_q - log_Q[:, None]).exp())
        A = A + r
        each = each.masked_fill(named, 0)
        noise = (A[:, None] * q + each) * (4 + gap)
        noise = noise.scatter_add(1, class_ids, (4 * prob).masked_fill(~live, 0))
    weight = torch.ones(B).double() if p.row_weights_B is None else p.row_weights_B.double()
    soft = weight * T * T
    return 8 * EPS * soft * (N + A), 4 * EPS * (soft / T)[:, None] * noise


def _gap(x_BC: torch.Tensor) -> torch.Tensor:
    """How far each is below the largest of its row; 0 for -inf."""
    return _finite(x_BC - x_BC.amax(1, keepdim=True)).abs()


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x))
