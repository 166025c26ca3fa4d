"""Records keep what the codec's docstring promises: kept logits, classes, and the tail at any T."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from kdcache.batch import Target, dense_target
from kdcache.cache.codecs import Dense, TopK, ValueType, choose_codec, record_bytes, values
from kdcache.cache.records import Records
from kdcache.errors import CacheCorrupt
from kdcache.kernels import reference
from tests.conftest import codec_for

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


def encode(z: torch.Tensor, top_k: int, dtype: ValueType) -> Records:
    return codec_for(z.shape[1], top_k, dtype).encode(z)


def through(z: torch.Tensor, top_k: int, dtype: ValueType) -> Target:
    """What a record of these logits decodes to."""
    target = codec_for(z.shape[1], top_k, dtype).decode(encode(z, top_k, dtype), z.shape[1])
    assert isinstance(target, Target)
    return target


def bound(gaps: torch.Tensor, dtype: ValueType) -> torch.Tensor:
    """The codec's promise for gaps below its saturation."""
    if dtype == "float32":
        return torch.zeros_like(gaps)
    return gaps * 2**-11 + 2**-25 if dtype == "float16" else gaps.sqrt() / 31.8 + 0.0008


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_classes", "top_k"), SHAPES)
def test_kept_logits_come_back_within_the_bound(
    family: str, num_classes: int, top_k: int, dtype: ValueType
) -> None:
    z = logits_of(family, num_classes)
    target = through(z, top_k, dtype)
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
    limit = {"uint8": values.GAP_LIMIT, "float16": 65504.0}.get(dtype, torch.inf)
    gaps = (-truth).clamp(max=limit)
    assert ((-target.logits_BK.double() - gaps).abs() <= bound(gaps, dtype)).all()
    assert (target.logits_BK.amax(1) == 0).all()


def test_float16_keeps_its_bound_for_the_smallest_gaps() -> None:
    z = torch.zeros(1, 400)
    z[0, 1:] = -torch.logspace(-9, 4, 399)
    target = through(z, 400, "float16")
    assert ((target.logits_BK - z).abs().double() <= bound(-z.double(), "float16")).all()


