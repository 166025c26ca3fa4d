"""Random draws from the teacher's softmax: unbiased sparse targets.

A record has the classes that n draws with replacement hit, and how often. Their counts over n are
an unbiased estimate of the teacher's probabilities, where the top k are a biased one, and so is the
gradient of the loss with `tail="none"` (Random Sampling KD, arXiv 2503.16870; plain sampling, its
proposal being the teacher itself). The draws are a function of (seed, view, row): equal logits give
equal records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import TemperedTarget
from kdcache.cache.codecs import values
from kdcache.cache.codecs.protocol import Allowance, Column, MeasureNames, Packing, RowErrors, Rows
from kdcache.cache.codecs.top_k import class_ids_of
from kdcache.cache.records import Records
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.spec import require
from kdcache.views.philox import Purpose, draw

LEAST_DISTANCE = 1e-6


@dataclass(frozen=True)
class Sampled:
    """n random draws from softmax(logits / T), as class ids and counts.

    num_draws     1 to 255
    temperature   T of the draws, and so the only one that their targets have
    """

    num_draws: int
    temperature: float = 1.0
    name: ClassVar[str] = "sampled"
    measures: ClassVar[MeasureNames] = MeasureNames(
        ("drawn", "equal draws, boundaries aside"),
        ("distance", "mean distance of a draw"),
        ("reach", "largest distance, of what is allowed"),
        "",
    )

    @property
    def default_temperature(self) -> float:
        return self.temperature

    def __post_init__(self) -> None:
        require(1 <= self.num_draws <= 255, "num-draws", "1 to 255 draws", self.num_draws)
        require(0 < self.temperature < math.inf, "temperature", "above 0", self.temperature)

    def require_classes(self, num_classes: int) -> None: ...

    def require_temperature(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise UsageError(
                f"the cache holds draws at T = {self.temperature:g}: train with --temperature "
                f"{self.temperature:g}, or precompute at {temperature:g}"
            )

    def columns(self, num_classes: int) -> dict[str, Column]:
        slots = self.num_named(num_classes)
        ids: Packing = "bitshuffle" if num_classes > 256 else "shuffle"
        return {
            "classes": Column(slots, values.class_id_dtype(num_classes), ids),
            "counts": Column(slots, np.dtype(np.uint8), "columns"),
        }

    def num_named(self, num_classes: int) -> int:
        return min(self.num_draws, num_classes)

    def encode(self, logits_BC: torch.Tensor, rows: Rows) -> Records:
        """Class ids in rising order; unused slots have the count 0."""
        # float64: a draw has 53 bits, more than a float32 sum over C classes can tell apart.
        p_BC = torch.softmax(logits_BC.double() / self.temperature, 1)
        u_Bn = torch.from_numpy(_uniform(rows, self.num_draws)).to(p_BC.device)
        cumulative_BC = p_BC.cumsum(1)
        # Scaled to the sum itself, so that no draw falls behind the last class.
        hits_Bn = torch.searchsorted(cumulative_BC, u_Bn * cumulative_BC[:, -1:], right=True)
        hits_Bn = hits_Bn.clamp_(max=p_BC.shape[1] - 1).sort(1).values
        first_Bn = torch.ones_like(hits_Bn, dtype=torch.bool)
        first_Bn[:, 1:] = hits_Bn[:, 1:] != hits_Bn[:, :-1]
        slot_Bn = first_Bn.long().cumsum(1) - 1
        slots = self.num_named(p_BC.shape[1])
        empty = torch.zeros(len(hits_Bn), slots, dtype=torch.long, device=p_BC.device)
        counts = empty.scatter_add(1, slot_Bn, torch.ones_like(hits_Bn))
        ids = empty.scatter(1, slot_Bn, hits_Bn).cpu().numpy()
        return Records(
            {
                "classes": ids.astype(values.class_id_dtype(p_BC.shape[1])),
                "counts": counts.cpu().numpy().astype(np.uint8),
            }
        )

    def decode(self, records: Records, num_classes: int) -> TemperedTarget:
        counts = torch.from_numpy(records.columns["counts"].astype(np.float32))
        if not bool((counts.sum(1) == self.num_draws).all()):
            raise CacheCorrupt(
                f"a record does not hold {self.num_draws} draws: it is uninitialised"
            )
        class_ids = class_ids_of(records.columns["classes"], num_classes)
        # An unused slot becomes -inf, which names no class.
        log_p_BK = (counts / self.num_draws).log()
        return TemperedTarget(log_p_BK, class_ids, None, self.temperature, num_classes)

    def error_bound(self, gaps: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gaps)

    def compare(
        self, records: Records, live_BC: torch.Tensor, allowance: Allowance, rows: Rows
    ) -> RowErrors:
        # Errors e of the logits move a boundary between two classes by at most e / 2.
        distance_Bn = self.distances(records, live_BC, rows)
        largest_B = allowance.largest_B / self.temperature / 2 + LEAST_DISTANCE
        typical_B = allowance.typical_B / self.temperature / 2 + LEAST_DISTANCE
        return RowErrors(
            (distance_Bn <= largest_B[:, None]).double().mean(1),
            distance_Bn.mean(1),
            typical_B,
            distance_Bn.amax(1),
            distance_Bn.amax(1) / largest_B,
        )

    def distances(self, records: Records, logits_BC: torch.Tensor, rows: Rows) -> torch.Tensor:
        """How far each draw [B, n] lies from its class in the cumulative softmax(logits_BC / T).

        rows   those that the records are of: their draws are made again

        0 for a draw that these logits give again; small for one that rounding has moved across the
        boundary between two classes; at most 1. The records are such that `decode` takes them.
        """
        counts_BK = torch.from_numpy(records.columns["counts"].astype(np.int64))
        class_ids_BK = torch.from_numpy(records.columns["classes"].astype(np.int64))
        # Larger draws hit later classes: the sorted ones belong to the classes in rising order.
        repeated = class_ids_BK.reshape(-1).repeat_interleave(counts_BK.reshape(-1))
        hits_Bn = repeated.view(-1, self.num_draws)
        u_Bn = torch.from_numpy(_uniform(rows, self.num_draws)).sort(1).values
        cumulative_BC = torch.softmax(logits_BC.double().cpu() / self.temperature, 1).cumsum(1)
        cumulative_BC /= cumulative_BC[:, -1:].clone()
        upper_Bn = cumulative_BC.gather(1, hits_Bn)
        lower_Bn = cumulative_BC.gather(1, (hits_Bn - 1).clamp(min=0)).masked_fill(hits_Bn == 0, 0)
        return torch.maximum(lower_Bn - u_Bn, u_Bn - upper_Bn).clamp(min=0)

    def describe(self, num_classes: int) -> str:
        return f"{self.num_draws} draws at T = {self.temperature:g}"


def _uniform(rows: Rows, num_draws: int) -> NDArray[np.float64]:
    """[B, n] in [0, 1), of 53 random bits each: a Philox block gives two."""
    out = np.empty((len(rows.row_ids), num_draws))
    # 53 bits of the two words: the significand of a float64 (as in NumPy's random doubles).
    for i in range(0, num_draws, 2):
        words = draw(rows.seed, rows.view, rows.row_ids, Purpose.TARGET, attempt=i // 2)
        for j in range(min(2, num_draws - i)):
            high, low = words[2 * j] >> np.uint64(5), words[2 * j + 1] >> np.uint64(6)
            out[:, i + j] = (high * 2.0**26 + low) * 2.0**-53
    return out
