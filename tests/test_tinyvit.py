"""TinyViT's saved logits: it reads what is written, and what comes in says the same at T = 1."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache import layout
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import Dense, TopK, ValueType
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.data.sources import Source, open_source
from kdcache.errors import CacheIncomplete, CacheMismatch, UsageError
from kdcache.interop import tinyvit, tinyvit_reader
from kdcache.models import load
from kdcache.teacher.precompute import precompute
from kdcache.views.order import view_order
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec, codec_for, overwrite, synthetic_cache

STUDENT = "python:tests.conftest:convolutional_student"
PLAIN = ViewSpec(8, mixup=0)
Command = Callable[..., Result]


def tinyvit_reads(folder: Path, top_k: int, key: str) -> tuple[int, list[int], list[float]]:
    """(seed, classes, probabilities) of a key, by TinyViT's reading of the layout."""
    for rank in range(len(list(folder.glob("*-keys.txt")))):
        keys = [x.strip() for x in (folder / f"rank{rank}-keys.txt").read_text().splitlines()]
        if key in keys:
            item = 4 + 2 * 2 * top_k
            data = (folder / f"rank{rank}-values.bin").read_bytes()[item * keys.index(key) :][:item]
            classes = np.frombuffer(data[4 : 4 + 2 * top_k], np.int16)
            values = np.frombuffer(data[4 + 2 * top_k :], np.float16)
            return int(np.frombuffer(data[:4], np.int32)[0]), classes.tolist(), values.tolist()
    raise KeyError(key)


def save(
    folder: Path,
    logits_BC: torch.Tensor,
    top_k: int,
    *,
    epoch: int = 0,
    ranks: int = 1,
    keys: list[str] | None = None,
) -> Path:
    """One epoch as TinyViT saves it: samples dealt out to ranks, padded by repeats."""
    p_Bk, classes_Bk = logits_BC.softmax(1).topk(top_k, dim=1)
    out = folder / f"logits_top{top_k}_epoch{epoch}"
    out.mkdir(parents=True)
    order = np.random.default_rng(epoch).permutation(len(logits_BC))
    order = np.concatenate([order, order[: -len(order) % ranks]])
    for rank in range(ranks):
        mine = order[rank::ranks]
        text = "".join(f"{keys[i] if keys else i}\n" for i in mine)
        (out / f"rank{rank}-keys.txt").write_text(text)
        data = b"".join(
            np.int32(1000 * rank + j).tobytes()
            + classes_Bk[i].numpy().astype(np.int16).tobytes()
            + p_Bk[i].numpy().astype(np.float16).tobytes()
            for j, i in enumerate(mine)
        )
        (out / f"rank{rank}-values.bin").write_bytes(data)
    return out


def imported(folder: Path, dataset: Dataset, out: Path, **options: Any) -> LogitCache:
    saved = tinyvit_reader.open_saved(folder, dataset)
    return tinyvit.import_cache(
        saved, dataset, tinyvit.make_cache_spec(saved, dataset, **options), out
    )


def as_tinyvit_trains(folder: Path, top_k: int, num_samples: int, num_classes: int) -> torch.Tensor:
    """The targets [N, C] of TinyViT's loss: what is left is for all other classes alike."""
    targets = torch.empty(num_samples, num_classes)
    for i in range(num_samples):
        _, named, p = tinyvit_reads(folder, top_k, str(i))
        targets[i] = (1 - sum(p)) / max(1, num_classes - top_k)
        targets[i, named] = torch.tensor(p)
    return targets


def dense_p(cache: LogitCache, view: int) -> torch.Tensor:
    """Probabilities [N, C] at T = 1, the tail spread evenly."""
    target = cache.target(view, np.arange(cache.spec.num_samples))
    left = max(1, cache.spec.num_classes - target.class_ids_BK.shape[1])
    rest = 0 if target.log_tail_B is None else target.log_tail_B.exp()[:, None] / left
    p = torch.zeros(cache.spec.num_samples, cache.spec.num_classes) + rest
    return p.scatter(1, target.class_ids_BK.long(), target.log_p_BK.exp())


