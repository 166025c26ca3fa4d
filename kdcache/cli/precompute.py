"""The commands about caches: parse, compose the library, print. `cli` puts them into the app.

Heavy modules are imported in the commands that use them.
"""

from __future__ import annotations

import re
import time
from typing import Annotated

import typer

from kdcache.cache.setting import cache_setting_name
from kdcache.cli.output import (
    AreaOption,
    AverageOption,
    BatchOption,
    CropOption,
    DataOption,
    DeviceOption,
    DrawTemperatureOption,
    DtypeOption,
    FlipOption,
    JsonOption,
    MixupOption,
    NumDrawsOption,
    OrderOption,
    PrecisionOption,
    SettingOption,
    SizeOption,
    TeacherOption,
    TopKOption,
    UnlabeledOption,
    ViewSeedOption,
    ViewsOption,
    WorkersOption,
    class_names_of,
    device_of,
    given_view,
    interruptible,
    progress_bar,
    rank,
    show,
    stopped,
    teacher_and_spec,
)
from kdcache.errors import UsageError


def precompute(
    data: DataOption,
    teacher: TeacherOption,
    out: Annotated[str, typer.Option(help="The cache to make or finish: a folder, or s3://...")],
    setting: SettingOption = None,
    unlabeled: UnlabeledOption = False,
    views: ViewsOption = 1,
    top_k: TopKOption = None,
    dtype: DtypeOption = "float16",
    row_order: OrderOption = None,
    average_views: AverageOption = 0,
    num_draws: NumDrawsOption = 0,
    temperature: DrawTemperatureOption = 1.0,
    view_seed: ViewSeedOption = None,
    size: SizeOption = None,
    crop: CropOption = None,
    min_scale: AreaOption = None,
    flip: FlipOption = None,
    mixup: MixupOption = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="i/n: do only the i-th of n parts; jobs for all n make the cache. Under torchrun, "
            "each process takes its share.  [default: all]"
        ),
    ] = None,
    precision: PrecisionOption = "float32",
    batch_size: BatchOption = 256,
    workers: WorkersOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher over views of the data and store its answers on a cache."""
    start = time.perf_counter()
    number, processes = rank()
    job = _part(part)
    mine = job[0] * processes + number, job[1] * processes
    with interruptible(lambda: stopped(out)) as check:
        from kdcache.data import beton as datasets
        from kdcache.teacher import precompute as recording

        dataset = datasets.open_dataset(data)
        model, spec = teacher_and_spec(
            dataset,
            teacher,
            given_view(view_seed, size, crop, min_scale, flip, mixup),
            device_of(device),
            precision,
            num_views=views,
            top_k=top_k,
            dtype=dtype,
            row_order=row_order,
            num_averaged_views=average_views,
            sampled=num_draws,
            temperature=temperature,
            setting=setting,
            unlabeled=unlabeled,
        )
        rows = spec.num_views * spec.num_samples
        with progress_bar("precompute", rows // mine[1], "records") as update:

            def progress(done: int) -> None:
                check()
                update(done)

            cache = recording.precompute(
                dataset,
                model,
                spec,
                out,
                batch_size=batch_size,
                workers=workers,
                part=mine,
                class_names=class_names_of(teacher) if unlabeled else None,
                progress=progress,
            )
            if number > 0:
                return
            recording.wait_for_parts(cache, *job, progress)
    stored, missing = cache.stored_bytes(), cache.missing()
    answer = {
        "path": out,
        "setting": cache_setting_name(spec),
        "views": spec.num_views,
        "samples": spec.num_samples,
        "record": spec.codec.describe(spec.num_classes),
        "bytes": stored,
        "bytes_per_record": None if missing else round(stored / rows, 2),
        "shards_missing": len(missing),
        "seconds": round(time.perf_counter() - start, 2),
    }
    show(answer, as_json)


def _part(text: str | None) -> tuple[int, int]:
    """(i, n), i from 0, of "i/n"; all of it where none is given."""
    if text is None:
        return 0, 1
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f"--part is i/n with i from 1 to n, such as 1/4, not {text!r}")
    return int(found[1]) - 1, int(found[2])
