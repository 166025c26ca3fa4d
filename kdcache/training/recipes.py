"""Recipes: named settings of training, each a function that returns them; and what they cost.

In: a recipe's name, or a function of this file and a length. Out: a `Recipe`, whose `spec` is what
training takes. The paper's (Beyer et al. 2022, arXiv 2106.05237) follow its authors' published
configurations, in google-research/big_vision, big_vision/configs/proj/distill: bit_i1k.py,
bigsweep_flowers_pet.py and bigsweep_food_sun.py. `docs/recipes.md` says where ours differ.

All of the paper's are function matching: one inception crop of 5 to 100 % of the image and one
mirroring for both, mixed by Beta(1, 1); Adam with decoupled weight decay; a linear warm-up, then a
cosine to 0; the teacher alone, without labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch

from kdcache.batch import Batch, dense_target
from kdcache.cache.codecs import Dense, record_bytes
from kdcache.choices import RecordName
from kdcache.errors import MissingDependency, UsageError, did_you_mean
from kdcache.losses.loss import Distillation
from kdcache.models import load
from kdcache.teacher.calibration import DENSE_CLASSES
from kdcache.training.spec import TrainSpec
from kdcache.training.state import State
from kdcache.training.step import train_step
from kdcache.views.spec import ViewSpec

Length = Literal["fast", "medium", "long"]

BIT_R50 = "timm:resnetv2_50x1_bit"
BIT_R152 = "timm:resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k"
# What `precompute --record auto --temperature T` takes for a record of EfficientNet-Lite0's 1,000
# classes, of mixed views (docs/record-codecs.md): bytes by T, stored. Other teachers differ.
TRANSFORMED_BYTES = {1: 55, 2: 175, 5: 238}
MEASURE_S, MEASURE_STEPS = 2.0, 2
MEASURE_PIXELS = {"cpu": 2 * 224**2, "cuda": 128 * 224**2}  # of a batch


@dataclass(frozen=True)
class Data:
    """The data that a recipe is for; `part` says which images."""

    part: str
    num_samples: int
    num_classes: int


@dataclass(frozen=True)
class Recipe:
    """student, teacher   names of models; teacher None: one that you train for your data
    evaluation   how its authors measure, and what is known to come of it
    """

    name: str
    spec: TrainSpec
    student: str
    teacher: str | None
    data: Data
    evaluation: str


@dataclass(frozen=True)
class Cost:
    """What a run takes, and a cache with every view of it, as precompute makes it by default.

    record         dense (float16), or transformed where that should take less
    record_bytes   dense: before compression; transformed: an estimate, from TRANSFORMED_BYTES
    """

    num_samples: int
    num_classes: int
    steps: int
    num_views: int
    record: RecordName
    record_bytes: int
    cache_bytes: int


def to_pytorch_weight_decay(wd: float, lr: float) -> float:
    """PyTorch's weight_decay that shrinks a weight as the paper's wd does.

    Theirs (big_vision/optax.py, `make`) adds wd * w after the learning rate has been applied and
    before the schedule s is: w -= s (lr * adam + wd * w). PyTorch: w -= s lr (adam + decay * w).
    """
    return float(f"{wd / lr:.6g}")


def imagenet_r50(length: Length) -> Recipe:
    """ImageNet-1k: bit_i1k.py, with 300 epochs, its 1200, or 9600 as in the paper's longest run."""
    epochs = {"fast": 300, "medium": 1200, "long": 9600}[length]
    return _paper(
        f"imagenet-r50-{length}",
        Data("train[:98%]", round(0.98 * 1_281_167), 1000),
        224,
        4096,
        epochs,
        temperature=1,
        lr=0.03,
        wd=3e-4,
        warmup=5000,
        teacher=BIT_R152,
        evaluation="val, centre 224 of 256 px; the paper's best is 82.8 %, from two teachers",
    )


