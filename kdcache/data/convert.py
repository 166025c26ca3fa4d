"""Images to a `.beton` file with a sidecar, and a report of what became of them."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import io
import os
import threading
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from kdcache import files
from kdcache.choices import OnError
from kdcache.data.beton import (
    FIELDS,
    METADATA,
    PAGE_BYTES,
    SIDECAR_VERSION,
    Dataset,
    content_hash_of,
    field_descriptors,
    open_dataset,
    sidecar_path,
)
from kdcache.data.ffcv import ALLOC_TABLE_TYPE, CURRENT_VERSION, IMAGE_MODES, HeaderType, libffcv
from kdcache.data.sources import Image, Source, open_source
from kdcache.errors import StorageError, UsageError
from kdcache.paths import PathLike, require_new_dataset
from kdcache.spec import canonical_json
from kdcache.views.spec import SMALL_PX

Progress = Callable[[int], None]

_libffcv = ctypes.CDLL(libffcv.__file__)
# TurboJPEG's, to which FFCV is linked: why its last call in this thread failed.
_libffcv.tjGetErrorStr.restype = ctypes.c_char_p

MAX_JPEG_SIDE_PX = 65_500
MAX_PIXELS = 500_000_000
# Of larger images one is decoded at a time: 500 megapixels take 2 GB.
LARGE_PIXELS = 50_000_000
DAMAGED = "damaged JPEG data"
_large_images = threading.Lock()


@dataclass(frozen=True)
class ConvertReport:
    """What became of the images.

    skipped     a line for each unreadable image
    damaged     paths of JPEGs with damaged data that could be decoded in part or with a warning;
                what was decoded is stored
    re_encoded  numbers of images that were not stored as they are, by reason
    ignored     numbers of files and folders that are no images, by reason or file extension
    warnings    Pillow's, each with the path of the image
    """

    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    re_encoded: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Payload:
    """reason   why it is not the file's own bytes"""

    mode: int
    width: int
    height: int
    data: bytes
    reason: str = ""


def convert(
    source: Source | str,
    out: PathLike,
    *,
    max_side_px: int | None = None,
    quality: int = 95,
    on_error: OnError = "fail",
    progress: Progress = lambda done: None,
) -> tuple[Dataset, ConvertReport]:
    """Write images to a .beton file with a sidecar: the dataset, and what became of the images.

    source       what `open_source` gives, or its name: the training split
    out          path of the .beton file, which must not exist; the sidecar is `out` + ".json"
    max_side_px  images whose longer side is above this many pixels are made smaller; None: none
    quality      1 to 100, of images that have to be re-encoded as JPEG
    on_error     what an unreadable image does: "fail", or "skip"
    progress     is called with the number of images done so far

    JPEGs that need no change keep their bytes. Other images are stored as pixels up to 64 px and
    as JPEG above. Images have at most 500 megapixels. Raises UsageError for a path that exists or
    an unreadable image, StorageError.
    """
    out = Path(out)
    require_new_dataset(out)
    _require_limits(max_side_px, quality)
    if isinstance(source, str):
        source = open_source(source)
    skipped: list[str] = []
    damaged: list[str] = []
    re_encoded: Counter[str] = Counter()
    warned: set[str] = set()
    image = threading.local()

    def job(i: int) -> _Payload:
        image.name = source.name(i)
        payload = _encode(source.images[i], max_side_px, quality)
        if len(payload.data) > PAGE_BYTES:
            raise ValueError(
                f"it takes {len(payload.data) / 2**20:.1f} MiB as a JPEG of quality {quality}, and "
                f"FFCV holds at most {PAGE_BYTES >> 20}: use --max-side or a lower --quality"
            )
        return payload

    def encoded() -> Iterator[tuple[_Payload, int]]:
        for i, future in _encode_ahead(job, len(source.images)):
            progress(i + 1)
            try:
                payload = future.result()
            except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                line = f"{source.name(i)}: {_explain(error)}"
                if on_error == "fail":
                    raise UsageError(
                        f"cannot read {line}; repair or remove it, or use --on-error skip"
                    ) from error
                skipped.append(line)
                continue
            if payload.reason:
                re_encoded[payload.reason] += 1
            if payload.reason == DAMAGED:
                damaged.append(source.name(i))
            yield payload, source.labels[i]

    try:
        with _alone(out), files.replace_file(out) as beton:
            # Within: the sidecar gets its name first, and both are on the disk by then.
            with files.replace_file(sidecar_path(out)) as sidecar:
                with _pillow_reports(lambda text: warned.add(f"{image.name}: {text}")):
                    tables = _write_beton(beton, len(source.images), encoded())
                sidecar.write_text(_sidecar(source.class_names, *tables))
                files.sync_file(beton)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    report = ConvertReport(skipped, damaged, re_encoded, source.ignored, sorted(warned))
    return open_dataset(out), report


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within, no other process converts to this path, and what killed ones left is removed."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.hold(out.with_name(out.name + files.LOCK)))
        except files.Taken as taken:
            raise UsageError(
                f"another process converts to {out} ({taken}): wait for it, or choose another name"
            ) from None
        require_new_dataset(out)  # again: it may have ended just now
        files.remove_abandoned(out.parent, out.name)
        yield


