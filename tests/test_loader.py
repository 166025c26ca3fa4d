"""The loader: views do not depend on how they are played, and nothing hangs or leaks."""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.reader import Reader
from ffcv.types import HeaderType

from kdcache.batch import Batch
from kdcache.data import passes
from kdcache.data import render as pixels
from kdcache.data.beton import Dataset, open_dataset, sidecar_path
from kdcache.data.loader import Loader
from kdcache.errors import DatasetCorrupt, KDCacheError, UsageError
from kdcache.views.mixing import pair_mix_weights
from kdcache.views.order import view_order, view_positions
from kdcache.views.spec import ViewSpec
from tests.conftest import subset

pytestmark = pytest.mark.timeout(90)

MIXED = ViewSpec(8, min_scale=0.3, mixup=1.0, seed=5)
PLAIN = ViewSpec(8, min_scale=0.3, mixup=0, seed=5)
PHOTOS = ViewSpec(16, min_scale=0.2, mixup=0.4, seed=1)

Played = dict[str, np.ndarray]


def joined(batches: list[Batch]) -> Played:
    """All rows of some batches as one array for each column."""
    return {
        "positions": np.concatenate([b.positions_B for b in batches]),
        "samples": np.concatenate([b.sample_ids_B for b in batches]),
        "images": torch.cat([b.images_BCHW for b in batches]).numpy(),
        "labels": torch.cat([b.labels_B for b in batches]).numpy(),
        "partners": torch.cat([b.partner_labels_B for b in batches]).numpy(),
        "weights": torch.cat([b.mix_weights_B for b in batches]).numpy(),
    }


def play(
    dataset: Dataset,
    spec: ViewSpec,
    view: int = 0,
    positions: np.ndarray | slice = slice(None),
    *,
    batch_size: int = 64,
    workers: int = 2,
) -> Played:
    with Loader(dataset, spec, batch_size, workers=workers) as loader:
        return joined(list(loader.batches(view, positions)))


def same(a: Played, b: Played) -> bool:
    return all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


def rows_of(played: Played, rows: np.ndarray | slice) -> Played:
    return {name: column[rows] for name, column in played.items()}


def passes_alive() -> int:
    return sum(isinstance(thread, EpochIterator) for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert passes_alive() == 0


@pytest.fixture(params=["digits", "photos"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    found: Dataset = request.getfixturevalue(request.param)
    return found


# --- invariant: a view is the same however it is played


@pytest.mark.parametrize("spec", [MIXED, PLAIN], ids=["mixed", "plain"])
@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 1), (1, 2), (7, 1), (7, 2), (64, 1), (10_000, 2)]
)
def test_batch_size_and_workers_change_nothing(
    dataset: Dataset, spec: ViewSpec, batch_size: int, workers: int
) -> None:
    found = play(dataset, spec, 2, batch_size=batch_size, workers=workers)
    assert same(found, play(dataset, spec, 2))


