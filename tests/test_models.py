"""Models by name: what is built, what is frozen, what is refused, and in which words."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.errors import KDCacheError, MissingDependency, UsageError
from kdcache.models import load
from kdcache.models.classifier import Classifier, Triple
from kdcache.models.pretrained import Role
from kdcache.models.run_json import sealed
from kdcache.models.weights import load_initial_weights, save_weights
from kdcache.views.spec import ViewSpec
from tests.conftest import TEACHER, linear_teacher

STUDENT = "python:tests.conftest:convolutional_student"
HALF: Triple = (0.5, 0.5, 0.5)


def views(size_px: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, size_px, size_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def classifier(network: nn.Module | None = None, mean: Triple = HALF) -> Classifier:
    return Classifier(network or linear_teacher(10), "x", mean, HALF)


# --- what is built ---------------------------------------------------------------------------


@pytest.mark.parametrize("size_px", [28, 32, 64])
@pytest.mark.parametrize("name", ["small", "medium", "large"])
def test_our_own_networks(name: str, size_px: int) -> None:
    model = load.load_model(f"kdcache:{name}", "student", num_classes=7, size_px=size_px)
    assert model(views(size_px)).shape == (2, 7)
    assert model.name == f"kdcache:{name}"
    assert model.training
    assert all(w.requires_grad for w in model.parameters())


def test_our_own_networks_grow_with_their_names() -> None:
    sizes = [
        sum(
            w.numel()
            for w in load.load_model(
                f"kdcache:{name}", "student", num_classes=10, size_px=28
            ).parameters()
        )
        for name in ("small", "medium", "large")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] * 3 < sizes[1]


def test_a_torchvision_student() -> None:
    model = load.load_model("torchvision:resnet18", "student", num_classes=11, size_px=32)
    assert model(views(32)).shape == (2, 11)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor(load.IMAGENET_MEAN))


def test_a_timm_student() -> None:
    pytest.importorskip("timm")
    model = load.load_model("timm:resnet10t", "student", num_classes=9, size_px=32)
    assert model(views(32)).shape == (2, 9)


def test_a_factorys_student_starts_from_torchs_seed() -> None:
    prints = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        prints.append(load.load_model(STUDENT, "student", num_classes=10, size_px=8).content_hash())
    assert prints[0] == prints[1] != prints[2]


def test_a_teacher_is_frozen() -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    assert not teacher.training
    assert not any(w.requires_grad for w in teacher.parameters())


def test_looking_at_a_model_leaves_its_statistics_alone() -> None:
    torch.manual_seed(0)
    model = load.load_model("kdcache:small", "student", num_classes=10, size_px=28)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(int(m.num_batches_tracked) == 0 for m in norms)


def test_views_are_scaled_and_normalised_and_not_changed() -> None:
    model = Classifier(nn.Flatten(), "x", (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(model(images), torch.tensor([[-1.0, 3.0, 0.2]]))
    assert images.flatten().tolist() == [0, 255, 51]


def test_a_factory_may_bring_its_own_normalisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory(tmp_path, monkeypatch, "m.mean = (0.1, 0.2, 0.3)\n    m.std = (1, 1, 1)")
    model = load.load_model("python:mine:build", "teacher", num_classes=10, size_px=8)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(model.std.flatten(), torch.ones(3))


# --- fingerprints ----------------------------------------------------------------------------


def test_equal_weights_have_one_fingerprint() -> None:
    assert classifier().content_hash() == classifier().content_hash()
    assert classifier().eval().requires_grad_(False).content_hash() == classifier().content_hash()
    moved = classifier().to(memory_format=torch.channels_last)
    assert moved.content_hash() == classifier().content_hash()


def _one_weight(model: Classifier) -> None:
    with torch.no_grad():
        model.network[1].weight[3, 5] += 1e-6


def _mean(model: Classifier) -> None:
    model.mean[0, 1] += 0.01


def _std(model: Classifier) -> None:
    model.std[0, 1] += 0.01


def _type(model: Classifier) -> None:
    model.network.double()


def _buffer(model: Classifier) -> None:
    model.network.register_buffer("extra", torch.zeros(1))


@pytest.mark.parametrize("change", [_one_weight, _mean, _std, _type, _buffer])
def test_any_change_changes_the_fingerprint(change: Callable[[Classifier], None]) -> None:
    model = classifier()
    before = model.content_hash()
    change(model)
    assert model.content_hash() != before


# --- a finished run --------------------------------------------------------------------------


def write_run(folder: Path, student: Classifier) -> None:
    """What a finished run leaves, so far as models are concerned."""
    folder.mkdir()
    save_weights(student, folder / load.WEIGHTS_FILE)
    record = {
        "student": student.name,
        "weights": student.content_hash(),
        "num_classes": student.num_classes,
        "version": 2,
        "spec": {"view_spec": ViewSpec(8).to_json()},
    }
    (folder / load.RUN_FILE).write_text(json.dumps(record))


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    torch.manual_seed(4)
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    write_run(tmp_path / "run", student)
    return tmp_path / "run"


def test_a_run_is_a_teacher(run_folder: Path) -> None:
    record = json.loads((run_folder / "run.json").read_text())
    teacher = load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)
    assert teacher.content_hash() == record["weights"]
    assert teacher.name == str(run_folder)
    assert not teacher.training
    assert not any(w.requires_grad for w in teacher.parameters())
    assert load.read_run_json(run_folder) == record


# --- a run from somebody else ------------------------------------------------------------------

EVIL = """
import pathlib

