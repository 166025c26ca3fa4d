"""Converting images: right pixels, whole files or none, and one clear error for each damage."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from ffcv.reader import Reader
from ffcv.types import HeaderType

from kdcache.data import beton, render
from kdcache.data import convert as conversion
from kdcache.data.beton import Dataset, open_dataset, sidecar_path
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.sources import Image, Source, open_source
from kdcache.errors import DatasetCorrupt, StorageError, UsageError
from kdcache.views.spec import SMALL_PX, ViewSpec
from tests.conftest import subset

JPEG, RAW = 0, 1
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def gradient(height: int, width: int) -> np.ndarray:
    """A smooth picture without symmetry, [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 64], 2).astype(np.uint8)


def jpeg_bytes(image: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def converted(out: Path, *images: Image, **options: Any) -> Dataset:
    source = Source(("only",), list(images), [0] * len(images))
    return convert(source, out / "out.beton", **options)[0]


def payload(dataset: Dataset, i: int) -> tuple[int, tuple[int, int], bytes]:
    """Mode, (height, width) and bytes of a stored sample, found with FFCV's own reader."""
    reader = Reader(str(dataset.path))
    entry, (_, start, size) = reader.metadata["f0"][i], reader.alloc_table[i]
    with dataset.path.open("rb") as file:
        file.seek(int(start))
        data = file.read(int(size))
    return int(entry["mode"]), (int(entry["height"]), int(entry["width"])), data


def stored(dataset: Dataset, i: int = 0) -> np.ndarray:
    """The pixels of a stored sample, [H, W, 3]."""
    mode, sides, data = payload(dataset, i)
    if mode == RAW:
        return np.frombuffer(data, np.uint8).reshape(*sides, 3)
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.size == sides[::-1]
        return np.asarray(image.convert("RGB"))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def saved(folder: Path, name: str, image: PIL.Image.Image, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def mode_of(path: Path) -> str:
    with PIL.Image.open(path) as image:
        return image.mode


# --- round trip


def test_a_dataset_says_what_was_converted(digits: Dataset) -> None:
    source = open_source("digits", "train")
    assert digits.class_names == source.class_names
    assert digits.labels.tolist() == source.labels
    assert digits.labels.dtype == np.int64
    assert len(digits) == 1500
    assert digits.natural_size_px == 8
    assert (digits.sides_px == 8).all()
    for i in (0, 700, 1499):
        grey = np.asarray(source.images[i])
        assert (stored(digits, i) == grey[:, :, None]).all()


def test_sides_are_heights_and_widths(photos: Dataset) -> None:
    sides = [stored(photos, i).shape[:2] for i in range(len(photos))]
    assert [tuple(s) for s in photos.sides_px.tolist()] == sides
    assert photos.natural_size_px == 224


@pytest.mark.parametrize("name", ["digits", "photos"])
def test_checksums_are_those_of_the_stored_bytes(name: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue(name)
    found = [zlib.crc32(payload(dataset, i)[2]) for i in range(len(dataset))]
    assert dataset.checksums.tolist() == found


def test_opening_gives_what_converting_gave(photos: Dataset) -> None:
    again = open_dataset(photos.path)
    assert (again.class_names, again.content_hash) == (photos.class_names, photos.content_hash)
    assert (again.labels == photos.labels).all()
    assert (again.checksums == photos.checksums).all()


STOCK = """
import sys, numpy as np, torch
from ffcv.loader import Loader, OrderOption
loader = Loader(sys.argv[1], 128, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
batches = [(images.clone(), labels.clone()) for images, labels in loader]
images, labels = (torch.cat(parts).numpy() for parts in zip(*batches))
np.savez(sys.argv[2], images=images, labels=labels.reshape(-1))
"""


def test_stock_ffcv_reads_the_file(digits: Dataset, tmp_path: Path) -> None:
    """In a process of its own: FFCV's loader alters numba's types for the whole process."""
    out = tmp_path / "read.npz"
    subprocess.run([sys.executable, "-c", STOCK, digits.path, out], check=True)
    found, source = np.load(out), open_source("digits", "train")
    assert found["labels"].tolist() == source.labels
    images = np.stack([np.asarray(x) for x in source.images])[..., None]
    assert (found["images"] == images).all()


def test_many_pages_are_filled_without_crossing_one(tmp_path: Path) -> None:
    """FFCV's format wants each payload within one page of 8 MiB."""
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    dataset = converted(tmp_path, *[noise] * 4, quality=95)
    table = Reader(str(dataset.path)).alloc_table
    first, last = table["ptr"] >> 23, (table["ptr"] + table["size"] - 1) >> 23
    assert (first == last).all()
    assert len(set(first.tolist())) > 1
    assert (stored(dataset, 3) == stored(dataset, 0)).all()


# --- equal sources, equal bytes


def test_equal_sources_give_equal_bytes(photos: Dataset, tmp_path: Path) -> None:
    pictures = [PIL.Image.fromarray(gradient(40 + 9 * i, 100 - 7 * i)) for i in range(10)]
    for name in ("a.beton", "b.beton"):
        convert(Source(("x", "y"), pictures, [0, 1] * 5), tmp_path / name)
    for name in ("{}.beton", "{}.beton.json"):
        a, b = (tmp_path / name.format(x) for x in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_the_fingerprint_sees_pixels_labels_classes_and_order(tmp_path: Path) -> None:
    images = [gradient(8, 8), gradient(8, 8)[::-1].copy()]
    changed = [images[0], np.clip(images[1], 0, 200)]
    sources = [
        Source(("a", "b"), images, [0, 1]),
        Source(("a", "b"), images, [1, 1]),
        Source(("a", "c"), images, [0, 1]),
        Source(("a", "b"), changed, [0, 1]),
        Source(("a", "b"), images[::-1], [0, 1]),
        Source(("a", "b"), images[:1], [0]),
    ]
    found = [convert(s, tmp_path / f"{i}.beton")[0].content_hash for i, s in enumerate(sources)]
    assert len(set(found)) == len(sources)


# --- how images are stored


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"comment": b"x"}])
def test_jpegs_keep_their_bytes(tmp_path: Path, options: dict[str, Any]) -> None:
    original = jpeg_bytes(gradient(90, 120), **options)
    (tmp_path / "x.jpg").write_bytes(original)
    assert payload(converted(tmp_path, tmp_path / "x.jpg"), 0) == (JPEG, (90, 120), original)


def test_small_and_grey_jpegs_keep_their_bytes_too(tmp_path: Path) -> None:
    originals = [jpeg_bytes(gradient(20, 30)), jpeg_bytes(gradient(90, 80)[:, :, 0])]
    paths = [tmp_path / f"{i}.jpeg" for i in range(2)]
    for path, original in zip(paths, originals, strict=True):
        path.write_bytes(original)
    dataset = converted(tmp_path, *paths)
    assert [payload(dataset, i)[2] for i in range(2)] == originals
    spec = ViewSpec(20, crop="center", min_scale=1.0, flip=False, mixup=0)
    with Loader(dataset, spec, 2) as loader:
        (batch,) = loader.batches(0)
    grey = batch.images_BCHW[batch.sample_ids_B.tolist().index(1)]
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])


