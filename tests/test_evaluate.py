"""Accuracy and fidelity against figures computed by hand on the same pixels."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.data.beton import Dataset
from kdcache.data.sources import open_source
from kdcache.errors import NonFinite, UsageError
from kdcache.evaluation.evaluate import Evaluation, evaluate
from kdcache.evaluation.metrics import Sums
from kdcache.models import load
from kdcache.models.classifier import Classifier, Ensemble
from kdcache.views.order import view_order
from kdcache.views.spec import evaluation_view_spec
from tests.conftest import TEACHER, subset
from tests.test_metrics import calibration_by_loop, gram_cka

HALF = (0.5, 0.5, 0.5)


def network(seed: int, num_classes: int = 10) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes)), "x", HALF, HALF)


def digits_pixels() -> tuple[torch.Tensor, torch.Tensor]:
    """Small images are shown whole, so the pixels are those of the source."""
    source = open_source("digits", "test")
    grey = torch.from_numpy(np.stack([np.asarray(x) for x in source.images]))
    images = grey[:, None].expand(-1, 3, -1, -1) if grey.ndim == 3 else grey.permute(0, 3, 1, 2)
    return images, torch.tensor(source.labels)


def test_figures_are_those_computed_by_hand(digits_test: Dataset) -> None:
    images, labels = digits_pixels()
    model, teacher = network(1), load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    with torch.inference_mode():
        z, t = model(images).double(), teacher(images).double()
    log_q, log_p = torch.log_softmax(z, 1), torch.log_softmax(t, 1)
    found = evaluate(model, digits_test, size_px=8, teacher=teacher, batch_size=64)
    assert found.num_samples == 297
    assert found.top1 == pytest.approx(float((z.argmax(1) == labels).double().mean()))
    rank = (z > z.gather(1, labels[:, None])).sum(1)
    assert found.top5 == pytest.approx(float((rank < 5).double().mean()))
    agreement = float((z.argmax(1) == t.argmax(1)).double().mean())
    assert found.agreement == pytest.approx(agreement)
    cross = -float(log_q.gather(1, labels[:, None]).mean())
    assert found.cross_entropy == pytest.approx(cross, rel=1e-5)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-4)
    among = (z > z.gather(1, t.argmax(1)[:, None])).sum(1) < 5
    assert found.agreement5 == pytest.approx(float(among.double().mean()))
    assert found.euclidean == pytest.approx(float((z - t).norm(dim=1).mean()), rel=1e-5)
    assert found.teacher_top1 == pytest.approx(float((t.argmax(1) == labels).double().mean()))
    assert found.calibration_error == pytest.approx(calibration_by_loop(z.numpy(), labels.numpy()))


def two_layers(seed: int, width: int) -> Classifier:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 10))
    return Classifier(layers, "x", HALF, HALF)


def test_cka_is_that_of_the_gram_matrices(digits_test: Dataset) -> None:
    images, _ = digits_pixels()
    model, teacher = two_layers(1, 8), two_layers(2, 20)
    with torch.inference_mode():
        x, y = (
            m.network[:3](images / 127.5 - 1).double().numpy()  # type: ignore[operator, index]
            for m in (model, teacher)
        )
    found = evaluate(model, digits_test, size_px=8, teacher=teacher)
    assert found.cka == pytest.approx(gram_cka(x, y), rel=1e-5)
    assert found.cka < 0.99


@pytest.mark.parametrize("batch_size", [1, 100, 297, 1000])
def test_the_batch_size_does_not_matter(digits_test: Dataset, batch_size: int) -> None:
    model = network(2)
    a = evaluate(model, digits_test, size_px=8, batch_size=batch_size)
    b = evaluate(model, digits_test, size_px=8)
    assert (a.num_samples, a.top1, a.top5) == (b.num_samples, b.top1, b.top5)
    assert a.cross_entropy == pytest.approx(b.cross_entropy, rel=1e-5)


def test_a_model_agrees_with_itself(digits_test: Dataset) -> None:
    teacher = load.load_model(TEACHER, "teacher", num_classes=10, size_px=8)
    found = evaluate(teacher, digits_test, size_px=8, teacher=teacher)
    assert found.agreement == found.agreement5 == 1
    assert found.kl == 0
    assert found.euclidean == 0
    assert found.cka == pytest.approx(1)
    assert found.teacher_top1 == found.top1


def test_an_ensemble_teaches_without_features(digits_test: Dataset) -> None:
    members = [two_layers(1, 8), two_layers(1, 8)]
    found = evaluate(members[0], digits_test, size_px=8, teacher=Ensemble(members))
    assert found.agreement == 1
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.cka is None
    assert found.euclidean is not None
    assert found.euclidean > 0.1  # its logits are logarithms of probabilities


def test_features_too_wide_are_not_compared(
    digits_test: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.evaluation.evaluate.WIDEST_FEATURES", 19)
    model, narrow, wide = two_layers(1, 8), two_layers(2, 19), two_layers(2, 20)
    assert evaluate(model, digits_test, size_px=8, teacher=narrow).cka is not None
    assert evaluate(model, digits_test, size_px=8, teacher=wide).cka is None
    assert evaluate(wide, digits_test, size_px=8, teacher=model).cka is None


# --- several processes -----------------------------------------------------------------------


def in_parts(n: int, *args: Any, **options: Any) -> list[Evaluation]:
    """What each of n processes finds: first all sums are gathered, then all get their sum."""
    gathered: list[Sums] = []

    class Gathered(Exception):
        pass

    def gather(sums: Sums) -> Sums:
        gathered.append(sums)
        raise Gathered

    for i in range(n):
        with pytest.raises(Gathered):
            evaluate(*args, **options, part=(i, n), reduce=gather)
    assert len({tuple((k, x.shape, x.dtype) for k, x in sums.items()) for sums in gathered}) == 1
    total = {name: sum((g[name] for g in gathered), torch.zeros(())) for name in gathered[0]}
    return [evaluate(*args, **options, part=(i, n), reduce=lambda _: dict(total)) for i in range(n)]


def approximately(found: Evaluation, expected: Evaluation) -> None:
    for name, value in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("n", [2, 3])
def test_parts_are_the_whole(digits_test: Dataset, n: int) -> None:
    model, teacher = two_layers(1, 8), two_layers(2, 20)
    options: dict[str, Any] = {"size_px": 8, "teacher": teacher, "batch_size": 41}
    whole = evaluate(model, digits_test, **options)
    assert all(getattr(whole, field.name) is not None for field in fields(whole))
    for found in in_parts(n, model, digits_test, **options):
        approximately(found, whole)


def test_more_processes_than_samples(digits: Dataset, tmp_path: Path) -> None:
    data = subset(digits, 3, tmp_path / "three.beton")
    options: dict[str, Any] = {"size_px": 8, "teacher": two_layers(2, 20)}
    whole = evaluate(two_layers(1, 8), data, **options)
    assert whole.num_samples == 3
    for found in in_parts(5, two_layers(1, 8), data, **options):
        approximately(found, whole)


def test_a_part_counts_its_own_progress(digits_test: Dataset) -> None:
    seen: list[int] = []
    evaluate(network(1), digits_test, size_px=8, batch_size=60, part=(1, 3), progress=seen.append)
    assert seen == [60, 99]


@pytest.mark.parametrize("part", [(3, 3), (-1, 2)])
def test_a_part_that_is_none(digits_test: Dataset, part: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=rf"part must be from 1/{part[1]} to"):
        evaluate(network(1), digits_test, size_px=8, part=part)


def test_sums_may_be_changed_in_place(digits_test: Dataset) -> None:
    """As collective operations do."""

    def double(sums: Sums) -> Sums:
        for total in sums.values():
            total.mul_(2)
        return sums

    once = evaluate(network(1), digits_test, size_px=8)
    twice = evaluate(network(1), digits_test, size_px=8, reduce=double)
    assert twice.top1 == pytest.approx(2 * once.top1)


# --- what is not finite ----------------------------------------------------------------------


class Spoilt(nn.Module):
    """A linear network that answers some images, known by their pixels, with this value."""

    def __init__(self, images: torch.Tensor, value: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        self.register_buffer("bad", images.flatten(1) / 127.5 - 1)
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bad = torch.cdist(x.flatten(1), self.bad).amin(1) < 1e-2  # type: ignore[arg-type]
        logits = self.inner(x)
        return torch.where(bad[:, None] & (torch.arange(10) == 3), self.value, logits)


def spoilt(positions: list[int], value: float) -> tuple[Classifier, int]:
    """A model that fails at these positions of the plain view, and the first one's sample."""
    samples = view_order(evaluation_view_spec(8), 0, 297)[positions]
    network = Spoilt(digits_pixels()[0][samples.copy()], value)
    return Classifier(network, "bad", HALF, HALF), int(samples[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch_size", [10, 297])
def test_the_first_sample_that_is_not_finite_is_named(
    digits_test: Dataset, value: float, batch_size: int
) -> None:
    bad, sample = spoilt([123, 200], value)
    who = {"size_px": 8, "batch_size": batch_size}
    with pytest.raises(NonFinite, match=f"the model bad gave .* for sample {sample} at evaluation"):
        evaluate(bad, digits_test, **who)  # type: ignore[arg-type]
    with pytest.raises(NonFinite, match=f"the teacher bad gave NaN .* for sample {sample} at"):
        evaluate(network(1), digits_test, teacher=bad, **who)  # type: ignore[arg-type]


def test_every_process_names_it(digits_test: Dataset) -> None:
    bad, sample = spoilt([123, 200], torch.nan)
    gathered: list[Sums] = []

    def gather(sums: Sums) -> Sums:
        gathered.append(sums)
        return {name: sum((g[name] for g in gathered), torch.zeros(())) for name in gathered[0]}

    for i in (2, 1, 0):  # 200 is of the last part, 123 of the one before
        with pytest.raises(NonFinite, match="for sample") as caught:
            evaluate(bad, digits_test, size_px=8, part=(i, 3), reduce=gather)
    assert f"for sample {sample} at" in str(caught.value)


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in waits
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_at_the_end_only(digits_test: Dataset) -> None:
    counts = []
    for batch_size in (20, 297):
        with Waits() as waits:
            evaluate(
                two_layers(1, 8),
                digits_test,
                size_px=8,
                teacher=two_layers(2, 20),
                batch_size=batch_size,
            )
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


# --- what the teacher sees -------------------------------------------------------------------


def test_the_teacher_may_see_another_resolution(photos: Dataset) -> None:
    """Means over halves of an image: the same at any size, and blind to which crop it is not."""
    seen: list[tuple[int, int]] = []

    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((x.shape[2], x.shape[3]))
            return torch.stack(
                [x[:, :, :, : x.shape[3] // 2].mean((1, 2, 3)), x.mean((1, 2, 3))], 1
            )

    def halves() -> Classifier:
        return Classifier(Halves(), "x", HALF, HALF)

    found = evaluate(
        halves(), photos, size_px=96, teacher=halves(), teacher_size_px=48, batch_size=64
    )
    assert seen == [(96, 96), (48, 48)]
    assert found.euclidean == pytest.approx(0, abs=0.02)
    # 48 px alone would be shown whole, which is another box.
    seen.clear()
    alone = evaluate(halves(), photos, size_px=48, batch_size=64)
    assert alone.cross_entropy != pytest.approx(found.cross_entropy, rel=1e-6)


# --- what is said, and what is left as it was ------------------------------------------------


def test_without_a_teacher_nothing_is_said_of_one(digits_test: Dataset) -> None:
    found = evaluate(network(3), digits_test, size_px=8)
    said = {"num_samples", "top1", "top5", "cross_entropy", "calibration_error"}
    assert {name for name, value in asdict(found).items() if value is not None} == said


def test_top5_of_two_classes_means_nothing(photos: Dataset) -> None:
    two = network(3, num_classes=2)
    found = evaluate(two, photos, size_px=8, teacher=two)
    assert found.num_samples == 41
    assert found.top5 is None
    assert found.agreement5 is None
    assert found.agreement == 1
    assert 0 <= found.top1 <= 1


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(digits_test: Dataset, training: bool) -> None:
    model = Classifier(
        nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10)), "x", HALF, HALF
    ).train(training)
    before = model.content_hash()
    evaluate(model, digits_test, size_px=8)
    assert model.training is training
    assert model.network.training is training
    assert model.content_hash() == before


def test_the_mode_is_restored_after_an_error(digits_test: Dataset) -> None:
    model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(5, 10)), "x", HALF, HALF).train()
    with pytest.raises(RuntimeError):
        evaluate(model, digits_test, size_px=8)
    assert model.training


def test_progress_counts_images(digits_test: Dataset) -> None:
    seen: list[int] = []
    evaluate(network(4), digits_test, size_px=8, batch_size=128, progress=seen.append)
    assert seen == [128, 256, 297]
