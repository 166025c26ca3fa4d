"""`kdcache export`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import progress_bar, show
from kdcache.options import option
from kdcache.paths import require_cache


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    cache: str = option(
        name="C.zarr", help="The cache to export.", positional=True, require=require_cache
    )
    out: Path = option(name="OUT_DIR", help="The folder to create.", positional=True)
    top_k: int | None = option(
        None,
        help="Logits to write per record.",
        default_text="the cache's; 100 if it has all",
        metavar="N",
    )


def export(options: ExportOptions, output: OutputOptions) -> None:
    """Write the records of a cache as TinyViT saves logits: a folder for each view."""
    from kdcache.cache.cache import LogitCache
    from kdcache.interop import tinyvit

    start = time.perf_counter()
    cache = LogitCache.open(options.cache)
    spec = cache.spec
    k = tinyvit.exported_top_k(spec, options.top_k)
    with progress_bar("export", spec.num_views * spec.num_samples, "records") as update:
        written = tinyvit.export(cache, options.out, k, update)
    result = {
        "path": str(options.out),
        "epochs": spec.num_views,
        "samples": spec.num_samples,
        "top_k": k,
        "bytes": written,
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(result, output.as_json)