def _sidecar(
    class_names: Sequence[str],
    metadata: NDArray[Any],
    table: NDArray[Any],
    checksums: NDArray[np.uint32],
) -> str:
    names = tuple(class_names)
    content = {
        "version": SIDECAR_VERSION,
        "classes": names,
        "samples": len(metadata),
        "fingerprint": content_hash_of(SIDECAR_VERSION, names, metadata, table, checksums),
        "checksums": base64.b64encode(checksums.tobytes()).decode(),
    }
    return canonical_json(content) + "\n"


@contextmanager
def _pillow_reports(warn: Callable[[str], object]) -> Iterator[None]:
    """Let Pillow open images up to MAX_PIXELS, and pass on its warnings; for the whole process."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    # Pillow warns from its limit on, and refuses from twice that.
    PIL.Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    try:
        with warnings.catch_warnings():
            show = warnings.showwarning

            def pass_on(message: Warning | str, *args: Any, **options: Any) -> None:
                if _is_pillows(str(args[1])):
                    warn(str(message))
                else:
                    show(message, *args, **options)

            warnings.filterwarnings("always", module=r"PIL\b")
            warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
            warnings.showwarning = pass_on
            yield
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit


def _is_pillows(filename: str) -> bool:
    return Path(filename).parent == Path(PIL.__file__).parent


def _explain(error: BaseException) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "unsupported image format"
    if isinstance(error, PIL.Image.DecompressionBombError):
        return f"it has more than {MAX_PIXELS // 10**6} megapixels"
    return str(error)


def _require_limits(max_side_px: int | None, quality: int) -> None:
    if max_side_px is not None and max_side_px < 1:
        raise UsageError(f"max-side must be at least 1 px, not {max_side_px}")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality must be 1 to 100, not {quality}")


def _encode_ahead(
    job: Callable[[int], _Payload], count: int
) -> Iterator[tuple[int, Future[_Payload]]]:
    """Futures of job(0), job(1) ... in order, a bounded number of them ahead of need."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        # In order, so that equal sources give equal bytes for any number of workers; and bounded,
        # as encoded images wait in memory until they are written.
        running: deque[tuple[int, Future[_Payload]]] = deque()
        try:
            for i in range(count):
                running.append((i, pool.submit(job, i)))
                if len(running) > 8 * workers:
                    yield running.popleft()
            while running:
                yield running.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _encode(image: Image, max_side_px: int | None, quality: int) -> _Payload:
    reason = ""
    if isinstance(image, Path):
        original = image.read_bytes()
        with PIL.Image.open(io.BytesIO(original)) as opened:
            reason = _reason_to_encode(opened, original, max_side_px)
            if not reason:
                return _Payload(IMAGE_MODES["jpg"], *opened.size, original)
            picture = _decode(opened, max_side_px)
    elif isinstance(image, PIL.Image.Image):
        picture = to_rgb(image)
    else:
        picture = PIL.Image.fromarray(image).convert("RGB")
    if max_side_px is not None and max(picture.size) > max_side_px:
        picture.thumbnail((max_side_px, max_side_px), PIL.Image.Resampling.LANCZOS)
    if not min(picture.size):
        raise ValueError(f"it has no pixels: {picture.width} x {picture.height}")
    if max(picture.size) <= SMALL_PX:
        return _Payload(IMAGE_MODES["raw"], *picture.size, picture.tobytes(), reason)
    if max(picture.size) > MAX_JPEG_SIDE_PX:
        raise ValueError(
            f"it is {picture.width} x {picture.height} px, and a side of a JPEG has at most "
            f"{MAX_JPEG_SIDE_PX:,}: use --max-side"
        )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return _Payload(IMAGE_MODES["jpg"], *picture.size, buffer.getvalue(), reason)


