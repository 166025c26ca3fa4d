"""Whatever a user gets wrong is one clear line on stderr and exit code 2, and never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kdcache.cache.cache import LogitCache
from kdcache.data.beton import Dataset, open_dataset
from kdcache.files import create_file
from kdcache.models import load
from kdcache.teacher.precompute import precompute
from kdcache.training.run_folder import make_run_json, write_result
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, Result, cache_spec, synthetic_cache

STUDENT = "python:tests.conftest:convolutional_student"
NAN_TEACHER = "python:tests.test_bad_input:nan_teacher"
TWO_CLASSES = "python:tests.test_bad_input:two_classes"
Command = Callable[..., Result]


def nan_teacher(num_classes: int) -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    network.mean = network.std = (0.5, 0.5, 0.5)  # type: ignore[assignment]
    nn.init.constant_(network[1].weight, torch.nan)
    return network


def two_classes(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))


@dataclass(frozen=True)
class Bench:
    """The command line beside a copy of the data and a whole cache of it."""

    command: Command
    folder: Path
    data: Path
    cache: Path

    def refused(self, *line: object, words: str | tuple[str, ...]) -> str:
        """Run a command that must fail in one line holding all of `words`."""
        result = self.command(*line)
        assert result.code == 2, result
        assert "Traceback" not in result.err
        err = result.err
        assert len(err.split("\n")) == 2, err
        assert err.startswith("kdcache: ")
        for word in (words,) if isinstance(words, str) else words:
            assert word in err, err
        return err

    def misused(self, *line: object, words: str) -> None:
        """Run a command whose options do not parse: usage, a blank line, then the error."""
        result = self.command(*line)
        assert result.code == 2, result
        assert "Traceback" not in result.err
        text = " ".join(result.err.replace("│", " ").split())
        assert words in text[text.index("Error") :], result.err

    def precompute(self, *options: object, out: str = "new.zarr") -> list[object]:
        line = ["precompute", "--data", self.data, "--teacher", TEACHER]
        return [*line, "--out", self.folder / out, "--views", 1, *options]

    def train(self, *options: object, mode: str = "labels") -> list[object]:
        line = ["train", "--mode", mode, "--data", self.data, "--student", STUDENT]
        return [*line, "--out", self.folder / "run", "--epochs", 1, "--batch-size", 98, *options]

    def cached(self, *options: object, cache: Path | None = None) -> list[object]:
        return self.train("--cache", cache or self.cache, *options, mode="cached")


@pytest.fixture(scope="module")
def made(digits_test: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    spec = cache_spec(digits_test, teacher, ViewSpec(8), num_views=2, top_k=1, dtype="float16")
    out = tmp_path_factory.mktemp("cache") / "t.zarr"
    precompute(digits_test, teacher, spec, out)
    return out


@pytest.fixture
def bench(kdcache: Command, digits_test: Dataset, made: Path, tmp_path: Path) -> Bench:
    for suffix in ("", ".json"):
        shutil.copy(f"{digits_test.path}{suffix}", tmp_path / f"d.beton{suffix}")
    shutil.copytree(made, tmp_path / "t.zarr")
    return Bench(kdcache, tmp_path, tmp_path / "d.beton", tmp_path / "t.zarr")


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


# --- data ------------------------------------------------------------------------------------

READERS = [
    ["eval", TEACHER, "--data"],
    ["precompute", "--teacher", TEACHER, "--out", "o.zarr", "--views", 1, "--data"],
    ["train", "--mode", "labels", "--student", STUDENT, "--out", "o", "--data"],
]


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r[0])
def test_data_that_is_not_there_or_not_data(bench: Bench, reader: list[object]) -> None:
    no = bench.folder / "no.beton"
    bench.refused(*reader, no, words=("no such file", str(no), "kdcache convert"))
    bench.refused(*reader, bench.folder, words="no such file")
    text = bench.folder / "text.beton"
    text.write_text("no images here\n" * 500)
    bench.refused(*reader, text, words=("text.beton is not a .beton file",))
    text.write_text("")
    bench.refused(*reader, text, words="shorter than a header")


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.9999])
def test_truncated_data(bench: Bench, keep: float) -> None:
    whole = bench.data.read_bytes()
    bench.data.write_bytes(whole[: int(keep * len(whole))])
    bench.refused(*bench.train(), words=("is truncated: expected", "convert the images again"))


def test_a_sample_whose_bytes_changed(bench: Bench) -> None:
    whole = bytearray(bench.data.read_bytes())
    whole[8 << 20] ^= 1
    bench.data.write_bytes(whole)
    for line in (bench.train("--batch-size", 297, "--mixup", 0), bench.precompute()):
        bench.refused(*line, words=("sample 0 is damaged: its checksum", "convert the images"))
    bench.refused("eval", TEACHER, "--data", bench.data, words="sample 0 is damaged")


def test_data_without_its_sidecar(bench: Bench) -> None:
    sidecar = bench.data.with_name("d.beton.json")
    sidecar.write_text("{}")
    bench.refused(*bench.train(), words=("d.beton.json is damaged", "convert the images again"))
    sidecar.write_bytes(b"\xff\xfe")
    bench.refused(*bench.train(), words="d.beton.json is damaged")
    sidecar.unlink()
    bench.refused(*bench.train(), words="has no sidecar d.beton.json")


def test_validation_data_of_other_classes(bench: Bench, photos: Dataset) -> None:
    line = bench.train("--val", photos.path, "--size", 8)
    bench.refused(*line, words=("has other classes than", str(photos.path)))
    bench.refused(*bench.train("--val", bench.folder / "v.beton"), words="no such file")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["no/folder", "a.beton"], "no such folder: no/folder"),
        (["digits", "a.zip"], "the output is a .beton file, not 'a.zip'"),
        (["digits", "no/folder/a.beton"], "no such folder: no/folder"),
        (["digits", "a.beton", "--quality", 0], "quality must be 1 to 100, not 0"),
        (["digits", "a.beton", "--max-side", 0], "max-side must be at least 1 px, not 0"),
        (["torchvision:Nothing", "a.beton"], "torchvision has no data set 'Nothing'"),
    ],
)
def test_convert_refuses(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, line: list[object], words: str
) -> None:
    monkeypatch.chdir(bench.folder)
    before = files(bench.folder)
    bench.refused("convert", *line, words=words)
    assert files(bench.folder) == before


def test_convert_does_not_overwrite(bench: Bench) -> None:
    bench.refused("convert", "digits", bench.data, words="exists; remove it or choose another")


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet50", "unknown model 'resnet50': a model is torchvision:NAME"),
        ("torchvision:resnet51", "unknown model 'torchvision:resnet51'"),
        ("kdcache:small", "kdcache:small has no trained weights"),
        ("python:tests.test_bad_input:two_classes", "has 2 classes, the data has 10"),
        ("python:nothing:f", "No module named 'nothing'"),
    ],
)
def test_teachers_that_cannot_teach(bench: Bench, name: str, words: str) -> None:
    line = ["precompute", "--data", bench.data, "--out", bench.folder / "n", "--views", 1]
    bench.refused(*line, "--teacher", name, words=words)
    bench.refused(*bench.train("--teacher", name, mode="online"), words=words)
    bench.refused("eval", TEACHER, "--data", bench.data, "--teacher", name, words=words)
    assert not (bench.folder / "n").exists()
    assert not (bench.folder / "run").exists()


def test_views_of_a_size_that_the_model_cannot_take(bench: Bench) -> None:
    line = bench.precompute("--size", 9)
    bench.refused(*line, words="linear_teacher cannot take views of 9 px")


def test_a_teacher_that_gives_nan(bench: Bench) -> None:
    words = (f"the teacher {NAN_TEACHER} gave NaN or infinity for sample", "in view 0")
    line = bench.precompute()
    line[line.index(TEACHER)] = NAN_TEACHER
    bench.refused(*line, words=words)
    bench.refused(*bench.train("--teacher", NAN_TEACHER, mode="online"), words=words)
    line = bench.precompute("--teacher", NAN_TEACHER, out="two.zarr")
    bench.refused(*line, words=f"the teacher {TEACHER} + {NAN_TEACHER} gave NaN")
    assert LogitCache.open(bench.folder / "new.zarr").missing() == [(0, 0)]


@pytest.fixture
def run_folder(bench: Bench) -> Path:
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    spec = TrainSpec("labels", ViewSpec(8), epochs=1, batch_size=8)
    data = open_dataset(bench.data)
    (bench.folder / "teacher").mkdir()
    write_result(bench.folder / "teacher", make_run_json(spec, data, student, None), student)
    return bench.folder / "teacher"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"student": 1, "classes": 2, "view": 3}'])
def test_a_damaged_run_as_teacher(bench: Bench, run_folder: Path, text: str) -> None:
    (run_folder / "run.json").write_text(text)
    bench.refused("eval", run_folder, "--data", bench.data, words="run.json is damaged")
    line = bench.train("--teacher", run_folder, mode="online")
    bench.refused(*line, words="run.json is damaged")


def test_a_run_with_damaged_weights_as_teacher(bench: Bench, run_folder: Path) -> None:
    (run_folder / "student.safetensors").write_bytes(b"\x80\x04garbage")
    line = bench.precompute("--teacher", f"{run_folder}@{STUDENT}")
    bench.refused(*line, words="student.safetensors is damaged")


def test_a_folder_that_is_no_run_as_teacher(bench: Bench) -> None:
    (bench.folder / "empty").mkdir()
    for line in (
        bench.precompute("--teacher", bench.folder / "empty"),
        ["eval", bench.folder / "empty", "--data", bench.data],
    ):
        bench.refused(*line, words=("is not a finished run: it has no run.json",))


def test_a_run_of_another_class_count(bench: Bench, run_folder: Path, photos: Dataset) -> None:
    line = ("eval", run_folder, "--data", photos.path)
    bench.refused(*line, words="it has no 'temple', 'flower', but '0', '1', '2' and 7 more")


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-k", 11], "top-k must be 1 to 10, the number of classes, or 'all', not 11"),
        (["--top-k", 0], "top-k must be at least 1, or 'all', not 0"),
        (["--top-k", -3], "not -3"),
        (["--top-k", "many"], "top-k must be a number or 'all', not 'many'"),
        (["--top-k", "1.5"], "top-k must be a number or 'all', not '1.5'"),
        (["--views", 0], "views must be 1 to 16777216, not 0"),
        (["--views", -1], "views must be 1 to 16777216, not -1"),
        (["--batch-size", 0], "batch size must be at least 1, not 0"),
        (["--batch-size", -5], "batch size must be at least 1, not -5"),
        (["--mixup", -1], "mixup must be 0 or 0.05 to 100, not -1"),
        (["--mixup", "nan"], "mixup must be 0 or 0.05 to 100, not nan"),
        (["--mixup", 1e9], "mixup must be 0 or 0.05 to 100"),
        (["--min-scale", 0], "min-scale must be in (0, 1], not 0"),
        (["--min-scale", 2], "min-scale must be in (0, 1], not 2"),
        (["--min-scale", "nan"], "min-scale must be in (0, 1], not nan"),
        (["--size", 0], "size must be a side of 1 to 4096 px, not 0"),
        (["--size", 5000], "size must be a side of 1 to 4096 px, not 5000"),
        (["--view-seed", -1], "view-seed must be in [0, 2^64), not -1"),
        (["--view-seed", 1 << 64], "view-seed must be in [0, 2^64)"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--device", ""], "--device is empty"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--device", "meta"], "device 'meta'"),
    ],
)
def test_precompute_refuses(bench: Bench, options: list[object], words: str) -> None:
    bench.refused(*bench.precompute(*options), words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", -1], "lr must be above 0, not -1"),
        (["--lr", 0], "lr must be above 0, not 0"),
        (["--lr", "nan"], "lr must be above 0, not nan"),
        (["--lr", "inf"], "lr must be"),
        (["--epochs", 0], "epochs must be at least 1, not 0"),
        (["--warmup", 1.5], "warmup must be a share in [0, 1) or a number of steps, not 1.5"),
        (["--warmup", 3], "a warm-up of 3 steps does not fit into the run's 3"),
        (["--weight-decay", -1], "weight decay must be at least 0, not -1"),
        (["--weight-decay", "inf"], "weight decay must be"),
        (["--batch-size", 0], "batch size must be at least 1, not 0"),
        (["--momentum", 1], "momentum must be in [0, 1), not 1"),
        (["--ema", 1], "ema decay must be a decay in [0, 1), not 1"),
        (["--ema", "nan"], "ema decay must be a decay in [0, 1), not nan"),
        (["--batch-size", 99], "batch size must be even with mixing, not 99: a step takes whole"),
        (["--checkpoint-minutes", 0], "checkpoint-minutes must be above 0, not 0"),
        (["--eval-every", 3], "--eval-every needs --val DATA.beton"),
        (["--recipe", "soup"], "soup"),
        (["--setting", "chaos"], "chaos"),
        (["--init", "no.safetensors"], "cannot read no.safetensors"),
        (["--init", "pretrained"], "has no pretrained weights"),
        (["--batch-size", 298], "batch size 298 is more than the 297 samples of the data"),
        (["--seed", 1 << 70], "seed must be"),
        (["--mixup", -1], "mixup must be 0 or 0.05 to 100, not -1"),
        (["--min-scale", 0], "min-scale must be in (0, 1], not 0"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--student", "kdcache:tiny"], "unknown model 'kdcache:tiny'"),
        (["--student", "python:tests.test_bad_input:two_classes"], "has 2 classes, the data has"),
    ],
)
def test_train_refuses_and_leaves_no_folder(
    bench: Bench, options: list[object], words: str
) -> None:
    bench.refused(*bench.train(*options), words=words)
    assert not (bench.folder / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", 0], "size"),
        (["--size", -8], "size"),
        (["--batch-size", 0], "batch size must be at least 1, not 0"),
        (["--device", "abacus"], "device 'abacus'"),
    ],
)
def test_eval_refuses(bench: Bench, options: list[object], words: str) -> None:
    bench.refused("eval", TEACHER, "--data", bench.data, *options, words=words)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["train", "--odd", 1], "No such option: --odd"),
        (["nothing"], "No such command 'nothing'"),
        (["train", "--mode", "psychic"], "'psychic' is not one of"),
        (["precompute", "--crop", "round"], "'round' is not one of"),
        (["precompute", "--dtype", "int4"], "'int4' is not one of"),
        (["precompute", "--views", "two"], "Invalid value for '--views'"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "--workers", 0], "Invalid value for '--workers'"),
        (["train", "--views", 0], "Invalid value for '--views'"),
        (["train", "--max-checkpoints", 0], "Invalid value for '--max-checkpoints'"),
        (["train", "--checkpoint-every", 0], "Invalid value for '--checkpoint-every'"),
        (["train", "--eval-every", 0], "Invalid value for '--eval-every'"),
        (["train", "--log-every", 0], "Invalid value for '--log-every'"),
        (["train", "--teacher-size", 0], "Invalid value for '--teacher-size'"),
        (["eval", "x", "--teacher-size", 0], "Invalid value for '--teacher-size'"),
        (["train", "--optimizer", "adam"], "'adam' is not one of"),
        (["train", "--precision", "int8"], "'int8' is not one of"),
        (["train", "--tail", "flat"], "'flat' is not one of"),
        (["demo", "--epochs", 0], "Invalid value for '--epochs'"),
        (["train"], "Missing option '--data'"),
        (["inspect"], "Missing argument"),
        (["verify"], "Missing argument"),
        (["verify", "t.zarr", "--samples", 0], "Invalid value for '--samples'"),
        (["eval", "x"], "Missing option '--data'"),
    ],
)
def test_options_that_do_not_parse(bench: Bench, line: list[object], words: str) -> None:
    bench.misused(*line, words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", 0], "temperature must be above 0, not 0"),
        (["--temperature", -2], "temperature must be above 0, not -2"),
        (["--temperature", "inf"], "temperature must be above 0, not inf"),
        (["--label-weight", 1.1], "label weight must be in [0, 1], not 1.1"),
        (["--label-weight", "nan"], "label weight must be in [0, 1], not nan"),
    ],
)
def test_train_refuses_of_its_teacher(bench: Bench, options: list[object], words: str) -> None:
    bench.refused(*bench.train("--teacher", TEACHER, *options, mode="online"), words=words)
    assert not (bench.folder / "run").exists()


# --- modes -----------------------------------------------------------------------------------


def test_modes_need_their_options_and_no_others(bench: Bench) -> None:
    train = bench.train
    bench.refused(*train(mode="online"), words="--mode online needs --teacher MODEL")
    bench.refused(*train(mode="cached"), words="--mode cached needs --cache C.zarr")
    bench.refused(*train("--cache", bench.cache), words="--cache goes with --mode cached, not with")
    bench.refused(
        *train("--cache", bench.cache, "--teacher", TEACHER, mode="online"),
        words="--cache goes with --mode cached, not with --mode online",
    )
    bench.refused(*train("--teacher", TEACHER), words="--teacher goes with --mode online or cached")


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_goes_with_records_that_leave_classes_out(bench: Bench, tail: str) -> None:
    words = "--tail goes with a cache whose records leave classes out"
    bench.refused(*bench.train("--tail", tail), words=(words, "not with --mode labels"))
    online = bench.train("--tail", tail, "--teacher", TEACHER, mode="online")
    bench.refused(*online, words=(words, "not with --mode online"))
    dense = bench.folder / "new.zarr"
    assert bench.command(*bench.precompute("--top-k", "all")).code == 0
    line = bench.cached("--tail", tail, cache=dense)
    bench.refused(*line, words=(words, f"{dense} has all classes, float16"))
    assert not (bench.folder / "run").exists()


def test_draws_have_no_tail_to_spread(bench: Bench) -> None:
    draws = bench.folder / "new.zarr"
    assert bench.command(*bench.precompute("--num-draws", 3)).code == 0
    for tail in ("uniform", "renormalise"):
        words = (f"--tail {tail} goes with top-k records", f"the draws of {draws}", "give none")
        bench.refused(*bench.cached("--tail", tail, cache=draws), words=words)
    assert not (bench.folder / "run").exists()
    assert bench.command(*bench.cached("--tail", "none", cache=draws)).code == 0


def test_the_tail_is_part_of_a_run(bench: Bench) -> None:
    """Without the option: uniform for a new run, and its own for one that is resumed."""
    record = bench.folder / "run" / "run.json"

    def tail() -> object:
        return json.loads(record.read_text())["spec"].get("tail", "bucket")

    assert bench.command(*bench.cached()).code == 0
    assert tail() == "uniform"
    record.unlink()
    words = ("holds a different run (", "tail: none here, uniform there")
    bench.refused(*bench.cached("--tail", "none", "--resume"), words=words)
    shutil.rmtree(record.parent)
    # As runs of before the default was uniform.
    assert bench.command(*bench.cached("--tail", "bucket")).code == 0
    record.unlink()
    assert bench.command(*bench.cached("--resume")).code == 0
    assert tail() == "bucket"


def test_a_teacher_of_other_classes_than_the_students(bench: Bench, photos: Dataset) -> None:
    """The student has the data's classes."""
    line = bench.train("--teacher", TWO_CLASSES, mode="online")
    bench.refused(*line, words=(f"{TWO_CLASSES} has 2 classes, the data has 10",))
    line = bench.cached("--val", bench.data, "--teacher", TWO_CLASSES)
    bench.refused(*line, words=(f"{TWO_CLASSES} has 2 classes, the data has 10",))


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture
def begun(bench: Bench) -> list[object]:
    """The command of a run that was begun, has three checkpoints, and is not finished."""
    line = bench.train(
        "--epochs", 2, "--checkpoint-every", 2, "--max-checkpoints", 9, "--log-every", 1
    )
    assert bench.command(*line).code == 0
    run = bench.folder / "run"
    again = bench.train("--out", bench.folder / "other", *line[-8:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kdcache.training.run_folder.RunFolder.finish", lambda self, record, _: record
        )
        assert bench.command(*again).code == 0
    shutil.rmtree(run)
    (bench.folder / "other").rename(run)
    assert len(list((run / "checkpoints").iterdir())) == 3
    return line


def test_a_run_folder_without_resume(bench: Bench, begun: list[object]) -> None:
    before = files(bench.folder)
    words = "run exists; choose another --out, or remove it, or give --resume to resume the run"
    bench.refused(*begun, words=words)
    assert files(bench.folder) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lr", 1], "lr: 1 here, 0.003 there"),
        (["--epochs", 3], "epochs: 3 here, 2 there"),
        (["--batch-size", 50], "batch_size: 50 here, 98 there"),
        (["--optimizer", "sgd"], "optimizer: sgd here, adamw there"),
        (["--seed", 1], "seed: 1 here, 0 there; initial_weights: "),
        (["--view-seed", 1], "seed: 1 here, 0 there"),
        (["--mixup", 0], "mixup: 0 here, 1 there"),
        (["--ema", 0.5], "ema_decay: 0.5 here, 0 there"),
        (["--precision", "bfloat16"], "precision: bfloat16 here, float32 there"),
        (["--deterministic"], "deterministic: True here, False there"),
        (["--student", "python:tests.test_bad_input:wide_student"], "student: python:tests.test_b"),
        (["--data", "OTHER"], "data: "),
    ],
)
def test_a_run_is_not_gone_on_with_by_another_command(
    bench: Bench, begun: list[object], digits: Dataset, options: list[object], words: str
) -> None:
    before = files(bench.folder)
    given = [digits.path if x == "OTHER" else x for x in options]
    bench.refused(
        *begun,
        *given,
        "--resume",
        words=("holds a different run (", words, "give the options that"),
    )
    assert files(bench.folder) == before


