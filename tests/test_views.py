"""Views: golden values, what holds for any spec, the compiled crop boxes, and the mixing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from kdcache.data import render
from kdcache.views.crops import aspect_ratios, crop_boxes
from kdcache.views.mixing import mix_pairs, mix_weight_table, pair_mix_weights
from kdcache.views.order import view_order, view_positions, view_tokens
from kdcache.views.spec import Crop, ViewSpec
from kdcache.views.transforms.flip import flip_draws

# These values may change only together with the view spec's version.
PLAIN = ViewSpec(8, min_scale=0.4, mixup=1.0, seed=5)
FAR = ViewSpec(32, crop="random", min_scale=0.5, mixup=0.2, seed=2**64 - 1)
CENTRAL = ViewSpec(8, crop="center", min_scale=(7 / 8) ** 2)
FAR_VIEW = 2**24 - 1
SHAPES = ((480, 640), (1, 500), (500, 1), (8, 8), (1, 1), (333, 250), (3000, 200), (65535, 65535))

ORDERS = {
    (PLAIN, 0): ([3, 10, 1, 7, 11, 8, 2, 6, 5, 9, 4, 0], "41d3039ff2c48fff"),
    (PLAIN, 3): ([0, 1, 8, 11, 5, 9, 7, 3, 6, 10, 2, 4], "d24407a52147f8a1"),
    (FAR, FAR_VIEW): ([3, 2, 5, 11, 0, 9, 4, 6, 8, 10, 7, 1], "b5099fe89e6f21dc"),
}
BOXES = {
    (PLAIN, 0): [
        [25, 49, 447, 450],
        [0, 249, 1, 1],
        [249, 0, 1, 1],
        [1, 2, 5, 5],
        [0, 0, 1, 1],
        [18, 26, 242, 197],
        [1366, 0, 267, 200],
        [737, 514, 64387, 64659],
    ],
    (PLAIN, 3): [
        [16, 188, 441, 388],
        [0, 249, 1, 1],
        [249, 0, 1, 1],
        [3, 1, 5, 7],
        [0, 0, 1, 1],
        [2, 66, 213, 177],
        [1366, 0, 267, 200],
        [14215, 38, 42536, 50701],
    ],
    (FAR, FAR_VIEW): [
        [114, 111, 339, 339],
        [0, 169, 1, 1],
        [192, 0, 1, 1],
        [2, 0, 6, 6],
        [0, 0, 1, 1],
        [120, 5, 177, 177],
        [113, 21, 141, 141],
        [5136, 1760, 46340, 46340],
    ],
    (CENTRAL, 0): [
        [30, 110, 420, 420],
        [0, 249, 1, 1],
        [249, 0, 1, 1],
        [0, 0, 7, 7],
        [0, 0, 1, 1],
        [57, 15, 219, 219],
        [1412, 12, 175, 175],
        [4096, 4096, 57343, 57343],
    ],
}
LAST_SAMPLE_BOXES = {
    (PLAIN, 0): [14, 275, 456, 345],
    (PLAIN, 3): [22, 58, 379, 410],
    (FAR, FAR_VIEW): [57, 220, 339, 339],
}
FLIPS = {
    (PLAIN, 0): "100000110110101100110001",
    (PLAIN, 3): "100100011010100110101111",
    (FAR, FAR_VIEW): "111111100000101111000111",
}
PAIR_WEIGHTS = {
    0.05: [0, 0, 1, 1, 0, 0, 0, 0, 0],
    0.2: [0, 0, 41, 41, 0, 0, 7, 7, 0],
    1.0: [30, 30, 96, 96, 21, 21, 66, 66, 0],
    8.0: [90, 90, 118, 118, 84, 84, 107, 107, 0],
    100.0: [117, 117, 125, 125, 115, 115, 122, 122, 0],
}
MIX_TABLES = {
    0.05: "30e906725d6644b7",
    0.2: "d28f79d1d1645c93",
    1.0: "fdf1bb051781b71a",
    8.0: "bffdbb714b5b4fde",
    100.0: "b3c5e56d6b4159c0",
}
ASPECT_RATIOS = "0b23eb1a0d4febf6"
MIXED_PAIRS = "f91c72e74f180816"

crops = st.sampled_from(["inception", "random", "center"])
areas = st.floats(1e-4, 1.0)
sides = st.integers(1, 3000) | st.sampled_from([1, 2, 3, 65535])
seeds = st.integers(0, 2**64 - 1)
view_numbers = st.integers(0, FAR_VIEW)


def short_digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).astype("<i8").tobytes()).hexdigest()[:16]


def box_of(spec: ViewSpec, view: int, sample: int, height: int, width: int) -> list[int]:
    return [int(x) for x in crop_boxes(spec, view, [sample], [height], [width])[0]]


def mixed_by_the_definition(images: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """x + floor((w (y - x) + 127) / 256) in wide integers; a last odd row stays as it is."""
    out = images.astype(np.int64)
    for i in range(len(images) // 2 * 2):
        x, y = images[i].astype(np.int64), images[i ^ 1].astype(np.int64)
        out[i] = x + (int(weights[i]) * (y - x) + 127) // 256
    return out.astype(np.uint8)


# --- golden values


@pytest.mark.parametrize(("spec", "view"), ORDERS)
def test_orders_are_golden(spec: ViewSpec, view: int) -> None:
    first, thousand = ORDERS[spec, view]
    assert view_order(spec, view, 12).tolist() == first
    assert short_digest(view_order(spec, view, 1000)) == thousand


@pytest.mark.parametrize(("spec", "view"), BOXES)
def test_boxes_are_golden(spec: ViewSpec, view: int) -> None:
    heights, widths = zip(*SHAPES, strict=True)
    boxes = crop_boxes(spec, view, np.arange(len(SHAPES)), heights, widths)
    assert boxes.tolist() == BOXES[spec, view]


@pytest.mark.parametrize(("spec", "view"), LAST_SAMPLE_BOXES)
def test_the_last_sample_has_a_golden_box(spec: ViewSpec, view: int) -> None:
    assert box_of(spec, view, 2**40 - 1, 480, 640) == LAST_SAMPLE_BOXES[spec, view]


@pytest.mark.parametrize(("spec", "view"), FLIPS)
def test_flips_are_golden(spec: ViewSpec, view: int) -> None:
    found = flip_draws(spec.seed, view, np.arange(24))
    assert "".join(str(int(f)) for f in found) == FLIPS[spec, view]


@pytest.mark.parametrize("alpha", PAIR_WEIGHTS)
def test_pair_weights_are_golden(alpha: float) -> None:
    spec = ViewSpec(8, mixup=alpha, seed=5)
    assert pair_mix_weights(spec, 0, np.arange(9), 9).tolist() == PAIR_WEIGHTS[alpha]


@pytest.mark.parametrize("alpha", MIX_TABLES)
def test_mixing_tables_are_golden(alpha: float) -> None:
    assert short_digest(mix_weight_table(alpha)) == MIX_TABLES[alpha]


def test_aspect_ratios_are_golden() -> None:
    ratios = aspect_ratios()
    assert short_digest(ratios * 2**20) == ASPECT_RATIOS
    assert 3 / 4 <= ratios[0] < ratios[-1] <= 4 / 3
    assert (np.diff(ratios) > 0).all()


def test_mixed_pixels_are_golden() -> None:
    i = torch.arange(7 * 3 * 50, dtype=torch.int64)
    images = (i * i * 31 % 251).to(torch.uint8).reshape(7, 3, 50)
    weights = torch.tensor([0, 0, 1, 1, 127, 128, 0], dtype=torch.int16)
    mixed = mix_pairs(images, weights).numpy()
    assert hashlib.sha256(mixed.tobytes()).hexdigest()[:16] == MIXED_PAIRS


# --- order


@given(seeds, view_numbers, st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_an_order_is_a_permutation_and_position_its_inverse(
    seed: int, view: int, num_samples: int
) -> None:
    spec = ViewSpec(8, seed=seed)
    order, position = view_order(spec, view, num_samples), view_positions(spec, view, num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))
    assert order[position].tolist() == list(range(num_samples))
    assert position[order].tolist() == list(range(num_samples))


def test_only_the_seed_and_the_view_decide_an_order() -> None:
    other = ViewSpec(32, crop="center", min_scale=0.9, flip=False, mixup=0, seed=PLAIN.seed)
    assert (view_order(PLAIN, 3, 500) == view_order(other, 3, 500)).all()


def test_every_place_is_about_equally_likely() -> None:
    """A sample's mean position over 400 views of 16 samples: 7.5, give or take 5 x 0.23."""
    mean = np.mean([view_positions(PLAIN, v, 16) for v in range(400)], axis=0)
    assert np.abs(mean - 7.5).max() < 1.2