def first_digits(count: int, out: Path) -> Dataset:
    whole = open_source("digits", "train")
    return convert(Source(whole.class_names, whole.images[:count], whole.labels[:count]), out)[0]


def logits_of(
    seed: int, num_samples: int = 60, num_classes: int = 10, scale: float = 3
) -> torch.Tensor:
    return scale * torch.randn(
        num_samples, num_classes, generator=torch.Generator().manual_seed(seed)
    )


# --- out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_tinyvit_reads_what_the_cache_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: ValueType, top_k: int
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 64)
    monkeypatch.setattr(layout, "SHARD_BYTES", 256)
    logits = torch.stack([logits_of(v, 60, 40) for v in (1, 2)])
    cache = synthetic_cache(tmp_path / "t", logits, top_k=3, dtype=dtype, view=PLAIN)
    assert cache.shards_per_view > 3
    written = tinyvit.export(cache, tmp_path / "out", top_k)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert written == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*.*"))
    for view in (0, 1):
        folder = tmp_path / "out" / f"logits_top{top_k}_epoch{view}"
        order = view_order(PLAIN, view, 60)
        for position in (0, 17, 59):
            _, classes, p = tinyvit_reads(folder, top_k, str(order[position]))
            wanted = cache.target(view, [position])
            assert classes == wanted.class_ids_BK[0, :top_k].tolist()
            assert p == wanted.log_p_BK[0, :top_k].exp().half().tolist()


def test_seeds_are_31_bits_and_differ_by_view_and_sample(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", torch.zeros(2, 50, 5), top_k=2, view=PLAIN)
    for name in ("a", "b"):
        tinyvit.export(cache, tmp_path / name, 2)
    seeds = [
        tinyvit_reads(tmp_path / "a" / f"logits_top2_epoch{v}", 2, str(i))[0]
        for v in (0, 1)
        for i in range(50)
    ]
    assert len(set(seeds)) == 100
    assert min(seeds) >= 0
    assert max(seeds) > 1 << 29
    for file in (tmp_path / "a").rglob("*.*"):
        again = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == again.read_bytes()


def test_a_cache_in_sample_order_is_exported_by_sample(
    digits_test: Dataset, tmp_path: Path
) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits_test, teacher, PLAIN, num_views=2, top_k=2, row_order="dataset")
    cache = precompute(digits_test, teacher, spec, tmp_path / "t")
    tinyvit.export(cache, tmp_path / "out", 2)
    for i in (0, 100, 296):
        _, classes, _ = tinyvit_reads(tmp_path / "out" / "logits_top2_epoch1", 2, str(i))
        assert classes == cache.target(1, [i]).class_ids_BK[0].tolist()


