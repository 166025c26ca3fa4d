"""Glyphs of the system's fonts as images, a teacher for them, and its logits of mixed views.

    python -m benchmarks.glyphs FOLDER [--threads 2]      about 20 minutes of 2 CPU cores

Needs Japanese fonts, as many typefaces as there are. From Debian 12 we took

    apt-get install --no-install-recommends fonts-noto-cjk fonts-ipaexfont-gothic \\
        fonts-ipaexfont-mincho fonts-ipamj-mincho fonts-takao-gothic fonts-takao-mincho \\
        fonts-vlgothic fonts-horai-umefont fonts-umeplus fonts-kiloji fonts-konatu fonts-migmix \\
        fonts-monapo fonts-motoya-l-cedar fonts-motoya-l-maruberi fonts-morisawa-bizud-gothic \\
        fonts-morisawa-bizud-mincho fonts-sawarabi-gothic fonts-seto fonts-yozvox-yozfont \\
        fonts-klee fonts-reggae fonts-rocknroll fonts-rampart fonts-stick fonts-train \\
        fonts-yusei-magic fonts-dotgothic16 fonts-misaki fonts-hanazono fonts-aoyagi-kouzan-t \\
        fonts-kouzan-mouhitsu fonts-lxgw-wenkai fonts-wqy-zenhei fonts-wqy-microhei \\
        fonts-droid-fallback

Two sets: "kana", the 169 hiragana and katakana, and "kanji", 1000 of the 2965 of JIS level 1, each
in every typeface that has them all, once a typeface and copy, with its own size, tilt, place, ink
and noise. A sixth of the typefaces is for testing. The teacher is a `kdcache:medium` trained here
from the labels; FOLDER/NAME.npy gets its logits of views that it was not trained on, mixed in
pairs as a cache's views are, float32 [ROWS, C], and FOLDER/NAME.json says what they are.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from numpy.typing import NDArray

from kdcache.data import beton as datasets
from kdcache.data.convert import convert
from kdcache.data.loader import Loader
from kdcache.data.sources import Source
from kdcache.evaluation.evaluate import evaluate
from kdcache.models import load
from kdcache.models.classifier import Classifier
from kdcache.teacher.logits import teacher_logits
from kdcache.teacher.targets import LabelTargets
from kdcache.training.loop import Progress, train
from kdcache.training.options import RunOptions
from kdcache.training.run import TrainingRun
from kdcache.training.spec import TrainSpec
from kdcache.views.spec import ViewSpec

FONTS = Path("/usr/share/fonts")
SIZE_PX = 32
ROWS = 1 << 16
TEST_EVERY = 6
VIEW = ViewSpec(SIZE_PX, min_scale=0.3, flip=False, mixup=1.0)
MISSING = "\U000ffffd"  # a private character: fonts draw their box for what they lack


@dataclass(frozen=True)
class GlyphSet:
    """copies: images of each class in each typeface."""

    name: str
    copies: int
    epochs: int

    @property
    def characters(self) -> str:
        if self.name == "kana":
            return "".join(_jis_row(4) + _jis_row(5))
        level_one = [c for row in range(16, 48) for c in _jis_row(row)]
        return "".join(level_one[:: len(level_one) // 1000][:1000])


SETS = {s.name: s for s in (GlyphSet("kana", 6, 5), GlyphSet("kanji", 2, 6))}


def _jis_row(row: int) -> list[str]:
    """The characters of a row of JIS X 0208."""
    codes = (bytes([0xA0 + row, 0xA0 + cell]) for cell in range(1, 95))
    return [c for code in codes if (c := code.decode("euc_jp", errors="ignore"))]


def typefaces(characters: str) -> list[Path]:
    """Fonts that draw every character, each in its own way, in the order of their names."""
    found: dict[bytes, Path] = {}
    files = (p for p in FONTS.rglob("*") if p.suffix.lower() in (".ttf", ".ttc", ".otf"))
    for path in sorted(files, key=lambda p: p.name):
        try:
            font = PIL.ImageFont.truetype(path, 16)
            lacking = bytes(font.getmask(MISSING))
            drawn = [bytes(font.getmask(c)) for c in characters]
        except OSError:
            continue
        if len(set(drawn)) > 0.9 * len(drawn) and lacking not in drawn and b"" not in drawn:
            found.setdefault(b"".join(drawn[:20]), path)
    return list(found.values())


def render(character: str, path: Path, random: np.random.Generator) -> NDArray[np.uint8]:
    """Grey pixels [SIZE_PX, SIZE_PX] of one glyph, drawn at twice the size."""
    side = 2 * SIZE_PX
    font = PIL.ImageFont.truetype(path, int(random.integers(42, 60)))
    image = PIL.Image.new("L", (side, side))
    centre = side / 2 + random.uniform(-5, 5, 2)
    draw = PIL.ImageDraw.Draw(image)
    draw.text((float(centre[0]), float(centre[1])), character, 255, font, anchor="mm")
    image = image.rotate(random.uniform(-12, 12), PIL.Image.Resampling.BILINEAR)
    ink = np.asarray(image.resize((SIZE_PX, SIZE_PX), PIL.Image.Resampling.BOX)) / 255
    dark, light = random.uniform(0, 90), random.uniform(150, 255)
    pixels = light + (dark - light) * ink + random.normal(0, random.uniform(2, 25), ink.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def source(glyphs: GlyphSet, paths: list[Path], seed: int) -> Source:
    random = np.random.default_rng(seed)
    images: list[NDArray[np.uint8]] = []
    labels = []
    for label, character in enumerate(glyphs.characters):
        for path in paths:
            images += [render(character, path, random) for _ in range(glyphs.copies)]
            labels += [label] * glyphs.copies
    return Source(tuple(glyphs.characters), images, labels)


def teach(glyphs: GlyphSet, data: datasets.Dataset) -> Classifier:
    """A teacher from the labels, on views of its own."""
    classes = len(data.class_names)
    own = ViewSpec(SIZE_PX, min_scale=0.5, flip=False, mixup=0.0, seed=1)
    spec = TrainSpec("labels", own, glyphs.epochs, 128)
    torch.manual_seed(0)
    teacher = load.load_model(
        "kdcache:medium", "student", num_classes=classes, size_px=SIZE_PX, device="cpu"
    )

    def show(progress: Progress) -> None:
        if metrics := progress.metrics:
            print(f"  step {metrics.step} of {metrics.steps}: loss {metrics.loss:.3f}", flush=True)

    run = TrainingRun(spec, data, teacher, LabelTargets(classes))
    train(run, options=RunOptions(log_every=500, workers=1), report=show)
    return teacher.eval().requires_grad_(False)


def answers(data: datasets.Dataset, teacher: Classifier) -> torch.Tensor:
    """Logits [ROWS, C] of the cache's views, front to back."""
    parts, rows = [], 0
    with Loader(data, VIEW, 256, workers=1) as loader:
        for view in range(math.ceil(ROWS / len(data))):
            for batch in loader.batches(view):
                parts.append(teacher_logits(teacher, batch).clone())
                rows += len(batch)
                if rows >= ROWS:
                    break
    return torch.cat(parts)[:ROWS]