def test_nor_with_another_mode_teacher_cache_or_recipe(bench: Bench, begun: list[object]) -> None:
    online = [*begun, "--mode", "online", "--teacher", TEACHER, "--resume"]
    words = ("mode: online here, labels there", "teacher: ", " here, None there")
    bench.refused(*online, words=words)
    cached = [*begun, "--mode", "cached", "--cache", bench.cache, "--resume"]
    words = ("mode: cached here, labels there", "views: 2 here, None there", "cache: ")
    result = bench.command(*cached)
    assert result.code == 2
    assert all(word in result.err for word in words), result.err
    recipe = [*begun, "--recipe", "fashion-mnist", "--size", 8, "--mixup", 1, "--resume"]
    bench.refused(*recipe, words=("holds a different run (", "lr: 0.01 here, 0.003 there"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty", "a directory"])
def test_a_checkpoint_that_cannot_be_read(bench: Bench, begun: list[object], damage: str) -> None:
    newest = bench.folder / "run" / "checkpoints" / "0000000006.safetensors"
    whole = newest.read_bytes()
    newest.unlink()
    if damage == "a directory":
        newest.mkdir()
    else:
        newest.write_bytes(
            {
                "truncated": whole[:-100],
                "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
                "foreign": safetensors.torch.save({"x": torch.zeros(1)}),
                "empty": b"",
            }[damage]
        )
    words = (str(newest), "resumes from the checkpoint before")
    bench.refused(*begun, "--resume", words=words)
    newest.rmdir() if damage == "a directory" else newest.unlink()
    result = bench.command(*begun, "--resume")
    assert (result.code, result.err) == (0, "kdcache: resumes after step 4 of 6\n")


def test_a_run_whose_spec_is_damaged(bench: Bench, begun: list[object]) -> None:
    spec = bench.folder / "run" / "spec.json"
    spec.write_text(spec.read_text()[:-9])
    bench.refused(*begun, "--resume", words=("spec.json is damaged: ", "; choose another --out"))
    spec.unlink()
    bench.refused(*begun, "--resume", words="run holds no run to resume (no spec.json): choose")


def test_a_loss_that_is_nan(bench: Bench) -> None:
    line = bench.train("--lr", 1000, "--optimizer", "sgd", "--epochs", 9, "--warmup", 0)
    line += ["--student", "python:tests.test_bad_input:exploding_student"]
    message = bench.refused(*line, words="the loss is not finite at step 4: lower --lr or raise")
    assert "is saved" not in message
    assert not (bench.folder / "run").exists()
    words = ("not finite at step 4: lower --lr", "; the checkpoint of step 3 is saved")
    bench.refused(*line, "--checkpoint-every", 1, words=words)
    kept = [f.name for f in (bench.folder / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == ["0000000002.safetensors", "0000000003.safetensors"]


def exploding_student(num_classes: int) -> nn.Module:
    """Its fourth batch is too much for it."""

    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, num_classes)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.layer(x.flatten(1))
            if not self.training:
                return logits
            self.calls += 1
            return logits * torch.where(self.calls == 4, torch.nan, 1.0)

    return Exploding()


def wide_student(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def test_a_cache_with_fewer_views_than_epochs_says_that_it_wraps(bench: Bench) -> None:
    result = bench.command(*bench.cached("--epochs", 3))
    assert result.code == 0
    said = f"{bench.cache} has 2 views for 3 epochs: epoch e trains on view e mod 2"
    assert result.err == f"kdcache: {said}\n"
    shutil.rmtree(bench.folder / "run")
    assert bench.command(*bench.cached("--epochs", 2)).err == ""


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("fixed-center", ("fixed-center", "t.zarr")),
        ("independent-random", ("independent-random", "t.zarr")),
        ("consistent-random", ("consistent-random", "t.zarr")),
    ],
)
def test_a_set_up_that_the_cache_was_not_made_for(
    bench: Bench, setting: str, words: tuple[str, ...]
) -> None:
    bench.refused(*bench.cached("--setting", setting), words=words)
    assert not (bench.folder / "run").exists()


def test_a_run_folder_that_exists(bench: Bench) -> None:
    (bench.folder / "run").mkdir()
    (bench.folder / "run" / "thesis").write_text("mine")
    bench.refused(*bench.train(), words="run exists; choose another --out, or remove it")
    assert files(bench.folder / "run") == {"thesis"}


def test_a_run_folder_that_cannot_be_made(bench: Bench) -> None:
    (bench.folder / "file").touch()
    line = bench.train("--out", bench.folder / "file" / "run")
    bench.refused(*line, words=("cannot write", "Not a directory"))


# --- caches -----------------------------------------------------------------------------------


def test_a_cache_that_is_not_there_or_something_else(bench: Bench) -> None:
    no, file = bench.folder / "no.zarr", bench.folder / "file"
    file.write_text("x")
    bench.refused(*bench.cached(cache=no), words=("no cache at", "kdcache precompute"))
    for command in ("inspect", "verify"):
        bench.refused(command, no, words="no cache at")
        bench.refused(command, file, words="exists and is not a cache")
    for line in (bench.cached(cache=file), ["inspect", file], ["inspect", bench.data]):
        bench.refused(*line, words="is not a cache; a cache is the folder that `kdcache precompute")
    bench.refused(*bench.precompute(out="file"), words="is not a cache; choose another path")
    bench.refused(*bench.precompute("--out", bench.folder), words="exists and is not a cache")
    bench.refused("inspect", bench.folder, words="exists and is not a cache")
    assert file.read_text() == "x"


def test_a_cache_of_other_data(bench: Bench, digits: Dataset, photos: Dataset) -> None:
    line = bench.cached("--data", digits.path)
    bench.refused(*line, words=("was made from other data", "precompute a cache for this"))
    line = bench.cached("--data", photos.path)
    bench.refused(*line, words="t.zarr has 10 classes")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--view-seed", 1], "seed: 1 here, 0 there"),
        (["--crop", "center"], "crop: center here, inception there"),
        (["--min-scale", 0.5], "min_scale: 0.5 here, 0.05 there"),
        (["--no-flip"], "flip: False here, True there"),
        (["--mixup", 0], "mixup: 0 here, 1 there"),
        (["--views", 3], "has 2 views, not 3: leave --views out"),
        (["--temperature", 0.5], "temperature must be at least 1 for top-k targets, not 0.5"),
    ],
)
def test_a_cache_of_other_views(bench: Bench, options: list[object], words: str) -> None:
    bench.refused(*bench.cached(*options), words=words)
    assert not (bench.folder / "run").exists()


