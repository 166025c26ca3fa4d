"""Teachers as people have them: other class orders, other outputs, odd numbers."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.cache.cache import LogitCache
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.sources import Source
from kdcache.errors import ClassesMismatch, NonFinite, UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load, pretrained
from kdcache.models.class_names import ClassNames, match_classes
from kdcache.models.classifier import Classifier
from kdcache.teacher.check import check_teacher
from kdcache.teacher.logits import LOGIT_RANGE, teacher_logits
from kdcache.teacher.recompute import LARGEST_ALLOWANCE, TYPICAL_ALLOWANCE, _allowances
from kdcache.views.spec import evaluation_view_spec
from tests.conftest import Result, linear_teacher

HALF = (0.5, 0.5, 0.5)
TWELVE = tuple(str(i) for i in range(12))
SORTED = tuple(sorted(TWELVE))
LEVELS = 21  # grey levels from one class to the next


# --- images whose class a fixed network tells ---------------------------------------------------


class Grey(nn.Module):
    """The class of a grey image, of 12, by its mean; `order[c]` is the row of class c."""

    mean = std = HALF

    def __init__(self, order: Sequence[int] = range(12)) -> None:
        super().__init__()
        self.register_buffer("centres", torch.tensor([LEVELS * i / 127.5 - 1 for i in order]))
        self.scale = nn.Parameter(torch.tensor(100.0))

    def forward(self, x: torch.Tensor) -> Any:
        return -self.scale * (x.mean((1, 2, 3))[:, None] - self.centres).square()


def grey_teacher(num_classes: int | None) -> nn.Module:
    """Its rows are 0, 1, 2, ..., 11."""
    return Grey()


def grey(path: Path, names: Sequence[str], copies: int = 6) -> Dataset:
    """Images of these classes, which are numbers; the folders' order is the labels'."""
    images = [np.full((8, 8), LEVELS * int(n), np.uint8) for n in names for _ in range(copies)]
    labels = [label for label in range(len(names)) for _ in range(copies)]
    return convert(Source(tuple(names), images, labels), path)[0]


@pytest.fixture(scope="module")
def by_text(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Folders 0 to 11, sorted as text: 0, 1, 10, 11, 2, ..."""
    return grey(tmp_path_factory.mktemp("data") / "d.beton", SORTED)


def load_grey(data: Dataset, names: Sequence[str] = (), **options: Any) -> Classifier:
    model = load.load_teacher(
        "python:tests.test_teachers:grey_teacher",
        num_classes=len(data.class_names),
        size_px=8,
        class_names=data.class_names,
        teacher_class_names=names,
        **options,
    )
    assert isinstance(model, Classifier)
    return model


# --- the order of classes ------------------------------------------------------------------------


def test_a_teacher_whose_names_are_given_is_right_in_any_order(by_text: Dataset) -> None:
    assert evaluate(load_grey(by_text, TWELVE), by_text, size_px=8).top1 == 1
    assert evaluate(load_grey(by_text), by_text, size_px=8).top1 == pytest.approx(2 / 12)


def test_a_teacher_of_more_classes_is_restricted(tmp_path: Path) -> None:
    data = grey(tmp_path / "d.beton", ("11", "3", "7"))
    model = load_grey(data, TWELVE)
    assert (model.num_classes, model.num_outputs) == (3, 12)
    assert evaluate(model, data, size_px=8).top1 == 1
    whole = load_grey(grey(tmp_path / "e.beton", TWELVE), TWELVE)
    assert whole.class_ids_C is None
    assert model.content_hash() != whole.content_hash()


def test_a_class_that_the_teacher_lacks_is_named(tmp_path: Path) -> None:
    data = grey(tmp_path / "d.beton", ("3", "12"))
    with pytest.raises(ClassesMismatch, match=r"it has no '12', but '0', '1', '2' and 9 more"):
        load_grey(data, TWELVE)


