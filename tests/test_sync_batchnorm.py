"""Batch normalisation over two processes against torch's own over the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.errors import UsageError
from kdcache.training import sync_batchnorm
from kdcache.training.distributed import ProcessGroup
from kdcache.training.sync_batchnorm import SyncedBatchNorm, synchronize
from tests import ranks

timm_layers = pytest.importorskip("timm.layers")

STEPS = 3
MEMORY = {"usual": torch.contiguous_format, "last": torch.channels_last}
CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "2d": (lambda: nn.BatchNorm2d(5), (8, 5, 4, 3)),
    "channels_last": (lambda: nn.BatchNorm2d(5), (8, 5, 4, 3)),
    "1d": (lambda: nn.BatchNorm1d(5), (8, 5)),
    "1d_long": (lambda: nn.BatchNorm1d(5), (8, 5, 7)),
    "3d": (lambda: nn.BatchNorm3d(2), (4, 2, 3, 2, 2)),
    "one_each": (lambda: nn.BatchNorm2d(5), (2, 5, 1, 1)),
    "no_affine": (lambda: nn.BatchNorm2d(5, affine=False), (8, 5, 4, 3)),
    "cumulative": (lambda: nn.BatchNorm2d(5, momentum=None), (8, 5, 4, 3)),
    "frozen_statistics": (lambda: nn.BatchNorm2d(5, momentum=0.0), (8, 5, 4, 3)),
    "own_numbers": (lambda: nn.BatchNorm2d(5, eps=0.3, momentum=0.7), (8, 5, 4, 3)),
    "double": (lambda: nn.BatchNorm2d(5).double(), (8, 5, 4, 3)),
    "offset": (lambda: nn.BatchNorm2d(5), (8, 5, 4, 3)),
    "bfloat16": (lambda: nn.BatchNorm2d(5), (8, 5, 4, 3)),
    "timm": (lambda: timm_layers.BatchNormAct2d(5, act_layer=nn.SiLU), (8, 5, 4, 3)),
    "timm_prelu": (lambda: timm_layers.BatchNormAct2d(5, act_layer=nn.PReLU), (8, 5, 4, 3)),
    "timm_plain": (lambda: timm_layers.BatchNormAct2d(5, apply_act=False), (8, 5, 4, 3)),
}


def network(case: str) -> nn.Sequential:
    """One layer, whose parameters are not those that it is made with."""
    torch.manual_seed(1)
    layer = CASES[case][0]()
    with torch.no_grad():
        for w in layer.parameters():
            w.add_(torch.rand_like(w))
    return nn.Sequential(layer)


def steps(case: str, rank: int = 0, count: int = 1) -> dict[str, torch.Tensor]:
    """Outputs, gradients, statistics, and what evaluation gives, of this process's share."""
    net = network(case)
    dtype = torch.float64 if case == "double" else torch.float32
    if count > 1:
        synchronize(net)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
    found: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        whole = torch.randn(CASES[case][1], generator=generator, dtype=dtype)
        weights = torch.randn(CASES[case][1], generator=generator, dtype=dtype)
        if case == "offset":
            whole = whole + 1000
        if case == "bfloat16":
            whole = whole.bfloat16()
        if case == "channels_last":
            whole = whole.contiguous(memory_format=torch.channels_last)
        x = whole.chunk(count)[rank].clone().requires_grad_()
        y = net(x)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())
        # The loop's loss is a mean over processes, so a sum over them is `count` times it.
        net.zero_grad()
        (y * weights.chunk(count)[rank]).sum().backward()
        assert x.grad is not None
        found |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
        found |= {f"d{name}{step}": w.grad for name, w in net.named_parameters()}
    net.eval()
    with torch.no_grad():
        found["eval"] = net(torch.ones(CASES[case][1], dtype=x.dtype))
    return found | dict(net.state_dict())


def share(folder: Path, rank: int, count: int) -> None:
    with ProcessGroup(rank, count):
        torch.save({case: steps(case, rank, count) for case in CASES}, folder / str(rank))


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("shares")
    ranks.run(2, share, folder)
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_do_what_one_does(shares: Any, case: str) -> None:
    expected, parts = steps(case), [part[case] for part in shares]
    assert list(expected) == list(parts[0]) == list(parts[1])
    # bfloat16 keeps 8 bits of what goes in and comes out; torch sums its gradients in it too.
    rtol, atol = {"bfloat16": (2e-2, 4e-2), "offset": (1e-3, 2e-3)}.get(case, (1e-4, 1e-5))
    for name, value in expected.items():
        if name[:-1] in ("y", "dx"):
            found = torch.cat([part[name] for part in parts])
        elif name.startswith("d"):
            found = sum(part[name] for part in parts)
        else:
            found = parts[0][name]
            assert torch.equal(found, parts[1][name]), name
        torch.testing.assert_close(found, value, rtol=rtol, atol=atol, msg=lambda m, n=name: n + m)


def test_the_statistics_move_and_those_of_a_share_would_be_others(shares: Any) -> None:
    """So the test above can fail."""
    found = shares[0]["2d"]
    assert (found["0.running_mean"] != 0).all()
    assert int(found["0.num_batches_tracked"]) == STEPS
    alone = network("2d")
    alone(torch.randn(CASES["2d"][1], generator=torch.Generator().manual_seed(2)).chunk(2)[0])
    assert not torch.allclose(alone[0].running_mean, found["0.running_mean"], atol=1e-2)


def test_names_and_tensors_stay() -> None:
    for case in CASES:
        net = network(case)
        before = {name: t.data_ptr() for name, t in net.state_dict().items()}
        parameters = list(net.parameters())
        synchronize(net)
        assert isinstance(net[0], SyncedBatchNorm)
        assert {name: t.data_ptr() for name, t in net.state_dict().items()} == before
        assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


def test_layers_within_layers_are_found_and_the_mode_stays() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5)), nn.GroupNorm(1, 5))
    net[0][1].eval()
    synchronize(net)
    assert isinstance(net[0][1], SyncedBatchNorm)
    assert not net[0][1].training
    assert isinstance(net[1], nn.GroupNorm)
    synchronize(net)  # a second time changes nothing
    assert isinstance(net[0][1], SyncedBatchNorm)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_does_more_is_refused() -> None:
    net = nn.Sequential(nn.Sequential(Doubled(3)))
    line = "the layer '0' is a Doubled, which is not known to synchronise: train this student in"
    with pytest.raises(UsageError, match=line):
        synchronize(net)


def test_a_layer_without_statistics_is_refused() -> None:
    line = "is a BatchNorm2d that keeps no statistics, so what it gives depends on the batch at"
    with pytest.raises(UsageError, match=line):
        synchronize(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize("case", ["2d", "timm", "timm_prelu", "timm_plain"])
def test_the_layer_for_gpus_does_what_the_one_before_did(case: str) -> None:
    """torch's own works on the CPU at evaluation, and where there is one process."""
    net, native = network(case), network(case)
    native[0] = sync_batchnorm._native(native[0])
    assert isinstance(native[0], nn.SyncBatchNorm)
    assert list(native.state_dict()) == list(net.state_dict())
    x = torch.randn(CASES[case][1])
    net.eval(), native.eval()
    assert torch.equal(native(x.clone()), net(x))
