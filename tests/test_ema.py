"""The moving average of weights: its formula, and that applying it leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.training import checkpoint
from kdcache.training.ema import EMA


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
