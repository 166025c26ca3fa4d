"""The labels of a batch as a target, mixed as its pixels are."""

from __future__ import annotations

import torch

from kdcache.batch import Batch, Target
from kdcache.views.mixing import MIX_UNIT


def label_target(batch: Batch, num_classes: int) -> Target:
    """At most two classes with mass in each row: the sample's and its partner's."""
    partner_B = batch.mix_weights_B.float() / MIX_UNIT
    # A pair of one class has one entry with all of the mass.
    partner_B = partner_B.masked_fill(batch.labels_B == batch.partner_labels_B, 0)
    mass_B2 = torch.stack([1 - partner_B, partner_B], 1)
    class_ids_B2 = torch.stack([batch.labels_B, batch.partner_labels_B], 1)
    # Relative to the largest, as all targets; a mass of 0 becomes -inf, which names no class.
    logits_B2 = mass_B2.log() - mass_B2.amax(1, keepdim=True).log()
    return Target(logits_B2, class_ids_B2, None, num_classes)