def test_names_match_whatever_their_case_and_spaces() -> None:
    known = ClassNames((("n1", "Great white  shark"), ("n2", "tench")), own=False)
    assert match_classes("t", known, "d", ["tench", "great_white_shark"]) == (1, 0)
    assert match_classes("t", known, "d", ["n2", "n1"]) == (1, 0)
    assert match_classes("t", known, "d", ["cat", "dog"]) is None
    with pytest.raises(ClassesMismatch, match="has no 'cat', but 'n1', 'n2'"):
        match_classes("t", known, "d", ["tench", "cat"])
    with pytest.raises(ClassesMismatch, match="classes 'n2', 'tench' of d are one class of t"):
        match_classes("t", known, "d", ["n2", "tench"])


def test_a_name_of_two_classes_is_refused() -> None:
    known = ClassNames((("crane",), ("crane",), ("dog",)), own=False)
    with pytest.raises(ClassesMismatch, match="2 classes of t are called 'crane': number 0 and 1"):
        match_classes("t", known, "d", ["dog", "crane"])


def test_a_run_without_a_common_class_is_refused() -> None:
    known = ClassNames.of(("a", "b"))
    with pytest.raises(ClassesMismatch, match="has no 'x', 'y', but 'a', 'b'"):
        match_classes("t", known, "d", ["x", "y"])


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18.a1_in1k"])
def test_imagenet_classes_are_known_by_word_and_number(name: str) -> None:
    pytest.importorskip("timm")
    known = pretrained.class_names(name)
    assert known is not None
    assert len(known) == 1000
    assert match_classes(name, known, "d", ["goldfish", "tench"]) == (1, 0)
    assert match_classes(name, known, "d", ["n01443537", "n01440764"]) == (1, 0)


@pytest.mark.parametrize(
    "name", ["torchvision:nothing", "timm:nothing", "kdcache:small", "python:a:b", "torchvision:"]
)
def test_classes_of_other_models_are_not_known(name: str) -> None:
    assert pretrained.class_names(name) is None
    assert pretrained.pretrained_size_px(name) is None


def test_the_size_of_pretrained_weights_is_their_configurations() -> None:
    assert pretrained.pretrained_size_px("torchvision:resnet18") == 224
    pytest.importorskip("timm")
    assert pretrained.pretrained_size_px("timm:efficientnet_b3.ra2_in1k") == 288


# --- from the command line -----------------------------------------------------------------------

Run = Callable[..., Result]
GREY = "python:tests.test_teachers:grey_teacher"


def test_precompute_finds_the_classes_by_name(
    kdcache: Run, by_text: Dataset, tmp_path: Path
) -> None:
    names, out = tmp_path / "names.txt", tmp_path / "t.zarr"
    names.write_text("\n".join(TWELVE) + "\n")
    line = ("--data", by_text.path, "--teacher", GREY)
    result = kdcache("precompute", *line, "--class-names", names, "--out", out, "--mixup", 0)
    assert result.code == 0, result.err
    assert "12 of the 12 classes" in result.err
    cache = LogitCache.open(out)
    with Loader(by_text, cache.spec.view_spec, 32) as loader:  # type: ignore[arg-type]
        labels = torch.cat([x.labels_B for x in loader.batches(0)])
    assert torch.equal(cache.target(0, np.arange(len(by_text))).top_class(), labels)
    verify = ("verify", out, *line, "--class-names", names, "--json")
    assert json.loads(kdcache(*verify).out)["ok"]
    assert kdcache(*verify[:-3], "--json").code == 1  # another teacher


def test_a_teacher_in_another_order_is_warned_of(
    kdcache: Run, by_text: Dataset, tmp_path: Path
) -> None:
    line = ("--data", by_text.path, "--teacher", GREY)
    training = ("--mode", "online", "--student", "kdcache:small", "--epochs", 1, "--batch-size", 36)
    for command in (
        ("precompute", *line, "--out", tmp_path / "t.zarr"),
        ("plan", *line),
        ("train", *line, *training, "--out", tmp_path / "run"),
    ):
        result = kdcache(*command)
        assert result.code == 0, result.err
        assert "right for 16.7% of 72 images, hardly more than by chance" in result.err