@pytest.mark.parametrize(("dtype", "limit"), [("uint8", 64.0), ("float16", 65504.0)])
def test_huge_gaps_saturate(dtype: ValueType, limit: float) -> None:
    target = through(torch.tensor([[0.0, -3e5, 1.0]]), 3, dtype)
    assert target.logits_BK[0, 1] == -limit


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_classes", "top_k"), [s for s in SHAPES if s[0] != s[1]])
def test_tail_numbers_are_those_of_float64(family: str, num_classes: int, top_k: int) -> None:
    z = logits_of(family, num_classes)
    records = encode(z, top_k, "float32")
    named = torch.from_numpy(records.columns["classes"].astype(np.int64))
    left = torch.ones(z.shape, dtype=torch.bool).scatter(1, named, False)
    tail = relative(z)[left].view(ROWS, num_classes - top_k)
    wanted = torch.stack([tail.logsumexp(1), tail.mean(1), tail.var(1, correction=0)], 1)
    torch.testing.assert_close(
        torch.from_numpy(records.columns["tail"]).double(), wanted, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_classes", "top_k"), [s for s in SHAPES if s[0] != s[1]])
def test_a_tail_of_codes_keeps_the_bound(family: str, num_classes: int, top_k: int) -> None:
    z = logits_of(family, num_classes)
    exact = through(z, top_k, "float32").tail_B3
    found = through(z, top_k, "uint8").tail_B3
    assert exact is not None
    assert found is not None

    def gaps(tail_B3: torch.Tensor) -> torch.Tensor:
        at_one, mean, variance = tail_B3.double().unbind(1)
        spread = variance.clamp(min=0).sqrt()
        return torch.stack([math.log(num_classes - top_k) - at_one, -mean, spread], 1)

    truth = gaps(exact).clamp(min=0, max=values.GAP_LIMIT)
    assert ((gaps(found) - truth).abs() <= bound(truth, "uint8") + 1e-5).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_record_of_codes_is_a_staircase(family: str) -> None:
    """Its sums are the codes that a dense record of the same logits holds."""
    z = logits_of(family, 100)
    sparse, dense = encode(z, 16, "uint8"), encode(z, 100, "uint8")
    codes = np.take_along_axis(
        dense.columns["logits"], sparse.columns["classes"].astype(np.int64), 1
    )
    np.testing.assert_array_equal(np.cumsum(sparse.columns["logits"], 1), codes)
    assert (sparse.columns["logits"][:, 0] == 0).all()
    assert (
        codes[:, -1].astype(int) + sparse.columns["tail"][:, :2].sum(1) <= values.MAX_CODE
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_records(dtype: ValueType) -> None:
    records = encode(logits_of("gaussian", 100), 5, dtype)
    assert records.columns["logits"].dtype == np.dtype(dtype)
    assert records.columns["classes"].dtype == np.uint16
    assert records.columns["tail"].dtype == np.dtype(dtype)
    assert sum(
        x.nbytes
        for x in (records.columns["logits"], records.columns["classes"], records.columns["tail"])
    ) == (ROWS * record_bytes(TopK(5, dtype), 100))


def test_more_classes_than_16_bits_hold_take_32() -> None:
    assert values.class_id_dtype(1 << 16) == np.uint16
    assert values.class_id_dtype((1 << 16) + 1) == np.uint32
    z = torch.zeros(2, 70_000)
    z[:, 69_999] = 5
    target = through(z, 2, "float16")
    assert target.class_ids_BK is not None
    assert target.class_ids_BK[:, 0].tolist() == [69_999, 69_999]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chosen_codec_never_takes_more_bytes(dtype: ValueType) -> None:
    for num_classes in (2, 3, 5, 10, 17, 100, 1000, 70_000):
        dense_bytes = record_bytes(Dense(dtype), num_classes)
        assert choose_codec(num_classes, None, dtype) == Dense(dtype)
        assert choose_codec(num_classes, num_classes, dtype) == Dense(dtype)
        ks = {1, 2, num_classes // 3 + 1, num_classes // 2 + 1, num_classes - 1}
        for k in ks - {num_classes}:
            chosen = choose_codec(num_classes, k, dtype)
            assert chosen in (TopK(k, dtype), Dense(dtype))
            asked = record_bytes(TopK(k, dtype), num_classes)
            assert record_bytes(chosen, num_classes) <= asked
            assert (chosen == Dense(dtype)) == (dense_bytes <= asked)


def test_record_bytes_of_known_records() -> None:
    assert record_bytes(TopK(16, "float16"), 1000) == 16 * (2 + 2) + 3 * 2
    assert record_bytes(TopK(16, "uint8"), 1000) == 16 * (1 + 2) + 3
    assert record_bytes(TopK(16, "float32"), 70_000) == 16 * (4 + 4) + 3 * 4
    assert record_bytes(Dense("float16"), 10) == 20


@pytest.mark.parametrize("scale", [1.0, 1e-3, 6e4])
def test_dense_float32_decodes_to_the_live_target_bit_for_bit(scale: float) -> None:
    z = scale * logits_of("gaussian", 100)
    taped = through(z, 100, "float32")
    live = dense_target(z)
    assert torch.equal(taped.logits_BK, live.logits_BK)
    assert taped.class_ids_BK is live.class_ids_BK is None
    assert taped.tail_B3 is live.tail_B3 is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_are_taken(dtype: torch.dtype) -> None:
    z = logits_of("gaussian", 50).to(dtype)
    target = through(z, 50, "float32")
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
        target = through(logits_of(family, classes), top_k, dtype)
        total = outcomes(target, temperature).exp().sum(1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=0)


# Largest KL in nats between the true softmax and the record's, both over k classes and the tail.
# At T = 1 the tail's mass is stored, above it is interpolated.
KL_AT_ONE: dict[ValueType, float] = {"float32": 1e-9, "float16": 1e-6, "uint8": 1e-3}
KL_ABOVE_ONE = {2.0: 1.5e-3, 4.0: 1.5e-4, 10.0: 5e-5}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 10.0])
@pytest.mark.parametrize(("num_classes", "top_k"), [(100, 10), (1000, 10), (1000, 100), (10, 10)])
@pytest.mark.parametrize("family", ["gaussian", "laplace", "peaked", "equal"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_target_is_close_at_every_temperature(
    dtype: ValueType, family: str, num_classes: int, top_k: int, temperature: float
) -> None:
    z = logits_of(family, num_classes)
    target = through(z, top_k, dtype)
    log_p, found = true_outcomes(z, target, temperature), outcomes(target, temperature)
    kl = (log_p.exp() * (log_p - found)).sum(1)
    assert kl.amax() < (KL_AT_ONE[dtype] if temperature == 1 else KL_ABOVE_ONE[temperature])


# Largest errors of log tail mass measured for such logits (C = 1000, k = 10), and some margin.
TAIL_BOUNDS = {1.0: 0.006, 1.5: 0.12, 2.0: 0.1, 4.0: 0.03, 10.0: 0.004}


@pytest.mark.parametrize("temperature", TAIL_BOUNDS)
@pytest.mark.parametrize("family", ["gaussian", "laplace", "peaked", "equal"])
def test_the_tails_mass_is_close_at_every_temperature(family: str, temperature: float) -> None:
    z = logits_of(family, 1000)
    target = through(z, 10, "float16")
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
    target = through(z, 10, dtype)
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
    records = encode(logits_of("gaussian", 20), top_k, dtype)
    again = Records.concatenate([records[:7], records[7:8], records[np.arange(8, ROWS)]])
    assert len(again) == ROWS
    np.testing.assert_array_equal(again.columns["logits"], records.columns["logits"])
    if top_k == 20:
        assert list(again.columns) == ["logits"]
    else:
        np.testing.assert_array_equal(again.columns["classes"], records.columns["classes"])
        np.testing.assert_array_equal(again.columns["tail"], records.columns["tail"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [3, 20])
def test_a_record_of_fill_values_was_never_written(dtype: ValueType, top_k: int) -> None:
    records = encode(logits_of("gaussian", 20), top_k, dtype)
    fill = np.iinfo(np.uint8).max if dtype == "uint8" else np.nan
    records.columns["logits"][5] = fill
    with pytest.raises(CacheCorrupt, match=r"no largest logit.*uninitialised"):
        codec_for(20, top_k, dtype).decode(records, 20)


@pytest.mark.parametrize("field", ["logits", "tail"])
def test_steps_below_the_last_code_are_corrupt(field: str) -> None:
    records = encode(logits_of("gaussian", 20), 3, "uint8")
    steps = records.columns[field]
    steps[5, 1] = 255
    with pytest.raises(CacheCorrupt, match="steps lead below the last code"):
        TopK(3, "uint8").decode(records, 20)


def test_no_record_is_no_target() -> None:
    for top_k, dtype in itertools.product((3, 20), DTYPES):
        codec = codec_for(20, top_k, dtype)
        target = codec.decode(codec.encode(logits_of("gaussian", 20))[:0], 20)
        assert target.logits_BK.shape == (0, top_k)


def test_a_class_that_the_teacher_does_not_have_is_corrupt() -> None:
    records = encode(logits_of("gaussian", 20), 3, "float16")
    records.columns["classes"][4, 1] = 20
    with pytest.raises(CacheCorrupt, match="a record names class 20 of 20"):
        TopK(3).decode(records, 20)
