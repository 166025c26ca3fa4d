"""The recipes are the paper's, number by number; their costs follow; the page and commands agree.

`python -m tests.test_recipes` writes the table of docs/recipes.md anew.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer

from kdcache.cli import app
from kdcache.cli.recipes import command_of, duration, table
from kdcache.data.beton import Dataset
from kdcache.errors import UsageError
from kdcache.models.resnet import SIZES
from kdcache.options import build
from kdcache.teacher.calibration import DENSE_CLASSES
from kdcache.teacher.options import RecordOptions
from kdcache.training import recipes
from kdcache.training.load import make_train_spec
from kdcache.training.loop import count_steps
from kdcache.training.optim import learning_rate, warmup_steps
from kdcache.training.options import TrainCommand
from kdcache.training.recipes import NAMES, Recipe, cost_of, get_recipe, to_pytorch_weight_decay
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec
from tests.conftest import Result

Run = Callable[..., Result]
PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
FENCE = re.compile(r"(?<=```text\n)recipe .*?(?=```)", re.DOTALL)

# As published: px, batch, epochs, T, lr, wd, warm-up; then wd / lr, by hand.
PAPER = {
    "imagenet-r50-fast": (224, 4096, 300, 1, 0.03, 3e-4, 5000, 0.01),
    "imagenet-r50-medium": (224, 4096, 1200, 1, 0.03, 3e-4, 5000, 0.01),
    "imagenet-r50-long": (224, 4096, 9600, 1, 0.03, 3e-4, 5000, 0.01),
    "flowers-fast": (128, 512, 10_000, 10, 3e-3, 3e-4, 1500, 0.1),
    "flowers-medium": (128, 512, 100_000, 1, 1e-3, 1e-4, 1500, 0.1),
    "flowers-long": (128, 512, 1_000_000, 1, 3e-4, 1e-5, 1500, 0.0333333),
    "pet-fast": (128, 512, 1000, 5, 1e-2, 1e-3, 1500, 0.1),
    "pet-medium": (128, 512, 3000, 10, 3e-3, 3e-4, 1500, 0.1),
    "pet-long": (128, 512, 30_000, 2, 3e-3, 1e-5, 1500, 0.00333333),
    "food-fast": (128, 512, 100, 10, 1e-2, 1e-3, 1500, 0.1),
    "food-medium": (128, 512, 1000, 10, 1e-3, 3e-4, 1500, 0.3),
    "food-long": (128, 512, 3000, 5, 1e-2, 1e-4, 1500, 0.01),
    "sun-fast": (128, 512, 100, 10, 1e-2, 1e-3, 1500, 0.1),
    "sun-medium": (128, 512, 1000, 10, 1e-3, 1e-4, 1500, 0.1),
    "sun-long": (128, 512, 3000, 10, 1e-2, 3e-5, 1500, 0.003),
}
# The images and classes of their training parts.
DATA = {
    "imagenet-r50": (1_255_544, 1000),
    "flowers": (1020, 102),
    "pet": (3312, 37),
    "food": (68_175, 101),
    "sun": (76_128, 397),
}


def test_these_are_the_recipes() -> None:
    assert set(NAMES) == {*PAPER, "fashion-mnist"}
    assert [get_recipe(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name: str) -> None:
    size, batch, epochs, temperature, lr, wd, warmup, decay = PAPER[name]
    recipe = get_recipe(name)
    if name.startswith("flowers"):
        batch = 510  # of 1,020 images: two whole batches
    view = ViewSpec(size, "inception", min_scale=0.05, flip=True, mixup=1.0)
    assert recipe.spec == TrainSpec(
        "online",
        view,
        epochs,
        batch,
        lr=lr,
        weight_decay=decay,
        warmup=warmup,
        temperature=temperature,
        setting="function-matching",
        optimizer="adamw",
        label_weight=0,
    )
    assert recipe.spec.weight_decay == pytest.approx(wd / lr, rel=1e-5)
    assert recipe.student == "timm:resnetv2_50x1_bit"
    family = name.rpartition("-")[0]
    assert (recipe.data.num_samples, recipe.data.num_classes) == DATA[family]


def test_decay_shrinks_a_weight_as_the_papers_does() -> None:
    """Theirs, written out: without a gradient w -= s * wd * w, at every point of the schedule."""
    lr, wd, weight, steps = 0.003, 1e-4, 1.0, 40
    spec = replace(
        get_recipe("pet-long").spec, lr=lr, warmup=10, weight_decay=to_pytorch_weight_decay(wd, lr)
    )
    ours = weight
    for step in range(steps):
        rate = learning_rate(spec, step, steps)
        weight -= rate / lr * wd * weight
        ours *= 1 - rate * spec.weight_decay
    assert ours == pytest.approx(weight, rel=1e-6)
    assert weight < 1


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_run(name: str) -> None:
    recipe = get_recipe(name)
    steps = cost_of(recipe).steps
    assert 0 < warmup_steps(recipe.spec, steps) <= steps / 4
    assert recipe.spec.batch_size % 2 == 0  # whole pairs
    kind, _, model = recipe.student.partition(":")
    if kind == "timm":
        assert model in pytest.importorskip("timm").list_models()
    else:
        assert model in SIZES


def test_the_papers_own_teacher_is_timms() -> None:
    timm = pytest.importorskip("timm")
    teacher = get_recipe("imagenet-r50-long").teacher
    assert teacher is not None
    assert teacher.removeprefix("timm:") in timm.list_pretrained()
    assert get_recipe("pet-fast").teacher is None


def test_longer_is_longer() -> None:
    for family in DATA:
        costs = [cost_of(get_recipe(f"{family}-{length}")) for length in ("fast", "medium", "long")]
        assert costs == sorted(costs, key=lambda cost: cost.steps)
        assert costs[0].steps < costs[2].steps
        assert costs[0].cache_bytes < costs[2].cache_bytes


def test_an_unknown_recipe_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match=r"unknown recipe 'x': there are fashion-mnist, .*-long$"):
        get_recipe("x")
    with pytest.raises(UsageError, match=r"; did you mean fashion-mnist\?$"):
        get_recipe("fashion-mist")


# --- costs -----------------------------------------------------------------------------------


def test_costs_follow_from_data_and_records() -> None:
    cost = cost_of(get_recipe("food-fast"))
    assert cost.steps == 133 * 100  # 68,175 images fill 133 batches of 512
    assert cost.num_views == 100
    assert (cost.record, cost.record_bytes) == ("dense", 2 * 101)  # no more than at T = 10
    assert cost.cache_bytes == 100 * 68_175 * 202
    few = cost_of(get_recipe("food-fast"), num_samples=1030, num_classes=10)
    assert (few.steps, few.record, few.record_bytes) == (200, "dense", 20)
    assert few.cache_bytes == 100 * 1030 * 20
    cycled = get_recipe("food-fast")
    cycled = replace(cycled, spec=replace(cycled.spec, num_views=7))
    assert cost_of(cycled).cache_bytes == 7 * 68_175 * 202


@pytest.mark.parametrize(
    ("num_classes", "temperature", "record", "size"),
    [
        (DENSE_CLASSES, 1, "dense", 2 * DENSE_CLASSES),
        (DENSE_CLASSES + 1, 1, "transformed", 55),
        (1000, 0.5, "transformed", 55),
        (1000, 1, "transformed", 55),
        (1000, 4, "transformed", 175),
        (1000, 10, "transformed", 238),
        (119, 10, "dense", 238),
        (120, 10, "transformed", 238),
    ],
)
def test_costs_are_of_the_records_that_precompute_makes(
    num_classes: int, temperature: float, record: str, size: int
) -> None:
    assert RecordOptions(data=Path("x.beton"), teachers=("x",)).record_name == "auto"
    recipe = get_recipe("imagenet-r50-fast")
    recipe = replace(recipe, spec=replace(recipe.spec, temperature=temperature))
    cost = cost_of(recipe, num_classes=num_classes)
    assert (cost.record, cost.record_bytes) == (record, size)


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "MEASURE_S", 0)
    assert 0 < recipes.seconds_per_image(get_recipe("fashion-mnist"), 10, "cpu") < 10


# --- the command -----------------------------------------------------------------------------


def test_the_list_fits_and_hours_scale(monkeypatch: pytest.MonkeyPatch, kdcache: Run) -> None:
    asked = []

    def pace(recipe: Recipe, num_classes: int, device: str) -> float:
        asked.append((recipe.student, recipe.spec.view_spec.size_px))
        return 36.0

    monkeypatch.setattr(recipes, "seconds_per_image", pace)
    result = kdcache("recipes", "--device", "cpu")
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *NAMES]
    assert max(map(len, lines)) <= 100
    assert len(asked) == len(set(asked)) == 3
    assert lines[NAMES.index("pet-fast") + 1].endswith("  3.5 years")
    found = json.loads(kdcache("recipes", "--json", "--device", "cpu").out)["recipes"]
    for one in found:
        assert one["hours"] == pytest.approx(one["steps"] * one["spec"]["batch_size"] / 100)


def test_one_recipe_in_full(kdcache: Run) -> None:
    out = kdcache("recipes", "sun-long", "--no-measure").out
    idle = {
        "view_spec",
        "teacher_view_spec",
        "num_views",
        "deterministic",
        "momentum",
        "num_averaged_views",
        "ema_decay",
        "ema_statistics",
        "decay_embeddings",
        "label_weight",
        "tail",
    }
    rows, _, command = out.partition("\nthe same as\n")
    assert {f.name for f in fields(TrainSpec) if f"\n{f.name} " not in rows} == idle
    assert "None" not in out
    assert "False" not in out
    assert "--momentum" not in command
    assert "--seed" not in command
    found = json.loads(kdcache("recipes", "sun-long", "--no-measure", "--json").out)
    assert found["spec"] == get_recipe("sun-long").spec.to_json()
    assert found["hours"] is None
    assert found["command"] == command_of(get_recipe("sun-long"))
    refused = kdcache("recipes", "sun", "--no-measure")
    assert refused.code == 2
    assert "unknown recipe 'sun'" in refused.err


def pasted(command: str) -> list[str]:
    """The arguments that a shell gives to the command."""
    script = f'kdcache() {{ printf "%s\\n" "$@"; }}\n{command}'
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def spec_of(arguments: list[str]) -> TrainSpec:
    """The run that a command asks for; what it leaves out is as by default."""
    train = typer.main.get_command(app.app).commands["train"]  # type: ignore[attr-defined]
    values: dict[str, Any] = train.make_context("train", arguments[1:]).params
    return make_train_spec(build(TrainCommand, values).train, None, None, 999)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is typed in, with its data."""
    (tmp_path / "TRAIN.beton").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_command_can_be_pasted_and_says_all_of_it(
    name: str, kdcache: Run, folder: Path
) -> None:
    out = kdcache("recipes", name, "--no-measure").out
    arguments = pasted(out.partition("\nthe same as\n")[2])
    assert ["kdcache", *arguments] == command_of(get_recipe(name))
    assert spec_of(arguments) == get_recipe(name).spec