def flowers(length: Length) -> Recipe:
    """Flowers-102, from 1,020 images. The batch is 510 where theirs is 512: a half, where ours
    leaves out what fills no batch and theirs goes on into the next epoch."""
    epochs, temperature, lr, wd = {
        "fast": (10_000, 10, 3e-3, 3e-4),
        "medium": (100_000, 1, 1e-3, 1e-4),
        "long": (1_000_000, 1, 3e-4, 1e-5),
    }[length]
    return _small(f"flowers-{length}", Data("train", 1020, 102), 510, epochs, temperature, lr, wd)


def pet(length: Length) -> Recipe:
    """Oxford-IIIT Pet."""
    epochs, temperature, lr, wd = {
        "fast": (1000, 5, 1e-2, 1e-3),
        "medium": (3000, 10, 3e-3, 3e-4),
        "long": (30_000, 2, 3e-3, 1e-5),
    }[length]
    return _small(f"pet-{length}", Data("train[:90%]", 3312, 37), 512, epochs, temperature, lr, wd)


def food(length: Length) -> Recipe:
    """Food-101."""
    epochs, temperature, lr, wd = {
        "fast": (100, 10, 1e-2, 1e-3),
        "medium": (1000, 10, 1e-3, 3e-4),
        "long": (3000, 5, 1e-2, 1e-4),
    }[length]
    data = Data("train[:90%]", 68_175, 101)
    return _small(f"food-{length}", data, 512, epochs, temperature, lr, wd)


def sun(length: Length) -> Recipe:
    """SUN397."""
    epochs, temperature, lr, wd = {
        "fast": (100, 10, 1e-2, 1e-3),
        "medium": (1000, 10, 1e-3, 1e-4),
        "long": (3000, 10, 1e-2, 3e-5),
    }[length]
    return _small(f"sun-{length}", Data("train", 76_128, 397), 512, epochs, temperature, lr, wd)


def fashion_mnist() -> Recipe:
    """Ours, for two CPU cores: minutes."""
    spec = TrainSpec(
        "online", ViewSpec(28, min_scale=0.5), epochs=8, batch_size=128, lr=1e-2, temperature=2
    )
    return Recipe(
        "fashion-mnist",
        spec,
        "kdcache:small",
        None,
        Data("train", 60_000, 10),
        "the 10,000 test images, whole",
    )


def _small(
    name: str, data: Data, batch: int, epochs: int, temperature: float, lr: float, wd: float
) -> Recipe:
    """One of bigsweep_flowers_pet.py and bigsweep_food_sun.py, which share what is not given."""
    return _paper(
        name,
        data,
        128,
        batch,
        epochs,
        temperature=temperature,
        lr=lr,
        wd=wd,
        warmup=1500,
        teacher=None,
        evaluation="test, centre 128 of 160 px",
    )


def _paper(
    name: str,
    data: Data,
    size_px: int,
    batch: int,
    epochs: int,
    *,
    temperature: float,
    lr: float,
    wd: float,
    warmup: int,
    teacher: str | None,
    evaluation: str,
) -> Recipe:
    spec = TrainSpec(
        mode="online",
        view_spec=ViewSpec(size_px, crop="inception", min_scale=0.05, flip=True, mixup=1.0),
        epochs=epochs,
        batch_size=batch,
        lr=lr,
        weight_decay=to_pytorch_weight_decay(wd, lr),
        warmup=warmup,
        temperature=temperature,
    )
    return Recipe(name, spec, BIT_R50, teacher, data, evaluation)