@pytest.mark.parametrize("marker", [b"\xff\xdb", b"\xff\xd9"], ids=["tables", "end"])
def test_a_jpeg_that_only_pillow_forgives_is_stored_anew(tmp_path: Path, marker: bytes) -> None:
    """FFCV's decoder refuses stray bytes; kept as it is, such a file would never play."""
    image = gradient(90, 120)
    original = jpeg_bytes(image)
    at = original.rindex(marker)
    (tmp_path / "x.jpg").write_bytes(original[:at] + b"\x00" * 5 + original[at:])
    dataset = converted(tmp_path, tmp_path / "x.jpg")
    assert difference(stored(dataset), image) < 2.5
    with Loader(dataset, ViewSpec(8), 1) as loader:
        assert len(list(loader.batches(0))) == 1


@pytest.mark.parametrize(
    ("height", "width", "mode"),
    [(64, 64, RAW), (1, 64, RAW), (64, 65, JPEG), (65, 1, JPEG), (1, 1, RAW), (300, 200, JPEG)],
)
def test_small_images_stay_raw_and_large_ones_become_jpeg(
    tmp_path: Path, height: int, width: int, mode: int
) -> None:
    image = gradient(height, width)
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(image))
    dataset = converted(tmp_path, path, PIL.Image.fromarray(image), image)
    for i in range(3):
        found, sides, _ = payload(dataset, i)
        assert (found, sides) == (mode, (height, width))
        assert difference(stored(dataset, i), image) <= (0 if mode == RAW else 3)


