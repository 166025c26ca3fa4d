"""Records keep what the codec's docstring promises: kept logits, classes, and the tail at any T."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from kdcache.batch import Target
from kdcache.cache.codecs import ValueType
from kdcache.cache.codecs import top_k as codec
from kdcache.cache.records import Records, class_dtype
from kdcache.errors import CacheCorrupt
from kdcache.kernels import reference

DTYPES: tuple[ValueType, ...] = get_args(ValueType)
SHAPES = [
    (2, 1),
    (2, 2),
    (3, 1),
    (5, 4),
    (10, 1),
    (10, 3),
    (10, 10),
    (37, 36),
    (100, 16),
    (257, 100),
    (1000, 1),
    (1000, 16),
    (1000, 999),
    (1000, 1000),
]
ROWS = 32


def _gaussian(num_classes: int) -> torch.Tensor:
    return 2 * torch.randn(ROWS, num_classes)


def _laplace(num_classes: int) -> torch.Tensor:
    return torch.distributions.Laplace(0.0, 1.5).sample((ROWS, num_classes))


def _peaked(num_classes: int) -> torch.Tensor:
    winner = torch.randint(num_classes, (ROWS,))
    return torch.randn(ROWS, num_classes) + 15 * torch.nn.functional.one_hot(winner, num_classes)


def _equal(num_classes: int) -> torch.Tensor:
    return torch.full((ROWS, num_classes), 3.7)


def _wide(num_classes: int) -> torch.Tensor:
    return 40 * torch.randn(ROWS, num_classes)


FAMILIES: dict[str, Callable[[int], torch.Tensor]] = {
    "gaussian": _gaussian,
    "laplace": _laplace,
    "peaked": _peaked,
    "equal": _equal,
    "wide": _wide,
}


def logits_of(family: str, num_classes: int) -> torch.Tensor:
    torch.manual_seed(num_classes)
    return FAMILIES[family](num_classes)


def relative(logits_BC: torch.Tensor) -> torch.Tensor:
    return (logits_BC - logits_BC.amax(1, keepdim=True)).double()


def bound(gaps: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    """The codec's promise for gaps below its saturation."""
    if dtype == "float32":
        return torch.zeros_like(gaps)
    return gaps * 2**-11 + 2**-25 if dtype == "float16" else gaps.sqrt() / 31.8 + 0.0008


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("classes", "top_k"), SHAPES)
def test_kept_logits_come_back_within_the_bound(
    family: str, num_classes: int, top_k: int, dtype: ValueType
) -> None:
    z = logits_of(family, num_classes)
    target = codec.decode(codec.encode(z, top_k, dtype), num_classes)
    truth = relative(z)
    if top_k == num_classes:
        assert target.class_ids_BK is None
        assert target.tail_B3 is None
    else:
        assert target.class_ids_BK is not None
        assert all(len(set(row)) == top_k for row in target.class_ids_BK.tolist())
        smallest_kept = truth.gather(1, target.class_ids_BK).amin(1)
        rest = truth.scatter(1, target.class_ids_BK, -torch.inf).amax(1)
        assert (rest <= smallest_kept).all()
        truth = truth.gather(1, target.class_ids_BK)
    limit = {"uint8": codec.GAP_LIMIT, "float16": 65504.0}.get(dtype, torch.inf)
    gaps = (-truth).clamp(max=limit)
    assert ((-target.logits_BK.double() - gaps).abs() <= bound(gaps, dtype)).all()
    assert (target.logits_BK.amax(1) == 0).all()


def test_float16_keeps_its_bound_for_the_smallest_gaps() -> None:
    z = torch.zeros(1, 400)
    z[0, 1:] = -torch.logspace(-9, 4, 399)
    target = codec.decode(codec.encode(z, 400, "float16"), 400)
    assert ((target.logits_BK - z).abs().double() <= bound(-z.double(), "float16")).all()