# --- tokens


def test_a_token_holds_a_view_and_a_sample() -> None:
    tokens = view_tokens(FAR_VIEW, [0, 5, 2**40 - 1])
    assert tokens.dtype == np.uint64
    assert tokens.flags.c_contiguous
    assert [int(t) >> 40 for t in tokens] == [FAR_VIEW] * 3
    assert [int(t) & (2**40 - 1) for t in tokens] == [0, 5, 2**40 - 1]


@pytest.mark.parametrize("view", [-1, 2**24])
def test_a_view_that_no_token_can_hold_is_refused(view: int) -> None:
    with pytest.raises(ValueError, match="a view must be 0 to 16777215"):
        view_tokens(view, [0])


# --- coordinates do not coincide


def everything(spec: ViewSpec, view: int, samples: np.ndarray) -> tuple[object, ...]:
    n = len(samples)
    return (
        view_order(spec, view, n).tolist(),
        crop_boxes(spec, view, samples, 1000, 1000).tolist(),
        flip_draws(spec.seed, view, samples).tolist(),
        pair_mix_weights(spec, view, np.arange(n), n).tolist(),
    )


@pytest.mark.parametrize(
    ("a", "b"), [((1, 0), (0, 1)), ((0, 0), (0, 1)), ((0, 0), (1, 0)), ((2**32, 0), (0, 2**16))]
)
def test_other_seeds_and_views_give_other_views(a: tuple[int, int], b: tuple[int, int]) -> None:
    samples = np.arange(64)
    found = [everything(ViewSpec(8, seed=seed), view, samples) for seed, view in (a, b)]
    assert all(x != y for x, y in zip(*found, strict=True))