pathlib.Path({trace!r}).touch()
def build(num_classes):
    raise SystemExit(0)
"""


@pytest.mark.parametrize("network", ["python:evil:build", "timm:hf-hub:a/b", "timm:local-dir:x"])
def test_a_run_executes_no_code_because_its_file_names_it(
    run_folder: Path, tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "evil.py").write_text(EVIL.format(trace=str(tmp_path / "trace")))
    record = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**record, "student": network}))
    monkeypatch.chdir(run_folder)
    path, name = list(sys.path), re.escape(f"give {run_folder}@{network}")
    for role in ("teacher", "student"):
        with pytest.raises(UsageError, match=f"which is not run because a file says so: .*{name}"):
            load.load_model(str(run_folder), role, num_classes=10, size_px=8)  # type: ignore[arg-type]
    assert sys.path == path
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    with pytest.raises(UsageError, match=name):
        load_initial_weights(student, str(run_folder))
    assert "evil" not in sys.modules
    assert not (tmp_path / "trace").exists()


def test_the_network_that_the_user_names_has_to_be_the_runs(run_folder: Path) -> None:
    with pytest.raises(UsageError, match=f"is '{STUDENT}', not 'kdcache:small'"):
        load.load_model(f"{run_folder}@kdcache:small", "teacher", num_classes=10, size_px=8)


def test_a_student_of_the_same_factory_is_trusted(run_folder: Path) -> None:
    student = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    assert load_initial_weights(student, str(run_folder)) == []
    assert student.content_hash() == json.loads((run_folder / "run.json").read_text())["weights"]


def leaving(num_classes: int) -> nn.Module:
    raise SystemExit(0)


def test_a_factory_that_exits_is_an_error() -> None:
    words = "python:tests.test_models:leaving failed: SystemExit: 0"
    assert words in load_error("python:tests.test_models:leaving", "student")


def test_a_changed_bit_of_run_json_is_an_error(tmp_path: Path) -> None:
    """Nothing else notices a digit of the size that the images are shown at."""
    record = {
        "student": "kdcache:small",
        "weights": "0",
        "num_classes": 10,
        "version": 3,
        "spec": {"view_spec": ViewSpec(28).to_json()},
        "evaluation": {"kl": float("inf"), "top1": float("nan")},
    }
    path = tmp_path / load.RUN_FILE
    text = json.dumps(sealed(record))
    path.write_text(text)
    assert str(load.read_run_json(tmp_path)) == str(record)
    for old, new in (('"size_px": 28', '"size_px": 29'), ("small", "smell"), ("Infinity", "-1")):
        path.write_text(text.replace(old, new))
        with pytest.raises(UsageError, match=r"damaged: .*its digest is not that of its contents"):
            load.read_run_json(tmp_path)


def test_deep_json_is_damaged_json(tmp_path: Path) -> None:
    (tmp_path / load.RUN_FILE).write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"damaged: .*nested too deep"):
        load.read_run_json(tmp_path)


def _without_weights(folder: Path) -> None:
    (folder / "student.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    file = folder / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def _empty_weights(folder: Path) -> None:
    (folder / "student.safetensors").write_bytes(b"")


def _pickled_weights(folder: Path) -> None:
    """A pickle that would leave a mark if anything ever loaded it."""
    payload = pickle.dumps(_Mark(folder / "pwned"))
    (folder / "student.safetensors").write_bytes(payload)


def _weights_of_another_network(folder: Path) -> None:
    network = classifier(nn.Linear(3, 3))
    save_weights(network, folder / "student.safetensors")


class _Mark:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "damage",
    [
        _without_weights,
        _truncated_weights,
        _empty_weights,
        _pickled_weights,
        _weights_of_another_network,
    ],
)
def test_a_run_with_damaged_weights(run_folder: Path, damage: Callable[[Path], None]) -> None:
    damage(run_folder)
    with pytest.raises(UsageError, match=r"student\.safetensors is damaged: ") as caught:
        load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)
    assert "\n" not in str(caught.value)
    assert not (run_folder / "pwned").exists()


def test_no_pickle_is_read_or_written(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(module, name, refuse)
    load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)


def test_weights_that_are_not_those_of_the_record(run_folder: Path) -> None:
    """Whole, loadable and of the right shapes, but another run's."""
    torch.manual_seed(5)
    other = load.load_model(STUDENT, "student", num_classes=10, size_px=8)
    save_weights(other, run_folder / "student.safetensors")
    with pytest.raises(UsageError, match=r"is damaged: .* not those that run\.json names"):
        load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "7",
        '{"student": "kdcache:small"}',
        "\x00\xff",
        '{"student": "kdcache:small", "classes": 10, "view": 3}',
        '{"student": "kdcache:small", "classes": "ten", "view": {"size_px": 8}}',
        '{"student": 5, "classes": 10, "view": {"size_px": 8}}',
        '{"student": "kdcache:small", "classes": 10, "view": {"size_px": "8"}}',
        '{"student": "kdcache:small", "classes": -1, "view": {"size_px": 8}}',
    ],
)
def test_a_damaged_record(run_folder: Path, text: str) -> None:
    (run_folder / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)