@pytest.mark.parametrize(
    ("changes", "top_k", "words"),
    [
        ({"view_spec": ViewSpec(8, mixup=0.4)}, None, "mixed pairs (mixup 0.4)"),
        ({"num_draws": 5}, None, "no place for random draws"),
        ({"num_classes": 32_769}, None, "at most 32768 classes, the cache has 32769"),
        ({}, 6, "top-k must be 1 to 5 for this cache, not 6"),
        ({}, 0, "top-k must be 1 to 5 for this cache, not 0"),
        ({"num_classes": 5}, 5, "top-k must be 1 to 4 for this cache, not 5"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    changes: dict[str, Any], top_k: int | None, words: str
) -> None:
    options = {"num_classes": 100, "num_draws": 0, "view_spec": PLAIN} | changes
    num_classes, num_draws = options["num_classes"], options["num_draws"]
    codec = codec_for(num_classes, 5, num_draws=num_draws)
    spec = CacheSpec(1, 9, num_classes, codec, "d", "t", options["view_spec"])
    with pytest.raises(UsageError) as caught:
        tinyvit.exported_top_k(spec, top_k)
    assert words in str(caught.value)


def test_the_k_that_is_exported() -> None:
    def k(num_classes: int, top_k: int) -> int:
        spec = CacheSpec(1, 9, num_classes, codec_for(num_classes, top_k), "d", "t", PLAIN)
        return tinyvit.exported_top_k(spec, None)

    assert k(1000, 16) == 16
    assert k(1000, 1000) == 100
    assert k(10, 10) == 9
    assert k(32_768, 200) == 200


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = synthetic_cache(tmp_path / "t", torch.zeros(2, 50, 5), top_k=2, view=PLAIN)
    key = layout.key("logits", 1, 0)
    data = cache.store.read(key) or b""
    overwrite(cache.store, key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Exception, match="view 1 shard 0"):
        tinyvit.export(cache, tmp_path / "out", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(UsageError, match="out exists; choose another folder"):
        tinyvit.export(cache, tmp_path / "out", 2)


# --- in --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_an_imported_cache_says_what_tinyvit_trains_on(
    tmp_path: Path, dtype: ValueType, ranks: int
) -> None:
    data = first_digits(60, tmp_path / "s.beton")
    folders = [save(tmp_path / "in", logits_of(e), 2, epoch=e, ranks=ranks) for e in (4, 5)]
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype=dtype)
    spec = cache.spec
    assert (spec.num_views, spec.num_samples, spec.num_classes) == (2, 60, 10)
    assert spec.codec == TopK(2, dtype)
    assert (spec.row_order, spec.view_spec, spec.num_averaged_views) == ("dataset", None, 0)
    assert cache.metadata["epochs"] == [4, 5]
    assert cache.metadata["imported_from"] == str((tmp_path / "in").resolve())
    bound = {"float32": 1e-6, "float16": 2e-3, "uint8": 6e-2}[dtype]
    for view, folder in enumerate(folders):
        wanted = as_tinyvit_trains(folder, 2, 60, 10)
        found = dense_p(cache, view)
        # What float16 leaves for the tail may be more than each of it can have; then it gets less.
        sane = (1 - wanted.topk(2).values.sum(1)) / 8 <= wanted.topk(2).values[:, 1] + 1e-6
        assert sane.float().mean() > 0.9
        assert (found - wanted).abs()[sane].max() < bound
        assert torch.equal(found.argmax(1), wanted.argmax(1))


def test_the_tail_of_an_imported_record_is_uniform_at_every_temperature(tmp_path: Path) -> None:
    data = first_digits(60, tmp_path / "s.beton")
    folder = save(tmp_path / "in", logits_of(0, scale=1), 2)
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype="float32")
    _, _, p = tinyvit_reads(folder, 2, "7")
    each = min((1 - sum(p)) / 8, p[1])
    whole = torch.tensor([*p, *[each] * 8], dtype=torch.float64).log()
    for T in (1, 2, 5, 10):
        wanted = (whole / T).log_softmax(0)
        found = cache.target(0, [7], T)
        torch.testing.assert_close(found.log_p_BK[0].double(), wanted[:2], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            found.log_tail_B[0].double(), wanted[2:].logsumexp(0), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("top_k", [6, 9, 10])
def test_where_most_classes_are_named_the_cache_is_dense(tmp_path: Path, top_k: int) -> None:
    data = first_digits(60, tmp_path / "s.beton")
    folder = save(tmp_path / "in", logits_of(0), top_k)
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype="float32")
    assert isinstance(cache.spec.codec, Dense)
    wanted = as_tinyvit_trains(folder, top_k, 60, 10)
    assert (dense_p(cache, 0) - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("top_k", [2, 10])
def test_records_of_a_sure_teacher_are_finite(tmp_path: Path, dtype: ValueType, top_k: int) -> None:
    """float16 makes 1 of the first probability, 0 of the others, and nothing of the rest."""
    data = first_digits(60, tmp_path / "s.beton")
    logits = torch.zeros(60, 10)
    logits[:, 3] = 100
    logits[30:, 3] = 8
    save(tmp_path / "in", logits, top_k)
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype=dtype)
    for T in (1, 4):
        target = cache.target(0, np.arange(60), T)
        assert bool(target.log_p_BK.isfinite().all())
        if target.log_tail_B is not None:
            assert bool(target.log_tail_B.isfinite().all())
    p = dense_p(cache, 0)
    assert (p[:30, 3] > 0.9999).all()
    assert p.sum(1).sub(1).abs().max() < 1e-5


