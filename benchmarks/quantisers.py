"""Vector quantisation of logits: the other way to few bytes a record.

A row of centred logits becomes bytes, each the number of one of 256 codewords that k-means finds in
calibration rows. It is how VQAE (arXiv 2603.03808) compresses soft labels, whose learned encoder is
not reproduced here.

product    each byte is of an equal share of the classes (Jegou et al. 2011, TPAMI 33(1))
residual   each byte is of all classes, of what the bytes before it leave
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CODEWORDS = 256
ITERATIONS = 8


def kmeans(x_ND: torch.Tensor, seed: int) -> torch.Tensor:
    """Codewords [256, D], of Lloyd's iterations from random rows."""
    chosen = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))[:CODEWORDS]
    words_WD = x_ND[chosen].clone()
    for _ in range(ITERATIONS):
        nearest_N = nearest(x_ND, words_WD)
        count_W = torch.bincount(nearest_N, minlength=len(words_WD))
        sums_WD = torch.zeros_like(words_WD).index_add_(0, nearest_N, x_ND)
        used_W = count_W > 0
        words_WD[used_W] = sums_WD[used_W] / count_W[used_W, None]
    return words_WD


def nearest(x_ND: torch.Tensor, words_WD: torch.Tensor) -> torch.Tensor:
    """The codeword of each row [N]: of least squared distance, less a row's own square."""
    return torch.addmm(words_WD.square().sum(1), x_ND, words_WD.T, alpha=-2).argmin(1)


@dataclass(frozen=True)
class VectorQuantiser:
    """Bytes of a record: `size`."""

    kind: str
    size: int

    def fit(self, rows_NC: torch.Tensor) -> list[torch.Tensor]:
        """The codewords of each byte."""
        left_NC = _centred(rows_NC)
        if self.kind == "product":
            return [kmeans(x_ND, i) for i, x_ND in enumerate(left_NC.tensor_split(self.size, 1))]
        words = []
        for i in range(self.size):
            words.append(kmeans(left_NC, i))
            left_NC = left_NC - words[-1][nearest(left_NC, words[-1])]
        return words

    def reconstruct(self, words: list[torch.Tensor], rows_BC: torch.Tensor) -> torch.Tensor:
        """The centred rows as their bytes give them back."""
        left_BC = _centred(rows_BC)
        if self.kind == "product":
            parts = zip(words, left_BC.tensor_split(self.size, 1), strict=True)
            return torch.cat([words_WD[nearest(x_BD, words_WD)] for words_WD, x_BD in parts], 1)
        found_BC = torch.zeros_like(left_BC)
        for words_WC in words:
            found_BC += words_WC[nearest(left_BC - found_BC, words_WC)]
        return found_BC


def _centred(rows_BC: torch.Tensor) -> torch.Tensor:
    return rows_BC - rows_BC.mean(1, keepdim=True)