def test_a_run_meets_its_classes_in_another_order(
    kdcache: Run, by_text: Dataset, tmp_path: Path
) -> None:
    """A run of the classes in one order, evaluated on data that have them in another one."""
    there = grey(tmp_path / "d.beton", TWELVE)
    train = ("train", "--mode", "labels", "--student", "kdcache:small", "--batch-size", 72)
    train = (*train, "--epochs", 60, "--lr", 0.02, "--mixup", 0, "--no-flip")
    result = kdcache(*train, "--data", there.path, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    figures = [
        json.loads(kdcache("eval", tmp_path / "run", "--data", x.path, "--json").out)["top1"]
        for x in (there, by_text)
    ]
    assert figures[0] == figures[1] > 0.5  # 0.17 where the order is not heeded


def test_a_file_of_names_that_is_not_there(kdcache: Run, by_text: Dataset, tmp_path: Path) -> None:
    line = ("precompute", "--data", by_text.path, "--teacher", GREY, "--out", tmp_path / "t")
    result = kdcache(*line, "--class-names", tmp_path / "none.txt")
    assert result.code == 2
    assert f"cannot read --class-names {tmp_path / 'none.txt'}: " in result.err


# --- what a teacher gives ------------------------------------------------------------------------


def classifier(network: nn.Module, **attributes: Any) -> Classifier:
    model = Classifier(network, "x", HALF, HALF).eval().requires_grad_(False)
    model.num_classes = model.num_outputs = 10
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


class Gives(nn.Module):
    def __init__(self, wrap: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.linear, self.wrap = linear_teacher(10), wrap

    def forward(self, x: torch.Tensor) -> object:
        return self.wrap(self.linear(x))


def images(count: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)


Output = namedtuple("Output", ["features", "logits"])


@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (lambda z: (z, z + 1), "tuple: 0"),
        (lambda z: (z.sum(), z[:, :4], z), "tuple: 2"),
        (lambda z: {"loss": z.sum(), "logits": z, "other": z + 1}, "dict: logits"),
        (lambda z: Output(z + 1, z), "Output: logits"),
        (lambda z: SimpleNamespace(hidden=z + 1, logits=z), "SimpleNamespace: logits"),
        (lambda z: SimpleNamespace(first=z, hidden=None), "SimpleNamespace: first"),
    ],
)
def test_logits_are_found_in_what_a_network_gives(
    wrap: Callable[[torch.Tensor], object], part: str
) -> None:
    model = classifier(Gives(wrap))
    assert torch.equal(model(images()), classifier(linear_teacher(10))(images()))
    assert model.output_part == part


def test_a_dict_without_logits_is_refused() -> None:
    model = classifier(Gives(lambda z: {"features": z[:, :4]}))
    with pytest.raises(
        UsageError, match="x gives a dict when it answers, not one tensor of logits"
    ):
        model(images())


def test_probabilities_become_logits() -> None:
    logits = classifier(linear_teacher(10))(images())
    model = classifier(Gives(lambda z: z.softmax(1)), output="probabilities")
    torch.testing.assert_close(model(images()).softmax(1), logits.softmax(1))
    zeros = classifier(Gives(lambda z: torch.eye(10)[:4]), output="probabilities")
    assert zeros(images()).isfinite().all()
    assert model.content_hash() != classifier(Gives(lambda z: z)).content_hash()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_in_another_type_is_fed_in_it(dtype: torch.dtype) -> None:
    logits = classifier(linear_teacher(10).to(dtype))(images())
    assert logits.dtype == dtype
    expected = classifier(linear_teacher(10))(images())
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.3)


def batch_of(data: Dataset, count: int = 4) -> Any:
    with Loader(data, evaluation_view_spec(8), count) as loader:
        return next(iter(loader))