def test_the_mean_of_all_epochs(tmp_path: Path) -> None:
    data = first_digits(60, tmp_path / "s.beton")
    folders = [save(tmp_path / "in", logits_of(e, scale=1), 4, epoch=e, ranks=2) for e in range(3)]
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype="float32", average=True)
    assert (cache.spec.num_views, cache.spec.num_averaged_views) == (1, 3)
    # The rest is at most what the last named class has, six times.
    each = []
    for folder in folders:
        p = as_tinyvit_trains(folder, 4, 60, 10)
        named = p.topk(4)
        p = torch.minimum(p, torch.where(p < named.values[:, 3:], named.values[:, 3:], p))
        each.append(p / p.sum(1, keepdim=True))
    mean = torch.stack(each).mean(0)
    top = mean.topk(4)
    found = cache.target(0, np.arange(60))
    assert torch.equal(found.class_ids_BK.long(), top.indices)
    assert (found.log_p_BK.exp() - top.values).abs().max() < 2e-3


def test_padding_repeats_samples_and_the_first_rank_wins(tmp_path: Path) -> None:
    data = first_digits(10, tmp_path / "s.beton")
    folder = save(tmp_path / "in", logits_of(0, 10, scale=1), 2, ranks=4)
    keys = [(folder / f"rank{r}-keys.txt").read_text().split() for r in range(4)]
    assert sum(map(len, keys)) == 12
    double = next(k for k in keys[3] if any(k in rank for rank in keys[:3]))
    values = folder / "rank3-values.bin"
    rows = np.fromfile(values, tinyvit_reader.record_dtype(2)).copy()
    rows["values"][keys[3].index(double)] = [0.5, 0.25]
    rows.tofile(values)
    cache = imported(tmp_path / "in", data, tmp_path / "t", dtype="float32")
    p = cache.target(0, [int(double)]).log_p_BK[0].exp()
    assert abs(float(p[0]) - 0.5) > 1e-3


def test_names_stand_for_samples(tmp_path: Path) -> None:
    data = first_digits(20, tmp_path / "s.beton")
    names = [f"n{i % 3}_{i:03}" for i in range(20)]
    save(tmp_path / "a", logits_of(0, 20), 2)
    save(tmp_path / "b", logits_of(0, 20), 2, keys=names)
    by_index = imported(tmp_path / "a", data, tmp_path / "t")
    saved = tinyvit_reader.open_saved(tmp_path / "b", data, names)
    by_name = tinyvit.import_cache(
        saved, data, tinyvit.make_cache_spec(saved, data), tmp_path / "u"
    )
    for name, array in by_index[0].columns.items():
        assert np.array_equal(array, by_name[0].columns[name])
    with pytest.raises(UsageError, match=r"line 1: 'n\d_0\d\d' names no sample of .*: expected an"):
        tinyvit_reader.open_saved(tmp_path / "b", data)
    with pytest.raises(UsageError, match="has 20 samples, and 19 names were given"):
        tinyvit_reader.open_saved(tmp_path / "b", data, names[1:])
    with pytest.raises(UsageError, match="two samples have the name 'n1_001'"):
        tinyvit_reader.open_saved(tmp_path / "b", data, [names[1], *names[1:]])


