"""Images a second of the seeded loader, stock FFCV and torchvision's DataLoader, in one run.

    python -m benchmarks.bench_loader [--rounds 9] [--photos 600] [--save]

Everyone decodes, takes an inception crop (area 8 % to 1), resizes, mirrors half, and hands over
uint8 batches, with the same number of workers. Photos: JPEGs of about 500x400 px cut from
scikit-learn's two photos, to 224 px. Fashion-MNIST: 28 px to 28 px. Filters differ (FFCV uses
OpenCV's INTER_AREA, torchvision bilinear with antialias), so this compares pipelines.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torchvision
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader as StockLoader
from ffcv.loader import OrderOption
from ffcv.transforms import RandomHorizontalFlip
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks import harness
from kdcache.data import beton as datasets
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.passes import BATCHES_AHEAD
from kdcache.data.render import row_bytes
from kdcache.data.sources import Source, open_source
from kdcache.views.spec import ViewSpec

WORKERS = 2
AREA = (0.08, 1.0)


class Files(Dataset[tuple[torch.Tensor, int]]):
    """JPEG files decoded by PIL or by torchvision, as an ImageFolder does."""

    def __init__(self, paths: list[Path], size: int, pil: bool) -> None:
        self.paths, self.pil = paths, pil
        crop = v2.RandomResizedCrop(size, scale=AREA, antialias=True)
        tail = [v2.PILToTensor()] if pil else []
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *tail])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if self.pil:
            return self.transform(PIL.Image.open(self.paths[i]).convert("RGB")), 0
        data = torchvision.io.read_file(str(self.paths[i]))
        return self.transform(torchvision.io.decode_jpeg(data)), 0


class Arrays(Dataset[tuple[torch.Tensor, int]]):
    """Images in memory through PIL, as torchvision's FashionMNIST does."""

    def __init__(self, images: Any, size: int) -> None:
        self.images = images
        crop = v2.RandomResizedCrop(size, scale=AREA, antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(PIL.Image.fromarray(self.images[i]).convert("RGB")), 0


def ours(path: Path, size: int, batch: int, mixup: float) -> Callable[[], int]:
    spec = ViewSpec(size, min_scale=AREA[0], mixup=mixup)
    loader = Loader(datasets.open_dataset(path), spec, batch, workers=WORKERS)
    views = iter(range(1 << 20))
    return lambda: sum(len(b) for b in loader.batches(next(views)))


def stock(path: Path, size: int, batch: int) -> Callable[[], int]:
    decoder = RandomResizedCropRGBImageDecoder((size, size), scale=AREA)
    loader = StockLoader(
        str(path),
        batch,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        batches_ahead=BATCHES_AHEAD,
        pipelines={"image": [decoder, RandomHorizontalFlip()]},
    )
    return lambda: sum(len(images) for images, _ in loader)


def torch_loader(data: Dataset[Any], batch: int) -> Callable[[], int]:
    loader: Any = DataLoader(data, batch, shuffle=True, num_workers=WORKERS)
    return lambda: sum(len(images) for images, _ in loader)


def batched_tensor(images: torch.Tensor, size: int, batch: int) -> Callable[[], int]:
    """The fair rival on small images: one affine resampling of a whole batch."""

    def run() -> int:
        done = 0
        for rows in torch.randperm(len(images)).split(batch):
            x = images[rows].float().unsqueeze(1)
            n = len(x)
            area = torch.empty(n).uniform_(*AREA)
            ratio = torch.empty(n).uniform_(np.log(3 / 4), np.log(4 / 3)).exp()
            w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
            theta = torch.zeros(n, 2, 3)
            theta[:, 0, 0] = w * (torch.rand(n) < 0.5).float().mul(2).sub(1)
            theta[:, 1, 1] = h
            theta[:, 0, 2] = (1 - w) * torch.empty(n).uniform_(-1, 1)
            theta[:, 1, 2] = (1 - h) * torch.empty(n).uniform_(-1, 1)
            grid = torch.nn.functional.affine_grid(theta, (n, 1, size, size), align_corners=False)
            out = torch.nn.functional.grid_sample(x, grid, align_corners=False)
            done += len(out.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous())
        return done

    return run


def make_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of about 500x400 px: crops of two photos, scaled and with sensor-like noise."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    paths = []
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        share = rng.uniform(0.6, 1)
        h, w = (int(side * share) for side in photo.shape[:2])
        y, x = rng.integers(0, photo.shape[0] - h + 1), rng.integers(0, photo.shape[1] - w + 1)
        cut = PIL.Image.fromarray(photo[y : y + h, x : x + w])
        cut = cut.resize((int(rng.integers(440, 560)), int(rng.integers(340, 460))))
        noisy = np.asarray(cut).astype(np.int16) + rng.normal(0, 4, (cut.height, cut.width, 1))
        buffer = io.BytesIO()
        PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        path = folder / f"{i:05d}.jpg"
        path.write_bytes(buffer.getvalue())
        paths.append(path)
    return paths


def run_case(
    case: str, contestants: dict[str, Callable[[], int]], bars: dict[str, float], args: Any
) -> None:
    samples = harness.interleave(contestants, args.rounds)
    lines = []
    for name, found in samples.items():
        against = harness.ratio(samples, "kdcache", name)
        line = {"group": case, "case": name, **found.quantiles(), "kdcache_by_it": against}
        if name in bars:
            line |= {"bar": bars[name], "met": against >= bars[name]}
        lines.append(line)
    title = f"{case}: images/s, CPU us an image, and our rate by theirs ({args.rounds} rounds)"
    harness.report("loader", title, lines, args.save)


def scratch_lines(path: Path, size: int) -> list[dict[str, Any]]:
    """Bytes that each loader holds beside the pixels it hands over, by its own declarations."""
    data = datasets.open_dataset(path)
    largest = int(data.sides_px.astype(np.int64).prod(1).max()) * 3
    slots = BATCHES_AHEAD + 2
    lines = []
    for batch in (64, 256, 1024):
        trailer = (row_bytes(ViewSpec(size)) - size * size * 3) * slots * batch
        lines.append(
            {
                "group": "scratch",
                "case": f"batch {batch}",
                "kdcache_MB": (2 * WORKERS * largest + trailer) / 1e6,
                "stock_MB": slots * batch * largest / 1e6,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--photos", type=int, default=600)
    parser.add_argument("--save", action="store_true", help="keep the result lines")
    args = parser.parse_args()
    if args.save:
        harness.start_results("loader")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = make_photos(folder, args.photos)
        path = folder / "photos.beton"
        convert(Source(("photo",), photos, [0] * len(photos)), path)
        run_case(
            "photos to 224 px",
            {
                "kdcache": ours(path, 224, 64, 0),
                "kdcache, mixed": ours(path, 224, 64, 1),
                "ffcv": stock(path, 224, 64),
                "torchvision, PIL": torch_loader(Files(photos, 224, pil=True), 64),
                "torchvision, decode_jpeg": torch_loader(Files(photos, 224, pil=False), 64),
            },
            {"ffcv": 0.95, "torchvision, PIL": 1.2},
            args,
        )
        harness.report(
            "loader", "scratch memory, photos to 224 px", scratch_lines(path, 224), args.save
        )
        source = open_source("fashion-mnist", "train")
        path = folder / "fashion.beton"
        convert(source, path)
        images = np.stack(source.images)  # type: ignore[arg-type]
        run_case(
            "Fashion-MNIST to 28 px",
            {
                "kdcache": ours(path, 28, 256, 0),
                "kdcache, mixed": ours(path, 28, 256, 1),
                "ffcv": stock(path, 28, 256),
                "torchvision, PIL": torch_loader(Arrays(images, 28), 256),
                "torch, whole batches": batched_tensor(torch.from_numpy(images), 28, 256),
            },
            {"ffcv": 0.95, "torchvision, PIL": 20},
            args,
        )


if __name__ == "__main__":
    main()
