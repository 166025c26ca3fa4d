"""Checkpoints: values come back as they were, damage is found, nothing is unpickled."""

from __future__ import annotations

import math
import os
import pickle
import random
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import CheckpointCorrupt, StorageError
from kdcache.training import checkpoint
from tests import processes

STATE = {
    "step": 7,
    "student": {"0.weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(2.0)}, 1: {}}, "betas": (0.9, 0.999)},
    "empty": [torch.zeros(0, 3), [], {}, ()],
    "best": -1.0,
    "note": None,
}


def same(a: Any, b: Any) -> bool:
    """Equal, types and bits included."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bytes(a.reshape(-1).view(torch.uint8)) == bytes(b.reshape(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


# --- round trips -----------------------------------------------------------------------------


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", STATE)
    assert same(checkpoint.load(tmp_path / "c"), STATE)
    assert os.listdir(tmp_path) == ["c"]


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
]
tensors = st.builds(
    lambda shape, dtype: (torch.randn(shape) * 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
leaves = st.one_of(
    tensors, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(value=values)
def test_any_nest_of_values_comes_back(
    value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("c") / "c"
    checkpoint.save(path, {"value": value})
    assert same(checkpoint.load(path)["value"], value)


def test_memory_may_be_shared_and_strided(tmp_path: Path) -> None:
    """Tied weights, and weights in channels-last memory."""
    weight = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "c", {"a": weight, "b": weight, "c": weight.mT, "d": weight[0]})
    found = checkpoint.load(tmp_path / "c")
    assert torch.equal(found["a"], weight)
    assert torch.equal(found["b"], weight)
    assert torch.equal(found["c"], weight.mT)
    found["a"].zero_()
    assert torch.equal(found["b"], weight)


def test_what_it_cannot_hold_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set"):
        checkpoint.save(tmp_path / "c", {"x": {1}})
    assert not list(tmp_path.iterdir())


def test_nothing_is_pickled_or_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, names in (
        (pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")),
        (torch, ("load", "save")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    checkpoint.save(tmp_path / "c", STATE)
    assert same(checkpoint.load(tmp_path / "c"), STATE)
    with pytest.raises(AssertionError, match="pickle"):
        torch.save({}, tmp_path / "x")


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["KDCACHE_TRAP"],)


def test_a_pickle_in_its_place_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "sprung"
    monkeypatch.setenv("KDCACHE_TRAP", str(trap))
    torch.save({"x": Trap()}, tmp_path / "c")
    with pytest.raises(CheckpointCorrupt, match="cannot read"):
        checkpoint.load(tmp_path / "c")
    assert not trap.exists()


# --- damage ----------------------------------------------------------------------------------


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    dice = random.Random(0)
    for at in range(dice.randrange(3), len(whole), 3):
        bytes_ = bytearray(whole)
        bytes_[at] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes_)
        with pytest.raises(CheckpointCorrupt, match=r"c(:| ).*remove it; --resume then resumes"):
            checkpoint.load(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointCorrupt, match="remove it"):
            checkpoint.load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointCorrupt, match="remove it"):
        checkpoint.load(path)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    safetensors.torch.save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(
        CheckpointCorrupt, match="foreign is not a checkpoint of version 1: remove it"
    ):
        checkpoint.load(foreign)
    with pytest.raises(CheckpointCorrupt, match=r"cannot read .*none: .*remove it"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(CheckpointCorrupt, match=r"cannot read .*: .*remove it"):
        checkpoint.load(tmp_path)


# --- writing ---------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if done[-1].endswith(".partial"):
            assert not (tmp_path / "c").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    checkpoint.save(tmp_path / "c", STATE)
    partial, folder = done
    assert re.fullmatch(rf"{tmp_path}/c\.[0-9a-f]{{8}}\.partial", partial)
    assert folder == str(tmp_path)


def _with_files_limited(path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    words = re.escape(f"cannot write the checkpoint {path}: ") + ".*; earlier ones are unchanged$"
    with pytest.raises(StorageError, match=words):
        checkpoint.save(path, {"step": 2, "x": torch.zeros(10_000)})


def test_without_room_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, STATE)
    assert processes.run(_with_files_limited, path) == 0
    assert same(checkpoint.load(path), STATE)
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write the checkpoint .*File exists"):
        checkpoint.save(tmp_path / "file" / "c", STATE)
