"""A classifier's features, and several classifiers as one teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.batch import dense_target
from kdcache.cache.codecs import Dense
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import NonFinite, UsageError
from kdcache.losses.distillation import distillation_loss
from kdcache.models import load
from kdcache.models.classifier import LEAST_LOG_P, Classifier, Ensemble, teacher_of
from kdcache.teacher.logits import teacher_logits
from kdcache.views.spec import evaluation_view_spec
from tests.conftest import TEACHER

HALF = (0.5, 0.5, 0.5)


def member(seed: int, *, scale: float = 1.0, num_classes: int = 10) -> Classifier:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))
    with torch.no_grad():
        network[1].weight.mul_(scale)
    found = Classifier(network, f"m{seed}", HALF, (0.1 * seed + 0.1,) * 3)
    found.num_classes = num_classes
    return found.eval().requires_grad_(False)


def views(size_px: int = 8, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, size_px, size_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# --- an ensemble -----------------------------------------------------------------------------


def test_an_ensemble_averages_probabilities() -> None:
    members = [member(1), member(2, scale=9), member(3)]
    answers = [m(views()).double().numpy() for m in members]
    e = [np.exp(z - z.max(1, keepdims=True)) for z in answers]
    expected = np.log(np.mean([x / x.sum(1, keepdims=True) for x in e], axis=0))
    found = Ensemble(members)(views())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_an_ensemble_of_one_is_that_one() -> None:
    one = member(1)
    assert teacher_of([one]) is one
    assert isinstance(teacher_of([one, member(2)]), Ensemble)


def test_an_ensemble_says_what_it_is() -> None:
    a, b = member(1), member(2)
    both = Ensemble([a, b])
    assert both.name == "m1 + m2"
    assert both.num_classes == 10
    assert both.device == torch.device("cpu")
    assert len(both.content_hash()) == 16
    assert both.content_hash() == Ensemble([member(1), member(2)]).content_hash()
    prints = {
        a.content_hash(),
        b.content_hash(),
        both.content_hash(),
        Ensemble([b, a]).content_hash(),
    }
    assert len(prints) == 4
    assert both.features(views())[0] is None


def test_the_precision_is_that_of_all_members() -> None:
    both = Ensemble([member(1), member(2)])
    single = both(views())
    other = copy.copy(both)
    other.precision = "bfloat16"
    half = other(views())
    assert both.precision == "float32"
    torch.testing.assert_close(both(views()), single, rtol=0, atol=0)
    for m in (member(1), member(2)):
        assert not torch.equal(m(views()), m.answer(views(), "bfloat16").float())
    expected = [m.answer(views(), "bfloat16").float().softmax(1) for m in (member(1), member(2))]
    torch.testing.assert_close(half.exp(), sum(expected) / 2, rtol=1e-5, atol=1e-6)


def test_a_member_of_no_chance_leaves_the_logits_finite() -> None:
    both = Ensemble([member(1, scale=1e5), member(2, scale=1e5)])
    logits = both(views())
    assert logits.isfinite().all()
    assert logits.min() == LEAST_LOG_P
    Dense().encode(logits)
    loss = distillation_loss(torch.zeros(5, 10), dense_target(logits))
    assert torch.isfinite(loss)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_ensemble_does_not_hide_what_is_not_finite(digits_test: Dataset, bad: float) -> None:
    broken = member(2)
    broken.network[1].bias[3] = bad  # type: ignore[index, union-attr]
    with (
        Loader(digits_test, evaluation_view_spec(8), 4) as loader,
        pytest.raises(NonFinite, match=r"the teacher m1 \+ m2 gave NaN or infinity for sample"),
    ):
        teacher_logits(Ensemble([member(1), broken]), next(loader.batches(0)))  # type: ignore[arg-type]


def test_members_must_have_equally_many_classes() -> None:
    with pytest.raises(UsageError, match="equally many classes: m1 has 10, m2 has 7"):
        teacher_of([member(1), member(2, num_classes=7)])


def test_members_must_have_one_precision() -> None:
    other = member(2)
    other.precision = "float16"
    with pytest.raises(UsageError, match="one precision: m1 has float32, m2 has float16"):
        teacher_of([member(1), other])


def test_teachers_by_name() -> None:
    options: dict[str, Any] = {"num_classes": 10, "size_px": 8, "precision": "bfloat16"}
    one = load.load_teacher([TEACHER], **options)
    assert isinstance(one, Classifier)
    two = load.load_teacher([TEACHER, TEACHER], **options)
    assert two.name == f"{TEACHER} + {TEACHER}"
    assert one.precision == two.precision == "bfloat16"
    assert not two.training
    assert not any(w.requires_grad for w in two.parameters())
    torch.testing.assert_close(two(views()), one(views()).float().log_softmax(1))


def test_teachers_that_cannot_be_averaged() -> None:
    with pytest.raises(UsageError, match="expected the name of at least one teacher"):
        load.load_teacher([], num_classes=10, size_px=8)
    names = ["python:tests.test_models:seven_if_none", "python:tests.test_classifier:four"]
    with pytest.raises(UsageError, match=r"seven_if_none has 7, .*:four has 4$"):
        load.load_teacher(names, num_classes=None, size_px=8)
    with pytest.raises(UsageError, match="seven_if_none has 7 classes, the data has 10"):
        load.load_teacher(names, num_classes=10, size_px=8)


def four(num_classes: int | None) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


# --- features --------------------------------------------------------------------------------


def head(model: Classifier) -> nn.Module:
    return list(model.network.modules())[-1]


@pytest.mark.parametrize(
    ("name", "size_px", "layer", "width"),
    [
        ("kdcache:small", 28, "head", 64),
        ("torchvision:resnet18", 32, "fc", 512),
        ("torchvision:mobilenet_v3_small", 32, "classifier.3", 1024),
        ("torchvision:vit_b_32", 224, "heads.head", 768),
        ("torchvision:squeezenet1_1", 64, "classifier.1", 512),
        ("timm:test_vit", 160, "head", 64),
        ("timm:resnet10t", 32, "fc", 512),
        ("timm:test_convnext", 32, "head.fc", 64),
    ],
)
def test_features_are_what_the_head_gets(name: str, size_px: int, layer: str, width: int) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model = load.load_model(name, "student", num_classes=9, size_px=size_px).eval()
    with torch.inference_mode():
        features, logits = model.features(views(size_px, 2))
        assert features is not None
        assert features.shape == (2, width)
        torch.testing.assert_close(logits, model(views(size_px, 2)), rtol=0, atol=0)
        last = model.network.get_submodule(layer)
        if isinstance(last, nn.Linear):
            torch.testing.assert_close(last(features), logits)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.slow
def test_a_compiled_network_has_features() -> None:
    model = load.load_model("kdcache:small", "student", num_classes=9, size_px=28).eval()
    features, logits = model.features(views(28))
    model.network.compile(backend="eager")
    torch.testing.assert_close(model(views(28)), logits)
    again, _ = model.features(views(28))
    assert again is not None
    assert torch.equal(again, features)


class Places(nn.Module):
    """Logits are the mean over places of a layer's, so features are too."""

    def __init__(self, layer: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.layer = layer  # before the stem: the order of running counts
        self.stem = nn.Conv2d(3, 6, 1)
        self.channels_last = channels_last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.channels_last:
            out: torch.Tensor = self.layer(x.flatten(2).transpose(1, 2)).mean(1)
        else:
            out = self.layer(x).mean((2, 3))
        return out


@pytest.mark.parametrize(
    ("layer", "channels_last"), [(nn.Conv2d(6, 4, 1), False), (nn.Linear(6, 4), True)]
)
def test_features_of_many_places_are_averaged(layer: nn.Module, channels_last: bool) -> None:
    network = Places(layer, channels_last)
    features, logits = Classifier(network, "x", HALF, HALF).features(views())
    assert features is not None
    assert features.shape == (5, 6)
    weight = layer.weight.reshape(4, 6)
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(features @ weight.T + layer.bias, logits)


def _no_layer(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _another_width(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2 * num_classes), nn.MaxPool1d(2))


@pytest.mark.parametrize("build", [_no_layer, _another_width])
def test_a_network_without_such_a_layer_has_no_features(build: Callable[[int], nn.Module]) -> None:
    features, logits = Classifier(build(10), "x", HALF, HALF).features(views())
    assert features is None
    assert len(logits) == 5


def test_the_hooks_go_when_the_network_fails() -> None:
    model = member(1)
    with pytest.raises(RuntimeError):
        model.features(views(9))
    assert not any(m._forward_pre_hooks for m in model.modules())