def test_what_differs_from_the_defaults_is_said(folder: Path) -> None:
    recipe = get_recipe("pet-fast")
    view = ViewSpec(16, "random", min_scale=0.05, flip=False, mixup=0.5, seed=4)
    spec = replace(
        recipe.spec,
        view_spec=view,
        seed=3,
        optimizer="sgd",
        momentum=0.8,
        num_views=7,
        ema_decay=0.9,
        label_weight=0.25,
        deterministic=True,
        precision="bfloat16",
        setting="custom",
    )
    assert spec_of(command_of(replace(recipe, spec=spec))[1:]) == spec


def test_costs_on_other_data(digits: Dataset, kdcache: Run) -> None:
    options = ("--data", digits.path, "--no-measure", "--json")
    found = json.loads(kdcache("recipes", "pet-fast", *options).out)
    assert (found["num_samples"], found["num_classes"], found["steps"]) == (1500, 10, 2 * 1000)
    assert found["steps"] == count_steps(get_recipe("pet-fast").spec, len(digits))[1]


def test_a_batch_above_the_images_makes_no_steps(
    monkeypatch: pytest.MonkeyPatch, kdcache: Run, digits_test: Dataset
) -> None:
    monkeypatch.setattr(recipes, "seconds_per_image", None)  # nothing is measured
    options = ("--data", digits_test.path, "--device", "cpu")
    words = f"the batch is too large for {len(digits_test)} images: give `train` a smaller --batch"
    listed = kdcache("recipes", *options, "--no-measure").out.splitlines()
    assert re.fullmatch(r"pet-fast .* 1000 +-  .* -", listed[NAMES.index("pet-fast") + 1])
    assert listed[-1].startswith(f"-: {words}")
    out = kdcache("recipes", "pet-fast", *options).out
    assert words in " ".join(out.split())
    assert "\ncache " not in out
    found = json.loads(kdcache("recipes", "pet-fast", *options, "--json").out)
    assert (found["steps"], found["hours"]) == (0, None)


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0.0422, "2.53 min"),
        (0.999, "59.9 min"),
        (1, "1 h"),
        (47, "47 h"),
        (48, "2 days"),
        (17_000, "708 days"),
        (2.51e6, "286 years"),
        (1e8, "11.4k years"),
    ],
)
def test_durations_can_be_read(hours: float, text: str) -> None:
    assert duration(hours) == text


