"""docs/settings.png: python scripts/draw_settings.py

What teacher and student see of one of scikit-learn's photos in each setting.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from kdcache.cli.plots import draw_setups
from kdcache.data.convert import convert
from kdcache.data.sources import Source

OUT = Path(__file__).parents[1] / "docs" / "settings.png"
SEED = 24  # whose three mixtures all show both photos

if __name__ == "__main__":
    photos = load_sample_images().images
    with tempfile.TemporaryDirectory() as folder:
        source = Source(("temple", "flower"), list(photos), [0, 1])
        dataset, _ = convert(source, Path(folder) / "photos.beton")
        draw_setups(dataset, OUT, sample=0, size_px=160, seed=SEED)
    # A quarter of the bytes.
    Image.open(OUT).convert("RGB").quantize(256).save(OUT, optimize=True)