def test_samples_differ_from_each_other() -> None:
    boxes = crop_boxes(PLAIN, 0, np.arange(1000), 5000, 5000)
    assert len({tuple(box) for box in boxes.tolist()}) == 1000


def test_half_of_the_samples_are_flipped() -> None:
    found = flip_draws(0, 0, np.arange(10_000))
    assert found.dtype == bool
    assert found.mean() == pytest.approx(0.5, abs=0.025)


def test_a_subset_of_samples_gives_the_rows_of_the_whole() -> None:
    heights, widths = np.arange(10, 110), np.arange(110, 10, -1)
    some = np.array([99, 3, 3, 41])
    whole = crop_boxes(PLAIN, 2, np.arange(100), heights, widths)
    part = crop_boxes(PLAIN, 2, some, heights[some], widths[some])
    assert (part == whole[some]).all()


# --- crop boxes


@given(crops, areas, sides, sides, seeds, view_numbers, st.integers(0, 2**40 - 1))
@settings(max_examples=300, deadline=None)
def test_boxes_lie_inside_the_image(
    crop: Crop, area: float, height: int, width: int, seed: int, view: int, sample: int
) -> None:
    spec = ViewSpec(8, crop=crop, min_scale=area, seed=seed)
    top, left, h, w = box_of(spec, view, sample, height, width)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1


