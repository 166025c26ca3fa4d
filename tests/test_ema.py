"""The moving average of weights: its formula, and that applying it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.data.beton import Dataset
from kdcache.errors import UsageError
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load
from kdcache.models.run_json import read_run_json
from kdcache.teacher.targets import LabelTargets
from kdcache.training import batch_statistics, checkpoint, run_folder
from kdcache.training.ema import EMA
from kdcache.training.loop import set_determinism, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def move(model: nn.Module) -> None:
    """A step, of any optimizer."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
        model[1].running_mean += 1


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.9999])
def test_it_is_what_a_loop_in_numpy_makes(decay: float) -> None:
    model = network()
    average = EMA(model, decay)
    wanted = [w.detach().numpy().astype(np.float64) for w in model.parameters()]
    for n in range(1, 40):
        move(model)
        average.update()
        d = min(decay, (1 + n) / (10 + n))
        live = [w.detach().numpy().astype(np.float64) for w in model.parameters()]
        wanted = [d * old + (1 - d) * new for old, new in zip(wanted, live, strict=True)]
    with average.applied():
        for found, value in zip(model.parameters(), wanted, strict=True):
            np.testing.assert_allclose(found.detach().numpy(), value, rtol=1e-4, atol=1e-5)


def test_the_first_weights_are_soon_forgotten() -> None:
    """With a constant decay they would have half of the weight after 6,900 steps."""
    model = network()
    average = EMA(model, 0.9999)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1)
    for _ in range(100):
        average.update()
    with average.applied():
        assert all(w.isclose(torch.ones(()), atol=1e-4).all() for w in model.parameters())


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_applying_it_leaves_the_network_as_it_was(decay: float) -> None:
    model = network()
    average = EMA(model, decay)
    move(model)
    average.update()
    before = copy.deepcopy(model.state_dict())
    kept = copy.deepcopy(average.state_dict())
    with average.applied():
        assert torch.equal(model[0].weight, before["0.weight"]) == (decay == 0)
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())
    assert all(map(torch.equal, average.state_dict()["weights"], kept["weights"]))


def test_it_learns_nothing_while_it_is_applied_and_takes_no_gradient() -> None:
    model = network()
    average = EMA(model, 0.9)
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    average.update()
    with average.applied():
        assert all(w.requires_grad and w.grad is not None for w in model.parameters())
    assert not any(w.requires_grad for w in average.state_dict()["weights"])


def test_it_goes_on_from_a_file_to_the_bit(tmp_path: Path) -> None:
    results = []
    for cut in (False, True):
        model = network()
        average = EMA(model, 0.99)
        for n in range(20):
            move(model)
            average.update()
            if cut and n == 7:
                checkpoint.save(tmp_path / "c", average.state_dict())
                average = EMA(model, 0.99)
                average.load_state_dict(checkpoint.load(tmp_path / "c"))
        results.append(average.state_dict())
    assert results[0]["updates"] == results[1]["updates"] == 20
    assert all(map(torch.equal, results[0]["weights"], results[1]["weights"]))


def test_without_decay_it_keeps_nothing() -> None:
    average = EMA(network(), 0)
    average.update()
    assert average.state_dict() == {"updates": 0, "weights": []}


# --- statistics of batch normalisation -----------------------------------------------------------


def images(seed: int) -> torch.Tensor:
    return torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_the_mean_over_batches() -> None:
    model = network()
    before = {name: x.clone() for name, x in model.named_parameters()}
    batches = [images(seed) for seed in range(3)]
    batch_statistics.estimate(model, batches)
    outputs = [model[0](x) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, variance)
    assert model[1].momentum == 0.1
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())


def test_dropout_is_off_while_they_are_estimated() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).eval()
    batch_statistics.estimate(model, [images(0)])
    torch.testing.assert_close(model[1].running_var, images(0).transpose(0, 1).flatten(1).var(1))
    assert not model[1].training


def test_they_are_put_back() -> None:
    model = network()
    model(images(0))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with batch_statistics.kept(model):
        batch_statistics.estimate(model, [images(1) + 5])
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_network_without_batch_normalisation_is_not_run() -> None:
    def none() -> Iterator[torch.Tensor]:
        raise AssertionError
        yield

    batch_statistics.estimate(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), none())


def test_an_average_at_a_high_rate_is_better_with_its_own(
    digits: Dataset, digits_test: Dataset, tmp_path: Path
) -> None:
    """Evaluation, best/ and the final weights have them; training goes on with its own."""
    spec = TrainSpec("labels", ViewSpec(8), epochs=2, batch_size=50, lr=0.1, ema_decay=0.98)
    spec = replace(spec, warmup=0.0, deterministic=True)
    records = {}
    for count in (0, 500):
        this = replace(spec, ema_statistics=count)
        set_determinism(this)
        student = load.load_student("kdcache:small", num_classes=10, size_px=8)
        run = TrainingRun(this, digits, student, LabelTargets(10), val=digits_test)
        options = RunOptions(workers=1, eval_every=20, log_every=1)
        records[count] = train(run, tmp_path / str(count), options=options)
        assert records[count]["weights"] == student.content_hash()
        found = evaluate(student, digits_test, size_px=8)
        assert records[count]["evaluation"]["top1"] == found.top1
        best = load.load_teacher(str(tmp_path / str(count) / "best"), size_px=8)
        kept = read_run_json(tmp_path / str(count) / "best")["evaluation"]
        assert evaluate(best, digits_test, size_px=8).top1 == kept["top1"]
    logs = [
        [x["loss"] for x in run_folder.read_log(tmp_path / str(count)) if "loss" in x]
        for count in records
    ]
    assert logs[0] == logs[1]
    assert records[500]["evaluation"]["cross_entropy"] < records[0]["evaluation"]["cross_entropy"]


def test_statistics_without_an_average_are_refused() -> None:
    with pytest.raises(UsageError, match="--ema-statistics goes with --ema"):
        TrainSpec("labels", ViewSpec(8), ema_statistics=100)
