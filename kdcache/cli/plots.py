"""Pictures: of a cache (samples, their views, what the teacher said of each), and of the settings.

In: a cache and its data, or data alone. Out: a PNG. Needs matplotlib.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache.cache import LogitCache
from kdcache.data.beton import Dataset
from kdcache.data.loader import Loader
from kdcache.errors import MissingDependency, UsageError
from kdcache.views.mixing import MIX_UNIT
from kdcache.views.order import view_order, view_positions
from kdcache.views.settings import SETTINGS, Setting
from kdcache.views.spec import evaluation_view_spec

TEACHER, STUDENT, BOTH = "#c8642a", "#2f6ca8", "#3b8752"  # frames
EPOCHS = 3
SIDE = 3  # an average is shown as a square of so many views a side


def draw_views(
    cache: LogitCache,
    dataset: Dataset,
    out: Path,
    *,
    samples: list[int],
    views: list[int],
    top: int = 3,
) -> None:
    """A PNG: a row for each sample, its plain picture, then each view beside the teacher's answer.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib: pip install 'kdcache[plot]'") from error
    spec = cache.spec
    if spec.view_spec is None:
        raise UsageError(f"{cache.url} has views that are not of kdcache's making: nothing to draw")
    names = dataset.class_names
    figure = Figure(figsize=(1.9 + 4.1 * len(views), 1.75 * len(samples) + 0.5), dpi=130)
    grid = figure.add_gridspec(
        len(samples),
        1 + 2 * len(views),
        width_ratios=[1.1] + [1.1, 1.25] * len(views),
        hspace=0.55,
        wspace=0.12,
        left=0.02,
        right=0.97,
        top=0.9,
        bottom=0.04,
    )
    plain_spec = evaluation_view_spec(spec.view_spec.size_px)
    with Loader(dataset, plain_spec, 1) as plain, Loader(dataset, spec.view_spec, 2) as loader:
        for row, sample in enumerate(samples):
            place = view_positions(plain_spec, 0, len(dataset))[sample]
            batch = next(plain.batches(0, np.array([place])))
            axis = figure.add_subplot(grid[row, 0])
            _show(axis, batch.images_BCHW[0], names[int(batch.labels_B[0])], f"sample {sample}")
            for column, view in enumerate(views):
                place = int(view_positions(spec.view_spec, view, len(dataset))[sample])
                pair = np.arange(place & ~1, min((place | 1) + 1, len(dataset)))
                batch = next(
                    loader.batches(view, pair if spec.view_spec.mixup else np.array([place]))
                )
                i = int(np.argmax(batch.sample_ids_B == sample))
                share = int(batch.mix_weights_B[i]) / MIX_UNIT
                mixed = f"+ {share:.0%} {names[int(batch.partner_labels_B[i])]}" if share else ""
                axis = figure.add_subplot(grid[row, 1 + 2 * column])
                _show(axis, batch.images_BCHW[i], f"view {view}" if row == 0 else "", mixed)
                target = cache.target(view, place if spec.row_order == "view" else sample)
                p, k = target.log_p_BK[0].exp().topk(min(top, target.log_p_BK.shape[1]))
                classes = target.class_ids_BK[0][k]
                _bars(
                    figure.add_subplot(grid[row, 2 + 2 * column]),
                    p.numpy(),
                    [names[int(c)] for c in classes],
                )
    title = "What the student sees, and the teacher's softmax from the cache"
    figure.suptitle(title, y=0.985, fontsize=min(12, 1.5 * figure.get_figwidth()))
    figure.savefig(out)