def contiguous(num_samples: int, rank: int) -> np.ndarray:
    pairs = np.array_split(np.arange(-(-num_samples // 2)), 3)[rank]
    return np.arange(2 * pairs[0], min(2 * pairs[-1] + 2, num_samples))


def dealt_round_robin(num_samples: int, rank: int) -> np.ndarray:
    pairs = np.arange(-(-num_samples // 2))[rank::3]
    positions = (2 * pairs[:, None] + np.arange(2)).reshape(-1)
    return positions[positions < num_samples]


@pytest.mark.parametrize("spec", [MIXED, PLAIN], ids=["mixed", "plain"])
@pytest.mark.parametrize("part", [contiguous, dealt_round_robin])
def test_splitting_over_processes_changes_nothing(
    dataset: Dataset, spec: ViewSpec, part: Callable[[int, int], np.ndarray]
) -> None:
    whole = play(dataset, spec, 5)
    covered = []
    for rank in range(3):
        positions = part(len(dataset), rank)
        found = play(dataset, spec, 5, positions, batch_size=(7, 8, 64)[rank], workers=1 + rank % 2)
        assert same(found, rows_of(whole, positions))
        covered += positions.tolist()
    assert sorted(covered) == list(range(len(dataset)))


def test_batches_have_the_size_asked_for(digits: Dataset) -> None:
    for batch_size, spec in ((7, MIXED), (7, PLAIN), (64, MIXED), (1499, MIXED), (1501, MIXED)):
        with Loader(digits, spec, batch_size) as loader:
            sizes = [len(b) for b in loader.batches(0)]
        whole, rest = divmod(1500, batch_size)
        assert sizes == [batch_size] * whole + [rest] * (rest > 0)


@pytest.mark.parametrize("spec", [MIXED, PLAIN], ids=["mixed", "plain"])
def test_a_batch_says_what_it_shows(dataset: Dataset, spec: ViewSpec) -> None:
    played, n = play(dataset, spec, 3), len(dataset)
    order = view_order(spec, 3, n)
    assert played["positions"].tolist() == list(range(n))
    assert (played["samples"] == order).all()
    assert (played["labels"] == dataset.labels[order]).all()
    assert (played["weights"] == pair_mix_weights(spec, 3, np.arange(n), n)).all()
    partner = np.minimum(np.arange(n) ^ 1, n - 1) if spec.mixup else np.arange(n)
    assert (played["partners"] == dataset.labels[order[partner]]).all()


def test_batches_have_the_promised_types_and_layout(digits: Dataset) -> None:
    with Loader(digits, MIXED, 6) as loader:
        batch = next(loader.batches(1))
    assert batch.view == 1
    assert batch.images_BCHW.shape == (6, 3, 8, 8)
    assert batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert (batch.labels_B.dtype, batch.partner_labels_B.dtype) == (torch.int64, torch.int64)
    assert batch.mix_weights_B.dtype == torch.int16
    assert (batch.positions_B.dtype, batch.sample_ids_B.dtype) == (np.int64, np.int64)


def test_other_views_and_seeds_show_other_pixels(photos: Dataset) -> None:
    shown = {
        play(photos, ViewSpec(16, seed=seed), view)["images"].tobytes()
        for seed, view in ((0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1, 2**24 - 1))
    }
    assert len(shown) == 5


def test_batches_stay_as_they_were_when_more_are_read(digits: Dataset) -> None:
    """FFCV reuses its memory; a batch that was given out must not change."""
    for spec in (MIXED, PLAIN):
        with Loader(digits, spec, 50) as loader:
            batches, copies = [], []
            for batch in loader.batches(0):
                batches.append(batch)
                copies.append(batch.images_BCHW.clone())
        assert all(torch.equal(b.images_BCHW, c) for b, c in zip(batches, copies, strict=True))


# --- positions


@pytest.mark.parametrize(
    "positions",
    [
        slice(10, 30),
        slice(1490, None),
        slice(None, None, 1),
        slice(20, 27),
        slice(1498, 5000),
        np.array([4, 5, 0, 1, 1498, 1499, 4, 5]),
        np.array([6]),
    ],
    ids=str,
)
def test_any_positions_give_the_rows_of_the_whole(
    digits: Dataset, positions: np.ndarray | slice
) -> None:
    """An odd count is fine with mixing too, as long as only the last partner is missing."""
    wanted = np.arange(1500)[positions]
    whole = play(digits, MIXED, 1)
    for batch_size in (1, 3, 64):
        found = play(digits, MIXED, 1, positions, batch_size=batch_size)
        assert same(found, rows_of(whole, wanted))


def test_without_mixing_positions_need_no_partners(digits: Dataset) -> None:
    positions = np.array([1499, 3, 3, 7, 0, 2])
    whole = play(digits, PLAIN, 1)
    assert same(play(digits, PLAIN, 1, positions, batch_size=4), rows_of(whole, positions))


def test_the_last_odd_position_may_stand_alone(photos: Dataset) -> None:
    whole = play(photos, PHOTOS, 1)
    found = play(photos, PHOTOS, 1, np.array([40]))
    assert same(found, rows_of(whole, np.array([40])))
    assert found["weights"].tolist() == [0]


@pytest.mark.parametrize("spec", [MIXED, PLAIN], ids=["mixed", "plain"])
@pytest.mark.parametrize("positions", [slice(5, 5), np.array([], np.int64), slice(1500, 1600)])
def test_no_positions_give_no_batches(
    digits: Dataset, spec: ViewSpec, positions: np.ndarray | slice
) -> None:
    with Loader(digits, spec, 4) as loader:
        assert list(loader.batches(0, positions)) == []


@pytest.mark.parametrize("spec", [MIXED, PLAIN], ids=["mixed", "plain"])
@pytest.mark.parametrize("positions", [[0, 1500], [-1, 0], [2**40, 2**40 + 1], [-(2**62), 1]])
def test_positions_outside_the_view_are_refused(
    digits: Dataset, spec: ViewSpec, positions: list[int]
) -> None:
    with (
        Loader(digits, spec, 4) as loader,
        pytest.raises(UsageError, match="positions must lie in 0 to 1499"),
    ):
        next(loader.batches(0, np.array(positions)))


@pytest.mark.parametrize(
    "positions",
    [
        np.array([1, 2]),
        np.array([1, 0]),
        np.array([3]),
        np.array([0, 2]),
        np.array([0, 1, 2, 4, 5, 6]),
        np.array([0, 1, 3]),
        slice(1, 5),
        slice(0, 10, 2),
        slice(None, None, -1),
    ],
    ids=str,
)
def test_with_mixing_half_pairs_are_refused(digits: Dataset, positions: np.ndarray | slice) -> None:
    with Loader(digits, MIXED, 4) as loader, pytest.raises(UsageError, match="whole pairs"):
        next(loader.batches(0, positions))


def test_the_lonely_last_position_must_come_last(photos: Dataset) -> None:
    with Loader(photos, PHOTOS, 4) as loader, pytest.raises(UsageError, match="whole pairs"):
        next(loader.batches(0, np.array([40, 0, 1])))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_holds_at_least_one_image(digits: Dataset, batch_size: int) -> None:
    with pytest.raises(UsageError, match="batch size must be at least 1"):
        Loader(digits, MIXED, batch_size)


@pytest.mark.parametrize("mixup", [0, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_datasets_play(digits: Dataset, tmp_path: Path, count: int, mixup: float) -> None:
    spec = ViewSpec(8, crop="center", min_scale=1.0, flip=False, mixup=mixup)
    few = subset(digits, count, tmp_path / "few.beton")
    for batch_size in (1, 2, 64):
        played = play(few, spec, batch_size=batch_size)
        assert sorted(played["samples"].tolist()) == list(range(count))
        assert same(played, play(few, spec, batch_size=5))


def test_more_workers_than_cores_are_too_many_but_no_error(digits_test: Dataset) -> None:
    assert same(play(digits_test, MIXED, workers=500), play(digits_test, MIXED, workers=1))


# --- passes: early ends, several at once


def test_next_after_the_end_stops_again(digits_test: Dataset) -> None:
    with Loader(digits_test, MIXED, 100) as loader:
        running = loader.batches(0)
        assert len(list(running)) == 3
        for _ in range(3):
            assert next(running, None) is None


def test_the_same_loader_plays_again_and_again(digits_test: Dataset) -> None:
    with Loader(digits_test, MIXED, 100) as loader:
        first = joined(list(loader.batches(0)))
        other = joined(list(loader.batches(1)))
        assert same(first, joined(list(loader.batches(0))))
        assert not np.array_equal(first["images"], other["images"])


@pytest.mark.parametrize("read", [1, 2, 5])
def test_leaving_early_ends_the_thread(digits: Dataset, read: int) -> None:
    with Loader(digits, MIXED, 10) as loader:
        whole = joined(list(loader.batches(0)))
        for _ in range(15):
            for number, _ in enumerate(loader.batches(1), 1):
                if number == read:
                    break
            assert passes_alive() == 0
        assert same(whole, joined(list(loader.batches(0))))


def test_an_error_in_the_loop_ends_the_thread(digits: Dataset) -> None:
    with Loader(digits, MIXED, 10) as loader:
        with pytest.raises(ZeroDivisionError):
            [1 // 0 for _ in loader.batches(0)]
        loader.close()
        assert passes_alive() == 0


def test_a_pass_that_was_never_begun_starts_no_thread(digits: Dataset) -> None:
    with Loader(digits, MIXED, 10) as loader:
        loader.batches(0)
        assert passes_alive() == 0


def test_passes_at_once_do_not_disturb_each_other(digits: Dataset, photos: Dataset) -> None:
    with Loader(digits, MIXED, 64) as a, Loader(photos, PHOTOS, 2) as b:
        together = zip(a.batches(0), a.batches(1), b.batches(2), strict=False)
        columns = [list(batches) for batches in zip(*together, strict=True)]
    for found, expected in zip(
        columns,
        (play(digits, MIXED, 0), play(digits, MIXED, 1), play(photos, PHOTOS, 2)),
        strict=True,
    ):
        rows = joined(found)
        assert same(rows, rows_of(expected, slice(len(rows["labels"]))))


def test_closing_the_loader_ends_its_passes(digits: Dataset) -> None:
    loader = Loader(digits, MIXED, 10)
    running = [loader.batches(view) for view in range(3)]
    for one in running:
        next(one)
    assert passes_alive() == 3
    loader.close()
    assert passes_alive() == 0
    loader.close()


def test_a_pass_of_a_closed_loader_does_not_look_finished(digits: Dataset) -> None:
    loader = Loader(digits, MIXED, 10)
    running = loader.batches(0)
    next(running)
    loader.close()
    with pytest.raises(KDCacheError, match="closed"):
        next(running)


def test_the_loader_reads_ahead_by_a_few_batches_only(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[int] = []
    render = pixels.render_rows

    def counting(tokens: np.ndarray, *rest: Any) -> None:
        rendered.append(len(tokens))
        render(tokens, *rest)

    monkeypatch.setattr(pixels, "render_rows", counting)
    with Loader(digits, MIXED, 10) as loader:
        running = loader.batches(0)
        next(running)
        threading.Event().wait(0.3)
        assert len(rendered) <= 6


# --- errors in FFCV's thread


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [ValueError("odd"), MemoryError("full"), SystemExit(3)], ids=repr)
def test_an_error_in_the_pipeline_is_raised_here(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(EpochIterator, "run_pipeline", failing(error))
    with Loader(digits, MIXED, 10) as loader:
        with pytest.raises(KDCacheError, match="FFCV's pipeline failed") as raised:
            next(loader.batches(0))
        assert raised.value.__cause__ is error
        assert passes_alive() == 0


def test_an_error_in_a_later_batch_comes_after_the_good_ones(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = EpochIterator.run_pipeline

    def third_fails(self: Any, number: int, *rest: Any) -> Any:
        if number == 3:
            raise ValueError("the fourth batch")
        return run(self, number, *rest)

    with Loader(digits, MIXED, 10) as loader:
        monkeypatch.setattr(EpochIterator, "run_pipeline", third_fails)
        seen: list[Batch] = []
        with pytest.raises(KDCacheError, match="the fourth batch"):
            seen.extend(loader.batches(0))
        assert len(seen) == 3
        monkeypatch.undo()
        assert len(list(loader.batches(0))) == 150


def test_an_error_in_the_decoder_is_raised_here(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "render_rows", failing(RuntimeError("no such kernel")))
    with Loader(digits, MIXED, 10) as loader, pytest.raises(KDCacheError, match="no such kernel"):
        next(loader.batches(0))


def test_a_thread_that_dies_in_silence_is_noticed(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.data.passes.Pass.run", lambda self: None)
    with (
        Loader(digits, MIXED, 10) as loader,
        pytest.raises(KDCacheError, match="exited unexpectedly"),
    ):
        next(loader.batches(0))


def test_the_last_word_of_a_thread_is_not_lost(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait may run out just before the thread speaks for the last time and ends."""
    get, run = queue.Queue.get, passes.Pass.run
    waited: list[bool] = []
    waits = threading.Event()

    def run_while_it_waits(self: passes.Pass) -> None:
        waits.wait(60)
        run(self)

    def times_out_just_too_early(
        self: Any, block: bool = True, timeout: float | None = None
    ) -> Any:
        if block and not waited and threading.current_thread() is threading.main_thread():
            waited.append(True)
            waits.set()
            for thread in threading.enumerate():
                if isinstance(thread, EpochIterator):
                    thread.join()
            raise queue.Empty
        return get(self, block, timeout)

    with Loader(digits, PLAIN, 1500) as loader:
        monkeypatch.setattr(passes.Pass, "run", run_while_it_waits)
        monkeypatch.setattr(queue.Queue, "get", times_out_just_too_early)
        assert sum(len(b) for b in loader.batches(0)) == 1500


# --- damaged samples


def damaged_copy(
    dataset: Dataset, folder: Path, sample: int, damage: Callable[[np.ndarray], None]
) -> Dataset:
    """A copy of the dataset with the payload of one sample changed in place."""
    path = folder / "copy.beton"
    shutil.copy(dataset.path, path)
    shutil.copy(sidecar_path(dataset.path), sidecar_path(path))
    _, start, size = Reader(str(path)).alloc_table[sample]
    file = np.memmap(path, np.uint8, "r+")
    damage(file[int(start) : int(start + size)])
    file.flush()
    return open_dataset(path)


def one_bit(payload: np.ndarray) -> None:
    payload[len(payload) // 2] ^= 1


def header(payload: np.ndarray) -> None:
    payload[:16] ^= 0xFF


def tail(payload: np.ndarray) -> None:
    payload[-len(payload) // 3 :] = 0


def everything(payload: np.ndarray) -> None:
    payload[:] = 0


@pytest.mark.parametrize("damage", [one_bit, header, tail, everything])
@pytest.mark.parametrize("sample", [0, 17, 40])
def test_a_damaged_sample_is_named(
    photos: Dataset, tmp_path: Path, sample: int, damage: Callable[[np.ndarray], None]
) -> None:
    damaged = damaged_copy(photos, tmp_path, sample, damage)
    where = view_positions(PHOTOS, 0, 41)[sample] // 2 * 2
    with Loader(damaged, PHOTOS, 2) as loader:
        good: list[Batch] = []
        with pytest.raises(DatasetCorrupt, match=rf"copy\.beton: sample {sample} is damaged"):
            good.extend(loader.batches(0))
    assert sum(len(batch) for batch in good) == where


@pytest.mark.parametrize("damage", [one_bit, header, everything])
def test_damaged_raw_pixels_are_noticed(
    digits: Dataset, tmp_path: Path, damage: Callable[[np.ndarray], None]
) -> None:
    damaged = damaged_copy(digits, tmp_path, 1234, damage)
    with (
        Loader(damaged, MIXED, 64) as loader,
        pytest.raises(DatasetCorrupt, match="sample 1234 is damaged: its checksum"),
    ):
        list(loader.batches(0))


def test_healthy_samples_of_a_damaged_file_still_play(photos: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(photos, tmp_path, 17, everything)
    where = view_positions(PHOTOS, 0, 41)[17]
    others = np.array([p for p in range(41) if p // 2 != where // 2])
    assert same(play(damaged, PHOTOS, 0, others), play(photos, PHOTOS, 0, others))


@pytest.mark.parametrize("pointer", [0, 2**33, 2**64 - 1])
def test_a_pointer_out_of_the_data_is_noticed(
    photos: Dataset, tmp_path: Path, pointer: int
) -> None:
    damaged = damaged_copy(photos, tmp_path, 5, lambda payload: None)
    reader = Reader(str(damaged.path))
    metadata = reader.metadata.copy()
    metadata["f0"]["data_ptr"][5] = pointer
    with damaged.path.open("r+b") as file:
        file.seek(HeaderType.itemsize + reader.field_descriptors.nbytes)
        file.write(metadata.tobytes())
    with (
        Loader(open_dataset(damaged.path), PHOTOS, 8) as loader,
        pytest.raises(DatasetCorrupt, match="sample 5 is damaged: its data lies outside"),
    ):
        list(loader.batches(0))


def test_a_pointer_to_another_sample_is_noticed(photos: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(photos, tmp_path, 5, lambda payload: None)
    reader = Reader(str(damaged.path))
    metadata = reader.metadata.copy()
    metadata["f0"]["data_ptr"][5] = metadata["f0"]["data_ptr"][6]
    with damaged.path.open("r+b") as file:
        file.seek(HeaderType.itemsize + reader.field_descriptors.nbytes)
        file.write(metadata.tobytes())
    with (
        Loader(open_dataset(damaged.path), PHOTOS, 8) as loader,
        pytest.raises(DatasetCorrupt, match="sample 5 is damaged"),
    ):
        list(loader.batches(0))


# --- cost and manners


@pytest.mark.parametrize("batch_size", [2, 16])
def test_memory_for_a_batch_holds_views_not_whole_images(photos: Dataset, batch_size: int) -> None:
    """FFCV's own decoder keeps a full-size scratch image for each row of each batch ahead."""
    with Loader(photos, PHOTOS, batch_size) as loader:
        running = loader.batches(0)
        next(running)
        (one,) = loader._passes
        shapes = [
            buffer.shape[2:]
            for kind in one.memory_allocations.values()
            for buffer in kind.values()
            if buffer is not None
        ]
        running.close()
    assert sorted(shapes) == [(1,), (pixels.row_bytes(PHOTOS),)]


SCRIPT = """
import sys, torch
torch.set_num_threads(3)
from pathlib import Path
from kdcache.data.beton import open_dataset
from kdcache.data.loader import Loader
from kdcache.views.spec import ViewSpec
assert torch.get_num_threads() == 3, "changed by the import"
loader = Loader(open_dataset(Path(sys.argv[1])), ViewSpec(8), 10, workers=1)
assert torch.get_num_threads() == 3, "changed by the loader"
list(loader.batches(0))
assert torch.get_num_threads() == 3, "changed by a pass"
next(running := loader.batches(1))
print("leaving in the middle of a pass")
"""


def test_torch_keeps_its_threads_and_a_process_may_end_in_a_pass(digits: Dataset) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(digits.path)],
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "leaving in the middle of a pass\n"


def test_numba_finds_its_byte_array_functions_again(digits: Dataset) -> None:
    """FFCV's own memory manager alters the type of byte arrays for the whole process, like this."""
    passes._BYTES.mutable = False
    with Loader(digits, PLAIN, 64) as loader:
        next(loader.batches(0))
    assert passes._BYTES.mutable
    assert passes._BYTES is numba.uint8[::1]


# --- what the teacher sees beside the student ----------------------------------------------------

LARGER = replace(MIXED, size_px=20)
OTHER = replace(PLAIN, seed=77, crop="random", size_px=12)


@pytest.mark.parametrize(
    ("spec", "teacher_view_spec"), [(MIXED, LARGER), (PLAIN, OTHER)], ids=["resized", "other"]
)
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_teacher_sees_its_view_of_the_same_samples(
    digits_test: Dataset, spec: ViewSpec, teacher_view_spec: ViewSpec, batch_size: int
) -> None:
    with Loader(digits_test, spec, batch_size, teacher_view_spec=teacher_view_spec) as loader:
        found = list(loader.batches(3))
    assert same(joined(found), play(digits_test, spec, 3))
    alone = play(digits_test, teacher_view_spec, 3)
    by_sample = alone["images"][np.argsort(alone["samples"])]
    seen = torch.cat([batch.for_teacher for batch in found]).numpy()
    assert (seen == by_sample[joined(found)["samples"]]).all()
    assert found[0].for_teacher.is_contiguous(memory_format=torch.channels_last)


def test_without_a_view_of_its_own_the_teacher_sees_the_students_pixels(digits: Dataset) -> None:
    with Loader(digits, MIXED, 10) as loader:
        batch = next(iter(loader.batches(0)))
    assert batch.teacher_images_BCHW is None
    assert batch.for_teacher is batch.images_BCHW


@pytest.mark.parametrize("change", [{"mixup": 0}, {"mixup": 0.5}, {"seed": 6}])
def test_a_teacher_that_would_see_other_mixtures_is_refused(
    digits: Dataset, change: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"the same pairs: one seed and one mixup, not 5 and 1 be"):
        Loader(digits, MIXED, 10, teacher_view_spec=replace(MIXED, **change))
    with pytest.raises(UsageError, match="the same pairs"):
        Loader(digits, PLAIN, 10, teacher_view_spec=MIXED)


@pytest.mark.parametrize("failing_px", [8, 20])
def test_an_error_in_either_pass_ends_both(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch, failing_px: int
) -> None:
    run = EpochIterator.run_pipeline
    width = pixels.row_bytes(replace(MIXED, size_px=failing_px))

    def third_fails(self: Any, number: int, *rest: Any) -> Any:
        rows, labels = run(self, number, *rest)
        if number == 2 and rows.shape[1] == width:
            raise ValueError("the third batch")
        return rows, labels

    monkeypatch.setattr(EpochIterator, "run_pipeline", third_fails)
    with Loader(digits, MIXED, 10, teacher_view_spec=LARGER) as loader:
        seen: list[Batch] = []
        with pytest.raises(KDCacheError, match="the third batch"):
            seen.extend(loader.batches(0))
        assert len(seen) == 2
        assert passes_alive() == 0


def test_both_passes_end_when_left_or_closed(digits: Dataset) -> None:
    loader = Loader(digits, MIXED, 10, teacher_view_spec=LARGER)
    running = loader.batches(0)
    next(running)
    assert passes_alive() == 2
    running.close()
    assert passes_alive() == 0
    running = loader.batches(0)
    next(running)
    loader.close()
    assert passes_alive() == 0
    with pytest.raises(KDCacheError, match="closed"):
        next(running)


def test_a_damaged_sample_is_named_whoever_sees_it(photos: Dataset, tmp_path: Path) -> None:
    damaged = damaged_copy(photos, tmp_path, 17, one_bit)
    with (
        Loader(damaged, PHOTOS, 2, teacher_view_spec=replace(PHOTOS, size_px=24)) as loader,
        pytest.raises(DatasetCorrupt, match="sample 17 is damaged"),
    ):
        list(loader.batches(0))
