"""What imports load and leave behind, and that FFCV works whole after kdcache's import of it.

In processes of their own: what is imported here already would hide it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.data.beton import Dataset
from kdcache.data.sources import open_source
from tests.conftest import subset

ROOT = Path(__file__).parents[1]


def run(script: str, *args: object, stderr: str | None = "", **environment: str) -> str:
    """What a script prints. It must succeed, with these words on stderr (None: any)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_THREADING_LAYER")}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env | environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert stderr is None or done.stderr == stderr
    return done.stdout


LEFT_BEHIND = """
import multiprocessing, sys
import numba, numba.core.event, numba.np.ufunc.parallel, numba.typed, torch
torch.set_num_threads(3)
path, set_numba, set_torch = list(sys.path), numba.set_num_threads, torch.set_num_threads
modules = set(sys.modules)
with numba.core.event.install_recorder("numba:compile") as compiled:
    try:
        from kdcache.data import ffcv as ffcv_import
        print("imported", type(ffcv_import.IMAGE_MODES).__name__)
    except ImportError as error:
        print("no ffcv" if "FFCV" in str(error) else error)
assert not compiled.buffer, "numba has compiled something"
assert torch.get_num_threads() == 3
assert torch.set_num_threads is set_torch
assert numba.set_num_threads is set_numba
assert sys.modules["ffcv.pipeline.compiler"].set_num_threads is set_numba
assert not numba.np.ufunc.parallel._is_initialized, "numba's threads run"
assert multiprocessing.get_start_method(allow_none=True) is None
assert sys.path == path
unused = {"setuptools", "distutils.log", "torchvision", "scipy.special"}
assert not unused & (set(sys.modules) - modules)
from numba.typed import typeddict
assert numba.typed.Dict is typeddict.Dict
"""


def test_importing_ffcv_leaves_other_libraries_as_they_were() -> None:
    assert run(LEFT_BEHIND) == "imported dict\n"


@pytest.mark.parametrize("missing", ["cv2", "ffcv.fields.ndarray", "ffcv.loader.epoch_iterator"])
def test_so_does_an_import_that_fails(missing: str) -> None:
    blocked = f"import sys\nsys.modules[{missing!r}] = None\n"
    check = LEFT_BEHIND.replace(
        'sys.modules["ffcv.pipeline.compiler"]', 'sys.modules.get("ffcv.pipeline.compiler", numba)'
    )
    assert run(blocked + check) == "no ffcv\n"


LAYER = (
    "import numba\nfrom kdcache.data import ffcv as ffcv_import\n"
    "print(numba.config.THREADING_LAYER)"
)


def test_numbas_threads_are_of_a_kind_that_several_threads_may_use() -> None:
    assert run(LAYER) == "threadsafe\n"


def test_the_users_kind_of_threads_is_kept() -> None:
    assert run(LAYER, NUMBA_THREADING_LAYER="omp") == "omp\n"


def test_the_loader_loads_no_library_that_it_does_not_use() -> None:
    unused = "torchvision timm sklearn matplotlib zarr setuptools torch._dynamo"
    script = (
        "import sys\nfrom kdcache.data import beton, loader, sources\n"
        f"print(*(set({unused.split()!r}) & set(sys.modules)))"
    )
    assert run(script) == "\n"