@given(areas, sides, sides, seeds, st.integers(0, 2**40 - 1))
@settings(max_examples=300, deadline=None)
def test_inception_boxes_keep_area_and_aspect_within_rounding(
    area: float, height: int, width: int, seed: int, sample: int
) -> None:
    spec = ViewSpec(8, crop="inception", min_scale=area, seed=seed)
    top, left, h, w = box_of(spec, 0, sample, height, width)
    assert (w + 0.5) / (h - 0.5) >= 3 / 4
    assert (w - 0.5) / (h + 0.5) <= 4 / 3
    fell_back = (top, left) == ((height - h) // 2, (width - w) // 2)
    assert fell_back or (h + 0.5) * (w + 0.5) >= 0.999 * area * height * width


def test_inception_boxes_use_the_whole_range() -> None:
    spec = ViewSpec(8, min_scale=0.1)
    boxes = crop_boxes(spec, 0, np.arange(5000), 4000, 4000)
    share = boxes[:, 2] * boxes[:, 3] / 4000**2
    aspect = boxes[:, 3] / boxes[:, 2]
    assert share.min() == pytest.approx(0.1, abs=0.01)
    assert share.max() > 0.97
    assert aspect.min() == pytest.approx(3 / 4, abs=0.01)
    assert aspect.max() == pytest.approx(4 / 3, abs=0.01)
    assert np.median(np.log(aspect)) == pytest.approx(0, abs=0.03)
    assert boxes[:, 0].min() < 20
    assert (boxes[:, 0] + boxes[:, 2]).max() > 3980


def test_an_image_that_no_try_fits_is_cropped_in_the_middle() -> None:
    spec = ViewSpec(8, min_scale=0.9)
    assert box_of(spec, 0, 0, 100, 1000) == [0, 433, 100, 133]
    assert box_of(spec, 0, 0, 1000, 100) == [433, 0, 133, 100]


@given(st.sampled_from(["random", "center"]), areas, sides, sides, seeds)
@settings(max_examples=200, deadline=None)
def test_other_crops_are_squares_of_the_wanted_area(
    crop: Crop, area: float, height: int, width: int, seed: int
) -> None:
    spec = ViewSpec(8, crop=crop, min_scale=area, seed=seed)
    top, left, h, w = box_of(spec, 0, 0, height, width)
    assert h == w
    assert h == 1 or abs(h - area**0.5 * min(height, width)) <= 0.5 + 1e-6
    if crop == "center":
        assert (top, left) == ((height - h) // 2, (width - w) // 2)


def test_random_squares_reach_every_corner() -> None:
    boxes = crop_boxes(ViewSpec(8, crop="random", min_scale=0.25), 0, np.arange(2000), 6, 10)
    assert {int(x) for x in boxes[:, 0]} == set(range(4))
    assert {int(x) for x in boxes[:, 1]} == set(range(8))


@pytest.mark.parametrize("crop", ["inception", "random", "center"])
def test_compiled_boxes_equal_the_definition(crop: Crop) -> None:
    random = np.random.default_rng(11)
    for _ in range(60):
        area = float(random.choice([1.0, 0.05, random.uniform(1e-3, 1)]))
        seed = int(random.integers(0, 2**64, dtype=np.uint64))
        view = int(random.integers(0, 2**24))
        spec = ViewSpec(8, crop=crop, min_scale=area, seed=seed)
        samples = random.integers(0, 2**40, 50)
        heights, widths = np.exp(random.uniform(0, np.log(65536), (2, 50))).astype(np.int64)
        boxes = crop_boxes(spec, view, samples, heights, widths)
        record = render.settings_of(spec)[0]
        compiled = [
            render.crop_box_one(record, np.uint64(view), np.uint64(s), h, w)
            for s, h, w in zip(samples, heights, widths, strict=True)
        ]
        assert boxes.tolist() == [[int(x) for x in box] for box in compiled]


# --- mixing weights


@pytest.mark.parametrize("alpha", MIX_TABLES)
def test_the_table_fits_the_beta_distribution(alpha: float) -> None:
    """The share of entries up to t is P(min(b, 1-b) rounds to t or less), to one entry."""
    table = mix_weight_table(alpha)
    assert len(table) == 1024
    assert (np.diff(table) >= 0).all()
    assert 0 <= table[0] <= table[-1] <= 128
    for t in range(128):
        wanted = 2 * beta(alpha, alpha).cdf((t + 0.5) / 256)
        assert (table <= t).mean() == pytest.approx(wanted, abs=1 / 1024)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_drawn_weights_fit_the_beta_distribution(alpha: float) -> None:
    spec = ViewSpec(8, mixup=alpha)
    weights = pair_mix_weights(spec, 0, np.arange(0, 40_000, 2), 40_000)
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        wanted = 256 * beta(alpha, alpha).ppf(q / 2)
        # 20,000 draws: the share below a quantile is within 5 standard deviations of it.
        assert (weights < wanted - 1).mean() <= q + 5 * (q * (1 - q) / 20_000) ** 0.5
        assert (weights <= wanted + 1).mean() >= q - 5 * (q * (1 - q) / 20_000) ** 0.5


@given(st.floats(0.05, 100), st.integers(1, 200), view_numbers, seeds)
@settings(max_examples=100, deadline=None)
def test_partners_share_a_weight_of_at_most_half(
    alpha: float, num_samples: int, view: int, seed: int
) -> None:
    spec = ViewSpec(8, mixup=alpha, seed=seed)
    weights = pair_mix_weights(spec, view, np.arange(num_samples), num_samples)
    paired = num_samples // 2 * 2
    assert weights.dtype == np.int16
    assert 0 <= weights.min() <= weights.max() <= 128
    assert (weights[:paired:2] == weights[1:paired:2]).all()
    assert not weights[paired:].any()


def test_without_mixing_all_weights_are_zero() -> None:
    assert not pair_mix_weights(ViewSpec(8, mixup=0), 0, np.arange(100), 100).any()
    assert not mix_weight_table(0).any()


def test_a_weight_depends_on_its_own_position_alone() -> None:
    whole = pair_mix_weights(PLAIN, 4, np.arange(101), 101)
    some = np.array([100, 7, 6, 55])
    assert (pair_mix_weights(PLAIN, 4, some, 101) == whole[some]).all()


# --- mixing pixels


def test_mixing_every_pair_of_values_by_every_weight() -> None:
    values = np.arange(256, dtype=np.uint8)
    x, y = np.repeat(values, 256), np.tile(values, 256)
    images = np.stack([x, y])
    for weight in range(129):
        weights = np.full(2, weight, np.int16)
        mixed = mix_pairs(torch.from_numpy(images), torch.from_numpy(weights)).numpy()
        assert (mixed == mixed_by_the_definition(images, weights)).all()
        assert (mixed >= np.minimum(x, y)).all()
        assert (mixed <= np.maximum(x, y)).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 9])
