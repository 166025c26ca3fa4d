"""Transformed records: the error bound, any logits, the tables, and caches of them."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import files
from kdcache.batch import Target
from kdcache.cache import layout, verify
from kdcache.cache.cache import LogitCache
from kdcache.cache.codecs import TopK, Transformed, bind
from kdcache.cache.codecs.protocol import Allowance
from kdcache.cache.codecs.transformed import CORRECTIONS, principal_directions
from kdcache.cache.fidelity import Fidelity, fidelity_to_json
from kdcache.cache.records import Records, Tables
from kdcache.cache.spec import CacheSpec
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.models import load
from kdcache.models.classifier import Teacher
from kdcache.teacher.calibration import Calibration, calibration_rows, choose_record
from kdcache.teacher.options import RecordOptions
from kdcache.teacher.precompute import make_cache_spec, precompute
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result
from tests.growth import Killed, before_writes, kill_before
from tests.processes import contents
from tests.test_damage import read_all

C, NUM_RECORDS = 120, 200
VIEW = ViewSpec(8, min_scale=0.4, seed=3)
Run = Callable[..., Result]


def low_rank(rows: int, num_classes: int = C, seed: int = 0) -> torch.Tensor:
    """Logits of a head of 20 features, some of them certain of a class."""
    torch.manual_seed(99)
    head = torch.randn(20, num_classes)
    torch.manual_seed(seed)
    z = torch.randn(rows, 20) @ head * 0.4
    return z + 12 * torch.nn.functional.one_hot(torch.randint(num_classes, (rows,)), num_classes)


def outside(rows: int) -> torch.Tensor:
    """Logits that have nothing to do with `low_rank`."""
    torch.manual_seed(5)
    return 6 * torch.distributions.Laplace(0.0, 1.0).sample((rows, C)) + 1000


LOGITS = {
    "like the calibration set": low_rank(300, seed=1),
    "of another domain": outside(300),
    "all equal": torch.full((3, C), 7.0),
    "one far above": torch.zeros(3, C).index_fill(1, torch.tensor([4]), 300.0),
    "float64": low_rank(5, seed=2).double(),
}


@pytest.fixture(scope="module")
def tables() -> Tables:
    return Transformed().fit(low_rank(600))


def coder(codec: Transformed, tables: Tables) -> Any:
    return bind(codec, codec.fit(low_rank(600), tables))


def centred(z: torch.Tensor) -> torch.Tensor:
    return z.double() - z.double().mean(1, keepdim=True)


def through(found: Any, z: torch.Tensor) -> Target:
    target = found.decode(found.encode(z), z.shape[1])
    assert isinstance(target, Target)
    return target


# --- the codec -------------------------------------------------------------------------------


@pytest.mark.parametrize("distortion", [2.0, 0.1, 0.001])
@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("rank", [C, 15])
def test_the_error_is_at_most_a_step_in_every_record(
    tables: Tables, name: str, distortion: float, rank: int
) -> None:
    """Also where the basis does not hold the logits."""
    codec = Transformed(distortion, max_basis_bytes=2 * C * rank)
    assert codec.rank(C) == rank
    cut = tables if rank == C else {**tables, "basis": tables["basis"][:rank]}
    z = LOGITS[name]
    target = through(coder(codec, cut), z)
    error_B = (centred(target.logits_BK) - centred(z)).square().mean(1).sqrt()
    size_B = centred(z).square().mean(1).sqrt()
    assert (error_B <= codec.step + 2**-10 * size_B).all()
    assert (target.logits_BK.amax(1) == 0).all()
    assert (target.class_ids_BK, target.tail_B3, target.num_classes) == (None, None, C)


def test_the_mean_squared_error_is_about_the_distortion(tables: Tables) -> None:
    for distortion in (0.5, 0.05):
        z = low_rank(1000, seed=3)
        target = through(coder(Transformed(distortion), tables), z)
        # Of the coded directions; the others have less.
        error = (centred(target.logits_BK) - centred(z)).square().mean()
        assert 0.2 * distortion < error < distortion


@pytest.mark.parametrize("k", [1, 8, C - 1])
def test_the_largest_logits_are_exact_and_stay_the_largest(tables: Tables, k: int) -> None:
    codec, z = Transformed(1.0, k), low_rank(200, seed=4)
    target = through(coder(codec, tables), z)
    top_Bk, ids_Bk = z.topk(k, dim=1)
    gaps = (target.logits_BK.gather(1, ids_Bk) - (top_Bk - top_Bk[:, :1])).abs()
    assert gaps.max() <= codec.step / CORRECTIONS + 1e-4  # of the largest one, and of its own
    others = target.logits_BK.scatter(1, ids_Bk, -torch.inf).amax(1)
    assert (others <= target.logits_BK.gather(1, ids_Bk).amin(1)).all()


def test_logits_that_16_bits_do_not_hold_are_refused(tables: Tables) -> None:
    far = torch.zeros(2, C)
    far[1, 3] = 1e6
    with pytest.raises(UsageError, match=r"distortion 0\.001 .*--distortion.*--record dense"):
        coder(Transformed(0.001), tables).encode(far)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"distortion": 0.0}, "distortion"),
        ({"distortion": math.nan}, "distortion"),
        ({"distortion": math.inf}, "distortion"),
        ({"k": 0}, "top-k"),
        ({"num_calibration_records": 1}, "calibration-records"),
    ],
)
def test_parameters_are_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Transformed(**fields)


def test_classes_are_checked() -> None:
    with pytest.raises(UsageError, match=r"top-k must be 1 to 7"):
        Transformed(k=8).require_classes(8)
    Transformed().require_classes(21_841)
    with pytest.raises(UsageError, match=r"32,768 classes, the teacher has 151,936.*top-k"):
        Transformed().require_classes(151_936)


def test_columns_of_many_classes_have_a_bounded_basis_and_escapes() -> None:
    columns = Transformed().columns(21_841)
    assert columns["coefficients"].width == 2**26 // (2 * 21_841) == 1536
    assert columns["escapes"].width == 21_841
    assert set(Transformed().columns(5792)) == {"coefficients", "classes", "corrections"}


@pytest.mark.parametrize(("rows", "rank"), [(300, C), (50, C), (300, 30), (50, 30), (20, 30)])
def test_directions_are_orthonormal_and_those_of_the_largest_variance(rows: int, rank: int) -> None:
    x = low_rank(rows).double()
    basis = principal_directions(x, rank)
    assert basis.shape == (rank, C)
    found = min(rank, rows) if rank < C else C
    torch.testing.assert_close((basis @ basis.T)[:found, :found], torch.eye(found).double())
    variances = (x @ basis.T).square().sum(0)
    singular = torch.linalg.svdvals(x)[:rank].square()
    torch.testing.assert_close(variances[: len(singular)], singular, rtol=1e-6, atol=1e-6)
    assert (basis[found:] == 0).all()
    assert torch.equal(principal_directions(-x, rank)[:20], basis[:20])  # signs are fixed


@pytest.mark.parametrize("name", ["classes", "classes twice"])
def test_a_record_of_no_classes_is_corrupt(tables: Tables, name: str) -> None:
    found = coder(Transformed(), tables)
    columns = dict(found.encode(low_rank(4)).columns)
    columns["classes"] = columns["classes"].copy()
    columns["classes"][2, 1 if name == "classes twice" else -1] = 0 if "twice" in name else C
    with pytest.raises(CacheCorrupt, match=f"no 8 of {C} classes"):
        found.decode(Records(columns), C)


def test_a_record_that_was_never_written_is_corrupt(tables: Tables) -> None:
    columns = Transformed().columns(C)
    empty = Records({n: np.zeros((3, c.width), c.dtype) for n, c in columns.items()})
    with pytest.raises(CacheCorrupt, match="classes"):
        coder(Transformed(), tables).decode(empty, C)


def test_no_record_is_no_target(tables: Tables) -> None:
    found = coder(Transformed(), tables)
    assert through(found, low_rank(3)[:0]).logits_BK.shape == (0, C)


def test_comparison_tells_the_same_logits_from_others(tables: Tables) -> None:
    found, z = coder(Transformed(0.1), tables), low_rank(50, seed=6)
    allowance = Allowance(torch.full((50,), 1e-3).double(), torch.full((50,), 1e-3).double())
    rows: Any = None
    same = found.compare(found.encode(z), z.double(), allowance, rows)
    assert same.agrees.all()
    assert (same.ratio <= 1).all()
    assert same.typical.mean() <= same.allowed.mean()
    other = found.compare(found.encode(z), z.roll(1, 0).double(), allowance, rows)
    assert other.agrees.mean() < 0.2
    assert (other.ratio > 1).all()
    assert other.typical.mean() > 10 * other.allowed.mean()


# --- calibration -----------------------------------------------------------------------------


@pytest.fixture
def teacher() -> Teacher:
    return load.load_model(TEACHER, "teacher", num_classes=C, size_px=8)


def spec_of(data: Dataset, teacher: Teacher, **fields: Any) -> CacheSpec:
    codec = Transformed(0.2, 4, NUM_RECORDS)
    fields = {"num_views": 2, "view_spec": VIEW, "codec": codec, **fields}
    return make_cache_spec(data, teacher, fields.pop("view_spec"), fields.pop("codec"), **fields)


def test_calibration_rows_are_whole_pairs_of_named_views(
    digits_test: Dataset, teacher: Teacher
) -> None:
    spec = spec_of(digits_test, teacher)  # 297 samples
    (few,) = calibration_rows(spec, 100)
    assert few[0] == 0
    assert len(few[1]) == 100
    assert few[1].reshape(-1, 2).tolist() == [[p, p + 1] for p in few[1][::2]]
    assert few[1][-1] > 280  # spread over the view
    many = list(calibration_rows(spec, 700))
    assert [(view, len(rows)) for view, rows in many] == [(0, 297), (1, 297), (2, 104)]
    # A cache that gets more views has the same tables.
    more = list(calibration_rows(replace(spec, num_views=9), 700))
    assert all((a[1] == b[1]).all() for a, b in zip(many, more, strict=True))
    same = ViewSpec(8, "whole", 1.0, flip=False, mixup=0)
    assert len(list(calibration_rows(replace(spec, view_spec=same), 700))) == 1


def test_held_out_rows_are_whole_pairs(digits_test: Dataset) -> None:
    rows, held = Calibration(torch.arange(16.0)[:, None]).split()
    assert held[:, 0].tolist() == [6, 7, 14, 15]
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_auto_reaches_the_cosine_at_the_temperature_of_training(temperature: float) -> None:
    spec = CacheSpec(4, 100_000, C, Transformed(), "0" * 16, "1" * 16, VIEW)
    options = RecordOptions(data=Path("x"), teachers=("t",), temperature=temperature)
    choice = choose_record(spec, Calibration(low_rank(1200)), options)
    assert isinstance(choice.codec, Transformed)
    found = {x.temperature: x.cosine for x in choice.fidelity}
    assert 0.98 <= found[temperature] < 0.999
    assert found[10.0] > 0.95 or temperature == 1


def test_auto_takes_more_bytes_for_higher_temperatures() -> None:
    spec = CacheSpec(4, 100_000, C, Transformed(), "0" * 16, "1" * 16, VIEW)
    calibration = Calibration(low_rank(1200))
    sizes = [
        choose_record(
            spec, calibration, RecordOptions(data=Path("x"), teachers=("t",), temperature=T)
        ).bytes_per_record
        for T in (1.0, 2.0)
    ]
    assert sizes[0] < sizes[1]


# --- caches ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(layout, "CODED_ROWS", 32)
    monkeypatch.setattr(layout, "SHARD_BYTES", 1 << 14)


@pytest.fixture
def cache(digits_test: Dataset, teacher: Teacher, tmp_path: Path) -> LogitCache:
    spec = spec_of(digits_test, teacher)
    made = precompute(digits_test, teacher, spec, tmp_path / "t", batch_size=16, workers=1)
    assert made.shards_per_view > 3
    return made


def test_a_cache_holds_the_teachers_answers(
    cache: LogitCache, digits_test: Dataset, teacher: Teacher
) -> None:
    opened = LogitCache.open(cache.url)
    for view in range(2):
        with Loader(digits_test, VIEW, 50) as loader, torch.inference_mode():
            live = torch.cat([teacher(b.images_BCHW) for b in loader.batches(view)])
        found = opened.decode(opened[view])
        error = (centred(found.logits_BK) - centred(live)).square().mean(1).sqrt()
        assert error.max() <= Transformed(0.2).step
        assert (found.top_class() == live.argmax(1)).float().mean() > 0.98
    assert [x["temperature"] for x in opened.metadata["fidelity"]] == [1, 2, 5, 10]


def test_parts_in_any_order_make_the_same_cache(
    cache: LogitCache, digits_test: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    for i in (2, 0, 1):
        precompute(
            digits_test, teacher, cache.spec, tmp_path / "p", batch_size=16, workers=1, part=(i, 3)
        )
    assert contents(tmp_path / "p") == contents(tmp_path / "t")


def test_it_grows_with_the_same_tables(
    cache: LogitCache, digits_test: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    more = replace(cache.spec, num_views=3)
    grown = precompute(digits_test, teacher, more, tmp_path / "t", batch_size=16, workers=1)
    precompute(digits_test, teacher, more, tmp_path / "once", batch_size=16, workers=1)
    assert grown.manifest.identity == cache.manifest.identity
    assert contents(tmp_path / "once") == contents(tmp_path / "t")


@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_a_kill_anywhere_ends_with_the_same_bytes(
    cache: LogitCache, digits_test: Dataset, teacher: Teacher, tmp_path: Path, number: int
) -> None:
    run = {"batch_size": 16, "workers": 1}
    with before_writes(kill_before(number)), pytest.raises(Killed):
        precompute(digits_test, teacher, cache.spec, tmp_path / "k", **run)
    precompute(digits_test, teacher, cache.spec, tmp_path / "k", **run)
    assert contents(tmp_path / "k") == contents(tmp_path / "t")


def test_a_creation_that_is_killed_begins_again(
    cache: LogitCache,
    digits_test: Dataset,
    teacher: Teacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = files.write_file
    for number in range(9):
        left = iter(range(number))

        def killed(path: Path, data: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            real(path, data)

        monkeypatch.setattr(files, "write_file", killed)
        with pytest.raises(Killed):
            precompute(digits_test, teacher, cache.spec, tmp_path / "k", batch_size=16, workers=1)
        monkeypatch.setattr(files, "write_file", real)
        precompute(digits_test, teacher, cache.spec, tmp_path / "k", batch_size=16, workers=1)
        assert contents(tmp_path / "k") == contents(tmp_path / "t")
        shutil.rmtree(tmp_path / "k")


def test_a_shard_of_other_tables_is_refused(
    cache: LogitCache, digits_test: Dataset, teacher: Teacher, tmp_path: Path
) -> None:
    """With equal options its records would be other numbers."""
    made = {**Transformed(0.2, 4).fit(low_rank(300))}
    other = LogitCache.create(tmp_path / "o", cache.spec, {}, tables=made)
    assert other.manifest.identity != cache.manifest.identity
    for name in ("coefficients", "classes", "corrections", "seals"):
        shutil.copytree(tmp_path / "t" / name / "c", tmp_path / "o" / name / "c")
    with pytest.raises(CacheCorrupt, match="another place or cache"):
        LogitCache.open(tmp_path / "o").read_shard(0, 0)


def test_changed_bytes_are_noticed(cache: LogitCache, tmp_path: Path) -> None:
    dice = random.Random(0)
    files = [f for f in sorted((tmp_path / "t").rglob("*")) if f.is_file()]
    tables = [tmp_path / "t" / "basis/c/0/0", tmp_path / "t/mean/c/0", tmp_path / "t/shrink/c/0"]
    for file in tables * 20 + dice.choices(files, k=120):
        whole = file.read_bytes()
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= dice.randrange(1, 256)
        file.write_bytes(data)
        with pytest.raises((CacheCorrupt, UsageError)) as caught:
            read_all(tmp_path / "t")
        assert str(tmp_path) in str(caught.value), file
        file.write_bytes(whole)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_damaged_table_condemns_no_shard(
    cache: LogitCache, tmp_path: Path, kdcache: Run, how: str
) -> None:
    file = tmp_path / "t" / "basis/c/0/0"
    before = contents(tmp_path / "t")
    file.unlink() if how == "missing" else file.write_bytes(file.read_bytes()[:-1])
    result = kdcache("verify", tmp_path / "t", "--delete-damaged")
    assert result.code == 1
    assert f"{file} is {how}" in "".join(line.strip() for line in result.out.splitlines())
    file.write_bytes(before["basis/c/0/0"])
    assert contents(tmp_path / "t") == before
    assert verify.read(LogitCache.open(tmp_path / "t"), {}) == ([], [])


def test_a_shard_in_which_no_row_is_escaped_is_whole(tmp_path: Path) -> None:
    """Zarr would leave out a chunk of zeros."""
    codec = Transformed(1.0, 3, 10, max_basis_bytes=2 * C * 40)
    spec = CacheSpec(1, 40, C, codec, "0" * 16, "1" * 16, VIEW)
    made = LogitCache.create(tmp_path / "t", spec, {}, tables=codec.fit(low_rank(100)))
    some = low_rank(made.num_rows(0), seed=8)
    records = made.coder().encode(some)  # type: ignore[call-arg]
    assert not records.columns["escapes"].any()
    made.write(0, 0, records)
    assert LogitCache.open(tmp_path / "t").missing() == made.shards()[1:]
    found = LogitCache.open(tmp_path / "t").read_shard(0, 0)
    for name, column in records.columns.items():
        np.testing.assert_array_equal(found.columns[name], column)


# --- the commands ----------------------------------------------------------------------------


def test_the_commands_take_transformed_records(
    digits_test: Dataset, tmp_path: Path, kdcache: Run
) -> None:
    """From precompute to training, through all that reads a cache."""
    line = ["--data", digits_test.path, "--teacher", TEACHER]
    kind = ["--record", "transformed", "--distortion", 0.05, "--top-k", 3]
    view = ["--size", 8, "--calibration-records", 100]
    out = tmp_path / "t"
    made = kdcache("precompute", *line, "--out", out, "--views", 2, *kind, *view, "--json")
    assert made.code == 0, made.err
    assert "transformed at D = 0.05, the 3 largest exact" in made.err
    assert "at T = 1, 2, 5, 10" in made.err
    again = kdcache("precompute", *line, "--out", out, "--views", 2, *kind, *view)
    assert again.code == 0
    assert "bytes a record" not in again.err  # nothing is measured for a cache that is there
    assert kdcache("verify", out, *line).code == 0
    assert "transformed at D = 0.05" in kdcache("inspect", out).out
    assert kdcache("inspect", out, "--sample", 3).code == 0
    planned = kdcache("plan", *line, "--views", 2, *kind, *view, "--json")
    assert planned.code == 0
    found = json.loads(planned.out)
    assert [x["temperature"] for x in found["fidelity"]] == [1, 2, 5, 10]
    assert all(0.9 < x["cosine"] <= 1 for x in found["fidelity"])
    sizes = [json.loads(made.out)["bytes"], found["bytes"]]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)
    assert json.loads(made.out)["kl_records"] > 0
    assert 0 < json.loads(made.out)["kl_to_live_mean"] < 0.1
    student = ["--student", "python:tests.conftest:convolutional_student", "--epochs", 1]
    run = ["--mode", "cached", "--cache", out, "--out", tmp_path / "run", *student]
    trained = kdcache("train", "--data", digits_test.path, *run, "--temperature", 5)
    assert trained.code == 0, trained.err


def test_a_transformed_cache_in_dataset_order_and_of_averages(
    digits_test: Dataset, tmp_path: Path, kdcache: Run
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--teacher", TEACHER]
    kind = ["--size", 8, "--distortion", 0.01, "--top-k", 3, "--calibration-records", 400]
    for name, options in (("d", ["--row-order", "dataset"]), ("a", ["--average-views", 3])):
        out = tmp_path / name
        made = kdcache("precompute", *line, *kind, "--out", out, *options)
        assert made.code == 0, made.err
        assert kdcache("verify", out, *line).code == 0
        exported = kdcache("export", out, tmp_path / f"{name}.tinyvit", "--top-k", 5)
        assert exported.code == 0, exported.err


def fidelity(*cosines: float) -> dict[str, Any]:
    """What `precompute` would have measured of a cache at T = 1, 2, 5, 10."""
    temperatures = (1.0, 2.0, 5.0, 10.0)
    found = [Fidelity(T, 0.01, x) for T, x in zip(temperatures, cosines, strict=True)]
    return {"teacher": "t", "fidelity": fidelity_to_json(found)}


@pytest.mark.parametrize(
    ("metadata", "temperature", "words"),
    [
        (fidelity(0.99, 0.97, 0.8, 0.7), 1, None),
        (fidelity(0.99, 0.97, 0.8, 0.7), 2, None),
        (fidelity(0.99, 0.97, 0.8, 0.7), 5, "cosine of 0.80"),
        (fidelity(0.99, 0.97, 0.8, 0.7), 20, "cosine of 0.70"),
        (fidelity(0.90, 0.97, 0.8, 0.7), 1, "cosine of 0.90"),
        ({"teacher": "t"}, 1, None),  # measured by nobody: the tail of the records decides
        ({"teacher": "t"}, 10, "% of the probability"),
    ],
)
def test_training_warns_where_records_are_far_from_the_teacher(
    digits_test: Dataset,
    tmp_path: Path,
    kdcache: Run,
    metadata: dict[str, Any],
    temperature: float,
    words: str | None,
) -> None:
    N = len(digits_test)
    spec = CacheSpec(1, N, 10, TopK(3), digits_test.content_hash, "0" * 16, ViewSpec(8))
    made = LogitCache.create(tmp_path / "t", spec, metadata)
    z = 6 * torch.nn.functional.one_hot(torch.arange(N) % 10, 10).float()
    for view, shard in made.missing():
        made.write(view, shard, TopK(3).encode(z[slice(*made.shard_range(shard))]))
    student = ["--student", "python:tests.conftest:convolutional_student", "--epochs", 1]
    run = ["--mode", "cached", "--cache", tmp_path / "t", "--out", tmp_path / "run", *student]
    result = kdcache("train", "--data", digits_test.path, *run, "--temperature", temperature)
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if "at T = " in line]
    if words is None:
        assert not lines
        return
    (line,) = lines
    assert words in line
    assert f"--record auto --temperature {temperature}" in line


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_auto_does_not_go_on_with_records_for_a_lower_temperature(
    digits_test: Dataset, tmp_path: Path, kdcache: Run, temperature: int
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "c", "--size", 8]
    made = kdcache("precompute", *line, "--top-k", 9)
    assert made.code == 0, made.err
    cache = LogitCache.open(tmp_path / "c")
    measured = fidelity(0.90, 0.96, 0.8, 0.7)
    manifest = replace(cache.manifest, metadata={**cache.metadata, **measured})
    (tmp_path / "c" / "zarr.json").write_bytes(manifest.grown(1).zarr_json["zarr.json"])
    again = kdcache("precompute", *line, "--views", 2, "--temperature", temperature)
    if temperature < 5:  # 1 is the default, and names nothing
        assert again.code == 0, again.err
        return
    assert again.code == 2
    (said,) = again.err.splitlines()
    assert "at T = 5 they give" in said
    assert "cosine of 0.80" in said
    assert "give another --out" in said


def test_what_8_bits_lose_is_measured(digits_test: Dataset, tmp_path: Path, kdcache: Run) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--size", 8, "--record", "dense"]
    made = kdcache("precompute", *line, "--out", tmp_path / "8", "--dtype", "uint8")
    assert "all classes, uint8" in made.err
    assert "cosine 1.000" in made.err
    exact = kdcache("precompute", *line, "--out", tmp_path / "16")
    assert not exact.err.strip()


def test_an_object_store_holds_the_tables_too(
    digits_test: Dataset, teacher: Teacher, cache: LogitCache
) -> None:
    url = "memory://transformed-tables"
    precompute(digits_test, teacher, cache.spec, url, batch_size=16, workers=1)
    found = LogitCache.open(url)
    assert found.manifest.tables == cache.manifest.tables
    ours, theirs = found.decode(found[1]), cache.decode(cache[1])
    assert torch.equal(ours.logits_BK, theirs.logits_BK)


def test_a_cache_from_top_k_records_knows_its_fidelity(
    digits_test: Dataset, tmp_path: Path, kdcache: Run
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "t", "--size", 8]
    made = kdcache("precompute", *line, "--top-k", 3)
    assert made.code == 0
    assert "top 3 of 10 classes" in made.err
    found = LogitCache.open(tmp_path / "t").metadata["fidelity"]
    assert all(x["kl"] > 0.001 for x in found)
    assert found[0]["cosine"] > found[-1]["cosine"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--record", "dense", "--distortion", 1], "--distortion goes with --record transformed"),
        (["--distortion", 0], "distortion must be at least"),
        (["--record", "draws"], "--record draws needs --num-draws"),
        (
            ["--record", "top-k", "--temperature", 2],
            "--temperature goes with --record auto or draws",
        ),
        (
            ["--record", "transformed", "--dtype", "uint8"],
            "--dtype goes with --record auto or dense",
        ),
        (["--record", "transformed", "--top-k", 10], "top-k must be 1 to 9"),
        (["--record", "transformed", "--top-k", "all"], "--top-k all"),
        (["--record", "dense", "--top-k", 3], "--top-k 3"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    digits_test: Dataset, tmp_path: Path, kdcache: Run, options: list[object], words: str
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "t", "--size", 8]
    result = kdcache("precompute", *line, *options)
    assert result.code == 2, (result.code, result.err)
    assert words in result.err
    assert result.err.count("\n") == 1


def test_a_teacher_of_few_classes_gets_dense_records(
    digits_test: Dataset, tmp_path: Path, kdcache: Run
) -> None:
    line = ["--data", digits_test.path, "--teacher", TEACHER, "--out", tmp_path / "t", "--size", 8]
    assert kdcache("precompute", *line).code == 0
    assert "fidelity" not in LogitCache.open(tmp_path / "t").metadata
    assert LogitCache.open(tmp_path / "t").spec.codec.name == "dense"