def test_quality_is_a_trade_of_size_for_precision(tmp_path: Path) -> None:
    image = gradient(200, 300) ^ np.random.default_rng(0).integers(0, 32, (200, 300, 1), np.uint8)
    sizes, errors = [], []
    for quality in (10, 95):
        dataset = convert(
            Source(("a",), [image], [0]), tmp_path / f"{quality}.beton", quality=quality
        )[0]
        sizes.append(len(payload(dataset, 0)[2]))
        errors.append(difference(stored(dataset), image))
    assert sizes[0] < sizes[1]
    assert errors[0] > errors[1]


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((200, 100), 50, (50, 25)),
        ((100, 200), 100, (50, 100)),
        ((80, 60), 80, (80, 60)),
        ((80, 60), 5000, (80, 60)),
        ((1000, 2), 100, (100, 1)),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_max_side_shrinks_and_keeps_the_aspect(
    tmp_path: Path, suffix: str, size: tuple[int, int], max_side: int, expected: tuple[int, int]
) -> None:
    image = PIL.Image.fromarray(gradient(size[1], size[0]))
    path = saved(tmp_path, f"x.{suffix}", image)
    dataset = converted(tmp_path, path, max_side_px=max_side)
    mode, (height, width), data = payload(dataset, 0)
    assert (width, height) == expected
    if size == expected and suffix == "jpg":
        assert data == path.read_bytes()
    else:
        assert mode == (RAW if max(expected) <= SMALL_PX else JPEG)
        small = image.resize(expected, PIL.Image.Resampling.BOX)
        assert difference(stored(dataset), np.asarray(small)) < 6


# --- every kind of image


def test_grey_images_get_three_equal_channels(tmp_path: Path) -> None:
    grey = gradient(30, 20)[:, :, 0]
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(grey))
    assert (stored(converted(tmp_path, path)) == grey[:, :, None]).all()


def test_one_bit_images_become_black_and_white(tmp_path: Path) -> None:
    bits = gradient(30, 20)[:, :, 0] > 100
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(bits))
    assert mode_of(path) == "1"
    assert (stored(converted(tmp_path, path)) == bits[:, :, None] * 255).all()


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palettes_are_looked_up(tmp_path: Path, suffix: str) -> None:
    image = PIL.Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "L")
    image.putpalette([*RED, *GREEN, *BLUE])
    path = saved(tmp_path, f"x.{suffix}", image)
    found = stored(converted(tmp_path, path))
    assert found[0].tolist() == [list(c) for c in (RED, GREEN, BLUE, RED)]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_a_transparent_palette_entry_shows_white(tmp_path: Path, suffix: str) -> None:
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L")
    image.putpalette([*RED, *GREEN, *BLUE])
    path = saved(tmp_path, f"x.{suffix}", image, transparency=1)
    found = stored(converted(tmp_path, path))
    assert found[0].tolist() == [list(c) for c in (RED, WHITE, BLUE)]


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.array([[(*RED, 255), (*RED, 0), (*RED, 128), (0, 0, 0, 51)]], np.uint8)
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(pixels))
    found = stored(converted(tmp_path, path))[0].astype(int)
    expected = np.array([RED, WHITE, (255, 127, 127), (204, 204, 204)])
    assert np.abs(found - expected).max() <= 1


def test_grey_with_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.array([[(0, 255), (0, 0), (100, 255), (0, 51)]], np.uint8)
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(pixels, "LA"))
    assert mode_of(path) == "LA"
    found = stored(converted(tmp_path, path))[0].astype(int)
    assert np.abs(found - np.array([0, 255, 100, 204])[:, None]).max() <= 1


def test_a_transparent_colour_of_an_rgb_image_shows_white(tmp_path: Path) -> None:
    pixels = np.array([[RED, GREEN, BLUE]], np.uint8)
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(pixels), transparency=GREEN)
    found = stored(converted(tmp_path, path))
    assert found[0].tolist() == [list(c) for c in (RED, WHITE, BLUE)]


def test_cmyk_jpegs_keep_their_colours(tmp_path: Path) -> None:
    inks = {RED: (0, 255, 255, 0), WHITE: (0, 0, 0, 0), (0, 0, 0): (0, 0, 0, 255)}
    paths = [
        saved(tmp_path, f"{i}.jpg", PIL.Image.new("CMYK", (90, 70), ink), quality=95)
        for i, ink in enumerate(inks.values())
    ]
    dataset = converted(tmp_path, *paths)
    for i, colour in enumerate(inks):
        assert payload(dataset, i)[:2] == (JPEG, (70, 90))
        assert np.abs(stored(dataset, i).astype(int) - colour).max() <= 4


