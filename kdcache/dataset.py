"""Images to a `.beton` file with a sidecar, and back to a `Dataset` that is known to be whole.

In: a `Source`. Out: OUT.beton, which stock FFCV reads too, and OUT.beton.json with class names and
a CRC-32 of each sample's payload. What stays true: OUT.beton exists only when both files are whole
(written under another name, synced, renamed); equal sources give equal bytes; the fingerprint
depends on the samples alone, not on where they lie in the file.

FFCV itself trains on damaged samples in silence; with the checksums the loader does not.
Cost: opening reads the tables, not the payloads.
"""

from __future__ import annotations

import base64
import ctypes
import glob
import hashlib
import io
import json
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

from kdcache.errors import DatasetCorrupt, StorageError, UsageError
from kdcache.ffcv_import import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    IMAGE_MODES,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    get_metadata_type,
    libffcv,
)
from kdcache.sources import Image, Source
from kdcache.spec import SMALL_PX, OnError, canonical_json

Progress = Callable[[int], None]

FIELDS = {"image": RGBImageField(), "label": IntField()}
METADATA = get_metadata_type(list(FIELDS.values()))
PAGE_BYTES = 8 << 20
SIDECAR_VERSION = 1

_libffcv = ctypes.CDLL(libffcv.__file__)


@dataclass(frozen=True)
class Dataset:
    """A whole `.beton` file and what its sidecar says.

    checksums  CRC-32 of each payload, uint32 [N]; labels int64 [N]; sides_px uint16 [N, 2] are
               heights and widths
    """

    path: Path
    classes: tuple[str, ...]
    fingerprint: str
    checksums: NDArray[np.uint32]
    labels: NDArray[np.int64]
    sides_px: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def natural_size_px(self) -> int:
        """The view size to take when none is asked for: small images keep theirs."""
        side = int(self.sides_px.max())
        return side if side <= SMALL_PX else 224


@dataclass(frozen=True)
class _Payload:
    mode: int
    width: int
    height: int
    data: bytes


def convert(
    source: Source,
    out: Path,
    *,
    max_side_px: int | None = None,
    quality: int = 95,
    on_error: OnError = "fail",
    progress: Progress = lambda done: None,
) -> tuple[Dataset, list[str]]:
    """Write `source` to `out`; the dataset and one line for each image that was skipped.

    JPEGs that need no change keep their bytes. Other images are stored as pixels up to 64 px and
    as JPEG of `quality` above. Raises UsageError for a path that exists or an unreadable image.
    """
    _check_convert(out, max_side_px, quality)
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

        for i, future in _ahead(job, len(source.images)):
            progress(i + 1)
            try:
                yield future.result(), source.labels[i]
            except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
                unknown = isinstance(error, PIL.UnidentifiedImageError)
                line = f"{source.name(i)}: {'Pillow knows no such format' if unknown else error}"
                if on_error == "fail":
                    raise UsageError(
                        f"cannot read {line}; mend or remove it, or use --on-error skip"
                    ) from error
                skipped.append(line)

    try:
        metadata, table, checksums = _write_beton(partial, len(source.images), encoded())
        sidecar = {
            "version": SIDECAR_VERSION,
            "classes": source.classes,
            "samples": len(metadata),
            "fingerprint": _fingerprint(source.classes, metadata, table, checksums),
            "checksums": base64.b64encode(checksums.tobytes()).decode(),
        }
        _write_synced(sidecar_partial, (canonical_json(sidecar) + "\n").encode())
        sidecar_partial.replace(sidecar_path(out))
        partial.replace(out)
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


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def open_dataset(path: Path) -> Dataset:
    """The dataset at `path`. Raises UsageError or DatasetCorrupt, saying what is wrong with it."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}; make it with `kdcache convert SOURCE {path}`")
    metadata, table = _read_tables(path)
    try:
        sidecar = json.loads(sidecar_path(path).read_text())
        if sidecar["version"] != SIDECAR_VERSION:
            raise ValueError(f"version {sidecar['version']}, expected {SIDECAR_VERSION}")
        classes = tuple(map(str, sidecar["classes"]))
        checksums = np.frombuffer(base64.b64decode(sidecar["checksums"]), np.uint32)
        fingerprint = sidecar["fingerprint"]
    except FileNotFoundError:
        raise UsageError(
            f"{path} has no sidecar {sidecar_path(path).name}: make both with `kdcache convert`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetCorrupt(
            f"{sidecar_path(path)} is damaged ({error}): convert the images again"
        ) from error
    if fingerprint != _fingerprint(classes, metadata, table, checksums):
        raise DatasetCorrupt(
            f"{path} and its sidecar do not belong together, or one is damaged: "
            "convert the images again"
        )
    image = metadata["f0"]
    sides = np.stack([image["height"], image["width"]], 1)
    return Dataset(path, classes, fingerprint, checksums, metadata["f1"].astype(np.int64), sides)


def _check_convert(out: Path, max_side_px: int | None, quality: int) -> None:
    if out.suffix != ".beton":
        raise UsageError(f"the output is a .beton file, not {out.name!r}")
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another name")
    if not out.parent.is_dir():
        raise UsageError(f"no such folder: {out.parent}")
    if max_side_px is not None and max_side_px < 1:
        raise UsageError(f"max-side must be at least 1 px, not {max_side_px}")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality must be 1 to 100, not {quality}")


def _ahead(job: Callable[[int], _Payload], count: int) -> Iterator[tuple[int, Future[_Payload]]]:
    """Futures of job(0), job(1) ... in order, a bounded number of them ahead of need."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
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
    descriptors = _field_descriptors()
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
        header = np.zeros(1, HeaderType)
        header[0] = (CURRENT_VERSION, len(FIELDS), PAGE_BYTES, n, end)
        file.seek(0)
        file.write(header.tobytes() + descriptors.tobytes() + metadata.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return metadata, table, checksums


def _field_descriptors() -> NDArray[Any]:
    ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(FIELDS), FieldDescType)
    for descriptor, (name, field) in zip(descriptors, FIELDS.items(), strict=True):
        descriptor["type_id"] = ids[type(field)]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return descriptors


