"""The one place that imports FFCV, and the one whose import has effects on other libraries.

A plain `import ffcv` compiles a dictionary for 3 CPU seconds, leaves torch and numba with a single
thread, starts numba's threads (which fixes their kind, and multiprocessing's start method), and
extends sys.path. After this module's import none of that has happened, and FFCV's own loaders,
decoders and writers still work in the same process.

Two effects remain. Numba's threads, once started, are of a kind that several threads may enter
(unless NUMBA_THREADING_LAYER names another), and `ffcv.fields.rgb_image.IMAGE_MODES` is a plain
dict, where FFCV's has numba's type: compiled code cannot take it as an argument.
"""

import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import numba
import numba.typed
import torch

from kdcache.errors import MissingDependency

# Several passes may run at once, and numba's workqueue aborts when two threads enter it. This must
# be set before numba's first threads start. It gives TBB where installed, else OpenMP.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"


def _replace(names: dict[str, Any], name: str, stand_in: object, undo: ExitStack) -> None:
    """Put `stand_in` under a name in a module's (or any) dict until `undo` is closed."""
    if name in names:
        undo.callback(names.__setitem__, name, names[name])
    else:
        undo.callback(names.pop, name, None)
    names[name] = stand_in


def _give_ffcv_numba_threads() -> None:
    """Bind the true function where FFCV's import has bound the stand-in."""
    compiler = sys.modules.get("ffcv.pipeline.compiler")
    if compiler is not None:
        vars(compiler)["set_num_threads"] = numba.set_num_threads


def _stand_ins() -> ExitStack:
    """Replace what FFCV's import uses to its cost; closing the result undoes it."""
    undo = ExitStack()
    undo.callback(torch.set_num_threads, torch.get_num_threads())
    # Callbacks run last first: this one needs numba's own function back in its place.
    undo.callback(_give_ffcv_numba_threads)
    _replace(vars(numba), "set_num_threads", lambda n: None, undo)
    # FFCV makes one dictionary, IMAGE_MODES, and reads it in Python only.
    _replace(vars(numba.typed), "Dict", dict, undo)
    # FFCV imports a name from here that it never uses; the import would load setuptools.
    log = ModuleType("distutils.log")
    vars(log)["warn"] = None
    _replace(sys.modules, "distutils.log", log, undo)
    return undo


_undo = _stand_ins()
try:
    import ffcv._libffcv as libffcv
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.reader import Reader
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )
except ImportError as error:
    raise MissingDependency(
        f"reading images needs FFCV, which is not installed ({error}): run `make demo` or "
        "scripts/install-ffcv.sh in a checkout of kdcache; see docs/quickstart.md"
    ) from error
finally:
    _undo.close()

__all__ = [
    "ALLOC_TABLE_TYPE",
    "CURRENT_VERSION",
    "IMAGE_MODES",
    "TYPE_ID_HANDLER",
    "AllocationQuery",
    "Compiler",
    "EpochIterator",
    "FieldDescType",
    "Graph",
    "HeaderType",
    "IntDecoder",
    "IntField",
    "Operation",
    "PipelineSpec",
    "RGBImageField",
    "Reader",
    "get_metadata_type",
    "libffcv",
]