@pytest.mark.parametrize(("dtype", "limit"), [("uint8", 64.0), ("float16", 65504.0)])
def test_huge_gaps_saturate(dtype: ValueType, limit: float) -> None:
    target = codec.decode(codec.encode(torch.tensor([[0.0, -3e5, 1.0]]), 3, dtype), 3)
    assert target.logits_BK[0, 1] == -limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("classes", "top_k"), [s for s in SHAPES if s[0] != s[1]])
def test_tail_numbers_are_those_of_float64(family: str, num_classes: int, top_k: int) -> None:
    z = logits_of(family, num_classes)
    records = codec.encode(z, top_k, "float32")
    assert records.class_ids is not None
    assert records.tail is not None
    named = torch.from_numpy(records.class_ids.astype(np.int64))
    left = torch.ones(z.shape, dtype=torch.bool).scatter(1, named, False)
    tail = relative(z)[left].view(ROWS, num_classes - top_k)
    wanted = torch.stack([tail.logsumexp(1), tail.mean(1), tail.var(1, correction=0)], 1)
    torch.testing.assert_close(
        torch.from_numpy(records.tail).double(), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("classes", "top_k"), [s for s in SHAPES if s[0] != s[1]])
def test_a_tail_of_codes_keeps_the_bound(family: str, num_classes: int, top_k: int) -> None:
    z = logits_of(family, num_classes)
    exact = codec.decode(codec.encode(z, top_k, "float32"), num_classes).tail_B3
    found = codec.decode(codec.encode(z, top_k, "uint8"), num_classes).tail_B3
    assert exact is not None
    assert found is not None

    def gaps(tail_B3: torch.Tensor) -> torch.Tensor:
        at_one, mean, variance = tail_B3.double().unbind(1)
        spread = variance.clamp(min=0).sqrt()
        return torch.stack([math.log(num_classes - top_k) - at_one, -mean, spread], 1)

    truth = gaps(exact).clamp(min=0, max=codec.GAP_LIMIT)
    assert ((gaps(found) - truth).abs() <= bound(truth, "uint8") + 1e-5).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_record_of_codes_is_a_staircase(family: str) -> None:
    """Its sums are the codes that a dense record of the same logits holds."""
    z = logits_of(family, 100)
    sparse, dense = codec.encode(z, 16, "uint8"), codec.encode(z, 100, "uint8")
    assert sparse.logits is not None
    assert sparse.classes is not None
    assert sparse.tail is not None
    assert dense.logits is not None
    codes = np.take_along_axis(dense.logits, sparse.classes.astype(np.int64), 1)
    np.testing.assert_array_equal(np.cumsum(sparse.logits, 1), codes)
    assert (sparse.logits[:, 0] == 0).all()
    assert (codes[:, -1].astype(int) + sparse.tail[:, :2].sum(1) <= codec.CODES).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_records(dtype: ValueType) -> None:
    records = codec.encode(logits_of("gaussian", 100), 5, dtype)
    assert records.logits.dtype == np.dtype(dtype)
    assert records.class_ids is not None
    assert records.class_ids.dtype == np.uint16
    assert records.tail is not None
    assert records.tail.dtype == np.dtype(dtype)
    assert sum(x.nbytes for x in (records.logits, records.class_ids, records.tail)) == (
        ROWS * codec.record_bytes(100, 5, dtype)
    )


def test_more_classes_than_16_bits_hold_take_32() -> None:
    assert class_dtype(1 << 16) == np.uint16
    assert class_dtype((1 << 16) + 1) == np.uint32
    z = torch.zeros(2, 70_000)
    z[:, 69_999] = 5
    target = codec.decode(codec.encode(z, 2, "float16"), 70_000)
    assert target.class_ids_BK is not None
    assert target.class_ids_BK[:, 0].tolist() == [69_999, 69_999]