def test_sixteen_bit_grey_is_scaled_not_cut(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 0x7FFF, 0xFF00, 0xFFFF]], np.uint16)
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(values))
    assert mode_of(path).startswith("I")
    found = stored(converted(tmp_path, path))
    assert found[0].tolist() == [[v] * 3 for v in (0, 0, 1, 127, 255, 255)]


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    image = gradient(24, 40)
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, f"x.{suffix}", PIL.Image.fromarray(image), exif=exif)
    dataset = converted(tmp_path, path)
    expected = UPRIGHT[orientation](image)
    assert stored(dataset).shape == expected.shape
    assert difference(stored(dataset), expected) <= (0 if suffix == "png" else 4)
    assert (payload(dataset, 0)[2] == path.read_bytes()) == (suffix == "jpg" and orientation == 1)


def test_an_upright_copy_is_not_turned_again(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.fromarray(gradient(80, 120))
    dataset = converted(tmp_path, saved(tmp_path, "x.jpg", image, exif=exif))
    with PIL.Image.open(io.BytesIO(payload(dataset, 0)[2])) as copy:
        assert copy.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (np.full((4, 4), 0.5, np.float32), "floating-point pixels"),
        (np.full((4, 4), 70_000, np.int32), "32-bit pixels"),
        (np.full((4, 4), -1, np.int32), "32-bit pixels"),
    ],
    ids=["float", "over 16 bit", "negative"],
)
def test_pixels_of_unknown_range_are_refused(
    tmp_path: Path, pixels: np.ndarray, reason: str
) -> None:
    path = saved(tmp_path, "x.tiff", PIL.Image.fromarray(pixels))
    with pytest.raises(UsageError, match=rf"cannot read .*x\.tiff: {reason}"):
        converted(tmp_path, path)


# --- unreadable images


def truncated(path: Path, original: bytes) -> None:
    path.write_bytes(original[: len(original) // 2])


def emptied(path: Path, original: bytes) -> None:
    path.write_bytes(b"")


def replaced_by_text(path: Path, original: bytes) -> None:
    path.write_text("<html>404</html>")


def removed(path: Path, original: bytes) -> None:
    path.unlink()


@pytest.fixture
def six_images(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "images"
    folder.mkdir()
    return [
        saved(folder, f"{i}.{suffix}", PIL.Image.fromarray(gradient(80 + i, 100)))
        for i in range(3)
        for suffix in ("jpg", "png")
    ]


@pytest.mark.parametrize("hurt", [truncated, emptied, replaced_by_text, removed])
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_an_unreadable_image_stops_and_is_named(
    tmp_path: Path, six_images: list[Path], hurt: Callable[[Path, bytes], None], bad: int
) -> None:
    hurt(six_images[bad], six_images[bad].read_bytes())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=rf"cannot read {six_images[bad]}: .*--on-error skip"):
        converted(tmp_path, *six_images)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_no_image_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(UsageError, match=r"cannot read .*x\.jpg: unsupported image format;"):
        converted(tmp_path, path)


@pytest.mark.parametrize("hurt", [truncated, emptied, replaced_by_text, removed])
def test_unreadable_images_can_be_skipped_and_are_reported(
    tmp_path: Path, six_images: list[Path], hurt: Callable[[Path, bytes], None]
) -> None:
    for bad in (0, 3):
        hurt(six_images[bad], six_images[bad].read_bytes())
    source = Source(tuple("abcdef"), six_images, list(range(6)))
    done: list[int] = []
    dataset, report = convert(source, tmp_path / "o.beton", on_error="skip", progress=done.append)
    assert dataset.labels.tolist() == [1, 2, 4, 5]
    assert [side[0] for side in dataset.sides_px.tolist()] == [80, 81, 82, 82]
    assert [line.split(":")[0] for line in report.skipped] == [
        str(six_images[0]),
        str(six_images[3]),
    ]
    assert done == [1, 2, 3, 4, 5, 6]
    assert Reader(str(dataset.path)).num_samples == 4
    with Loader(dataset, ViewSpec(8), 4) as loader:
        assert sum(len(batch) for batch in loader.batches(0)) == 4


@pytest.mark.parametrize("count", [0, 2])
def test_no_readable_image_at_all_is_an_error(tmp_path: Path, count: int) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(count)]
    with pytest.raises(UsageError, match="there is no image to convert"):
        converted(tmp_path, *paths, on_error="skip")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_an_image_over_ffcvs_page_is_named(tmp_path: Path, on_error: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3200, 3200, 3), np.uint8)
    path = saved(tmp_path, "big.png", PIL.Image.fromarray(noise))
    small = gradient(8, 8)
    if on_error == "fail":
        with pytest.raises(UsageError, match=r"big\.png: it takes \d+\.\d MiB .*--max-side"):
            converted(tmp_path, path)
        assert list(tmp_path.iterdir()) == [path]
    else:
        assert len(converted(tmp_path, small, path, small, on_error="skip")) == 2


