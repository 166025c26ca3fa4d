"""Three optimizers with one meaning of decay, whose states go through a file and on to the bit."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.errors import MissingDependency, UsageError
from kdcache.models import pretrained
from kdcache.models.classifier import Classifier
from kdcache.training import checkpoint
from kdcache.training.optim import learning_rate, make_optimizer, undecayed, warmup_steps
from kdcache.training.spec import TrainSpec
from kdcache.training.state import State
from kdcache.views.spec import ViewSpec

SPEC = TrainSpec("labels", ViewSpec(8), epochs=1, batch_size=8, lr=0.02, weight_decay=0.1)
NAMES = ("adamw", "sgd", "soap")
STEPS = 30


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return nn.Sequential(*parts).to(memory_format=torch.channels_last)


def train(spec: TrainSpec, cut: Path | None = None, at: int = 0) -> State:
    """Some steps; at one of them all goes through the file `cut` and on in a new state."""
    state, batches = fresh(spec), torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if cut and step == at:
            checkpoint.save(cut, state.state_dict())
            state = fresh(spec)
            state.load_state_dict(checkpoint.load(cut))
        images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=batches)
        labels = torch.randint(5, (16,), generator=batches)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(spec, step, STEPS)
        state.optimizer.zero_grad()
        logits = state.student(images.contiguous(memory_format=torch.channels_last))
        nn.functional.cross_entropy(logits, labels).backward()
        state.optimizer.step()
    return state


def fresh(spec: TrainSpec) -> State:
    return State(spec, Classifier(network(), "test", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [1, 15, 20])
def test_a_state_goes_through_a_file_and_on_to_the_bit(name: Any, at: int, tmp_path: Path) -> None:
    spec = replace(SPEC, optimizer=name)
    undisturbed, resumed = train(spec).student, train(spec, tmp_path / "state", at).student
    for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(undisturbed.parameters()), next(network().parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_laid_out_by_a_rule(name: Any) -> None:
    def check(weight: torch.Tensor, kept: Any) -> None:
        for value in kept:
            if isinstance(value, list):
                check(weight, value)
            elif isinstance(value, torch.Tensor):
                same = value.shape == weight.shape
                assert value.stride() == weight.stride() if same else value.is_contiguous()

    optimizer = train(replace(SPEC, optimizer=name)).optimizer
    assert len(optimizer.state) == 9
    for weight, kept in optimizer.state.items():
        check(weight, kept.values())


@pytest.mark.parametrize("name", NAMES)
def test_matrices_and_kernels_decay_by_rate_times_weight_decay(name: Any) -> None:
    """Without a gradient nothing else moves a weight, and momentum has nothing to keep."""
    model = network()
    optimizer = make_optimizer(model, replace(SPEC, optimizer=name, lr=0.5, weight_decay=0.1))
    before = [w.detach().clone() for w in model.parameters()]
    steps = 3 if name == "soap" else 2  # SOAP only looks at the first gradient
    for _ in range(steps):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95**2 if old.ndim > 1 else 1))


def test_sgd_is_heavy_ball() -> None:
    weight = nn.Parameter(torch.zeros(1))
    model = nn.Module()
    model.weight = weight
    sgd = make_optimizer(model, replace(SPEC, optimizer="sgd", lr=1.0, momentum=0.5))
    path = []
    for _ in range(3):
        weight.grad = torch.ones(1)
        sgd.step()
        path.append(weight.item())
    assert path == [-1, -2.5, -4.25]  # by 1, then 1.5, then 1.75


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_weight_stays(name: Any) -> None:
    model = network()
    frozen = next(model.parameters()).requires_grad_(False)
    optimizer = make_optimizer(model, replace(SPEC, optimizer=name))
    held = [w for group in optimizer.param_groups for w in group["params"]]
    assert len(held) == 8
    assert all(w is not frozen for w in held)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_first_order_steps_are_fused(name: Any) -> None:
    optimizer = make_optimizer(network(), replace(SPEC, optimizer=name))
    assert all(group["fused"] for group in optimizer.param_groups)


def test_soap_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "pytorch_optimizer":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependency, match=r"pip install 'kdcache\[soap\]'"):
        make_optimizer(network(), replace(SPEC, optimizer="soap"))


def test_warm_up_is_a_share_or_a_number_of_steps() -> None:
    share, number = replace(SPEC, warmup=0.25), replace(SPEC, warmup=10)
    assert [warmup_steps(share, 40), warmup_steps(number, 40)] == [10, 10]
    for spec in (share, number):
        rates = [learning_rate(spec, step, 40) / spec.lr for step in range(40)]
        assert rates[:11] == pytest.approx([*(n / 10 for n in range(1, 11)), 1.0])
        assert rates[25] == pytest.approx(0.5)
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert 0 < rates[-1] < 0.01
    assert learning_rate(replace(SPEC, warmup=0), 0, 40) == SPEC.lr
    assert warmup_steps(replace(SPEC, warmup=1), 40) == 1


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UsageError, match="warm-up of 1500 steps does not fit into the run's 1500"):
        learning_rate(replace(SPEC, warmup=1500), 0, 1500)


def test_a_student_that_cannot_learn_is_refused() -> None:
    frozen = network().requires_grad_(False)
    with pytest.raises(UsageError, match="the student has no weight that learns"):
        make_optimizer(frozen, SPEC)
    frozen[7].requires_grad_(True)
    assert make_optimizer(frozen, SPEC)


# --- what does not decay ------------------------------------------------------------------------


class Named(nn.Module):
    """A network that names what shall not decay, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 4))
        self.table = nn.Parameter(torch.ones(4, 4))
        self.cpb_mlp = nn.Linear(2, 2)

    def no_weight_decay(self) -> set[str]:
        return {"table"}

    def no_weight_decay_keywords(self) -> set[str]:
        return {"cpb_mlp"}


