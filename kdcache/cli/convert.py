"""`kdcache convert`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdcache.choices import OnError, Split
from kdcache.cli.options import OutputOptions
from kdcache.cli.output import progress_bar, say, show
from kdcache.options import option
from kdcache.paths import require_new_dataset


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    source: str = option(
        name="SOURCE",
        help="A folder of class folders or of images without labels, fashion-mnist, digits, or "
        "torchvision:NAME.",
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
    allow_empty: bool = option(False, help="Keep classes whose folder holds no image.")


def convert(options: ConvertOptions, output: OutputOptions) -> None:
    """Turn images into a .beton file with a sidecar of checksums."""
    import numpy as np

    from kdcache.data.sources import open_source

    start = time.perf_counter()
    source = open_source(options.source, options.split, allow_empty=options.allow_empty)

    from kdcache.data import convert as conversion

    with progress_bar("convert", len(source.images), "images") as update:
        data, report = conversion.convert(
            source,
            options.out,
            max_side_px=options.max_side,
            quality=options.quality,
            on_error=options.on_error,
            progress=update,
        )
    lines = [
        *(f"skipped {line}" for line in report.skipped),
        *(f"damaged, stored as far as it decodes: {name}" for name in report.damaged),
        *report.warnings,
    ]
    for line in lines:
        say(line)
    per_class = np.bincount(data.labels[data.labels >= 0], minlength=len(data.class_names))
    result = {
        "path": str(options.out),
        "samples": len(data),
        "classes": len(data.class_names),
        "per_class_min": int(per_class.min(initial=len(data))),
        "per_class_max": int(per_class.max(initial=0)),
        "re_encoded": _counts(report.re_encoded, output),
        "damaged": len(report.damaged),
        "skipped": len(report.skipped),
        "ignored": _counts(report.ignored, output),
        "bytes": options.out.stat().st_size,
        "content_hash": data.content_hash,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if not data.class_names:
        del result["per_class_min"], result["per_class_max"]
    show(result, output.as_json)


def _counts(counts: Mapping[str, int], output: OutputOptions) -> dict[str, int] | str:
    """Numbers by reason, the largest first."""
    ordered = dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))
    if output.as_json:
        return ordered
    return ", ".join(f"{count:,} {reason}" for reason, count in ordered.items()) or "0"
