"""`Estimate`: what a cache will take, and when it pays, from the options of `kdcache plan`.

In: `PlanOptions`. Out: an `Estimate`, measured for some seconds as `planning.py` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kdcache.cache.codecs import bind
from kdcache.cache.fidelity import Fidelity
from kdcache.cache.spec import CacheSpec
from kdcache.models import load
from kdcache.teacher.load import load_precompute_run
from kdcache.training import planning
from kdcache.training.options import PlanOptions
from kdcache.training.planning import Comparison, Plan, Steps

STUDENTS = (1, 2, 5, 10, 50)


@dataclass(frozen=True)
class Estimate:
    """What was found.

    seconds_per_record, records_measured  of the teacher's passes, loading and encoding
    free_bytes                            where the cache would lie; None: not known
    steps, comparisons, break_even_epochs of a student; None, and none, where none is given; the
                                          last is math.inf where a cache never pays
    epochs                                of each student
    fidelity                              of the records; none where they are exact, or draws
    """

    spec: CacheSpec
    plan: Plan
    device: str
    seconds_per_record: float
    records_measured: int
    free_bytes: int | None
    epochs: int
    fidelity: tuple[Fidelity, ...] = ()
    steps: Steps | None = None
    comparisons: tuple[Comparison, ...] = ()
    break_even_epochs: float = math.inf
    warnings: tuple[str, ...] = ()


def estimate(options: PlanOptions) -> Estimate:
    """Raises what `load_precompute_run`, `load_model` and the measured parts raise."""
    records = options.records
    run = load_precompute_run(records)
    spec, device = run.spec, str(run.teacher.device)
    assert spec.view_spec is not None
    student = None
    if options.student:
        student = load.load_model(
            options.student,
            "student",
            num_classes=spec.num_classes,
            size_px=spec.view_spec.size_px,
            device=device,
        )
    tables = run.choice.tables if run.choice else {}
    coder = bind(spec.codec, tables, run.teacher.device)
    measured = planning.record_some(
        run.dataset,
        run.teacher,
        spec,
        coder,
        batch_size=records.batch_size,
        workers=records.workers,
    )
    plan = planning.make_plan(spec, measured, tables)
    epochs = options.epochs or spec.num_averaged_views or spec.num_views
    found = Estimate(
        spec,
        plan,
        device,
        measured.seconds,
        len(measured.records),
        planning.free_bytes(options.out) if options.out else None,
        epochs,
        run.choice.fidelity if run.choice else (),
        warnings=run.warnings,
    )
    if student is None:
        return found
    steps = planning.train_some(
        run.dataset,
        run.teacher,
        student,
        spec,
        coder,
        measured,
        batch_size=records.batch_size,
        workers=records.workers,
    )
    counts = [options.students] if options.students else STUDENTS
    return replace(
        found,
        steps=steps,
        comparisons=tuple(
            planning.compare(spec, plan, steps, students=n, epochs=epochs) for n in counts
        ),
        break_even_epochs=planning.break_even(spec, measured, steps),
    )