def test_what_a_network_names_does_not_decay() -> None:
    model = Classifier(Named(), "x", (0.5,) * 3, (0.5,) * 3)
    kept = {name for name, _ in model.named_parameters()} - undecayed(model)
    assert kept == {"network.layer.weight"}
    assert undecayed(Named()) == {
        "layer.bias",
        "norm.weight",
        "norm.bias",
        "pos_embed",
        "table",
        "cpb_mlp.weight",
        "cpb_mlp.bias",
    }
    for old in (False, True):
        spec = replace(SPEC, decay_embeddings=old)
        decayed, left = make_optimizer(model, spec).param_groups
        assert (len(decayed["params"]), len(left["params"])) == ((4, 4) if old else (1, 7))


@pytest.mark.parametrize(
    ("name", "size_px", "some"),
    [
        ("torchvision:vit_b_32", 32, {"class_token", "encoder.pos_embedding"}),
        ("torchvision:swin_t", 32, {"features.1.0.attn.relative_position_bias_table"}),
        ("torchvision:convnext_tiny", 32, {"features.1.0.layer_scale"}),
        ("timm:vit_tiny_patch16_224", 224, {"pos_embed", "cls_token"}),
        ("timm:swin_tiny_patch4_window7_224", 224, {"layers.0.blocks.0.attn.relative_position"}),
    ],
)
def test_embeddings_of_known_networks_do_not_decay(name: str, size_px: int, some: set[str]) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    found = undecayed(build_on_meta(name, size_px))
    assert all(any(x.startswith(f"network.{word}") for x in found) for word in some), found


def build_on_meta(name: str, size_px: int) -> nn.Module:
    """Without memory for its weights."""
    kind, _, rest = name.partition(":")
    with torch.device("meta"):
        build = {"torchvision": pretrained.from_torchvision, "timm": pretrained.from_timm}[kind]
        return build(rest, "student", 10)