def test_a_killed_import_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 64)
    monkeypatch.setattr(layout, "SHARD_BYTES", 256)
    data = first_digits(60, tmp_path / "s.beton")
    for e in (0, 1):
        save(tmp_path / "in", logits_of(e), 2, epoch=e, ranks=2)
    whole = imported(tmp_path / "in", data, tmp_path / "whole")
    assert len(whole.shards()) > 6

    class Killed(BaseException):
        pass

    def kill(done: int) -> None:
        if done > 50:
            raise Killed

    saved = tinyvit_reader.open_saved(tmp_path / "in", data)
    spec = tinyvit.make_cache_spec(saved, data)
    with pytest.raises(Killed):
        tinyvit.import_cache(saved, data, spec, tmp_path / "t", kill)
    partial = LogitCache.open(tmp_path / "t")
    assert 0 < len(partial.missing()) < len(whole.shards())
    with pytest.raises(CacheIncomplete, match="run the same `kdcache import` again to finish it"):
        partial.require_complete()
    seen: list[int] = []
    cache = tinyvit.import_cache(saved, data, spec, tmp_path / "t", seen.append)
    assert 30 < seen[0] < seen[-1] == 120
    for view in (0, 1):
        for name, array in whole[view].columns.items():
            assert np.array_equal(array, cache[view].columns[name])


def test_other_files_are_another_teacher(tmp_path: Path) -> None:
    data = first_digits(20, tmp_path / "s.beton")
    save(tmp_path / "a", logits_of(0, 20), 2)
    save(tmp_path / "b", logits_of(1, 20), 2)
    imported(tmp_path / "a", data, tmp_path / "t")
    with pytest.raises(CacheMismatch, match=r"teacher_hash: [0-9a-f]{16} here, [0-9a-f]{16} there"):
        imported(tmp_path / "b", data, tmp_path / "t")


def test_hundreds_of_files_are_not_open_at_once(tmp_path: Path) -> None:
    data = first_digits(20, tmp_path / "s.beton")
    for e in range(12):
        save(tmp_path / "in", logits_of(e, 20), 2, epoch=e, ranks=4)
    before = len(os.listdir("/proc/self/fd"))
    saved = tinyvit_reader.open_saved(tmp_path / "in", data)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    tinyvit.import_cache(
        saved, data, tinyvit.make_cache_spec(saved, data, average=True), tmp_path / "t"
    )
    assert len(os.listdir("/proc/self/fd")) <= before + 2


# --- what cannot be --------------------------------------------------------------------------


def record_with(folder: Path, row: int, **fields: Any) -> None:
    rows = np.fromfile(folder / "rank1-values.bin", tinyvit_reader.record_dtype(2))
    for name, value in fields.items():
        rows[name][row] = value
    rows.tofile(folder / "rank1-values.bin")


def cut(path: Path, size: int) -> None:
    os.truncate(path, path.stat().st_size - size)


def line(path: Path, number: int, text: str) -> None:
    lines = path.read_text().splitlines()
    lines[number] = text
    path.write_text("".join(x + "\n" for x in lines))


