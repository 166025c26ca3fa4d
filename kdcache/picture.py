"""A picture of a tape: samples, the views made of them, and what the teacher said of each view.

In: a tape and its data. Out: a PNG. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.dataset import Dataset
from kdcache.errors import MissingDependency, UsageError
from kdcache.loader import Loader
from kdcache.spec import evaluation_views
from kdcache.tape import Tape
from kdcache.views import MIX_UNIT, position


def draw_views(
    tape: Tape, dataset: Dataset, out: Path, *, samples: list[int], views: list[int], top: int = 3
) -> None:
    """A PNG: a row for each sample, its plain picture, then each view beside the teacher's answer.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib: pip install 'kdcache[plot]'") from error
    spec = tape.spec
    if spec.view is None:
        raise UsageError(f"{tape.url} has views that are not of kdcache's making: nothing to draw")
    names = dataset.classes
    figure = Figure(figsize=(1.9 + 4.1 * len(views), 1.75 * len(samples) + 0.5), dpi=130)
    grid = figure.add_gridspec(
        len(samples), 1 + 2 * len(views), width_ratios=[1.1] + [1.1, 1.25] * len(views),
        hspace=0.55, wspace=0.12, left=0.02, right=0.97, top=0.9, bottom=0.04,
    )  # fmt: skip
    plain_spec = evaluation_views(spec.view.size_px)
    with Loader(dataset, plain_spec, 1) as plain, Loader(dataset, spec.view, 2) as loader:
        for row, sample in enumerate(samples):
            place = position(plain_spec, 0, len(dataset))[sample]
            batch = next(plain.batches(0, np.array([place])))
            axis = figure.add_subplot(grid[row, 0])
            _show(axis, batch.images_BCHW[0], names[int(batch.labels_B[0])], f"sample {sample}")
            for column, view in enumerate(views):
                place = int(position(spec.view, view, len(dataset))[sample])
                pair = np.arange(place & ~1, min((place | 1) + 1, len(dataset)))
                batch = next(loader.batches(view, pair if spec.view.mixup else np.array([place])))
                i = int(np.argmax(batch.samples_B == sample))
                share = int(batch.weights_B[i]) / MIX_UNIT
                mixed = f"+ {share:.0%} {names[int(batch.partners_B[i])]}" if share else ""
                axis = figure.add_subplot(grid[row, 1 + 2 * column])
                _show(axis, batch.images_BCHW[i], f"view {view}" if row == 0 else "", mixed)
                target = tape.target(view, place if spec.order == "position" else sample)
                p, k = target.log_p_BK[0].exp().topk(min(top, target.log_p_BK.shape[1]))
                classes = target.classes_BK[0][k]
                _bars(
                    figure.add_subplot(grid[row, 2 + 2 * column]),
                    p.numpy(),
                    [names[int(c)] for c in classes],
                )
    title = "What the student sees, and what the tape says the teacher answered"
    figure.suptitle(title, y=0.985, fontsize=min(12, 1.5 * figure.get_figwidth()))
    figure.savefig(out)


def _show(axis: Any, image_CHW: torch.Tensor, title: str, caption: str) -> None:
    axis.imshow(image_CHW.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
    axis.set_title(title, fontsize=9, pad=3)
    axis.set_xlabel(caption, fontsize=7.5, labelpad=3)
    axis.set_xticks([])
    axis.set_yticks([])


def _bars(axis: Any, p: NDArray[np.float32], names: list[str]) -> None:
    rows = np.arange(len(p))
    axis.barh(rows, p, height=0.34, color="#3b6ea5")
    for y, (value, name) in enumerate(zip(p, names, strict=True)):
        axis.text(0, y - 0.27, f"{name}  {value:.1%}", fontsize=7.5, va="bottom")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(len(p) - 0.6, -0.85)
    axis.axis("off")
