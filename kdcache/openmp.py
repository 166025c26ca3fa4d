"""numba's parallel loops on the threads that torch has, on import.

Both take GNU's OpenMP, but torch brings a copy of its own. With two copies in one process there are
two pools of threads, and those of one spin for work while those of the other do it. torch's copy is
made visible to all, so that numba's layer, once loaded, calls that one. numba's other layers fight
torch's threads in the same way, and its workqueue aborts when two threads enter it.
"""

import ctypes
from pathlib import Path

import numba
import torch

numba.config.THREADING_LAYER = "omp"
for _library in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
    ctypes.CDLL(str(_library), mode=ctypes.RTLD_GLOBAL)