V, K = "rank1-values.bin", "rank1-keys.txt"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: cut(f / V, 5), "rank1-values.bin is truncated, or not of top 2: 115"),
    "a record short": (lambda f: cut(f / V, 12), "has 10 keys and rank1-values.bin 9 records"),
    "a key short": (lambda f: cut(f / K, len((f / K).read_text().split()[-1]) + 1), "has 9 keys"),
    "half a key": (lambda f: cut(f / K, 1), "rank1-keys.txt is truncated: its last line has no"),
    "no values": (lambda f: (f / V).unlink(), "has keys but no rank1-values.bin"),
    "no keys": (lambda f: (f / K).unlink(), "has rank1-values.bin without its keys"),
    "no rank": (lambda f: [(f / V).unlink(), (f / K).unlink()], "lacks 10 of 20 samples, the fir"),
    "no files": (lambda f: [p.unlink() for p in f.iterdir()], "has no rank0-keys.txt"),
    "a sample twice": (
        lambda f: line(f / K, 3, (f / K).read_text().split()[5]),
        "has two records of sample",
    ),
    "beyond": (lambda f: line(f / K, 3, "20"), "line 4: '20' names no sample of"),
    "negative": (lambda f: line(f / K, 3, "-1"), "line 4: '-1' names no sample of"),
    "leading zero": (lambda f: line(f / K, 3, "07"), "expected an index from 0 to 19"),
    "binary": (lambda f: (f / K).write_bytes(b"\xff\xfe\n" * 10), "line 1: "),
    "NaN": (lambda f: record_with(f, 3, values=[0.5, np.nan]), "record 3 holds a probability that"),
    "infinite": (lambda f: record_with(f, 9, values=[np.inf, 0]), "record 9 holds a probability"),
    "below 0": (lambda f: record_with(f, 3, values=[0.5, -0.1]), "holds a negative probability"),
    "above 1": (lambda f: record_with(f, 3, values=[0.9, 0.2]), "sum to more than 1"),
    "nothing": (lambda f: record_with(f, 0, values=[0, 0]), "record 0 holds no probability above"),
    "class beyond": (lambda f: record_with(f, 3, classes=[1, 10]), "that is not one of 0 to 9"),
    "class below": (lambda f: record_with(f, 3, classes=[-1, 2]), "that is not one of 0 to 9"),
    "class twice": (lambda f: record_with(f, 3, classes=[4, 4]), "record 3 holds a class twice"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_anything_is_written(tmp_path: Path, damage: str) -> None:
    data = first_digits(20, tmp_path / "s.beton")
    save(tmp_path / "in", logits_of(0, 20), 2, ranks=2)
    folder = save(tmp_path / "in", logits_of(1, 20), 2, epoch=1, ranks=2)
    do, words = DAMAGE[damage]
    do(folder)
    with pytest.raises(UsageError) as caught:
        imported(tmp_path / "in", data, tmp_path / "t")
    assert words in str(caught.value), caught.value
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_folders_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    data = first_digits(20, tmp_path / "s.beton")

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            tinyvit_reader.open_saved(folder, data)

    refused(tmp_path / "none", "no such folder: ")
    refused(tmp_path, "holds no folder such as logits_top100_epoch0")
    save(tmp_path / "in", logits_of(0, 20), 2)
    save(tmp_path / "in", logits_of(0, 20), 2, epoch=3)
    refused(tmp_path / "in", "lacks epoch 1 between 0 and 3")
    save(tmp_path / "in", logits_of(0, 20), 3, epoch=1)
    refused(tmp_path / "in", r"logits of several k \(2, 3\)")
    save(tmp_path / "wide", logits_of(0, 20, 30), 20)
    refused(tmp_path / "wide", "keeps 20 classes, .* has 10")
    save(tmp_path / "more", logits_of(0, 25), 2)
    refused(tmp_path / "more", r"line \d+: '2[0-4]' names no sample")
    save(tmp_path / "less", logits_of(0, 15), 2)
    refused(tmp_path / "less", "lacks 5 of 20 samples, the first is 15: a rank's files are missing")


def test_files_of_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    data = first_digits(20, tmp_path / "s.beton")
    folder = save(tmp_path / "in", logits_of(0, 20), 2, ranks=2)
    other = save(tmp_path / "other", logits_of(0, 20), 2, epoch=1, ranks=3)
    for end in ("keys.txt", "values.bin"):
        (other / f"rank2-{end}").rename(folder / f"rank2-{end}")
    with pytest.raises(UsageError, match=r"answers \d+ samples twice.* some are of another run"):
        tinyvit_reader.open_saved(tmp_path / "in", data)


# --- the whole way ---------------------------------------------------------------------------


def test_out_and_in_again_says_the_same(tmp_path: Path) -> None:
    data = first_digits(60, tmp_path / "s.beton")
    logits = torch.stack([logits_of(v) for v in (0, 1)])
    cache = synthetic_cache(tmp_path / "t", logits, top_k=2, view=PLAIN, dataset=data.content_hash)
    tinyvit.export(cache, tmp_path / "out", 2)
    back = imported(tmp_path / "out", data, tmp_path / "u", dtype="float32")
    for view in (0, 1):
        order = view_order(PLAIN, view, 60)
        there, here = cache.target(view, np.arange(60)), back.target(view, order)
        assert torch.equal(there.class_ids_BK.int(), here.class_ids_BK.int())
        assert (there.log_p_BK.exp() - here.log_p_BK.exp()).abs().max() < 2.0**-10


def test_the_commands_from_cache_to_student(
    kdcache: Command, digits_test: Dataset, tmp_path: Path
) -> None:
    def done(*line: object) -> dict[str, Any]:
        result = kdcache(*line, "--json")
        assert result.code == 0, result.err
        value = json.loads(result.out)
        assert isinstance(value, dict)
        return value

    data = ("--data", digits_test.path)
    t, out, u = tmp_path / "t.zarr", tmp_path / "out", tmp_path / "u.zarr"
    done(
        "precompute",
        *data,
        "--teacher",
        TEACHER,
        "--out",
        t,
        "--views",
        2,
        "--mixup",
        0,
        "--top-k",
        2,
    )
    found = done("export", t, out)
    assert (found["epochs"], found["samples"], found["top_k"]) == (2, 297, 2)
    found = done("import", out, u, *data)
    assert (found["views"], found["samples"]) == (2, 297)
    assert found["record"] == "top 2 of 10 classes and the tail, float16"
    assert 0 <= found["accuracy"] <= 1
    assert done("import", out, u, *data)["bytes"] == found["bytes"]
    done("import", out, tmp_path / "mean.zarr", *data, "--average-epochs", "--dtype", "uint8")
    for cache in (u, tmp_path / "mean.zarr"):
        run = done(
            "train",
            "--mode",
            "cached",
            *data,
            "--cache",
            cache,
            "--mixup",
            0,
            "--student",
            STUDENT,
            "--out",
            tmp_path / f"run-{cache.stem}",
            "--epochs",
            3,
            "--batch-size",
            99,
        )
        assert run["spec"]["mode"] == "cached"
        assert kdcache("inspect", cache).code == 0
    refused = kdcache(
        "train",
        "--mode",
        "cached",
        *data,
        "--cache",
        u,
        "--mixup",
        1,
        "--student",
        STUDENT,
        "--out",
        tmp_path / "x",
    )
    assert refused.code == 2
    assert "train with --mixup 0" in refused.err


def test_keys_in_another_order_are_noticed(
    kdcache: Command, digits_test: Dataset, tmp_path: Path
) -> None:
    logits = torch.zeros(297, 10)
    logits[np.arange(297), (digits_test.labels + 3) % 10] = 4
    save(tmp_path / "in", logits, 2)
    line = ("import", tmp_path / "in", tmp_path / "t", "--data", digits_test.path)
    result = kdcache(*line)
    assert result.code == 0
    assert "the label for 0.0% of the samples, hardly more than by chance" in result.err
    assert len(result.err.splitlines()) == 1


def test_names_come_from_a_file(kdcache: Command, digits_test: Dataset, tmp_path: Path) -> None:
    names = [f"img_{i}" for i in range(297)]
    logits = torch.zeros(297, 10)
    logits[np.arange(297), digits_test.labels] = 4
    save(tmp_path / "in", logits, 2, keys=names)
    (tmp_path / "names").write_text("\n".join(names))
    line = ("import", tmp_path / "in", tmp_path / "t", "--data", digits_test.path)
    result = kdcache(*line, "--keys-file", tmp_path / "names", "--json")
    assert json.loads(result.out)["accuracy"] == 1
    assert result.err == ""
    missing = kdcache(*line, "--keys-file", tmp_path / "none")
    assert (missing.code, len(missing.err.splitlines())) == (2, 1)
    assert "cannot read" in missing.err