def test_a_run_that_names_itself_as_its_network(run_folder: Path) -> None:
    file = run_folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "student": str(run_folder)}))
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        load.load_model(f"{run_folder}@{STUDENT}", "teacher", num_classes=10, size_px=8)


def test_a_student_that_starts_from_a_run_stands_on_its_own(
    run_folder: Path, tmp_path: Path
) -> None:
    """Its record names the network, not the folder of the run that it came from."""
    student = load.load_model(f"{run_folder}@{STUDENT}", "student", num_classes=10, size_px=8)
    assert student.training
    write_run(tmp_path / "second", student)
    shutil.rmtree(run_folder)
    again = load.load_model(
        f"{tmp_path / 'second'}@{STUDENT}", "teacher", num_classes=10, size_px=8
    )
    assert again.content_hash() == student.content_hash()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a finished run: it has no run\.json"):
        load.load_model(str(tmp_path), "teacher", num_classes=10, size_px=8)


# --- how many classes ------------------------------------------------------------------------


def test_a_teacher_may_have_the_classes_that_it_has(run_folder: Path) -> None:
    for role in ("teacher", "student"):
        model = load.load_model(f"{run_folder}@{STUDENT}", role, num_classes=None, size_px=8)
        assert model.num_classes == 10
    message = load_error("python:tests.test_models:seven_if_none", size_px=8)
    assert message.endswith("seven_if_none has 7 classes, the data has 10")
    name = "python:tests.test_models:seven_if_none"
    assert load.load_model(name, "teacher", num_classes=None, size_px=8).num_classes == 7


def test_a_student_needs_a_number_of_classes() -> None:
    with pytest.raises(UsageError, match="the student kdcache:small needs a number of classes"):
        load.load_model("kdcache:small", "student", num_classes=None, size_px=28)


def test_a_factory_that_has_no_classes_of_its_own() -> None:
    with pytest.raises(UsageError, match=r"linear_teacher failed: .*called with num_classes=None"):
        load.load_model(TEACHER, "teacher", num_classes=None, size_px=8)


# --- what is refused -------------------------------------------------------------------------


def load_error(name: str, role: Role = "student", size_px: int = 32) -> str:
    with pytest.raises(KDCacheError) as caught:
        load.load_model(name, role, num_classes=10, size_px=size_px)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "resnet18", "torchvision:", "timm:", "kdcache:", "python:", "http://x"]
)
def test_an_unknown_form_lists_the_known_ones(name: str) -> None:
    assert load_error(name) == f"unknown model {name!r}: a model is {load.FORMS}"


def test_a_path_is_a_run_that_is_not_there() -> None:
    assert load_error("runs/none") == f"no such folder: runs/none; a model is {load.FORMS}"


def test_unknown_names_of_each_form() -> None:
    assert load_error("kdcache:smal").endswith("small, medium, large; did you mean small?")
    assert load_error("kdcache:huge") == (
        "unknown model 'kdcache:huge': there are small, medium, large"
    )
    for role in ("student", "teacher"):
        assert load_error("torchvision:resnet19", role) == (
            "unknown model 'torchvision:resnet19': see torchvision.models; did you mean resnet18?"
        )
    words = "unknown model 'python:no.such:f': ModuleNotFoundError: No module named 'no'"
    assert words in load_error("python:no.such:f")
    assert "has no attribute 'no'" in load_error("python:tests.conftest:no")
    assert "expected python:package.module:factory" in load_error("python:tests.conftest")


