"""The inputs of a loss, in the form that the definition and every fused form take them.

Shapes: B rows, C classes, K classes named by a target.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Tail = Literal["bucket", "uniform", "renormalise", "none"]
# As compiled code has them: from `uniform` on, the classes that are not named have mass.
TAIL_CODES = {"renormalise": 0, "none": 1, "uniform": 2, "bucket": 3}


class Problem(NamedTuple):
    """Student logits, the teacher of the same rows, and what the loss is multiplied by.

    student_BC      logits
    values, class_ids_BK, tail_values   the teacher, in one of three forms:
        logits [B, C], None, None                          a dense teacher
        logits [B, K], class ids, None or summary [B, 3]   as in `reference.temper`
        log-probabilities at T [B, K], class ids, None or log r [B]   where `tempered`
    row_weights_B   a factor for each row; None means 1
    temperature     T > 0
    tail            what is assumed of the classes that are not named: see `reference.sparse_kl`

    The fields are in the order of the arguments of the operators in `ops.py`, tensors first.
    """

    student_BC: torch.Tensor
    values: torch.Tensor
    class_ids_BK: torch.Tensor | None
    tail_values: torch.Tensor | None
    row_weights_B: torch.Tensor | None
    temperature: float
    tail: Tail
    tempered: bool = False


NUM_TENSORS = 5