_FAMILIES: dict[str, Callable[[Length], Recipe]] = {
    "imagenet-r50": imagenet_r50,
    "flowers": flowers,
    "pet": pet,
    "food": food,
    "sun": sun,
}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "fashion-mnist": fashion_mnist,
    **{
        f"{n}-{size}": partial(of, size) for n, of in _FAMILIES.items() for size in get_args(Length)
    },
}
NAMES = tuple(RECIPES)


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`, one of NAMES. Raises UsageError for another."""
    if name not in RECIPES:
        close = did_you_mean(name, NAMES)
        raise UsageError(f"unknown recipe {name!r}: there are {', '.join(NAMES)}{close}")
    return RECIPES[name]()


def cost_of(
    recipe: Recipe, *, num_samples: int | None = None, num_classes: int | None = None
) -> Cost:
    """On the recipe's data, or on other data of so many samples and classes."""
    spec = recipe.spec
    n = recipe.data.num_samples if num_samples is None else num_samples
    c = recipe.data.num_classes if num_classes is None else num_classes
    record, size = _default_record(c, spec.temperature)
    views = spec.num_views or spec.epochs
    steps = n // spec.batch_size * spec.epochs
    return Cost(n, c, steps, views, record, size, views * n * size)


def _default_record(num_classes: int, temperature: float) -> tuple[RecordName, int]:
    """The record and its bytes."""
    dense = record_bytes(Dense(), num_classes)
    measured = max((T for T in TRANSFORMED_BYTES if temperature >= T), default=1)
    transformed = TRANSFORMED_BYTES[measured]
    if num_classes <= DENSE_CLASSES or dense <= transformed:
        return "dense", dense
    return "transformed", transformed


def measure_hours(
    recipes: Sequence[Recipe],
    costs: Sequence[Cost],
    device: str,
    progress: Callable[[int], None] = lambda recipes: None,
) -> tuple[list[float | None], list[str]]:
    """Hours of the student's steps here, by recipe, and why some are not known (None).

    Each student is measured once at each size; see `seconds_per_image`.
    """
    seconds: dict[tuple[str, int], float | None] = {}
    hours: list[float | None] = []
    warnings: list[str] = []
    for done, (recipe, cost) in enumerate(zip(recipes, costs, strict=True), 1):
        key = recipe.student, recipe.spec.view_spec.size_px
        if cost.steps and key not in seconds:
            try:
                seconds[key] = seconds_per_image(recipe, cost.num_classes, device)
            except MissingDependency as error:
                warnings.append(f"no hours of {recipe.student}: {error}")
                seconds[key] = None
        pace = seconds.get(key) if cost.steps else None
        images = cost.steps * recipe.spec.batch_size
        hours.append(None if pace is None else images * pace / 3600)
        progress(done)
    return hours, warnings


def seconds_per_image(recipe: Recipe, num_classes: int, device: str) -> float:
    """Seconds of a training step for each image, here: the fastest of some on random pixels.

    Of the student alone, without teacher and loading, in smaller batches than the recipe's where
    those are large. Raises what `load_model` and `make_optimizer` raise.
    """
    spec, size_px = recipe.spec, recipe.spec.view_spec.size_px
    student = load.load_model(
        recipe.student, "student", num_classes=num_classes, size_px=size_px, device=device
    )
    max_pixels = MEASURE_PIXELS["cuda" if device.startswith("cuda") else "cpu"]
    rows = min(spec.batch_size, max_pixels // size_px**2)
    batch = _random_batch(rows, size_px, student.device)
    target = dense_target(torch.randn(rows, num_classes, device=device))
    state, loss = State(spec, student), Distillation(spec.temperature)
    student.train()
    seconds: list[float] = []
    while len(seconds) <= MEASURE_STEPS or sum(seconds[1:]) < MEASURE_S:
        start = time.perf_counter()
        value = train_step(state, student, batch, lambda batch: target, loss, spec.lr)
        value.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / rows  # the first step compiles and warms up


def _random_batch(rows: int, size_px: int, device: torch.device) -> Batch:
    images = torch.randint(0, 256, (rows, 3, size_px, size_px), dtype=torch.uint8, device=device)
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    return Batch(
        view=0,
        positions_B=np.arange(rows),
        sample_ids_B=np.arange(rows),
        images_BCHW=images.contiguous(memory_format=torch.channels_last),
        labels_B=labels,
        partner_labels_B=labels,
        mix_weights_B=torch.zeros(rows, dtype=torch.int16, device=device),
    )
