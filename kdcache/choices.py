"""The words that an option is chosen from. Importing them imports nothing else of kdcache."""

from __future__ import annotations

from typing import Literal

Split = Literal["train", "test"]
OnError = Literal["fail", "skip"]
Crop = Literal["inception", "random", "center", "whole"]
RowOrder = Literal["view", "dataset"]
RecordName = Literal["auto", "dense", "transformed", "top-k", "draws"]
ValueType = Literal["float32", "float16", "uint8"]
Precision = Literal["float32", "bfloat16", "float16"]
TeacherOutput = Literal["logits", "probabilities", "log-probabilities"]
Mode = Literal["labels", "online", "cached"]
OptimizerName = Literal["adamw", "sgd", "soap"]
# As in kernels/problem.py, which stands alone.
Tail = Literal["bucket", "uniform", "renormalise", "none"]

# Defaults that an option and a spec share.
CALIBRATION_RECORDS = 4096
# Of training from top-k records: what the students of an ImageNet teacher learned best with.
TOP_K_TAIL: Tail = "uniform"