def draw_setups(dataset: Dataset, out: Path, *, sample: int, size_px: int, seed: int = 0) -> None:
    """A PNG: a row for each setting, what teacher and student see of a sample in three epochs.

    Raises MissingDependency without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib: pip install 'kdcache[plot]'") from error
    figure = Figure(figsize=(11, 1.26 * len(SETTINGS) + 0.75), dpi=100)
    grid = figure.add_gridspec(
        len(SETTINGS),
        1 + 3 * EPOCHS,
        width_ratios=[2.5] + [1, 1, 0.12] * EPOCHS,
        hspace=0.08,
        wspace=0.1,
        left=0.012,
        right=1,
        top=1 - 0.72 / figure.get_figheight(),
        bottom=0.01,
    )
    for row, setting in enumerate(SETTINGS.values()):
        axis = figure.add_subplot(grid[row, 0])
        axis.axis("off")
        axis.text(0, 0.97, setting.name, fontsize=12.5, weight="bold", va="top")
        axis.text(0, 0.77, f"the paper's {setting.paper}", fontsize=9, va="top", color="#666666")
        lines = textwrap.fill(setting.sees, 38)
        axis.text(0, 0.59, lines, fontsize=9, va="top", linespacing=1.25)
        for epoch, (teacher, student) in enumerate(_seen(setting, dataset, sample, size_px, seed)):
            axes = [figure.add_subplot(grid[row, 1 + 3 * epoch + side]) for side in (0, 1)]
            same = teacher.shape == student.shape and bool((teacher == student).all())
            for axis, image, own in zip(axes, (teacher, student), (TEACHER, STUDENT), strict=True):
                _frame(axis, image, BOTH if same else own)
            if row == 0:
                for axis, who in zip(axes, ("teacher", "student"), strict=True):
                    axis.set_title(who, fontsize=10, pad=4)
                axes[0].text(
                    1.05,
                    1.27,
                    f"epoch {epoch}",
                    transform=axes[0].transAxes,
                    fontsize=12,
                    weight="bold",
                    ha="center",
                    va="bottom",
                )
    top = 1 - 0.2 / figure.get_figheight()
    legend = (
        (0.012, "#333333", "Frames:"),
        (0.072, BOTH, "both see it"),
        (0.155, TEACHER, "teacher"),
        (0.219, STUDENT, "student"),
    )
    for x, colour, text in legend:
        figure.text(x, top, text, color=colour, fontsize=9.5, weight="bold", va="center")
    figure.savefig(out)


def _seen(
    setting: Setting, dataset: Dataset, sample: int, size_px: int, seed: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """What teacher and student see of a sample in the first epochs, as pictures [H, W, 3]."""
    student = setting.student_view_spec({"size_px": size_px, "seed": seed}, size_px)
    shown = []
    with Loader(
        dataset, student, 2, teacher_view_spec=setting.teacher_view_spec(student)
    ) as loader:
        for epoch in range(EPOCHS):
            place = int(view_positions(student, epoch, len(dataset))[sample])
            pair = np.arange(place & ~1, min((place | 1) + 1, len(dataset)))
            batch = next(iter(loader.batches(epoch, pair)))
            i = int(np.argmax(batch.sample_ids_B == sample))
            both = (batch.for_teacher[i], batch.images_BCHW[i])
            shown.append((both[0].permute(1, 2, 0).numpy(), both[1].permute(1, 2, 0).numpy()))
    if setting.num_averaged_views:
        mosaic = _mosaic(setting, dataset, sample, size_px, seed)
        return [(mosaic, image) for _, image in shown]
    # A fixed teacher looks once.
    return [(shown[0][0], image) for _, image in shown] if setting.fixed else shown


def _mosaic(
    setting: Setting, dataset: Dataset, sample: int, size_px: int, seed: int
) -> NDArray[np.uint8]:
    """Some of the views that are averaged, in one picture."""
    student = setting.student_view_spec({"size_px": size_px, "seed": seed}, size_px)
    view = setting.cache_view_spec(student)
    gap = max(1, size_px // 24)
    out = np.full(((size_px + gap) * SIDE - gap, (size_px + gap) * SIDE - gap, 3), 255, np.uint8)
    with Loader(dataset, view, 1) as loader:
        for number in range(SIDE**2):
            place = np.flatnonzero(view_order(view, number, len(dataset)) == sample)
            image = next(iter(loader.batches(number, place))).images_BCHW[0].permute(1, 2, 0)
            top, left = (size_px + gap) * (number // SIDE), (size_px + gap) * (number % SIDE)
            out[top : top + size_px, left : left + size_px] = image.numpy()
    return out


def _frame(axis: Any, image: NDArray[np.uint8], colour: str) -> None:
    axis.imshow(image, interpolation="lanczos" if len(image) > 64 else "nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(2.5)


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
