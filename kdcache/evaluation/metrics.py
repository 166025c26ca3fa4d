"""How alike two models are, and how well one knows what it knows: figures from sums over samples.

In: logits and features of a batch. Out: float64 sums on their device; then figures. What stays
true: sums of parts add up to the sum of the whole, so batches, and processes, may divide the
samples in any way; nothing waits for the device. docs/measuring.md says what each figure means.
"""

from __future__ import annotations

import torch
from torch.nn import functional

Sums = dict[str, torch.Tensor]

BINS = 15
WIDEST_FEATURES = 8192  # the sums of two such models take 1.6 GB


def accuracy_sums(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> Sums:
    """top1, top5, cross_entropy, and bins [3, BINS]: samples, hits and confidence.

    A sample is in bin b where its confidence, the largest probability, is in (b, b + 1] / BINS
    (Guo et al. 2017, section 2).
    """
    # float64, because a sum may be over a million samples.
    logits_BC = logits_BC.double()
    hits_BK = _best(logits_BC, 5) == labels_B[:, None]
    confidence_B = logits_BC.softmax(1).amax(1)
    # Bins are open below, so a confidence on an edge belongs to the lower bin.
    bin_B = (confidence_B * BINS).ceil().clamp(1, BINS) - 1
    in_bin_BN = (bin_B[:, None] == torch.arange(BINS, device=bin_B.device)).double()
    ones_B = torch.ones_like(confidence_B)
    return {
        "top1": hits_BK[:, 0].sum().double(),
        "top5": hits_BK.any(1).sum().double(),
        "cross_entropy": functional.cross_entropy(logits_BC, labels_B, reduction="sum"),
        "bins": torch.stack([ones_B, hits_BK[:, 0].double(), confidence_B]) @ in_bin_BN,
    }


def calibration_error(bins_3N: torch.Tensor) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3): the mean over samples of how far
    the accuracy of a sample's bin is from the bin's mean confidence."""
    samples_N, hits_N, confidence_N = bins_3N
    return float((hits_N - confidence_N).abs().sum() / samples_N.sum())


def fidelity_sums(logits_BC: torch.Tensor, teacher_BC: torch.Tensor) -> Sums:
    """agreement, agreement5, kl, euclidean: each of them a sum over the rows."""
    z_BC, t_BC = logits_BC.double(), teacher_BC.double()
    log_q_BC, log_p_BC = z_BC.log_softmax(1), t_BC.log_softmax(1)
    agreed_BK = _best(z_BC, 5) == _best(t_BC, 1)
    return {
        "agreement": agreed_BK[:, 0].sum().double(),
        "agreement5": agreed_BK.any(1).sum().double(),
        "kl": (log_p_BC.exp() * (log_p_BC - log_q_BC)).sum(),
        "euclidean": (z_BC - t_BC).square().sum(1).sqrt().sum(),
    }


def feature_sums(x_BD: torch.Tensor, y_BE: torch.Tensor) -> Sums:
    """What `linear_cka` needs: x and y summed, and their products. D^2 + D E + E^2 numbers."""
    x_BD, y_BE = x_BD.double(), y_BE.double()
    return {
        "x": x_BD.sum(0),
        "y": y_BE.sum(0),
        "xx": x_BD.T @ x_BD,
        "xy": x_BD.T @ y_BE,
        "yy": y_BE.T @ y_BE,
    }


def linear_cka(sums: Sums, num_samples: int) -> float | None:
    """Linear CKA between two models' features (Kornblith et al. 2019, equation 5 in its feature
    space form): |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms, centred columns.

    None where the features of one of them do not vary.
    """
    x_D, y_E = sums["x"], sums["y"]

    def norm(name: str, a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.linalg.matrix_norm(sums[name] - torch.outer(a, b) / num_samples))

    xx, xy, yy = norm("xx", x_D, x_D), norm("xy", x_D, y_E), norm("yy", y_E, y_E)
    # Constant features leave rounding of their size.
    for left, name in ((xx, "xx"), (yy, "yy")):
        if left <= 1e-12 * float(torch.linalg.matrix_norm(sums[name])):
            return None
    return xy**2 / (xx * yy)


def _best(logits_BC: torch.Tensor, count: int) -> torch.Tensor:
    """The classes of the largest logits, best first: the same ones for the same logits."""
    return logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices[:, :count]