def test_without_timm_the_list_has_no_hours(monkeypatch: pytest.MonkeyPatch, kdcache: Run) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = kdcache("recipes", "pet-fast")
    assert "no hours of timm:resnetv2_50x1_bit: timm is not installed" in result.err
    assert "time" not in result.out


@pytest.mark.slow  # of the import of torch
def test_the_list_needs_no_ffcv() -> None:
    code = (
        "import sys; sys.modules['ffcv'] = None\n"
        "sys.argv = ['kdcache', 'recipes', '--no-measure']\n"
        "from kdcache.cli.app import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "flowers-long" in result.stdout


# --- the page --------------------------------------------------------------------------------


def page_table() -> str:
    chosen = [get_recipe(name) for name in NAMES]
    lines = table(chosen, [cost_of(one) for one in chosen], [None] * len(chosen))
    return "".join(line.rstrip() + "\n" for line in lines)


def test_the_page_is_current() -> None:
    found = FENCE.search(PAGE.read_text())
    assert found, "no table"
    assert found[0] == page_table(), "write it anew: python -m tests.test_recipes"


def test_commands_of_the_page_can_be_typed() -> None:
    commands = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^kdcache ((?:.*\\\n)*.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) > 3
    for line in lines:
        name, *rest = shlex.split(line.replace("\\\n", ""), comments=True)
        commands[name].make_context(name, rest)


if __name__ == "__main__":
    PAGE.write_text(FENCE.sub(lambda _: page_table(), PAGE.read_text()))
