"""A student that starts from given weights: what fits, what stays fresh, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision

from kdcache.errors import UsageError
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.models.weights import load_initial_weights, save_weights
from tests.test_models import STUDENT, run_folder, write_run
from tests.test_pretrained import build, give_weights

__all__ = ["run_folder"]
Weights = dict[str, torch.Tensor]


def student(seed: int, num_classes: int = 10) -> Classifier:
    torch.manual_seed(seed)
    return load.load_model(STUDENT, "student", num_classes=num_classes, size_px=8)


def write(path: Path, weights: Weights) -> str:
    safetensors.torch.save_file({key: w.contiguous() for key, w in weights.items()}, path)
    return str(path)


def refusal(model: Classifier, source: str) -> str:
    before = model.content_hash()
    with pytest.raises(UsageError) as caught:
        load_initial_weights(model, source)
    assert "\n" not in str(caught.value)
    assert model.content_hash() == before
    return str(caught.value)


def test_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(student(1), path)
    model = student(2)
    assert load_initial_weights(model, str(path)) == []
    assert model.content_hash() == student(1).content_hash()
    assert model.training
    assert model.name == STUDENT


def test_from_a_finished_run(run_folder: Path) -> None:
    model = student(2)
    assert load_initial_weights(model, str(run_folder)) == []
    assert model.content_hash() == json.loads((run_folder / "run.json").read_text())["weights"]


def _without(weights: Weights) -> None:
    del weights["1.running_mean"]


def _without_a_counter(weights: Weights) -> None:
    del weights["1.num_batches_tracked"]


def _with(weights: Weights) -> None:
    weights["extra"] = torch.zeros(2)


def _reshaped(weights: Weights) -> None:
    weights["0.weight"] = weights["0.weight"].reshape(3, 8, 3, 3)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_without, "expected 1.running_mean of shape [8], found none"),
        (_without_a_counter, "expected 1.num_batches_tracked of shape [], found none"),
        (_with, f"found extra, which {STUDENT} does not have"),
        (_reshaped, "expected 0.weight of shape [8, 3, 3, 3], found [3, 8, 3, 3]"),
    ],
)
def test_weights_that_do_not_fit(change: object, line: str, tmp_path: Path) -> None:
    weights = student(1).network.state_dict()
    assert callable(change)
    change(weights)
    source = write(tmp_path / "w.safetensors", weights)
    assert refusal(student(2), source) == f"{source} does not fit {STUDENT}: {line}"


def test_a_head_of_other_classes_is_refused_in_a_file_and_a_run(tmp_path: Path) -> None:
    write_run(tmp_path / "run", student(1, num_classes=7))
    for source in (tmp_path / "run", tmp_path / "run" / "student.safetensors"):
        message = refusal(student(2), str(source))
        assert message.endswith("expected 5.weight of shape [10, 512], found [7, 512]")
        assert "student.safetensors does not fit" in message


def test_what_cannot_be_read(tmp_path: Path) -> None:
    empty = tmp_path / "e.safetensors"
    empty.write_bytes(b"")
    for source in (str(tmp_path / "none"), str(empty), "pretraind"):
        message = refusal(student(2), source)
        assert message.startswith(f"cannot read {source}: ")
        assert "expected a .safetensors file, the folder of a finished run, or 'pretr" in message
    assert "is not a finished run" in refusal(student(2), str(tmp_path))


def test_a_damaged_run(run_folder: Path) -> None:
    save_weights(student(5), run_folder / "student.safetensors")
    assert "is damaged" in refusal(student(2), str(run_folder))


def test_only_libraries_have_pretrained_weights() -> None:
    assert refusal(student(1), "pretrained").startswith(f"{STUDENT} has no pretrained weights: ")


@pytest.mark.parametrize(("num_classes", "fresh"), [(10, ["fc.weight", "fc.bias"]), (1000, [])])
def test_from_torchvisions_weights(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, fresh: list[str]
) -> None:
    weights = build("resnet18").state_dict()
    # As torchvision's oldest files are: they lack what torch did not keep then.
    given = {k: w for k, w in weights.items() if not k.endswith("num_batches_tracked")}
    give_weights(monkeypatch, given)
    model = load.load_model("torchvision:resnet18", "student", num_classes=num_classes, size_px=32)
    before = {key: value.clone() for key, value in model.network.state_dict().items()}
    assert load_initial_weights(model, "pretrained") == fresh
    for key, value in model.network.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else weights[key]), key


def test_pretrained_weights_must_fit_but_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = build("resnet18").state_dict()
    give_weights(monkeypatch, {k: w for k, w in weights.items() if k != "fc.bias"})
    model = load.load_model("torchvision:resnet18", "student", num_classes=10, size_px=32)
    assert refusal(model, "pretrained") == (
        "the pretrained torchvision:resnet18 does not fit torchvision:resnet18: "
        "expected fc.bias of shape [10], found none"
    )
    give_weights(monkeypatch, {**weights, "conv1.weight": torch.zeros(1000, 3, 7, 7)})
    assert "expected conv1.weight of shape [64, 3, 7, 7], f" in refusal(model, "pretrained")


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network\nat all")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    model = load.load_model("torchvision:resnet18", "student", num_classes=10, size_px=32)
    assert refusal(model, "pretrained") == (
        "the weights of torchvision:resnet18 cannot be had: no network"
    )