def _reason_to_encode(opened: PIL.Image.Image, original: bytes, max_side_px: int | None) -> str:
    """Why the file's bytes are not stored as they are; "" where they are."""
    if opened.format != "JPEG":
        return str(opened.format)
    if opened.mode not in ("RGB", "L"):
        return f"{opened.mode} JPEG"
    if max_side_px is not None and max(opened.size) > max_side_px:
        return "larger than --max-side"
    # 0x0112 is EXIF's orientation, by which FFCV's decoder does not turn an image.
    if opened.getexif().get(0x0112, 1) != 1:
        return "rotated by EXIF"
    if len(original) > PAGE_BYTES:
        return f"more than {PAGE_BYTES >> 20} MiB"
    return "" if _ffcv_decodes(original, *opened.size) else DAMAGED


def _decode(opened: PIL.Image.Image, max_side_px: int | None) -> PIL.Image.Image:
    """Upright, as RGB."""
    if opened.width * opened.height <= LARGE_PIXELS:
        opened.load()
        return to_rgb(PIL.ImageOps.exif_transpose(opened))
    with _large_images:
        if max_side_px is not None:
            # JPEGs at a half, a quarter or an eighth of their size, but no smaller than this.
            opened.draft("RGB", (2 * max_side_px, 2 * max_side_px))
            opened.load()
            opened.thumbnail((2 * max_side_px, 2 * max_side_px), PIL.Image.Resampling.BOX)
        return to_rgb(PIL.ImageOps.exif_transpose(opened))


def _ffcv_decodes(jpeg: bytes, width: int, height: int) -> bool:
    """Whether FFCV's decoder has no complaint; it has where Pillow forgives stray bytes.

    Raises ValueError where the data end before the last row, which Pillow fills with grey.
    """
    pixels, u32 = np.empty((height, width, 3), np.uint8), ctypes.c_uint32
    sides = (u32(height), u32(width))
    status = _libffcv.imdecode(
        jpeg,
        ctypes.c_uint64(len(jpeg)),
        *sides,
        ctypes.c_void_p(pixels.ctypes.data),
        *sides,
        u32(0),
        u32(0),
        u32(1),
        u32(1),
        ctypes.c_bool(False),
        ctypes.c_bool(False),
    )
    if status != 0 and b"remature end" in (_libffcv.tjGetErrorStr() or b""):
        raise ValueError(f"its data end before the last of {height} rows")
    return bool(status == 0)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any still image as 8-bit RGB: transparency over white, 16-bit grey scaled rather than cut."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels have no known range")
        return PIL.Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        return PIL.Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _write_beton(
    path: Path, capacity: int, encoded: Iterator[tuple[_Payload, int]]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.uint32]]:
    """The file, its tables and checksums. Payloads never cross a page, as FFCV's format wants."""
    descriptors = field_descriptors()
    metadata = np.zeros(capacity, METADATA)
    table = np.zeros(capacity, ALLOC_TABLE_TYPE)
    checksums = np.zeros(capacity, np.uint32)
    tables_start = HeaderType.itemsize + descriptors.nbytes
    end = -(-(tables_start + metadata.nbytes) // PAGE_BYTES) * PAGE_BYTES
    n = 0
    with path.open("wb") as file:
        for payload, label in encoded:
            size = len(payload.data)
            if end % PAGE_BYTES + size > PAGE_BYTES:
                end = -(-end // PAGE_BYTES) * PAGE_BYTES
            metadata["f0"][n] = (payload.mode, payload.width, payload.height, end)
            metadata["f1"][n] = label
            table[n] = (n, end, size)
            checksums[n] = zlib.crc32(payload.data)
            file.seek(end)
            file.write(payload.data)
            end += size
            n += 1
        if n == 0:
            raise UsageError("there is no image to convert")
        metadata, table, checksums = metadata[:n], table[:n], checksums[:n]
        file.seek(end)
        file.write(table.tobytes())
        # The header last: a file without the table's address counts as never finished.
        header = np.zeros(1, HeaderType)
        header[0] = (CURRENT_VERSION, len(FIELDS), PAGE_BYTES, n, end)
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
    return metadata, table, checksums
