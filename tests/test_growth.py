"""A cache gets more views: old shards stay, readers see no step in between, kills do no harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache import layout, verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK
from kdcache.cache.layout import GROUP
from kdcache.cache.store import Store
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheIncomplete, CacheMismatch
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.precompute import precompute
from kdcache.teacher.targets import CachedTargets
from tests.conftest import TEACHER, subset
from tests.growth import (
    NEW,
    OLD,
    VIEW,
    Killed,
    before_writes,
    columns,
    kill_before,
    objects,
    of_shards,
    record,
    require_readable,
    spec_of,
)
from tests.processes import Job, ended

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """90 digits: two shards in a view."""
    return subset(None, 90, tmp_path_factory.mktemp("data") / "d.beton")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)


@pytest.fixture(scope="module")
def small_shards() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 512)
        patch.setattr(layout, "SHARD_BYTES", 2048)
        yield


@pytest.fixture(scope="module")
def whole(
    data: Dataset, teacher: Classifier, small_shards: None, tmp_path_factory: pytest.TempPathFactory
) -> LogitCache:
    """Made with all views at once."""
    return record(data, teacher, tmp_path_factory.mktemp("whole") / "t", NEW)


@pytest.fixture(scope="module")
def old(
    data: Dataset, teacher: Classifier, small_shards: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes | None]:
    """The objects of a cache before it grows."""
    url = tmp_path_factory.mktemp("old") / "t"
    record(data, teacher, url, OLD)
    return objects(url)


@pytest.fixture
def url(old: dict[str, bytes | None], tmp_path: Path) -> Path:
    """A folder with a cache that can grow."""
    for key, content in old.items():
        path = tmp_path / "t" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        assert content is not None
        path.write_bytes(content)
    return tmp_path / "t"


def test_a_grown_cache_is_the_one_that_is_made_at_once(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in url.rglob("c/**/*") if p.is_file()}
    assert len(before) == OLD * whole.shards_per_view * 2
    identity = LogitCache.open(url).manifest.identity
    grown = record(data, teacher, url, NEW)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    assert grown.num_stored_views == grown.spec.num_views == NEW
    reader = LogitCache.open(url)
    assert reader.spec == whole.spec
    assert reader.manifest.identity == identity == whole.manifest.identity
    assert reader.metadata == whole.metadata
    found, expected = columns(reader, NEW), columns(whole, NEW)
    for name in expected:
        assert found[name].shape == (NEW, len(data), 10)
        np.testing.assert_array_equal(found[name], expected[name])
    assert verify.read(reader, {}) == ([], [])
    assert objects(url) == objects(whole.url)


def test_growth_in_steps_ends_as_growth_at_once(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    for num_views in range(OLD + 1, NEW + 1):
        assert record(data, teacher, url, num_views).num_stored_views == num_views
        assert require_readable(url, whole, sizes=(num_views,)) == num_views
    assert objects(url) == objects(whole.url)


def test_fewer_views_than_are_there_change_nothing(
    url: Path, data: Dataset, teacher: Classifier
) -> None:
    record(data, teacher, url, NEW)
    before = objects(url)
    with before_writes(lambda *_: None) as keys:
        assert record(data, teacher, url, 4).spec.num_views == NEW
    assert keys == []
    assert objects(url) == before


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("precision", {"precision": "bfloat16"}),
        ("teacher_hash", {"teacher_hash": "0" * 16}),
        ("seed", {"view_spec": replace(VIEW, seed=4)}),
        ("codec", {"codec": TopK(4, "float32")}),
        ("dataset_hash", {"dataset_hash": "0" * 16}),
    ],
)
def test_views_of_another_cache_are_refused(
    name: str, change: dict[str, Any], url: Path, data: Dataset, teacher: Classifier
) -> None:
    before = objects(url)
    spec = replace(spec_of(data, teacher, NEW), **change)
    with pytest.raises(CacheMismatch, match=name):
        precompute(data, teacher, spec, url, batch_size=16, workers=1)
    assert objects(url) == before


def test_a_training_that_reads_meanwhile_is_not_disturbed(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    reader = LogitCache.open(url)
    targets = CachedTargets(reader, data.content_hash, VIEW)
    with Loader(data, VIEW, 16, workers=1) as loader:
        first = [targets(batch) for batch in loader.batches(0)]
        record(data, teacher, url, NEW)
        later = [targets(batch) for view in (0, 1, 2) for batch in loader.batches(view)]
    assert reader.num_stored_views == reader.spec.num_views == OLD
    for a, b in zip(first, later, strict=False):
        assert torch.equal(a.logits_BK, b.logits_BK)  # type: ignore[union-attr]
    expected = torch.cat([whole.decode(whole[view]).logits_BK for view in range(OLD)])  # type: ignore[union-attr]
    assert torch.equal(torch.cat([t.logits_BK for t in later]), expected)  # type: ignore[union-attr]


# --- kills ------------------------------------------------------------------------------------


def writes_of_growth(num_shards: int) -> list[str]:
    """The writes of a growth: shards, each sealed last, then the manifest around the arrays."""
    shards = [name for _ in range(num_shards) for name in ("logits", "seals")]
    return [*shards, GROUP, f"logits/{GROUP}", f"seals/{GROUP}", GROUP]


NUM_WRITES = len(writes_of_growth((NEW - OLD) * 2))


def test_all_writes_of_a_growth_are_known(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    with before_writes(lambda *_: None) as keys:
        record(data, teacher, url, NEW)
    shards = (NEW - OLD) * whole.shards_per_view
    shown = [key if key.endswith(GROUP) else key.partition("/")[0] for key in keys]
    assert shown[: 2 * shards] == writes_of_growth(shards)[: 2 * shards]
    assert sorted(shown[2 * shards :]) == sorted(writes_of_growth(shards)[2 * shards :])
    assert (shown[2 * shards], shown[-1]) == (GROUP, GROUP)
    assert len(keys) == NUM_WRITES


@pytest.mark.parametrize("number", range(NUM_WRITES))
def test_a_growth_killed_at_any_write_is_a_cache_and_is_finished(
    number: int, url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    before = objects(url)
    with before_writes(kill_before(number)), pytest.raises(Killed):
        record(data, teacher, url, NEW)
    found = objects(url)
    assert {key: found[key] for key in of_shards(before)} == of_shards(before)
    assert require_readable(url, whole, sizes=(OLD,)) == OLD
    record(data, teacher, url, NEW)
    assert objects(url) == objects(whole.url)


@pytest.mark.parametrize("other", [4, 5])
@pytest.mark.parametrize("number", range(NUM_WRITES - 3, NUM_WRITES))
def test_a_killed_growth_is_followed_by_one_to_another_number_of_views(
    number: int, other: int, url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    with before_writes(kill_before(number)), pytest.raises(Killed):
        record(data, teacher, url, NEW)
    record(data, teacher, url, other)
    assert require_readable(url, whole, sizes=(other, NEW)) in (other, NEW)
    record(data, teacher, url, NEW)
    assert objects(url) == objects(whole.url)


def test_a_growth_killed_twice_is_finished(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    for number in (NUM_WRITES - 2, 1, 1):
        with before_writes(kill_before(number)), pytest.raises(Killed):
            record(data, teacher, url, NEW)
        assert require_readable(url, whole, sizes=(OLD,)) == OLD
    record(data, teacher, url, NEW)
    assert objects(url) == objects(whole.url)


# --- several processes ------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_views_are_visible_once_the_last_part_is_done(
    order: tuple[int, int], url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    first, last = order
    assert record(data, teacher, url, NEW, part=(first, 2)).num_stored_views == OLD
    assert require_readable(url, whole, sizes=(OLD,)) == OLD
    assert record(data, teacher, url, NEW, part=(last, 2)).num_stored_views == NEW
    assert require_readable(url, whole, sizes=(NEW,)) == NEW
    assert objects(url) == objects(whole.url)


def test_views_cannot_be_added_before_they_are_complete(
    url: Path, data: Dataset, teacher: Classifier, whole: LogitCache
) -> None:
    before = objects(url)
    cache = LogitCache.create(url, spec_of(data, teacher, NEW), {})
    with pytest.raises(CacheIncomplete, match="view 3 shard 0"):
        cache.add_views()
    assert objects(url) == before


def test_two_processes_that_add_the_same_views_both_succeed(data: Dataset, tmp_path: Path) -> None:
    jobs = {n: Job(data.path, tmp_path / f"t{n}", tmp_path / f"l{n}", num_views=n) for n in (3, 6)}
    for job in jobs.values():
        job.run()
    grow = replace(jobs[3], num_views=NEW)
    assert [ended(process) for process in [grow.start(), grow.start()]] == [0, 0]
    computed = [place for place in grow.computed() if place[0] >= OLD]
    assert sorted(set(computed)) == sorted((v, s) for v in range(OLD, NEW) for s in range(2))
    assert objects(tmp_path / "t3") == objects(tmp_path / "t6")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("opened", ["before", "meanwhile"])
@pytest.mark.parametrize("steps", range(1, 5))
def test_two_that_finish_the_same_views_at_once_both_succeed(
    steps: int,
    opened: str,
    number: int,
    url: Path,
    data: Dataset,
    teacher: Classifier,
    whole: LogitCache,
) -> None:
    """Before write `number` of the first one's, the second does so many of its own and stops."""
    complete_shards(url, whole)
    spec = spec_of(data, teacher, NEW)
    first = LogitCache.create(url, spec, {})
    second = LogitCache.create(url, spec, {}) if opened == "before" else None
    busy = False

    def interleave(current: int, store: Store, key: str) -> None:
        nonlocal second, busy
        if current != number or busy:
            return
        busy = True
        second = second or LogitCache.create(url, spec, {})
        with before_writes(kill_before(steps)):
            try:
                second.add_views()
            except Killed:
                pass

    with before_writes(interleave):
        first.add_views()
    assert second is not None
    second = LogitCache.create(url, spec, {})
    second.add_views()
    assert first.num_stored_views == second.num_stored_views == NEW
    assert objects(url) == objects(whole.url)


def complete_shards(url: Path, whole: LogitCache) -> None:
    """Put all shards of the new views, which are not yet part of the cache."""
    cache = LogitCache.create(url, whole.spec, {})
    for view, shard in cache.missing():
        cache.write(view, shard, whole.read_shard(view, shard))
