"""The one place that imports FFCV, with care, and what kdcache uses of it.

`import ffcv` leaves torch with a single thread, and fails where FFCV has not been built.
"""

import torch

from kdcache.errors import MissingDependency

_threads = torch.get_num_threads()
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
        f"reading images needs FFCV, which is not installed ({error}): run `make setup` in a "
        "checkout of kdcache, or see docs/quickstart.md"
    ) from error
finally:
    torch.set_num_threads(_threads)

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