def test_a_jpeg_over_ffcvs_page_is_encoded_again(tmp_path: Path) -> None:
    picture = gradient(90, 90)
    path = tmp_path / "big.jpg"
    path.write_bytes(jpeg_bytes(picture) + b"\x00" * (8 << 20))
    dataset, report = convert(Source(("a",), [path], [0]), tmp_path / "o.beton")
    assert report.re_encoded == {"more than 8 MiB": 1}
    assert difference(stored(dataset), picture) < 4


def test_an_image_too_wide_for_a_jpeg_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, "wide.png", PIL.Image.new("L", (70_000, 4)))
    with pytest.raises(UsageError, match=r"it is 70000 x 4 px, .* at most 65,500: use --max-side"):
        converted(tmp_path, path)
    assert list(tmp_path.iterdir()) == [path]
    assert converted(tmp_path, path, max_side_px=512).sides_px.tolist() == [[1, 512]]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_max_side_serves_images_above_pillows_limit(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "LARGE_PIXELS", 10_000)
    picture = gradient(700, 900)
    path = saved(tmp_path, f"large.{suffix}", PIL.Image.fromarray(picture))
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
        dataset = converted(tmp_path, path, max_side_px=90)
        assert PIL.Image.MAX_IMAGE_PIXELS == 1000
    assert dataset.sides_px.tolist() == [[70, 90]]
    small = PIL.Image.fromarray(picture).resize((90, 70), PIL.Image.Resampling.LANCZOS)
    assert difference(stored(dataset), np.asarray(small)) < 4


def test_two_do_not_convert_to_one_file(tmp_path: Path) -> None:
    """Of two that are at it at once, one is told of the other, and the file is whole."""
    out, source = tmp_path / "x.beton", open_source("digits", "test")
    told: list[str] = []

    def second(done: int) -> None:
        if done == 1:
            with pytest.raises(UsageError) as caught:
                convert(source, out)
            told.append(str(caught.value))

    convert(source, out, progress=second)
    assert len(told) == 1
    assert told[0].startswith(f"another process converts to {out} (process {os.getpid()} on ")
    assert len(open_dataset(out)) == len(source.labels)
    assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.beton.json"]


def test_what_killed_conversions_left_is_removed(tmp_path: Path) -> None:
    """Whatever their number was, and whoever has it now."""
    for name in (
        "partial-1",
        f"partial-{os.getpid()}",
        "0123abcd.partial",
        "json.01234567.partial",
    ):
        (tmp_path / f"x.beton.{name}").touch()
    (tmp_path / "x.beton.lock").write_text("of a process that was killed")
    convert(open_source("digits", "test"), tmp_path / "x.beton")
    assert sorted(os.listdir(tmp_path)) == ["x.beton", "x.beton.json"]


def test_more_pixels_than_the_stated_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "MAX_PIXELS", 2_000_000)
    path = saved(tmp_path, "x.png", PIL.Image.new("L", (1500, 1500)))
    with pytest.raises(UsageError, match=r"x\.png: it has more than 2 megapixels"):
        converted(tmp_path, path, max_side_px=64)


def test_an_array_without_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read image 1: "):
        converted(tmp_path, gradient(8, 8), np.zeros((0, 5, 3), np.uint8))


# --- the report


