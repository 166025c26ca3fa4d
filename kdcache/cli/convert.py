"""`kdcache convert`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kdcache.choices import OnError, Split
from kdcache.cli.options import OutputOptions
from kdcache.cli.output import err_console, progress_bar, show
from kdcache.options import option
from kdcache.paths import require_new_dataset


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    source: str = option(
        name="SOURCE",
        help="A folder of class folders, fashion-mnist, digits, or torchvision:NAME.",
        positional=True,
    )
    out: Path = option(
        name="OUT.beton", help="The file to create.", positional=True, require=require_new_dataset
    )
    split: Split = option("train", help="Part of the dataset.")
    max_side: int | None = option(
        None, help="Shrink images whose longer side is above this.", metavar="PX"
    )
    quality: int = option(
        95,
        help="Quality of images that have to be re-encoded; other JPEGs are stored unchanged.",
        metavar="N",
    )
    on_error: OnError = option("fail", help="What to do about an unreadable image.")


def convert(options: ConvertOptions, output: OutputOptions) -> None:
    """Turn images into a .beton file with a sidecar of checksums."""
    from kdcache.data.sources import open_source

    start = time.perf_counter()
    source = open_source(options.source, options.split)

    from kdcache.data import convert as conversion

    with progress_bar("convert", len(source.images), "images") as update:
        data, skipped = conversion.convert(
            source,
            options.out,
            max_side_px=options.max_side,
            quality=options.quality,
            on_error=options.on_error,
            progress=update,
        )
    for line in skipped:
        err_console().print(f"skipped {line}", markup=False, soft_wrap=True)
    result = {
        "path": str(options.out),
        "samples": len(data),
        "classes": len(data.class_names),
        "skipped": len(skipped),
        "bytes": options.out.stat().st_size,
        "content_hash": data.content_hash,
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(result, output.as_json)
