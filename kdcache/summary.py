"""What a tape holds, in figures.

In: a tape. Out: a `Summary`: completeness, size, and how sure the teacher was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kdcache.loss import log_probabilities
from kdcache.records import TemperedTarget
from kdcache.tape import Tape

SUMMARY_ROWS = 65_536


@dataclass(frozen=True)
class Summary:
    """Means over up to 65,536 records of the complete views, at T = 1.

    entropy and its tail are in nats, the tail taken as evenly spread; tail_mass is a share of 1
    """

    views_complete: int
    shards: int
    shards_missing: int
    stored_bytes: int
    bytes_per_record: float | None
    rows: int
    entropy: float | None
    largest_probability: float | None
    tail_mass: float | None


def summarise(tape: Tape) -> Summary:
    """Completeness, size and the teacher's statistics. Raises TapeCorrupt for a damaged shard."""
    spec = tape.spec
    missing = tape.missing()
    shards = spec.views * tape.shards_per_view
    complete = sorted(set(range(spec.views)) - {v for v, _ in missing})
    sums, rows = np.zeros(3), 0
    for view in complete:
        stop = min(spec.samples, max(1, SUMMARY_ROWS // len(complete)))
        target = tape.decode(tape.read(view, 0, stop))
        if isinstance(target, TemperedTarget):
            log_p, log_tail = target.log_p_BK, target.log_tail_B
        else:
            log_p, log_tail = log_probabilities(target)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        mass = torch.zeros(len(log_p))
        if log_tail is not None:
            mass = log_tail.exp()
            entropy = entropy - mass * (log_tail - float(np.log(spec.classes - spec.top_k)))
        largest = log_p.amax(1).exp()
        sums += [float(entropy.sum()), float(largest.sum()), float(mass.sum())]
        rows += stop
    stored = tape.stored_bytes()
    means = sums / rows if rows else [None] * 3
    recorded = spec.views * spec.samples - sum(tape.rows(shard) for _, shard in missing)
    per_record = stored / recorded if recorded else None
    return Summary(len(complete), shards, len(missing), stored, per_record, rows, *means)