def make(glyphs: GlyphSet, folder: Path) -> None:
    start = time.perf_counter()
    paths = typefaces(glyphs.characters)
    known = [p for i, p in enumerate(paths) if i % TEST_EVERY]
    data, _ = convert(source(glyphs, known, 0), folder / f"{glyphs.name}.beton")
    unknown = source(glyphs, paths[::TEST_EVERY], 1)
    test, _ = convert(unknown, folder / f"{glyphs.name}-test.beton")
    print(f"{glyphs.name}: {len(paths)} typefaces, {len(data)} images", flush=True)
    teacher = teach(glyphs, data)
    accuracy = evaluate(teacher, test, size_px=SIZE_PX, workers=1).top1
    logits_BC = answers(data, teacher)
    np.save(folder / f"{glyphs.name}.npy", logits_BC.numpy())
    largest_B = torch.softmax(logits_BC, 1).amax(1)
    about = {
        "set": glyphs.name,
        "classes": len(data.class_names),
        "typefaces": len(paths),
        "images": len(data),
        "epochs": glyphs.epochs,
        "accuracy": accuracy,
        "mean_top1_probability": float(largest_B.mean()),
        "view": asdict(VIEW),
        "seconds": time.perf_counter() - start,
    }
    (folder / f"{glyphs.name}.json").write_text(json.dumps(about, indent=2) + "\n")
    print(json.dumps(about), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.sets:
        make(SETS[name], args.folder)


if __name__ == "__main__":
    main()