@pytest.mark.parametrize("dtype", DTYPES)
def test_effective_top_k_never_takes_more_bytes(dtype: ValueType) -> None:
    for classes in (2, 3, 5, 10, 17, 100, 1000, 70_000):
        for k in {1, 2, classes // 3 + 1, classes // 2 + 1, classes - 1, classes}:
            effective = codec.effective_top_k(classes, k, dtype)
            assert effective in (k, classes)
            asked = codec.record_bytes(classes, k, dtype)
            assert codec.record_bytes(classes, effective, dtype) <= asked
            assert (effective == classes) == (codec.record_bytes(classes, classes, dtype) <= asked)


def test_record_bytes_of_known_records() -> None:
    assert codec.record_bytes(1000, 16, "float16") == 16 * (2 + 2) + 3 * 2
    assert codec.record_bytes(1000, 16, "uint8") == 16 * (1 + 2) + 3
    assert codec.record_bytes(70_000, 16, "float32") == 16 * (4 + 4) + 3 * 4
    assert codec.record_bytes(10, 10, "float16") == 20


@pytest.mark.parametrize("scale", [1.0, 1e-3, 6e4])
def test_dense_float32_decodes_to_the_live_target_bit_for_bit(scale: float) -> None:
    z = scale * logits_of("gaussian", 100)
    taped = codec.decode(codec.encode(z, 100, "float32"), 100)
    live = codec.dense_target(z)
    assert torch.equal(taped.logits_BK, live.logits_BK)
    assert taped.class_ids_BK is live.class_ids_BK is None
    assert taped.tail_B3 is live.tail_B3 is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_are_taken(dtype: torch.dtype) -> None:
    z = logits_of("gaussian", 50).to(dtype)
    target = codec.decode(codec.encode(z, 50, "float32"), 50)
    torch.testing.assert_close(target.logits_BK, (z.float() - z.float().amax(1, keepdim=True)))


# --- the distribution that a record stands for -----------------------------------------------


def outcomes(target: Target, temperature: float) -> torch.Tensor:
    """Log-probabilities of the named classes and, last, of the tail, in float64."""
    tail = None if target.tail_B3 is None else target.tail_B3.double()
    log_p, log_r = reference.temper(
        target.logits_BK.double(), tail, target.num_classes, temperature
    )
    return log_p if log_r is None else torch.cat([log_p, log_r[:, None]], 1)


def true_outcomes(z: torch.Tensor, target: Target, temperature: float) -> torch.Tensor:
    log_p = torch.log_softmax(relative(z) / temperature, 1)
    if target.class_ids_BK is None:
        return log_p
    rest = log_p.scatter(1, target.class_ids_BK, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, target.class_ids_BK), rest], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_outcomes_sum_to_one(family: str, dtype: ValueType) -> None:
    for (classes, top_k), temperature in itertools.product(SHAPES, (1.0, 2.0, 4.0, 10.0)):
        target = codec.decode(codec.encode(logits_of(family, classes), top_k, dtype), classes)
        total = outcomes(target, temperature).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)