@pytest.mark.parametrize("shape", [(3, 5, 4), (6,), (1, 1)])
def test_mixing_equals_the_definition(rows: int, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(rows)
    images = random.integers(0, 256, (rows, *shape), dtype=np.uint8)
    weights = random.integers(0, 129, (rows + 1) // 2).repeat(2)[:rows].astype(np.int16)
    mixed = mix_pairs(torch.from_numpy(images), torch.from_numpy(weights))
    assert mixed.dtype == torch.uint8
    assert (mixed.numpy() == mixed_by_the_definition(images, weights)).all()


def test_a_weight_of_zero_changes_nothing_and_128_gives_the_mean() -> None:
    images = torch.tensor([[0, 10, 255], [255, 20, 0]], dtype=torch.uint8)
    zero, half = torch.zeros(2, dtype=torch.int16), torch.full((2,), 128, dtype=torch.int16)
    assert torch.equal(mix_pairs(images, zero), images)
    assert mix_pairs(images, half).tolist() == [[127, 15, 127], [127, 15, 127]]


@pytest.mark.parametrize("layout", ["permuted", "strided", "expanded"])
def test_mixing_takes_any_memory_layout_and_leaves_it_alone(layout: str) -> None:
    random = np.random.default_rng(1)
    base = torch.from_numpy(random.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8))
    images = {
        "permuted": base.permute(0, 3, 1, 2),
        "strided": base[:, ::2, 1:, :],
        "expanded": base[:, :1].expand(5, 6, 8, 3),
    }[layout]
    weights = torch.tensor([40, 40, 128, 128, 0], dtype=torch.int16)
    before = images.clone()
    mixed = mix_pairs(images, weights)
    assert torch.equal(images, before)
    assert weights.tolist() == [40, 40, 128, 128, 0]
    assert (mixed.numpy() == mixed_by_the_definition(images.numpy(), weights.numpy())).all()


def test_mixing_gives_a_new_tensor_even_when_nothing_is_mixed() -> None:
    images = torch.zeros(1, 4, dtype=torch.uint8)
    mix_pairs(images, torch.zeros(1, dtype=torch.int16)).fill_(9)
    assert not images.any()


def test_all_of_the_image_is_all_of_it() -> None:
    spec = ViewSpec(8, crop="whole", min_scale=1.0)
    boxes = crop_boxes(spec, 3, [0, 1, 2], [5, 70, 9], [8, 3, 9])
    assert boxes.tolist() == [[0, 0, 5, 8], [0, 0, 70, 3], [0, 0, 9, 9]]
    assert spec.digest != ViewSpec(8, crop="center", min_scale=1.0).digest
