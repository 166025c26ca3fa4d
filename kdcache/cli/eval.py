"""`kdcache eval`."""

from __future__ import annotations

from dataclasses import asdict

from kdcache.cli.options import OutputOptions
from kdcache.cli.output import format_evaluation, progress_bar, show
from kdcache.evaluation.options import EvaluateOptions


def evaluate(options: EvaluateOptions, output: OutputOptions) -> None:
    """Measure accuracy, calibration, and agreement with a teacher."""
    from kdcache.evaluation import evaluate as evaluation
    from kdcache.evaluation.load import load_evaluation_run

    run = load_evaluation_run(options)
    with progress_bar("eval", len(run.dataset), "images") as update:
        found = evaluation.evaluate(
            run.model,
            run.dataset,
            size_px=run.size_px,
            teacher=run.teacher,
            teacher_size_px=run.teacher_size_px,
            batch_size=options.batch_size,
            workers=options.workers,
            progress=update,
        )
    figures = asdict(found)
    text = {"model": options.model, "samples": found.num_samples, **format_evaluation(figures)}
    show(figures if output.as_json else text, output.as_json)