# Largest KL in nats between the true softmax and the record's, both over k classes and the tail.
# At T = 1 the tail's mass is stored, above it is interpolated.
KL_AT_ONE: dict[ValueType, float] = {"float32": 1e-9, "float16": 1e-6, "uint8": 1e-3}
KL_ABOVE_ONE = {2.0: 1.5e-3, 4.0: 1.5e-4, 10.0: 5e-5}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize(("classes", "top_k"), [(100, 10), (1000, 10), (1000, 100), (10, 10)])
@pytest.mark.parametrize("family", ["gaussian", "laplace", "peaked", "equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_target_is_close_at_every_temperature(
    dtype: ValueType, family: str, num_classes: int, top_k: int, temperature: float
) -> None:
    z = logits_of(family, num_classes)
    target = codec.decode(codec.encode(z, top_k, dtype), num_classes)
    log_p, found = true_outcomes(z, target, temperature), outcomes(target, temperature)
    kl = (log_p.exp() * (log_p - found)).sum(1)
    assert kl.amax() < (KL_AT_ONE[dtype] if temperature == 1 else KL_ABOVE_ONE[temperature])


# Largest errors of log tail mass measured for such logits (C = 1000, k = 10), and some margin.
TAIL_BOUNDS = {1.0: 0.006, 1.5: 0.12, 2.0: 0.1, 4.0: 0.03, 10.0: 0.004}


@pytest.mark.parametrize("temperature", TAIL_BOUNDS)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "peaked", "equal"])
def test_the_tails_mass_is_close_at_every_temperature(family: str, temperature: float) -> None:
    z = logits_of(family, 1000)
    target = codec.decode(codec.encode(z, 10, "float16"), 1000)
    assert target.class_ids_BK is not None
    assert target.tail_B3 is not None
    named = target.class_ids_BK
    truth = (relative(z) / temperature).scatter(1, named, -torch.inf).logsumexp(1)
    found = reference.tail_log_mass(target.tail_B3.double(), 990, 1 / temperature)
    assert (found - truth).abs().amax() < TAIL_BOUNDS[temperature]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_very_wide_tail_is_never_taken_for_the_whole(dtype: ValueType) -> None:
    """The cubic alone would give such a tail e^40 times its mass at T = 2."""
    torch.manual_seed(0)
    z = -100 * torch.rand(ROWS, 1000)
    target = codec.decode(codec.encode(z, 10, dtype), 1000)
    assert target.tail_B3 is not None
    assert target.class_ids_BK is not None
    for temperature in (1.5, 2.0, 4.0, 10.0):
        scaled = relative(z) / temperature
        truth = scaled.scatter(1, target.class_ids_BK, -torch.inf).logsumexp(1)
        found = reference.tail_log_mass(target.tail_B3.double(), 990, 1 / temperature)
        assert (found - truth).abs().amax() < 3


# --- records as arrays -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [3, 20])
def test_records_are_cut_and_joined_by_rows(dtype: ValueType, top_k: int) -> None:
    records = codec.encode(logits_of("gaussian", 20), top_k, dtype)
    again = Records.concatenate([records[:7], records[7:8], records[np.arange(8, ROWS)]])
    assert len(again) == ROWS
    np.testing.assert_array_equal(again.logits, records.logits)
    if top_k == 20:
        assert again.classes is None
        assert again.tail is None
    else:
        np.testing.assert_array_equal(again.classes, records.class_ids)
        np.testing.assert_array_equal(again.tail, records.tail)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [3, 20])
def test_a_record_of_fill_values_was_never_written(dtype: ValueType, top_k: int) -> None:
    records = codec.encode(logits_of("gaussian", 20), top_k, dtype)
    fill = np.iinfo(np.uint8).max if dtype == "uint8" else np.nan
    records.logits[5] = fill
    with pytest.raises(CacheCorrupt, match="no largest logit, so it was never written"):
        codec.decode(records, 20)


@pytest.mark.parametrize("field", ["logits", "tail"])
def test_steps_below_the_last_code_are_corrupt(field: str) -> None:
    records = codec.encode(logits_of("gaussian", 20), 3, "uint8")
    steps = getattr(records, field)
    steps[5, 1] = 255
    with pytest.raises(CacheCorrupt, match="steps lead below the last code"):
        codec.decode(records, 20)


def test_no_record_is_no_target() -> None:
    for top_k, dtype in itertools.product((3, 20), DTYPES):
        target = codec.decode(codec.encode(logits_of("gaussian", 20), top_k, dtype)[:0], 20)
        assert target.logits_BK.shape == (0, top_k)


def test_a_class_that_the_teacher_does_not_have_is_corrupt() -> None:
    records = codec.encode(logits_of("gaussian", 20), 3, "float16")
    assert records.class_ids is not None
    records.class_ids[4, 1] = 20
    with pytest.raises(CacheCorrupt, match="a record names class 20 of 20"):
        codec.decode(records, 20)