def test_view_options_that_agree_with_the_cache_are_fine(bench: Bench) -> None:
    line = bench.cached("--size", 8, "--mixup", 1, "--view-seed", 0, "--views", 2)
    assert bench.command(*line).code == 0


def test_precompute_onto_another_cache(bench: Bench) -> None:
    line = bench.precompute("--views", 3, "--top-k", 1, "--view-seed", 4, out="t.zarr")
    words = ("is a different cache", "seed: 4 here, 0 there")
    bench.refused(*line, words=words)


def test_an_incomplete_cache(bench: Bench) -> None:
    (bench.cache / "classes/c/1/0/0").unlink()
    words = ("lacks 1 of 2 shards", "view 1 shard 0", "run the same `kdcache precompute` again")
    bench.refused(*bench.cached(), words=words)


def test_a_damaged_cache(bench: Bench) -> None:
    shard = bench.cache / "logits/c/0/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    for line in (bench.cached(), ["inspect", bench.cache]):
        words = (
            "view 0 shard 0 (positions 0 to 296) is damaged",
            "kdcache verify --delete-damaged",
        )
        bench.refused(*line, words=words)


def _manifest(bench: Bench, change: Callable[[dict[str, object]], object]) -> None:
    file = bench.cache / "zarr.json"
    value = json.loads(file.read_text())
    change(value["attributes"]["kdcache"])
    file.write_text(json.dumps(value))


