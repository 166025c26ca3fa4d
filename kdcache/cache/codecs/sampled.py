"""Teacher logits to random draws of their softmax, and back: unbiased sparse targets.

In: logits [B, C]. Out: `Records` of the classes that n draws with replacement hit, and how often.
Their counts over n are an unbiased estimate of the teacher's probabilities, where the top k are a
biased one, and so is the gradient of the loss with `tail="none"` (Random Sampling KD,
arXiv 2503.16870; plain sampling, its proposal being the teacher itself). The draws are a function
of (seed, view, row): equal logits give equal records.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import TemperedTarget
from kdcache.cache.records import Records, class_dtype
from kdcache.errors import CacheCorrupt
from kdcache.views.philox import Purpose, draw


def encode(
    logits_BC: torch.Tensor,
    draws: int,
    temperature: float,
    *,
    seed: int,
    view: int,
    rows_B: NDArray[np.int64],
) -> Records:
    """n draws from softmax(logits / T) for each row; classes in rising order, unused slots 0."""
    p_BC = torch.softmax(logits_BC.double() / temperature, 1)
    u_Bn = torch.from_numpy(_uniform(seed, view, rows_B, draws)).to(p_BC.device)
    cumulative_BC = p_BC.cumsum(1)
    # Scaled to the sum itself, so that no draw falls behind the last class.
    hits_Bn = torch.searchsorted(cumulative_BC, u_Bn * cumulative_BC[:, -1:], right=True)
    hits_Bn = hits_Bn.clamp_(max=p_BC.shape[1] - 1).sort(1).values
    first_Bn = torch.ones_like(hits_Bn, dtype=torch.bool)
    first_Bn[:, 1:] = hits_Bn[:, 1:] != hits_Bn[:, :-1]
    slot_Bn = first_Bn.long().cumsum(1) - 1
    slots = min(draws, p_BC.shape[1])
    empty = torch.zeros(len(hits_Bn), slots, dtype=torch.long, device=p_BC.device)
    counts = empty.scatter_add(1, slot_Bn, torch.ones_like(hits_Bn))
    classes = empty.scatter(1, slot_Bn, hits_Bn)
    return Records(
        classes=classes.cpu().numpy().astype(class_dtype(p_BC.shape[1])),
        counts=counts.cpu().numpy().astype(np.uint8),
    )


def decode(records: Records, draws: int, temperature: float, classes: int) -> TemperedTarget:
    """The estimate of each record. Raises TapeCorrupt for one that no draws can have given."""
    assert records.classes is not None
    assert records.counts is not None
    counts = torch.from_numpy(records.counts.astype(np.float32))
    named = torch.from_numpy(records.classes.astype(np.int64))
    if not bool((counts.sum(1) == draws).all()):
        raise CacheCorrupt(f"a record does not hold {draws} draws, so it was never written")
    if named.numel() and int(named.max()) >= classes:
        raise CacheCorrupt(f"a record names class {int(named.max())} of {classes}")
    return TemperedTarget((counts / draws).log(), named, None, temperature, classes)


def distances(
    records: Records,
    logits_BC: torch.Tensor,
    temperature: float,
    *,
    seed: int,
    view: int,
    rows_B: NDArray[np.int64],
) -> torch.Tensor:
    """How far each draw [B, n] lies from its class in the cumulative softmax(logits / T).

    0 for a draw that these logits give again; small for one that rounding has moved across the
    boundary between two classes; at most 1. The records are such that `decode` takes them.
    """
    assert records.classes is not None
    assert records.counts is not None
    counts_BK = torch.from_numpy(records.counts.astype(np.int64))
    classes_BK = torch.from_numpy(records.classes.astype(np.int64))
    draws = int(counts_BK[0].sum())
    # Larger draws hit later classes, so the sorted ones belong to the classes in rising order.
    hits_Bn = classes_BK.reshape(-1).repeat_interleave(counts_BK.reshape(-1)).view(-1, draws)
    u_Bn = torch.from_numpy(_uniform(seed, view, rows_B, draws)).sort(1).values
    cumulative_BC = torch.softmax(logits_BC.double().cpu() / temperature, 1).cumsum(1)
    cumulative_BC /= cumulative_BC[:, -1:].clone()
    upper_Bn = cumulative_BC.gather(1, hits_Bn)
    lower_Bn = cumulative_BC.gather(1, (hits_Bn - 1).clamp(min=0)).masked_fill(hits_Bn == 0, 0)
    return torch.maximum(lower_Bn - u_Bn, u_Bn - upper_Bn).clamp(min=0)


def _uniform(seed: int, view: int, rows_B: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    """[B, n] in [0, 1), of 53 random bits each: a Philox block gives two."""
    out = np.empty((len(rows_B), draws))
    for i in range(0, draws, 2):
        words = draw(seed, view, rows_B, Purpose.TARGET, attempt=i // 2)
        for j in range(min(2, draws - i)):
            high, low = words[2 * j] >> np.uint64(5), words[2 * j + 1] >> np.uint64(6)
            out[:, i + j] = (high * 2.0**26 + low) * 2.0**-53
    return out