def test_converting_digits_loads_no_torchvision(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from kdcache.data.convert import convert
from kdcache.data.sources import open_source
dataset, _ = convert(open_source("digits", "test"), Path(sys.argv[1]))
print(len(dataset), "torchvision" in sys.modules)
"""
    assert run(script, tmp_path / "d.beton") == "297 False\n"


OURS = """
import os, sys
from pathlib import Path
import numba, numpy as np
from kdcache.data.beton import open_dataset
from kdcache.data.loader import Loader
from kdcache.views.spec import ViewSpec

def read(path):
    with Loader(open_dataset(Path(path)), ViewSpec(8), 64, workers=1) as loader:
        return sum(len(batch) for batch in loader.batches(0))
"""

FORKED = """
def read_in_child(path):
    child = os.fork()
    if child == 0:
        os._exit(read(path) != 297)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("layer", ["default", "omp"])
def test_a_process_forked_after_the_import_reads_images(digits_test: Dataset, layer: str) -> None:
    script = OURS + FORKED + "print(read_in_child(sys.argv[1]))"
    assert run(script, digits_test.path, stderr=None, NUMBA_THREADING_LAYER=layer) == "0\n"


def test_with_tbb_so_does_a_process_forked_after_a_pass(digits_test: Dataset) -> None:
    """And without numba's complaint about a fork from another thread than started TBB's."""
    script = (
        OURS
        + FORKED
        + (
            "print(read(sys.argv[1]))\n"
            "tbb = numba.threading_layer() == 'tbb'\n"
            "print(read_in_child(sys.argv[1]) if tbb else 'no TBB')"
        )
    )
    out = run(script, digits_test.path, PYTHONWARNINGS="ignore::DeprecationWarning")
    if "no TBB" in out:
        pytest.skip("TBB is not installed")
    assert out == "297\n0\n"


STOCK = """
from kdcache.data.convert import convert
from kdcache.data.sources import Source
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import CenterCropRGBImageDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader as StockLoader, OrderOption
from ffcv.writer import DatasetWriter
import numba.typed

folder, digits, photos = map(Path, sys.argv[1:])
noise = np.random.default_rng(0).integers(0, 256, (20, 70, 90, 3), np.uint8)

class Noise:
    def __len__(self):
        return len(noise)

    def __getitem__(self, i):
        return noise[i], i

def write(mode):
    path = folder / f"{mode}.beton"
    fields = {"image": RGBImageField(write_mode=mode), "label": IntField()}
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Noise())
    return path

def stock(path, decoder):
    loader = StockLoader(str(path), 8, num_workers=1, order=OrderOption.SEQUENTIAL,
                         drop_last=False, pipelines={"image": [decoder]})
    return np.concatenate([images.copy() for images, _ in loader])

def convert_noise(name):
    dataset, _ = convert(Source(("a",), list(noise), [0] * len(noise)), folder / name)
    return dataset

print(read(digits), read(photos))
raw, jpg, own = write("raw"), write("jpg"), convert_noise("own.beton").path
assert (stock(raw, SimpleRGBImageDecoder()) == noise).all()
error = np.abs(stock(jpg, SimpleRGBImageDecoder()).astype(int) - noise).mean()
own_error = np.abs(stock(own, SimpleRGBImageDecoder()).astype(int) - noise).mean()
assert 0 < own_error < error < 60, (own_error, error)
assert stock(jpg, CenterCropRGBImageDecoder((16, 16), 1.0)).shape == (20, 16, 16, 3)
typed = numba.typed.Dict()
typed["a"] = 1
print(read(digits), read(photos), len(convert_noise("again.beton")), type(typed).__module__)
"""


def test_ours_and_stock_ffcv_write_and_read_in_one_process(
    digits_test: Dataset, photos: Dataset, tmp_path: Path
) -> None:
    out = run(OURS + STOCK, tmp_path, digits_test.path, photos.path, stderr=None)
    assert out == "297 41\n297 41 20 numba.typed.typeddict\n"


ALONE = """
import sys
import numpy as np
from kdcache.data import ffcv as ffcv_import
from ffcv.loader import Loader, OrderOption
loader = Loader(sys.argv[1], 16, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
np.save(sys.argv[2], np.concatenate([images.numpy() for images, _ in loader]))
"""


def test_a_stock_loader_with_its_own_defaults_reads_our_file(
    digits: Dataset, tmp_path: Path
) -> None:
    dataset = subset(digits, 30, tmp_path / "d.beton")
    run(ALONE, dataset.path, tmp_path / "read.npy", stderr=None)
    expected = np.stack([np.asarray(x) for x in open_source("digits", "train").images[:30]])
    assert (np.load(tmp_path / "read.npy") == expected[..., None]).all()