def test_an_unknown_timm_model() -> None:
    pytest.importorskip("timm")
    assert load_error("timm:no_such_net").startswith("timm:no_such_net: ")
    assert load_error("timm:resnet10") == (
        "timm:resnet10: Unknown model (resnet10); did you mean resnet10t?"
    )
    message = load_error("timm:resnet18.a1_in1kk", "teacher")
    assert message.endswith(
        "Invalid pretrained tag (a1_in1kk) for resnet18; did you mean resnet18.a1_in1k?"
    )


def test_without_timm_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"pip install 'kdcache\[timm\]'"):
        load.load_model("timm:resnet10t", "student", num_classes=10, size_px=32)


def test_our_own_networks_cannot_teach_untrained() -> None:
    assert "kdcache:small has no trained weights: train it with" in load_error(
        "kdcache:small", "teacher"
    )


def test_another_class_count() -> None:
    message = load_error("python:tests.test_models:eleven_classes", size_px=8)
    assert message.endswith("eleven_classes has 11 classes, the data has 10")


def test_views_of_another_size_than_the_model_takes() -> None:
    message = load_error(TEACHER, "teacher", size_px=9)
    assert "cannot take views of 9 px: " in message


def test_a_factory_that_gives_something_else() -> None:
    message = load_error("python:tests.test_models:not_a_module")
    assert message.endswith("not_a_module gave a str, not an nn.Module")
    message = load_error("python:tests.test_models:feature_maps", size_px=8)
    assert message.endswith("feature_maps does not give one row of logits for each image")


@pytest.mark.parametrize(
    "name",
    ["torchvision:raft_small", "torchvision:fcn_resnet50", "torchvision:fasterrcnn_resnet50_fpn"],
)
def test_torchvision_models_that_do_not_classify(name: str) -> None:
    assert name in load_error(name)


def test_a_network_that_trains_with_a_tuple() -> None:
    name = "python:tests.test_models:tuple_in_training"
    model = load.load_model(name, "student", num_classes=10, size_px=8)
    assert model.eval()(views(8)).shape == (2, 10)
    with pytest.raises(UsageError, match="gives a tuple when it trains, not one tensor of logits"):
        model.train()(views(8))
    name = "python:tests.test_models:always_a_tuple"
    model = load.load_model(name, "teacher", num_classes=10, size_px=8)
    assert model(views(8)).shape == (2, 10)
    assert model.output_part == "tuple: 0"
    with pytest.raises(
        UsageError, match="gives a tuple, not one tensor of logits: build a student"
    ):
        load.load_model(name, "student", num_classes=10, size_px=8)


@pytest.mark.parametrize("attribute", ["__doc__", "json", "takes_nothing", "fails"])
def test_a_factory_that_cannot_be_called(attribute: str) -> None:
    message = load_error(f"python:tests.test_models:{attribute}")
    assert message.startswith(f"python:tests.test_models:{attribute} ")


def test_a_factorys_normalisation_must_be_triples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory(tmp_path, monkeypatch, "m.mean = 0.5")
    assert "mean and std must be three numbers" in load_error("python:mine:build", size_px=8)


def factory(folder: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    (folder / "mine.py").write_text(
        "from tests.conftest import linear_teacher\n"
        f"def build(num_classes):\n    m = linear_teacher(num_classes)\n    {line}\n    return m\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def seven_if_none(num_classes: int | None) -> nn.Module:
    return linear_teacher(7)


def eleven_classes(num_classes: int) -> nn.Module:
    return linear_teacher(num_classes + 1)


def not_a_module(num_classes: int) -> str:
    return str(num_classes)


def feature_maps(num_classes: int) -> nn.Module:
    return nn.Conv2d(3, num_classes, 3)


class Tuple(nn.Module):
    def __init__(self, always: bool) -> None:
        super().__init__()
        self.linear = linear_teacher(10)
        self.always = always

    def forward(self, x: torch.Tensor) -> object:
        z = self.linear(x)
        return (z, z) if self.training or self.always else z


def tuple_in_training(num_classes: int) -> nn.Module:
    return Tuple(always=False)


def always_a_tuple(num_classes: int) -> nn.Module:
    return Tuple(always=True)


def takes_nothing() -> nn.Module:
    return linear_teacher(10)


def fails(num_classes: int) -> nn.Module:
    raise RuntimeError(f"no weights for {num_classes} classes\nand a second line")
