"""The draws: Random123's known answers, and the compiled form against the NumPy form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kdcache.data import render
from kdcache.views import philox
from kdcache.views.philox import Purpose

SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
VIEWS = (0, 1, 2**16 + 3, 2**24 - 1)

# kat_vectors of Random123: counter, key, answer of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}

coordinates = st.tuples(
    st.integers(0, 2**24 - 1),
    st.integers(0, 2**40 - 1),
    st.sampled_from(Purpose),
    st.integers(0, 9),
)


def words(seed: int, view: int, index: int, purpose: Purpose, attempt: int = 0) -> tuple[int, ...]:
    return tuple(int(w) for w in philox.draw(seed, view, index, purpose, attempt))


def compiled_words(
    seed: int, view: int, index: int, purpose: Purpose, attempt: int = 0
) -> tuple[int, ...]:
    arguments = (np.uint64(x) for x in (seed, view, index, purpose, attempt))
    return tuple(int(w) for w in render.draw_one(*arguments))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(name: str) -> None:
    counter, key, answer = KNOWN_ANSWERS[name]
    found = philox.philox((counter[0], counter[1], counter[2], counter[3]), key[0] | key[1] << 32)
    assert [int(w) for w in found] == answer


def test_the_known_answers_also_come_from_a_batch_of_counters() -> None:
    counters = [
        np.array(column) for column in zip(*[k[0] for k in KNOWN_ANSWERS.values()], strict=True)
    ]
    for row, (_, key, answer) in enumerate(KNOWN_ANSWERS.values()):
        c0, c1, c2, c3 = counters
        found = philox.philox((c0, c1, c2, c3), key[0] | key[1] << 32)
        assert [int(w[row]) for w in found] == answer


@pytest.mark.parametrize("seed", SEEDS)
def test_compiled_draws_equal_the_numpy_draws(seed: int) -> None:
    random = np.random.default_rng(seed)
    near_the_end = 2**40 - 1 - np.arange(8)
    for view in (*VIEWS, *map(int, random.integers(0, 2**24, 8))):
        samples = np.concatenate([near_the_end, random.integers(0, 2**40, 24), np.arange(4)])
        purpose = Purpose(int(random.integers(1, 5)))
        attempt = int(random.integers(0, 10))
        table = np.stack(philox.draw(seed, view, samples, purpose, attempt), 1)
        found = [compiled_words(seed, view, int(s), purpose, attempt) for s in samples]
        assert table.tolist() == [list(f) for f in found]


def test_a_draw_puts_each_coordinate_where_the_module_says() -> None:
    index = 0x12_3456_789A
    expected = philox.philox((0x3456_789A, 0x12 | Purpose.FLIP << 16, 7, 3), 99)
    assert words(99, 7, index, Purpose.FLIP, 3) == tuple(int(w) for w in expected)


@given(coordinates, coordinates, st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_no_two_draws_of_a_seed_coincide(
    a: tuple[int, int, Purpose, int], b: tuple[int, int, Purpose, int], seed: int
) -> None:
    assume(a != b)
    assert words(seed, *a) != words(seed, *b)


def test_seeds_and_views_are_not_added() -> None:
    seen = {words(seed, view, 0, Purpose.CROP) for seed in SEEDS for view in VIEWS}
    assert len(seen) == len(SEEDS) * len(VIEWS)


@given(st.integers(0, 2**32 - 1), st.integers(1, 2**31))
@settings(max_examples=200, deadline=None)
def test_below_is_the_integer_part_of_the_share(word: int, bound: int) -> None:
    assert int(philox.below(np.uint64(word), bound)) == word * bound // 2**32


def test_words_are_spread_evenly() -> None:
    drawn = np.stack(philox.draw(3, 1, np.arange(20_000), Purpose.ORDER))
    counts = np.stack([np.bincount((w >> np.uint64(28)).astype(int), minlength=16) for w in drawn])
    # 16 bins of 1250: the standard deviation is 34, and 5 of them are never seen by chance.
    assert np.abs(counts - 1250).max() < 175
