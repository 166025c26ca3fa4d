"""torchrun's environment variables."""

from __future__ import annotations

import pytest

from kdcache.errors import UsageError
from kdcache.torchrun import Process, current_process

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.mark.parametrize(
    ("values", "process"),
    [
        ({}, Process(0, 1, 0, 1)),
        ({"RANK": "3"}, Process(0, 1, 0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, Process(3, 4, 0, 1)),
        (dict(zip(NAMES, "3412", strict=True)), Process(3, 4, 1, 2)),
    ],
)
def test_the_process(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], process: Process
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert current_process() == process


@pytest.mark.parametrize("name", NAMES)
def test_a_variable_that_is_not_a_number(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in NAMES:
        monkeypatch.setenv(other, "1")
    monkeypatch.setenv(name, "first")
    with pytest.raises(UsageError, match=f"{name} must be a number, not 'first': start with"):
        current_process()