@pytest.mark.parametrize(
    "wrap",
    [lambda z: z[:-1], lambda z: z[:, :7], lambda z: z[:, :, None]],
    ids=["rows", "classes", "axes"],
)
def test_other_shapes_in_mid_run_are_one_line(
    wrap: Callable[[torch.Tensor], torch.Tensor], digits: Dataset
) -> None:
    with pytest.raises(
        UsageError, match=r"x gave logits of shape .* for view 0: expected \[4, 10\]"
    ):
        teacher_logits(classifier(Gives(wrap)), batch_of(digits))


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_masked_classes_are_taken_as_far_below(value: float, digits: Dataset) -> None:
    def mask(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([z[:, :8], torch.full_like(z[:, 8:], value)], 1)

    batch = batch_of(digits)
    logits = teacher_logits(classifier(Gives(mask)), batch)
    plain = teacher_logits(classifier(linear_teacher(10)), batch)
    assert torch.equal(logits[:, :8], plain[:, :8])
    expected = logits.amax(1, keepdim=True).expand(-1, 2) - LOGIT_RANGE
    assert torch.equal(logits[:, 8:], expected)


def test_infinity_is_still_refused(digits: Dataset) -> None:
    with pytest.raises(NonFinite, match="the teacher x gave NaN or infinity"):
        teacher_logits(
            classifier(Gives(lambda z: z.masked_fill(z < 0, -torch.inf))), batch_of(digits)
        )


def test_no_scale_of_logits_lets_a_wrong_answer_pass() -> None:
    lives = [torch.randn(5, 10, dtype=torch.float64) * 1e9]
    (allowance,) = _allowances(lives, [torch.full((5,), 1e6, dtype=torch.float64)], 2.0**-8)
    assert allowance.largest_B.max() == LARGEST_ALLOWANCE
    assert allowance.typical_B.max() == TYPICAL_ALLOWANCE


# --- what is said of a teacher -------------------------------------------------------------------


def lines_about(model: Classifier, data: Dataset, size_px: int = 8, **options: Any) -> list[str]:
    return check_teacher(model, ["x"], data, size_px, labeled=options.get("labeled", False))


def test_a_plain_teacher_gets_no_line(digits: Dataset, by_text: Dataset) -> None:
    assert lines_about(classifier(linear_teacher(10)), digits) == []
    assert lines_about(load_grey(by_text, TWELVE), by_text, labeled=True)[1:] == []


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda z: z.softmax(1), "sum to 1, as softmax gives"),
        (lambda z: z.softmax(1).half(), "sum to 1, as softmax gives"),
        (lambda z: z.sigmoid(), "lie in 0 to 1, as sigmoid gives"),
    ],
)
def test_probabilities_are_recognised(
    wrap: Callable[[torch.Tensor], torch.Tensor], words: str, digits: Dataset
) -> None:
    (line,) = lines_about(classifier(Gives(wrap)), digits)
    assert words in line
    assert line.endswith("give --teacher-output probabilities")
    assert lines_about(classifier(Gives(wrap), output="probabilities"), digits) == []


def test_masked_classes_are_told(digits: Dataset) -> None:
    model = classifier(Gives(lambda z: torch.cat([z[:, :9], z[:, 9:] - 1e9], 1)))
    (line,) = lines_about(model, digits)
    assert "some classes of 100% of the images logits more than 1,000 below the largest" in line


def test_small_images_and_an_assumed_normalisation_are_told(digits: Dataset) -> None:
    model = classifier(nn.Sequential(nn.AdaptiveAvgPool2d(8), linear_teacher(10)))
    model.assumed_norm = True
    norm, small = lines_about(model, digits, 16)
    assert norm == ("x has no attributes mean and std: its images are normalised as ImageNet's are")
    assert small == (
        "100% of the images are smaller than the views of 16 px: they are enlarged; the median "
        "has 8 px"
    )


def test_a_constant_answer_is_told(digits: Dataset) -> None:
    constant = classifier(Gives(lambda z: torch.full_like(z, -5)))
    (line,) = lines_about(constant, digits, labeled=True)
    assert "of 256 images, hardly more than by chance" in line


def test_every_teacher_of_several_is_looked_at(
    kdcache: Run, by_text: Dataset, tmp_path: Path
) -> None:
    line = ("precompute", "--data", by_text.path, "--out", tmp_path / "t.zarr")
    result = kdcache(*line, "--teacher", GREY, "--teacher", GREY)
    assert result.code == 0
    assert result.err.count("hardly more than by chance") == 2