def test_the_report_says_why_images_were_encoded_again(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray(gradient(90, 120))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    plain = jpeg_bytes(gradient(90, 120))
    middle = plain.index(b"\xff\xda")
    (tmp_path / "damaged.jpg").write_bytes(plain[:middle] + bytes(3) + plain[middle:])
    images = [
        saved(tmp_path, "plain.jpg", picture),
        saved(tmp_path, "a.png", picture),
        saved(tmp_path, "b.png", picture),
        saved(tmp_path, "cmyk.jpg", picture.convert("CMYK")),
        saved(tmp_path, "turned.jpg", picture, exif=turned),
        tmp_path / "damaged.jpg",
    ]
    report = convert(Source(("a",), images, [0] * 6), tmp_path / "o.beton")[1]
    assert report.re_encoded == {
        "PNG": 2,
        "CMYK JPEG": 1,
        "rotated by EXIF": 1,
        "damaged JPEG data": 1,
    }
    assert report.damaged == [str(tmp_path / "damaged.jpg")]
    assert report.skipped == []


def test_a_jpeg_whose_header_claims_more_rows_than_it_has_is_refused(tmp_path: Path) -> None:
    """Pillow fills the missing rows with grey."""
    data = bytearray(jpeg_bytes(gradient(90, 120)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = (180).to_bytes(2, "big")
    path = tmp_path / "tall.jpg"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"tall\.jpg: its data end before the last of 180 rows"):
        converted(tmp_path, path)


def test_pillows_warnings_have_the_images_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, "x.png", PIL.Image.fromarray(gradient(9, 9)))

    def odd(image: PIL.Image.Image) -> PIL.Image.Image:
        warnings.warn_explicit("it is odd", UserWarning, str(PIL.Image.__file__), 1)
        return image

    monkeypatch.setattr(conversion, "to_rgb", odd)
    with pytest.warns(UserWarning, match="ours"):
        report = convert(Source(("a",), [path], [0]), tmp_path / "o.beton", progress=warn)[1]
    assert report.warnings == [f"{path}: it is odd"]


def warn(done: int) -> None:
    warnings.warn("ours", UserWarning, stacklevel=1)


# --- what no convert writes


def rewritten(dataset: Dataset, change: Callable[[Any, Any, dict[str, Any]], None]) -> Path:
    """The dataset with other tables and a sidecar that fits them, as no accident makes it."""
    metadata, table = beton._read_tables(dataset.path)
    sidecar = json.loads(beton.sidecar_path(dataset.path).read_text())
    change(metadata, table, sidecar)
    names = tuple(sidecar["classes"])
    checksums = np.frombuffer(base64.b64decode(sidecar["checksums"]), np.uint32)
    sidecar["fingerprint"] = beton.content_hash_of(1, names, metadata, table, checksums)
    beton.sidecar_path(dataset.path).write_text(json.dumps(sidecar))
    with dataset.path.open("r+b") as file:
        file.seek(beton.HeaderType.itemsize + beton.field_descriptors().nbytes)
        file.write(metadata.tobytes())
    return dataset.path


def no_rows(metadata: Any, table: Any, sidecar: dict[str, Any]) -> None:
    metadata["f0"]["height"][1] = 0


def another_class(metadata: Any, table: Any, sidecar: dict[str, Any]) -> None:
    metadata["f1"][1] = 7


def absurd_sides(metadata: Any, table: Any, sidecar: dict[str, Any]) -> None:
    metadata["f0"]["height"][1] = metadata["f0"]["width"][1] = 65_535


def short_checksums(metadata: Any, table: Any, sidecar: dict[str, Any]) -> None:
    sidecar["checksums"] = base64.b64encode(bytes(4)).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_rows, "sample 1 has no pixels"),
        (another_class, "sample 1 has a label outside 0 to 0"),
        (absurd_sides, "sample 1 claims more pixels than its bytes can hold"),
        (short_checksums, "2 samples, its sidecar 1"),
    ],
)
def test_tables_that_no_convert_writes_are_refused(
    tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    path = rewritten(converted(tmp_path, gradient(90, 80), gradient(70, 90)), change)
    with pytest.raises(DatasetCorrupt, match=message):
        open_dataset(path)


@pytest.mark.parametrize("height", [40, 100])
def test_a_jpeg_of_another_size_than_was_recorded_is_refused(tmp_path: Path, height: int) -> None:
    """It would leave pixels of the image before, or be cut."""

    def change(metadata: Any, table: Any, sidecar: dict[str, Any]) -> None:
        metadata["f0"]["height"][1] = height

    path = rewritten(converted(tmp_path, gradient(90, 80), gradient(70, 90)), change)
    with Loader(open_dataset(path), ViewSpec(16), 2) as loader:
        with pytest.raises(DatasetCorrupt, match="1 is damaged: its JPEG is of another size"):
            list(loader.batches(0))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"comment": b"x" * 500}])
