"""`kdcache import`."""

from __future__ import annotations

import time

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import progress_bar, show, warn
from kdcache.cli.precompute import interruptible
from kdcache.interop.options import ImportOptions


def import_logits(options: ImportOptions, output: OutputOptions) -> None:
    """Make a cache of logits that TinyViT saved: one view per epoch, in dataset order."""
    start = time.perf_counter()
    with interruptible(options.out) as stop:
        from kdcache.cache.summary import summarise
        from kdcache.data.beton import open_dataset, require_labels
        from kdcache.interop import tinyvit, tinyvit_reader

        dataset = open_dataset(options.data)
        require_labels(dataset)
        keys = tinyvit_reader.read_keys(options.keys_file) if options.keys_file else None
        with progress_bar("check", len(dataset), "records of an epoch") as update:

            def checking(done: int) -> None:
                stop.check()
                update(done % len(dataset), f"{done:,} records")

            saved = tinyvit_reader.open_saved(options.folder, dataset, keys, checking)
        spec = tinyvit.make_cache_spec(
            saved, dataset, dtype=options.dtype, average=options.average_epochs
        )
        records = spec.num_views * spec.num_samples
        with progress_bar("import", records, "records") as update:

            def importing(done: int) -> None:
                stop.check()
                update(done)

            cache = tinyvit.import_cache(saved, dataset, spec, options.out, importing)
    summary = summarise(cache, dataset.labels)
    assert summary.accuracy is not None
    accuracy = summary.accuracy.own
    if accuracy * len(dataset.class_names) < 2:
        warn(
            [
                f"the largest logit is at the label for {accuracy:.1%} of the samples, hardly more "
                f"than by chance: the images of {options.data}, or its classes, may have another "
                "order than the keys"
            ]
        )
    result = {
        "path": options.out,
        "views": spec.num_views,
        "samples": spec.num_samples,
        "record": spec.codec.describe(spec.num_classes),
        "bytes": summary.stored_bytes,
        "bytes_per_record": round(summary.stored_bytes / records, 2),
        "accuracy": round(accuracy, 4),
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(result, output.as_json)
