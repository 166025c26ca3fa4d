"""torchvision's and timm's models, with and without their weights; no test needs the network."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from kdcache.errors import UsageError
from kdcache.models import load
from kdcache.models.pretrained import from_torchvision, natural_size_px
from kdcache.models.weights import load_initial_weights


def views(size_px: int, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, size_px, size_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def give_weights(monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]) -> None:
    """What a download would have given."""

    def get_state_dict(weights: object, *, check_hash: bool, weights_only: bool) -> Any:
        assert check_hash
        assert weights_only
        return OrderedDict(state)

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return network


# --- torchvision -----------------------------------------------------------------------------


def test_a_torchvision_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("resnet18").eval()
    give_weights(monkeypatch, network.state_dict())
    teacher = load.load_model("torchvision:resnet18", "teacher", num_classes=None, size_px=32)
    assert teacher.num_classes == 1000
    assert not teacher.training
    mean = torch.tensor(load.IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(load.IMAGENET_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(teacher(views(32)), network((views(32) / 255 - mean) / std))


def test_torchvision_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    give_weights(monkeypatch, {})
    with pytest.raises(UsageError, match="the weights of torchvision:resnet18 cannot be had: Err"):
        load.load_model("torchvision:resnet18", "teacher", num_classes=None, size_px=32)


@pytest.mark.parametrize("name", ["torchvision:resnet152", "timm:resnet10t"])
def test_the_classes_of_a_teacher_are_checked_before_its_weights_are_fetched(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fetch(*args: Any, **options: Any) -> Any:
        raise AssertionError("fetched")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fetch)
    if name.startswith("timm:"):
        timm = pytest.importorskip("timm")
        monkeypatch.setattr(timm, "create_model", fetch)
    with pytest.raises(UsageError, match=f"{name} has 1000 classes, the data has 10$"):
        load.load_model(name, "teacher", num_classes=10, size_px=32)


@pytest.mark.parametrize(("name", "size_px"), [("googlenet", 32), ("inception_v3", 80)])
def test_networks_with_auxiliary_heads_train_without_them(
    monkeypatch: pytest.MonkeyPatch, name: str, size_px: int
) -> None:
    student = load.load_model(f"torchvision:{name}", "student", num_classes=7, size_px=size_px)
    assert student.training
    assert student(views(size_px, 4)).shape == (4, 7)
    # torchvision's way to these weights normalises a second time, within the network.
    network: Any = build(name, transform_input=True, init_weights=False)
    give_weights(monkeypatch, network.state_dict())
    teacher = load.load_model(f"torchvision:{name}", "teacher", num_classes=None, size_px=size_px)
    mean = torch.tensor(load.IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(load.IMAGENET_STD).view(1, 3, 1, 1)
    expected = network._transform_input((views(size_px) / 255 - mean) / std)
    found = (views(size_px) / 255 - teacher.mean) / teacher.std
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert load_initial_weights(student, "pretrained") == ["fc.weight", "fc.bias"]
    assert torch.equal(student.mean, teacher.mean)
    torch.testing.assert_close(
        student.eval().features(views(size_px))[0], teacher.features(views(size_px))[0]
    )


def test_the_densenets_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build("densenet121")
    old = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2"): value
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    give_weights(monkeypatch, old)
    teacher = load.load_model("torchvision:densenet121", "teacher", num_classes=None, size_px=32)
    found = teacher.network.state_dict()
    assert all(torch.equal(found[key], value) for key, value in network.state_dict().items())
    student = load.load_model("torchvision:densenet121", "student", num_classes=7, size_px=32)
    assert load_initial_weights(student, "pretrained") == ["classifier.weight", "classifier.bias"]


def test_a_models_normalisation_is_that_of_its_weights() -> None:
    model = load.load_model("torchvision:efficientnet_v2_l", "student", num_classes=3, size_px=33)
    torch.testing.assert_close(model.mean.flatten(), torch.full((3,), 0.5))


# --- timm ------------------------------------------------------------------------------------


def test_a_timm_models_normalisation_is_that_of_its_configuration() -> None:
    pytest.importorskip("timm")
    model = load.load_model("timm:test_vit", "student", num_classes=5, size_px=160)
    torch.testing.assert_close(model.mean.flatten(), torch.full((3,), 0.5))
    torch.testing.assert_close(model.std.flatten(), torch.full((3,), 0.5))
    assert model(views(160)).shape == (2, 5)


def give_timm_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model

    def create_model(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
        if pretrained:
            torch.manual_seed(3)
        network: nn.Module = create(name, pretrained=False, **options)
        return network

    monkeypatch.setattr(timm, "create_model", create_model)


def test_a_timm_student_starts_from_timms_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    give_timm_weights(monkeypatch)
    teacher = load.load_model("timm:test_vit", "teacher", num_classes=None, size_px=160)
    assert teacher.num_classes == 1000
    student = load.load_model("timm:test_vit", "student", num_classes=5, size_px=160)
    assert load_initial_weights(student, "pretrained") == ["head.weight", "head.bias"]
    torch.testing.assert_close(
        student.eval().features(views(160))[0], teacher.features(views(160))[0]
    )


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size_px"),
    [
        ("timm:vit_tiny_patch16_224", 224),
        ("timm:test_vit", 160),
        ("timm:resnet10t", None),
        ("timm:no_such_net", None),
        ("timm:resnet18.no_such_weights", None),
        ("torchvision:vit_b_16", 224),
        ("torchvision:vit_h_14", 518),
        ("torchvision:maxvit_t", 224),
        ("torchvision:vit_x", None),
        ("torchvision:resnet18", None),
        ("kdcache:small", None),
        ("python:tests.conftest:linear_teacher", None),
        ("/runs/one", None),
    ],
)
def test_the_size_that_a_model_asks_for(name: str, size_px: int | None) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    assert natural_size_px(name) == size_px


def test_a_network_is_built_for_the_size_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def get_model(name: str, **options: Any) -> nn.Module:
        seen.update(options)
        return nn.Identity()

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    from_torchvision("vit_h_14", "student", 5)
    assert seen == {"weights": None, "num_classes": 5, "image_size": 518}


def test_a_model_takes_the_size_that_it_asks_for() -> None:
    pytest.importorskip("timm")
    for name in ("timm:vit_tiny_patch16_224", "torchvision:vit_b_32"):
        size_px = natural_size_px(name)
        assert size_px == 224
        load.load_model(name, "student", num_classes=3, size_px=size_px)
        with pytest.raises(UsageError, match=r"cannot take views of 32 px: .*; give --size 224$"):
            load.load_model(name, "student", num_classes=3, size_px=32)
