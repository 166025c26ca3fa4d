"""kdcache: an offline teacher-logit cache and a fast student trainer, for consistent distillation.

Names are imported when they are first used: `import kdcache` loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.batch import Batch as Batch
    from kdcache.batch import Target as Target
    from kdcache.batch import TemperedTarget as TemperedTarget
    from kdcache.cache.cache import LogitCache as LogitCache
    from kdcache.cache.codecs import Dense as Dense
    from kdcache.cache.codecs import Sampled as Sampled
    from kdcache.cache.codecs import TopK as TopK
    from kdcache.cache.codecs import Transformed as Transformed
    from kdcache.cache.spec import CacheSpec as CacheSpec
    from kdcache.data.beton import Dataset as Dataset
    from kdcache.data.beton import open_dataset as open_dataset
    from kdcache.data.convert import ConvertReport as ConvertReport
    from kdcache.data.convert import convert as convert
    from kdcache.data.loader import Loader as Loader
    from kdcache.data.sources import open_source as open_source
    from kdcache.evaluation.evaluate import evaluate as evaluate
    from kdcache.losses.distillation import DistillationLoss as DistillationLoss
    from kdcache.losses.distillation import distillation_loss as distillation_loss
    from kdcache.models.load import load_student as load_student
    from kdcache.models.load import load_teacher as load_teacher
    from kdcache.teacher.cached_loader import CachedLoader as CachedLoader
    from kdcache.teacher.precompute import make_cache_spec as make_cache_spec
    from kdcache.teacher.precompute import precompute as precompute
    from kdcache.training.loop import train as train
    from kdcache.training.options import RunOptions as RunOptions
    from kdcache.training.run import TrainingRun as TrainingRun
    from kdcache.training.spec import TrainSpec as TrainSpec
    from kdcache.views.spec import ViewSpec as ViewSpec

__version__ = "0.1.0"

_HOMES = {
    "Batch": "kdcache.batch",
    "CacheSpec": "kdcache.cache.spec",
    "CachedLoader": "kdcache.teacher.cached_loader",
    "ConvertReport": "kdcache.data.convert",
    "Dataset": "kdcache.data.beton",
    "Dense": "kdcache.cache.codecs",
    "DistillationLoss": "kdcache.losses.distillation",
    "Loader": "kdcache.data.loader",
    "LogitCache": "kdcache.cache.cache",
    "RunOptions": "kdcache.training.options",
    "Sampled": "kdcache.cache.codecs",
    "Target": "kdcache.batch",
    "TemperedTarget": "kdcache.batch",
    "TopK": "kdcache.cache.codecs",
    "TrainSpec": "kdcache.training.spec",
    "Transformed": "kdcache.cache.codecs",
    "TrainingRun": "kdcache.training.run",
    "ViewSpec": "kdcache.views.spec",
    "convert": "kdcache.data.convert",
    "distillation_loss": "kdcache.losses.distillation",
    "evaluate": "kdcache.evaluation.evaluate",
    "load_student": "kdcache.models.load",
    "load_teacher": "kdcache.models.load",
    "make_cache_spec": "kdcache.teacher.precompute",
    "open_dataset": "kdcache.data.beton",
    "open_source": "kdcache.data.sources",
    "precompute": "kdcache.teacher.precompute",
    "train": "kdcache.training.loop",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