def _read_tables(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Metadata and allocation table, after the checks that FFCV leaves out."""
    size = path.stat().st_size
    descriptors = _field_descriptors()
    tables_start = HeaderType.itemsize + descriptors.nbytes
    with path.open("rb") as file:
        head = file.read(tables_start)
    if len(head) < tables_start:
        raise DatasetCorrupt(f"{path} is not a .beton file: it is shorter than a header")
    header = np.frombuffer(head, HeaderType, 1)[0]
    version, fields, _, samples, table_start = (int(x) for x in header)
    if version != CURRENT_VERSION or fields > 64:
        raise DatasetCorrupt(f"{path} is not a .beton file of version {CURRENT_VERSION}")
    if fields != len(FIELDS) or head[HeaderType.itemsize :] != descriptors.tobytes():
        raise DatasetCorrupt(
            f"{path} has other fields than an image and a label: make it with `kdcache convert`"
        )
    if table_start == 0:
        raise DatasetCorrupt(f"{path} was never finished: convert the images again")
    wanted = table_start + samples * ALLOC_TABLE_TYPE.itemsize
    if size != wanted:
        raise DatasetCorrupt(
            f"{path} is truncated: expected {wanted} bytes, found {size}; convert the images again"
        )
    metadata = np.fromfile(path, METADATA, samples, offset=tables_start)
    table = np.fromfile(path, ALLOC_TABLE_TYPE, offset=table_start)
    return metadata, table


def _fingerprint(
    classes: tuple[str, ...],
    metadata: NDArray[Any],
    table: NDArray[Any],
    checksums: NDArray[np.uint32],
) -> str:
    """Digest of the samples, in order: payload CRC and size, shape, label, class names."""
    h = hashlib.sha256(canonical_json([SIDECAR_VERSION, list(classes)]).encode())
    image = metadata["f0"]
    columns = (checksums, table["size"], image["mode"], image["height"], image["width"])
    for column in (*columns, metadata["f1"]):
        h.update(np.ascontiguousarray(column).astype("<i8").tobytes())
    return h.hexdigest()[:16]


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
