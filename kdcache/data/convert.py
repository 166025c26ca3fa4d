"""Images to a `.beton` file with a sidecar."""

from __future__ import annotations

import base64
import ctypes
import glob
import io
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Payload:
    mode: int
    width: int
    height: int
    data: bytes


def convert(
    source: Source | str,
    out: PathLike,
    *,
    max_side_px: int | None = None,
    quality: int = 95,
    on_error: OnError = "fail",
    progress: Progress = lambda done: None,
) -> tuple[Dataset, list[str]]:
    """Write images to a .beton file with a sidecar: the dataset, and a line for each skipped image.

    source       what `open_source` gives, or its name: the training split
    out          path of the .beton file, which must not exist; the sidecar is `out` + ".json"
    max_side_px  images whose longer side is above this many pixels are made smaller; None: none
    quality      1 to 100, of images that have to be re-encoded as JPEG
    on_error     what an unreadable image does: "fail", or "skip"
    progress     is called with the number of images done so far

    JPEGs that need no change keep their bytes. Other images are stored as pixels up to 64 px and
    as JPEG above. Raises UsageError for a path that exists or an unreadable image, StorageError.
    """
    out = Path(out)
    require_new_dataset(out)
    _require_limits(max_side_px, quality)
    if isinstance(source, str):
        source = open_source(source)
    _remove_abandoned(out)
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    sidecar_partial = sidecar_path(partial)
    skipped: list[str] = []

    def encoded() -> Iterator[tuple[_Payload, int]]:
        def job(i: int) -> _Payload:
            payload = _encode(source.images[i], max_side_px, quality)
            if len(payload.data) > PAGE_BYTES:
                raise ValueError(
                    f"it takes {len(payload.data) / 2**20:.1f} MiB and FFCV holds at most "
                    f"{PAGE_BYTES >> 20}: use --max-side or a lower --quality"
                )
            return payload

        for i, future in _encode_ahead(job, len(source.images)):
            progress(i + 1)
            try:
                yield future.result(), source.labels[i]
            except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                unknown = isinstance(error, PIL.UnidentifiedImageError)
                line = f"{source.name(i)}: {'unsupported image format' if unknown else error}"
                if on_error == "fail":
                    raise UsageError(
                        f"cannot read {line}; repair or remove it, or use --on-error skip"
                    ) from error
                skipped.append(line)

    try:
        metadata, table, checksums = _write_beton(partial, len(source.images), encoded())
        sidecar = {
            "version": SIDECAR_VERSION,
            "classes": source.class_names,
            "samples": len(metadata),
            "fingerprint": content_hash_of(
                SIDECAR_VERSION, source.class_names, metadata, table, checksums
            ),
            "checksums": base64.b64encode(checksums.tobytes()).decode(),
        }
        sidecar_partial.write_bytes((canonical_json(sidecar) + "\n").encode())
        files.sync_file(partial)  # both are on the disk before either gets its name
        files.commit_file(sidecar_partial, sidecar_path(out))
        files.commit_file(partial, out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
        sidecar_partial.unlink(missing_ok=True)
    return open_dataset(out), skipped


def _remove_abandoned(out: Path) -> None:
    """Delete what killed conversions to the same path have left."""
    for partial in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        owner = partial.name.removesuffix(".json").rpartition("-")[2]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            partial.unlink(missing_ok=True)


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
    if isinstance(image, Path):
        original = image.read_bytes()
        with PIL.Image.open(io.BytesIO(original)) as opened:
            fits = max_side_px is None or max(opened.size) <= max_side_px
            # 0x0112 is EXIF's orientation, by which FFCV's decoder does not turn an image.
            upright = opened.getexif().get(0x0112, 1) == 1
            plain = opened.format == "JPEG" and opened.mode in ("RGB", "L")
            if plain and fits and upright and _ffcv_decodes(original, *opened.size):
                return _Payload(IMAGE_MODES["jpg"], *opened.size, original)
            opened.load()
            picture = to_rgb(PIL.ImageOps.exif_transpose(opened))
    elif isinstance(image, PIL.Image.Image):
        picture = to_rgb(image)
    else:
        picture = PIL.Image.fromarray(image).convert("RGB")
    if max_side_px is not None and max(picture.size) > max_side_px:
        picture.thumbnail((max_side_px, max_side_px), PIL.Image.Resampling.LANCZOS)
    if max(picture.size) <= SMALL_PX:
        return _Payload(IMAGE_MODES["raw"], *picture.size, picture.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return _Payload(IMAGE_MODES["jpg"], *picture.size, buffer.getvalue())


def _ffcv_decodes(jpeg: bytes, width: int, height: int) -> bool:
    """Whether FFCV's decoder has no complaint; it has where Pillow forgives stray bytes."""
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
