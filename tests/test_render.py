"""The rendered pixels against an independent reference: the definition of a view, and OpenCV."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ffcv.libffcv
import numpy as np
import pytest
import torch
from ffcv.reader import Reader

from kdcache.data import render
from kdcache.data.beton import Dataset
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.sources import Source
from kdcache.views.crops import crop_boxes
from kdcache.views.mixing import mix_pairs, pair_mix_weights
from kdcache.views.order import view_order
from kdcache.views.spec import ViewSpec
from kdcache.views.transforms.flip import flip_draws

WHOLE = ViewSpec(8, crop="center", min_scale=1.0, flip=False, mixup=0)
# May change only together with the view spec's version.
GOLDEN = {
    "mixed": (ViewSpec(8, min_scale=0.4, mixup=1.0, seed=5), 3, "34eea8880f497623"),
    "plain": (
        ViewSpec(12, crop="random", min_scale=0.5, mixup=0, seed=2**64 - 1),
        2**24 - 1,
        "f44cb640ebd0684b",
    ),
    "whole": (WHOLE, 0, "5ef36941a4f0f6d4"),
}


def rendered(dataset: Dataset, spec: ViewSpec, view: int) -> np.ndarray:
    """All images of a view in position order, as [N, H, W, C]."""
    with Loader(dataset, spec, 64) as loader:
        images = torch.cat([b.images_BCHW for b in loader.batches(view)])
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def stored_images(dataset: Dataset) -> list[np.ndarray]:
    """Each sample as stored and decoded, without kdcache's kernels."""
    reader, file = Reader(str(dataset.path)), np.fromfile(dataset.path, np.uint8)
    out = []
    for entry, (_, start, size) in zip(reader.metadata["f0"], reader.alloc_table, strict=True):
        height, width = int(entry["height"]), int(entry["width"])
        payload = file[int(start) : int(start + size)]
        if entry["mode"] == render.JPEG_MODE:
            image = np.zeros((height, width, 3), np.uint8)
            assert ffcv.libffcv.imdecode(payload, image, height, width, height, width) == 0
        else:
            image = payload.reshape(height, width, 3)
        out.append(image)
    return out