@pytest.mark.parametrize("part", ["spec", "digest", "metadata"])
def test_a_damaged_manifest(bench: Bench, part: str) -> None:
    _manifest(bench, lambda manifest: manifest.pop(part))
    for line in (bench.cached(), ["inspect", bench.cache]):
        bench.refused(*line, words=("the manifest of", "is damaged", "recreate the cache"))


def test_a_manifest_with_another_teachers_name(bench: Bench) -> None:
    _manifest(bench, lambda manifest: manifest.update(metadata={"teacher": "somebody else"}))
    words = "its digest is not that of its contents"
    bench.refused("inspect", bench.cache, words=words)
    bench.refused(*bench.cached(), words=words)


def test_a_manifest_that_is_no_json(bench: Bench) -> None:
    (bench.cache / "zarr.json").write_text("{")
    for line in (bench.cached(), ["inspect", bench.cache], bench.precompute(out="t.zarr")):
        bench.refused(*line, words="is not a cache")


def test_a_cache_without_data_of_its_own(bench: Bench) -> None:
    other = bench.folder / "other.zarr"
    synthetic_cache(other, torch.zeros(1, 297, 10), top_k=10)
    bench.refused(*bench.cached(cache=other), words="was made from other data")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("odd")])
def test_a_full_disk_while_recording(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    real = create_file

    def full(path: Path, data: bytes) -> bool:
        if "logits" in path.parts and path.name != "zarr.json":
            raise error
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("kdcache.files.create_file", full)
        bench.refused(
            *bench.precompute(),
            words=(
                "view 0 shard 0: cannot write",
                "fix the storage and run the same command again",
            ),
        )
    assert bench.command(*bench.precompute()).code == 0
    assert LogitCache.open(bench.folder / "new.zarr").missing() == []


def test_a_cache_where_none_can_be_made(bench: Bench) -> None:
    (bench.folder / "file").touch()
    bench.refused(*bench.precompute(out="file/t.zarr"), words=("cannot write", "File exists"))


def test_a_demo_does_not_empty_a_folder_that_is_not_its_own(bench: Bench) -> None:
    before = files(bench.folder)
    line = ("demo", "--out", bench.folder)
    bench.refused(*line, words="exists and no demo made it: choose another --out")
    bench.refused("demo", "--out", bench.data, words="d.beton")
    assert files(bench.folder) == before
