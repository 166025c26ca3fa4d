"""Figures of a tape whose answers are known, and a picture that is a picture."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from kdcache import models, summary
from kdcache.dataset import Dataset
from kdcache.errors import MissingDependency, TapeCorrupt
from kdcache.picture import draw_views
from kdcache.precompute import precompute, tape_spec
from kdcache.spec import ViewSpec
from kdcache.summary import summarise
from kdcache.tape import Tape
from tests.conftest import TEACHER, synthetic_tape


def logits_of(probabilities: list[float], views: int = 2, samples: int = 20) -> torch.Tensor:
    return torch.tensor(probabilities).log().expand(views, samples, -1)


def test_figures_of_a_dense_tape(tmp_path: Path) -> None:
    tape = synthetic_tape(tmp_path / "t", logits_of([0.5, 0.25, 0.125, 0.125]), top_k=4)
    found = summarise(tape)
    assert (found.views_complete, found.shards, found.shards_missing, found.rows) == (2, 2, 0, 40)
    assert found.entropy == pytest.approx(1.75 * math.log(2), rel=1e-5)
    assert found.largest_probability == pytest.approx(0.5, rel=1e-5)
    assert found.tail_mass == 0
    assert found.stored_bytes == tape.stored_bytes()
    assert found.bytes_per_record == pytest.approx(tape.stored_bytes() / 40)


def test_figures_of_a_sparse_tape(tmp_path: Path) -> None:
    """The tail is one half in four even parts, so its entropy is exact too."""
    tape = synthetic_tape(tmp_path / "t", logits_of([0.3, 0.2, *[0.125] * 4]), top_k=2)
    found = summarise(tape)
    entropy = -(0.3 * math.log(0.3) + 0.2 * math.log(0.2) + 0.5 * math.log(0.125))
    assert found.entropy == pytest.approx(entropy, rel=1e-5)
    assert found.largest_probability == pytest.approx(0.3, rel=1e-5)
    assert found.tail_mass == pytest.approx(0.5, rel=1e-5)


def test_figures_are_means_over_views(tmp_path: Path) -> None:
    logits = torch.cat([logits_of([0.5, 0.5], views=1), logits_of([0.9, 0.1], views=1)])
    found = summarise(synthetic_tape(tmp_path / "t", logits, top_k=2))
    assert found.largest_probability == pytest.approx(0.7, rel=1e-5)


def test_only_complete_views_count(tmp_path: Path) -> None:
    logits = torch.cat([logits_of([0.5, 0.5], views=1), logits_of([0.9, 0.1], views=1)])
    tape = synthetic_tape(tmp_path / "t", logits, top_k=2)
    (tmp_path / "t" / "logits/c/1/0/0").unlink()
    found = summarise(tape)
    assert (found.views_complete, found.shards_missing, found.rows) == (1, 1, 20)
    assert found.largest_probability == pytest.approx(0.5)
    (tmp_path / "t" / "logits/c/0/0/0").unlink()
    found = summarise(tape)
    assert (found.views_complete, found.shards_missing, found.rows) == (0, 2, 0)
    assert found.entropy is found.largest_probability is found.tail_mass is None


def test_few_rows_of_a_long_view_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "SUMMARY_ROWS", 5)
    found = summarise(synthetic_tape(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2))
    assert found.rows == 4
    assert found.largest_probability == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_other_types_come_close(tmp_path: Path, dtype: str) -> None:
    logits = logits_of([0.3, 0.2, *[0.125] * 4])
    found = summarise(synthetic_tape(tmp_path / "t", logits, top_k=2, dtype=dtype))
    assert found.largest_probability == pytest.approx(0.3, rel=1e-2)
    assert found.tail_mass == pytest.approx(0.5, rel=1e-2)


def test_a_damaged_tape_has_no_figures(tmp_path: Path) -> None:
    tape = synthetic_tape(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2)
    (tmp_path / "t" / "logits/c/1/0/0").write_bytes(b"?" * 100)
    with pytest.raises(TapeCorrupt, match="view 1"):
        summarise(tape)


# --- the picture -----------------------------------------------------------------------------


def recorded(dataset: Dataset, view: ViewSpec, out: Path, top_k: int | None = None) -> Tape:
    classes = len(dataset.classes)
    teacher = models.load(TEACHER, "teacher", num_classes=classes, size_px=8)
    spec = tape_spec(dataset, teacher, view, views=2, top_k=top_k, dtype="float32")
    return precompute(dataset, teacher, spec, out)


def assert_picture(path: Path, samples: int, views: int) -> None:
    with PIL.Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        wanted = 130 * (1.9 + 4.1 * views), 130 * (1.75 * samples + 0.5)
        assert picture.size == pytest.approx(wanted, abs=2)
        assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(("mixup", "top_k"), [(1.0, None), (0.0, None), (1.0, 2)])
def test_views_are_drawn(
    digits_test: Dataset, tmp_path: Path, mixup: float, top_k: int | None
) -> None:
    pytest.importorskip("matplotlib")
    tape = recorded(digits_test, ViewSpec(8, mixup=mixup), tmp_path / "t", top_k)
    draw_views(tape, digits_test, tmp_path / "v.png", samples=[0, 296], views=[0, 1])
    assert_picture(tmp_path / "v.png", 2, 2)


def test_views_of_an_odd_dataset_are_drawn(photos: Dataset, tmp_path: Path) -> None:
    """Among them the sample that has no partner; two classes, of which three cannot be shown."""
    pytest.importorskip("matplotlib")
    from kdcache import views

    view = ViewSpec(8)
    alone = int(views.order(view, 1, 41)[40])
    tape = recorded(photos, view, tmp_path / "t")
    draw_views(tape, photos, tmp_path / "v.png", samples=[alone], views=[1])
    assert_picture(tmp_path / "v.png", 1, 1)


def test_without_matplotlib_the_message_says_how_to_get_it(
    digits_test: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = synthetic_tape(tmp_path / "t", logits_of([0.5, 0.5]), top_k=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install 'kdcache\[plot\]'"):
        draw_views(tape, digits_test, tmp_path / "v.png", samples=[0], views=[0])
