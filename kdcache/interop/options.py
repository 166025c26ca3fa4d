"""The options of `kdcache import`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcache.choices import ValueType
from kdcache.options import data_option, option
from kdcache.paths import require_file, require_folder


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """A folder of saved logits, and the cache that is made of it."""

    folder: Path = option(
        name="DIR",
        help="The folder in which TinyViT saved logits.",
        positional=True,
        require=require_folder,
    )
    out: str = option(name="OUT.zarr", help="The cache to create or to complete.", positional=True)
    data: Path = data_option()
    average_epochs: bool = option(False, help="Store one view: the mean of all epochs.")
    keys_file: Path | None = option(
        None,
        help="A file with the key of each sample, one per line.",
        default_text="keys are indices",
        metavar="PATH",
        require=require_file,
    )
    dtype: ValueType = option("float16", help="Format of a stored logit.")
