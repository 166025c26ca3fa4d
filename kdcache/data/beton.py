"""Images to a `.beton` file with a sidecar, and back to a `Dataset` that is known to be whole.

In: a `Source`. Out: OUT.beton, which stock FFCV reads too, and OUT.beton.json with class names and
a CRC-32 of each sample's payload. What stays true: OUT.beton exists only when both files are whole
(written under another name, synced, renamed); equal sources give equal bytes; the content_hash
depends on the samples alone, not on where they lie in the file.

FFCV itself trains on damaged samples in silence; with the checksums the loader does not.
Cost: opening reads the tables, not the payloads.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.data.ffcv import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    RGBImageField,
    get_metadata_type,
)
from kdcache.errors import DatasetCorrupt, UsageError
from kdcache.paths import PathLike, require_dataset
from kdcache.spec import canonical_json, parse_json, require_version
from kdcache.views.spec import SMALL_PX

FIELDS = {"image": RGBImageField(), "label": IntField()}
METADATA = get_metadata_type(list(FIELDS.values()))
# FFCV's default. A payload lies within one page.
PAGE_BYTES = 8 << 20
MAX_PIXELS_PER_BYTE = 512
SIDECAR_VERSION = 1


@dataclass(frozen=True)
class Dataset:
    """A complete `.beton` file and its sidecar. Make one with `convert`, or `open_dataset`.

    path          of the .beton file
    class_names   of the labels; () where the images have none
    content_hash  16 hex digits over all samples and class names: what caches and runs know it by
    checksums     uint32 [N], CRC-32 of each sample's payload
    labels        int64 [N], indices into class_names; -1 where there are none
    sides_px      uint16 [N, 2], heights and widths in pixels
    """

    path: Path
    class_names: tuple[str, ...]
    content_hash: str
    checksums: NDArray[np.uint32]
    labels: NDArray[np.int64]
    sides_px: NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def natural_size_px(self) -> int:
        """The default side of a view in pixels: that of small images, else 224."""
        side = int(self.sides_px.max())
        return side if side <= SMALL_PX else 224


def require_labels(dataset: Dataset) -> None:
    """Raises UsageError for images without labels."""
    if not dataset.class_names:
        raise UsageError(
            f"{dataset.path} has no labels: its images were not in class folders; use them with "
            "--mode online or cached, as data to train on"
        )


def sidecar_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def open_dataset(path: PathLike) -> Dataset:
    """The dataset in a .beton file and its sidecar, checked to be whole.

    path   of the .beton file

    Raises UsageError where there is none, DatasetCorrupt where one of the two is truncated, damaged
    or of another file.
    """
    path = Path(path)
    require_dataset(path)
    metadata, table = _read_tables(path)
    try:
        sidecar = parse_json(sidecar_path(path).read_text())
        version = require_version("sidecars", sidecar["version"], SIDECAR_VERSION)
        # The file has kept the names of its first version.
        class_names = tuple(map(str, sidecar["classes"]))
        checksums = np.frombuffer(base64.b64decode(sidecar["checksums"]), np.uint32)
        content_hash = sidecar["fingerprint"]
    except FileNotFoundError:
        raise UsageError(
            f"{path} has no sidecar {sidecar_path(path).name}: make both with `kdcache convert`"
        ) from None
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetCorrupt(
            f"{sidecar_path(path)} is damaged ({error}): convert the images again"
        ) from error
    if content_hash != content_hash_of(version, class_names, metadata, table, checksums):
        raise DatasetCorrupt(
            f"{path} and its sidecar do not belong together, or one is damaged: "
            "convert the images again"
        )
    _require_consistent(path, metadata, table, checksums, len(class_names))
    image = metadata["f0"]
    sides = np.stack([image["height"], image["width"]], 1)
    return Dataset(
        path, class_names, content_hash, checksums, metadata["f1"].astype(np.int64), sides
    )


def _require_consistent(
    path: Path,
    metadata: NDArray[Any],
    table: NDArray[Any],
    checksums: NDArray[np.uint32],
    num_classes: int,
) -> None:
    """Raise DatasetCorrupt for what `convert` cannot have written: compiled code relies on it."""
    image, labels = metadata["f0"], metadata["f1"].astype(np.int64)
    pixels = image["height"].astype(np.int64) * image["width"]
    sizes = table["size"].astype(np.int64)
    least = 0 if num_classes else -1  # without classes, all labels are -1
    wrong = {
        "has no pixels": pixels == 0,
        f"has a label outside {least} to {num_classes - 1}": (labels < least)
        | (labels >= num_classes),
        # A JPEG takes at least a bit for each block of 64 pixels.
        "claims more pixels than its bytes can hold": pixels > MAX_PIXELS_PER_BYTE * sizes,
    }
    if not len(metadata) or len(checksums) != len(metadata):
        raise DatasetCorrupt(
            f"{path} has {len(metadata):,} samples, its sidecar {len(checksums):,}: convert the "
            "images again"
        )
    for what, bad_N in wrong.items():
        if bad_N.any():
            raise DatasetCorrupt(
                f"{path}: sample {int(np.argmax(bad_N))} {what}: convert the images again"
            )


def field_descriptors() -> NDArray[Any]:
    ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    descriptors = np.zeros(len(FIELDS), FieldDescType)
    for descriptor, (name, field) in zip(descriptors, FIELDS.items(), strict=True):
        descriptor["type_id"] = ids[type(field)]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return descriptors


def _read_tables(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Metadata and allocation table, after the checks that FFCV leaves out."""
    size = path.stat().st_size
    descriptors = field_descriptors()
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
    # FFCV's writer fills this in last, and its reader opens a file without it.
    if table_start == 0:
        raise DatasetCorrupt(f"{path} was never finished: convert the images again")
    # FFCV also opens a file whose end is missing, and gives other pixels for what is gone.
    wanted = table_start + samples * ALLOC_TABLE_TYPE.itemsize
    if size != wanted:
        raise DatasetCorrupt(
            f"{path} is truncated: expected {wanted} bytes, found {size}; convert the images again"
        )
    metadata = np.fromfile(path, METADATA, samples, offset=tables_start)
    table = np.fromfile(path, ALLOC_TABLE_TYPE, offset=table_start)
    return metadata, table


def content_hash_of(
    version: int,
    class_names: tuple[str, ...],
    metadata: NDArray[Any],
    table: NDArray[Any],
    checksums: NDArray[np.uint32],
) -> str:
    """16 hex digits over the samples, in order: payload CRC and size, shape, label, class names.

    version   of the sidecar, which says how
    """
    h = hashlib.sha256(canonical_json([version, list(class_names)]).encode())
    image = metadata["f0"]
    columns = (checksums, table["size"], image["mode"], image["height"], image["width"])
    for column in (*columns, metadata["f1"]):
        # One type and byte order for all columns, so that the hash does not depend on the tables'
        # own.
        h.update(np.ascontiguousarray(column).astype("<i8").tobytes())
    return h.hexdigest()[:16]