def by_the_definition(
    cv2: ModuleType, images: list[np.ndarray], spec: ViewSpec, view: int
) -> np.ndarray:
    n = len(images)
    samples = np.arange(n)
    heights, widths = zip(*[image.shape[:2] for image in images], strict=True)
    boxes = crop_boxes(spec, view, samples, heights, widths)
    flips = flip_draws(spec.seed, view, samples) & spec.flip
    side = (spec.size_px, spec.size_px)
    shown = []
    for sample in view_order(spec, view, n):
        top, left, h, w = boxes[sample]
        crop = np.ascontiguousarray(images[sample][top : top + h, left : left + w])
        small = cv2.resize(crop, side, interpolation=cv2.INTER_AREA)
        shown.append(small[:, ::-1] if flips[sample] else small)
    own = np.stack(shown).astype(np.int64)
    weights = pair_mix_weights(spec, view, samples, n)
    out = own.copy()
    for p in range(n // 2 * 2):
        out[p] = own[p] + (int(weights[p]) * (own[p ^ 1] - own[p]) + 127) // 256
    return out.astype(np.uint8)


@pytest.fixture(scope="module")
def cv2() -> ModuleType:
    module = pytest.importorskip("cv2")
    if not hasattr(module, "resize"):
        pytest.skip("cv2 is a stub here")
    return module


@pytest.fixture
def pair(tmp_path: Path) -> Dataset:
    """Two images of random pixels, 8 px."""
    images = list(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    return convert(Source(("a", "b"), images, [0, 1]), tmp_path / "pair.beton")[0]


@pytest.mark.parametrize("name", GOLDEN)
def test_pixels_of_digits_are_golden(digits: Dataset, name: str) -> None:
    spec, view, expected = GOLDEN[name]
    found = hashlib.sha256(rendered(digits, spec, view).tobytes()).hexdigest()[:16]
    assert found == expected


@pytest.mark.parametrize("crop", ["inception", "random", "center", "whole"])
@pytest.mark.parametrize("size_px", [5, 8, 20])
def test_raw_images_are_rendered_by_the_definition(
    digits_test: Dataset, cv2: ModuleType, crop: str, size_px: int
) -> None:
    area = 1.0 if crop == "whole" else 0.3
    spec = ViewSpec(size_px, crop=crop, min_scale=area, mixup=1.0, seed=9)
    expected = by_the_definition(cv2, stored_images(digits_test), spec, 4)
    assert (rendered(digits_test, spec, 4) == expected).all()


@pytest.mark.parametrize(
    "spec",
    [
        ViewSpec(32, min_scale=0.08, mixup=0.5, seed=1),
        ViewSpec(224, min_scale=0.02, mixup=0, seed=2),
        ViewSpec(64, crop="random", min_scale=0.5, flip=False, mixup=1.0),
        ViewSpec(96, crop="center", min_scale=(7 / 8) ** 2, flip=False, mixup=0),
        ViewSpec(40, crop="whole", min_scale=1.0, mixup=0),
    ],
    ids=["mixed", "enlarged", "random", "central", "squashed"],
)
def test_jpegs_are_rendered_by_the_definition(
    photos: Dataset, cv2: ModuleType, spec: ViewSpec
) -> None:
    expected = by_the_definition(cv2, stored_images(photos), spec, 1)
    assert (rendered(photos, spec, 1) == expected).all()


def test_whole_small_images_are_shown_as_stored(digits_test: Dataset) -> None:
    order = view_order(WHOLE, 0, len(digits_test))
    stored = np.stack(stored_images(digits_test))
    assert (rendered(digits_test, WHOLE, 0) == stored[order]).all()


def test_two_images_are_mixes_of_each_other(pair: Dataset) -> None:
    spec = replace(WHOLE, mixup=1.0, flip=True)
    plain = replace(spec, mixup=0)
    for view in range(5):
        x, y = rendered(pair, plain, view).astype(int)
        mixed = rendered(pair, spec, view)
        w = int(pair_mix_weights(spec, view, [0], 2)[0])
        assert 0 < w <= 128
        assert (mixed[0] == x + (w * (y - x) + 127) // 256).all()
        assert (mixed[1] == y + (w * (x - y) + 127) // 256).all()


def test_mirroring_works_at_odd_and_even_sizes(pair: Dataset) -> None:
    for size_px in (1, 7, 8):
        spec = replace(WHOLE, size_px=size_px, flip=True)
        for view in range(4):
            plain = rendered(pair, replace(spec, flip=False), view)
            flips = flip_draws(spec.seed, view, view_order(spec, view, 2))
            wanted = [x[:, ::-1] if f else x for x, f in zip(plain, flips, strict=True)]
            assert (rendered(pair, spec, view) == np.stack(wanted)).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("size_px", [1, 8, 13])
def test_mixing_rows_equals_mix_pairs(rows: int, size_px: int) -> None:
    """On rows as the kernel leaves them: with a trailer, not to be read or written."""
    spec = replace(WHOLE, size_px=size_px)
    random = np.random.default_rng(rows)
    memory = random.integers(0, 256, (rows, render.row_bytes(spec)), dtype=np.uint8)
    before = memory.copy()
    images, _, _ = render.split_rows(memory, size_px)
    weights = random.integers(0, 129, rows).astype(np.int16)
    weights[1::2] = weights[: rows // 2 * 2 : 2]
    weights[rows // 2 * 2 :] = 0
    mixed = render.mix_rows(images, weights)
    expected = mix_pairs(torch.from_numpy(images.copy()), torch.from_numpy(weights))
    assert (mixed == expected.numpy()).all()
    assert (memory == before).all()
    assert not np.shares_memory(mixed, memory)


def test_mixing_rows_takes_every_pair_of_values_by_every_weight() -> None:
    values = np.arange(256, dtype=np.uint8)
    images = np.stack([np.repeat(values, 256), np.tile(values, 256)]).reshape(2, 256, 256, 1)
    for weight in range(129):
        weights = np.full(2, weight, np.int16)
        expected = mix_pairs(torch.from_numpy(images), torch.from_numpy(weights)).numpy()
        assert (render.mix_rows(images, weights) == expected).all()


def test_rows_split_into_images_checksums_and_statuses() -> None:
    rows = np.zeros((2, render.row_bytes(replace(WHOLE, size_px=2))), np.uint8)
    rows[:, :12] = np.arange(24).reshape(2, 12)
    rows[:, 12:] = np.array([[1, 2], [3, 4]], "<u4").view(np.uint8)
    images, checksums, statuses = render.split_rows(rows, 2)
    assert images.reshape(-1).tolist() == list(range(24))
    assert np.shares_memory(images, rows)
    assert (checksums.tolist(), statuses.tolist()) == ([1, 3], [2, 4])