def test_the_sides_in_a_jpegs_header_are_found(options: dict[str, Any]) -> None:
    data = jpeg_bytes(gradient(70, 90), **options)
    assert render.jpeg_sides(np.frombuffer(data, np.uint8)) == (70, 90)
    for length in (0, 3, 20, 100):
        assert render.jpeg_sides(np.frombuffer(data[:length], np.uint8)) == (0, 0)
    assert render.jpeg_sides(np.full(50, 0xFF, np.uint8)) == (0, 0)


# --- whole or not at all


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.txt", {}, "the output is a .beton file"),
        ("none/x.beton", {}, "no such folder"),
        ("x.beton", {"max_side_px": 0}, "max-side must be at least 1 px"),
        ("x.beton", {"quality": 0}, "quality must be 1 to 100"),
        ("x.beton", {"quality": 101}, "quality must be 1 to 100"),
    ],
)
def test_wrong_arguments_are_refused_before_work(
    tmp_path: Path, name: str, options: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        convert(Source(("a",), [gradient(8, 8)], [0]), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists; remove it or choose another name"):
        converted(tmp_path, gradient(8, 8))
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with pytest.raises(StorageError, match=r"cannot write .*out\.beton: No space left"):
        converted(tmp_path, gradient(8, 8))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted(tmp_path, *[gradient(8, 8)] * 9, progress=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from kdcache.data.convert import convert
from kdcache.data.sources import Source

def progress(done):
    if done == 50:
        print("half", flush=True)
        time.sleep(120)

images = [np.zeros((70, 70, 3), np.uint8)] * 100
convert(Source(("a",), images, [0] * 100), Path(sys.argv[1]), progress=progress)
"""


def test_a_killed_convert_leaves_no_output(tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert not sidecar_path(out).exists()
    assert len(converted(tmp_path, gradient(8, 8))) == 1


# --- damaged files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two JPEGs and two raw images."""
    images = [gradient(8, 8), gradient(90, 70), gradient(64, 3), gradient(70, 90)]
    source = Source(("a", "b"), images, [0, 1, 1, 0])
    return convert(source, tmp_path_factory.mktemp("whole") / "whole.beton")[0]


@pytest.fixture
def copy(whole: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "copy.beton"
    shutil.copy(whole.path, path)
    shutil.copy(sidecar_path(whole.path), sidecar_path(path))
    return path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_the_untouched_copy_opens(copy: Path, whole: Dataset) -> None:
    assert open_dataset(copy).content_hash == whole.content_hash


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such file: .*x\.beton; make it with"):
        open_dataset(tmp_path / "x.beton")
    with pytest.raises(UsageError, match="no such file"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 20])
def test_a_file_shorter_than_a_header_is_refused(copy: Path, size: int) -> None:
    os.truncate(copy, size)
    with pytest.raises(DatasetCorrupt, match=r"is not a \.beton file: it is shorter"):
        open_dataset(copy)


@pytest.mark.parametrize("left", [0.01, 0.5, 0.999, -1])
def test_a_truncated_file_is_refused(copy: Path, left: float) -> None:
    size = copy.stat().st_size
    os.truncate(copy, size - 1 if left < 0 else int(size * left))
    with pytest.raises(DatasetCorrupt, match=rf"is truncated: expected {size} bytes, found"):
        open_dataset(copy)


def test_a_file_that_ends_too_late_is_refused(copy: Path) -> None:
    with copy.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatasetCorrupt, match="expected"):
        open_dataset(copy)


@pytest.mark.parametrize("content", [b"\x89PNG" * 2000, b"\x00" * 10_000, b"hello " * 2000])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(DatasetCorrupt, match=r"is not a \.beton file|has other fields"):
        open_dataset(path)


def test_a_beton_with_other_fields_is_refused(copy: Path) -> None:
    overwrite(copy, HeaderType.itemsize, b"\x07")
    with pytest.raises(DatasetCorrupt, match="has other fields than an image and a label"):
        open_dataset(copy)


def test_a_file_that_was_never_finished_is_refused(copy: Path) -> None:
    _, offset = HeaderType.fields["alloc_table_ptr"]
    overwrite(copy, offset, bytes(8))
    with pytest.raises(DatasetCorrupt, match="was never finished"):
        open_dataset(copy)


@pytest.mark.parametrize("field", ["num_samples", "alloc_table_ptr"])
@pytest.mark.parametrize("value", [1, 2**40, 2**64 - 1])
def test_a_wrong_header_is_refused(copy: Path, field: str, value: int) -> None:
    _, offset = HeaderType.fields[field]
    overwrite(copy, offset, value.to_bytes(8, "little"))
    with pytest.raises(DatasetCorrupt, match="convert the images again"):
        open_dataset(copy)


@pytest.mark.parametrize("column", ["mode", "width", "height", "label"])
def test_a_changed_table_is_refused(copy: Path, column: str) -> None:
    reader = Reader(str(copy))
    metadata = reader.metadata.copy()
    (metadata["f1"] if column == "label" else metadata["f0"][column])[2] ^= 1
    overwrite(copy, HeaderType.itemsize + reader.field_descriptors.nbytes, metadata.tobytes())
    with pytest.raises(DatasetCorrupt, match="do not belong together"):
        open_dataset(copy)


def test_a_changed_size_in_the_last_table_is_refused(copy: Path) -> None:
    reader = Reader(str(copy))
    table = reader.alloc_table.copy()
    table["size"][1] -= 1
    overwrite(copy, int(reader.header["alloc_table_ptr"]), table.tobytes())
    with pytest.raises(DatasetCorrupt, match="do not belong together"):
        open_dataset(copy)


# --- the sidecar


def test_a_missing_sidecar_is_named(copy: Path) -> None:
    sidecar_path(copy).unlink()
    with pytest.raises(UsageError, match=r"has no sidecar copy\.beton\.json"):
        open_dataset(copy)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff\xfe\x00", b'{"classes": 3}', b'"text"'],
)
def test_a_damaged_sidecar_is_named(copy: Path, content: bytes) -> None:
    sidecar_path(copy).write_bytes(content)
    with pytest.raises(DatasetCorrupt, match=r"copy\.beton\.json is damaged"):
        open_dataset(copy)


@pytest.mark.parametrize("checksums", ["*", "AAA", "AAAA", 7, None])
def test_damaged_checksums_are_named(copy: Path, checksums: object) -> None:
    sidecar = json.loads(sidecar_path(copy).read_text())
    sidecar_path(copy).write_text(json.dumps({**sidecar, "checksums": checksums}))
    with pytest.raises(DatasetCorrupt, match="convert the images again"):
        open_dataset(copy)


def flip_a_checksum(sidecar: dict[str, Any]) -> None:
    data = bytearray(base64.b64decode(sidecar["checksums"]))
    data[5] ^= 1
    sidecar["checksums"] = base64.b64encode(data).decode()


def drop_a_checksum(sidecar: dict[str, Any]) -> None:
    data = base64.b64decode(sidecar["checksums"])
    sidecar["checksums"] = base64.b64encode(data[:-4]).decode()


def rename_a_class(sidecar: dict[str, Any]) -> None:
    sidecar["classes"][0] = "other"


def change_the_fingerprint(sidecar: dict[str, Any]) -> None:
    sidecar["fingerprint"] = "0" * 16


@pytest.mark.parametrize(
    "change", [flip_a_checksum, drop_a_checksum, rename_a_class, change_the_fingerprint]
)
def test_a_changed_sidecar_is_refused(copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    sidecar = json.loads(sidecar_path(copy).read_text())
    change(sidecar)
    sidecar_path(copy).write_text(json.dumps(sidecar))
    with pytest.raises(DatasetCorrupt, match="do not belong together"):
        open_dataset(copy)


def test_the_sidecar_of_another_file_is_refused(
    copy: Path, digits: Dataset, tmp_path: Path
) -> None:
    shutil.copy(sidecar_path(digits.path), sidecar_path(copy))
    with pytest.raises(DatasetCorrupt, match="do not belong together"):
        open_dataset(copy)


def test_the_sidecar_of_a_like_file_is_refused(digits: Dataset, tmp_path: Path) -> None:
    """Equally many samples of equal size: only the bytes differ."""
    few = subset(digits, 10, tmp_path / "few.beton")
    whole = open_source("digits", "train")
    other = Source(whole.class_names, whole.images[10:20], whole.labels[:10])
    convert(other, tmp_path / "other.beton")
    shutil.copy(sidecar_path(tmp_path / "other.beton"), sidecar_path(few.path))
    # The sidecar agrees with the file in all that opening reads; the payloads tell.
    opened = open_dataset(few.path)
    with Loader(opened, ViewSpec(8), 10) as loader, pytest.raises(DatasetCorrupt, match="sample"):
        list(loader.batches(0))
