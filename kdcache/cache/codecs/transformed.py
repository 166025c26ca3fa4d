"""All logits of a record, by transform coding: cheap at every temperature, to a bounded error.

Logits of a row are correlated: a network's classes look alike in groups. So a record holds the
coefficients of its centred logits in the principal directions of a calibration set (the
Karhunen-Loève transform), all rounded to multiples of one step; those of weak directions are nearly
always 0 and take nearly nothing once entropy-coded. This is reverse water-filling (Cover and
Thomas, Elements of Information Theory, section 10.3.3): the mean squared error of a coefficient,
and so of a logit, is at most about D = step^2 / 12, the one dial.

    z        logits of a row minus their mean
    x        basis (z - mean), rounded to coefficients q = round(x / step)
    y        mean + basis^T (step (q - sign(q) shrink)), the logits that the coefficients give.
             Small values are likelier than large ones, so those that are rounded to q lie nearer to
             0 than q does, by `shrink` on average; each direction has its own.
    record   q; the classes of the k largest logits; what these are above y, in steps / 16

No other class is decoded above the least of the k. Error: the root mean square over classes of
z - y is at most one step in every record, and about sqrt(D) on average. Where the basis is complete
this follows from rounding. Where it is cut to `max_basis_bytes`, a row that it does not hold to
this error is escaped: `escapes` keeps round((z - y) / step) of each class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Target, move
from kdcache.cache.codecs.protocol import Allowance, Column, MeasureNames, RowErrors, Rows
from kdcache.cache.records import Records, Tables
from kdcache.choices import CALIBRATION_RECORDS
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.losses.distillation import check_temperature, distillation_losses
from kdcache.spec import require

MAX_CLASSES = 1 << 15
LEAST_DISTORTION = 1e-4
CORRECTIONS = 16  # of the largest logits, in a step
SHRINK_PRIOR = 20.0  # values by which a direction's shrink is drawn to the mean one
MAX_CODE = np.iinfo(np.int16).max
LEAST_ERROR = 1e-3  # what float16's rounding of the basis may add, in nats


@dataclass(frozen=True)
class Transformed:
    """Every class's logit, to a mean squared error.

    distortion               D, of a logit, in nats^2
    k                        the largest logits, which are kept to a 32nd of a step
    num_calibration_records  teacher logits that the basis is made from
    max_basis_bytes          of the basis in float16, which is complete up to 5,792 classes, and of
                             rank max_basis_bytes / 2C above
    """

    distortion: float = 0.1
    k: int = 8
    num_calibration_records: int = CALIBRATION_RECORDS
    max_basis_bytes: int = 1 << 26
    name: ClassVar[str] = "transformed"
    default_temperature: ClassVar[float] = 1.0
    measures: ClassVar[MeasureNames] = MeasureNames()

    def __post_init__(self) -> None:
        least = LEAST_DISTORTION
        ok = least <= self.distortion < math.inf
        require(ok, "distortion", f"at least {least:g}", self.distortion)
        require(self.k >= 1, "top-k", "at least 1", self.k)
        n = self.num_calibration_records
        require(n >= 2, "calibration-records", "at least 2", n)

    @property
    def step(self) -> float:
        """Of the quantiser, in nats: uniform rounding errors have a variance of step^2 / 12."""
        return math.sqrt(12 * self.distortion)

    def rank(self, num_classes: int) -> int:
        """Directions that the basis has, for num_classes classes."""
        return max(1, min(num_classes, self.max_basis_bytes // (2 * num_classes)))

    def require_classes(self, num_classes: int) -> None:
        require(self.k < num_classes, "top-k", f"1 to {num_classes - 1}", self.k)
        if num_classes > MAX_CLASSES:
            raise UsageError(
                f"transformed records hold up to {MAX_CLASSES:,} classes, the teacher has "
                f"{num_classes:,}: use --record top-k, or draws"
            )

    def require_temperature(self, temperature: float) -> None:
        check_temperature(temperature, sparse=False)

    def columns(self, num_classes: int) -> dict[str, Column]:
        rank, code = self.rank(num_classes), np.dtype(np.int16)
        found = {
            "coefficients": Column(rank, code, "rans"),
            "classes": Column(self.k, np.dtype(np.uint16), "rans"),
            "corrections": Column(self.k, code, "rans"),
        }
        if rank < num_classes:
            found["escapes"] = Column(num_classes, code, "rans")
        return found

    def num_named(self, num_classes: int) -> int:
        return num_classes

    def describe(self, num_classes: int) -> str:
        return (
            f"all {num_classes} classes, transformed at D = {self.distortion:g}, the {self.k} "
            "largest exact"
        )

    def fit(self, logits_NC: torch.Tensor, other: Tables | None = None) -> Tables:
        """The tables of a cache: the principal directions of these logits, their mean, `shrink`.

        other   what this gave for the same logits at another distortion, which has all but the last

        Equal logits give equal tables where LAPACK and its number of threads are the same.
        """
        z_NC = _centred(logits_NC.double())
        if other is None:
            mean_C = z_NC.mean(0)
            basis_RC = principal_directions(z_NC - mean_C, self.rank(z_NC.shape[1]))
            other = {"basis": _to_numpy(basis_RC.half()), "mean": _to_numpy(mean_C.float())}
        basis_RC, mean_C = (torch.from_numpy(other[name]) for name in ("basis", "mean"))
        shrink_R = _shrink((z_NC.float() - mean_C) @ basis_RC.float().T / self.step)
        return {**other, "shrink": _to_numpy(shrink_R)}

    def bind(self, tables: Tables, device: torch.device) -> FittedTransform:
        return FittedTransform(self, tables, device)


def _centred(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC - logits_BC.mean(1, keepdim=True)


def principal_directions(x_NC: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal directions [rank, C] of rows [N, C], those of the largest variance first.

    All C of them where rank = C; else those that N rows span, and rows of 0 where they are fewer.
    """
    N, C = x_NC.shape
    basis_RC: torch.Tensor
    if rank == C or N >= C:
        basis_CC = torch.linalg.eigh(x_NC.T @ x_NC).eigenvectors
        basis_RC = basis_CC.flip(1)[:, :rank].T.contiguous()
    else:
        # Eigenvectors u of x x^T give x^T u, without a matrix [C, C].
        values_N, u_NN = torch.linalg.eigh(x_NC @ x_NC.T)
        found = min(rank, int((values_N > values_N[-1] * 1e-10).sum()))
        rows_RC = u_NN.flip(1)[:, :found].T @ x_NC
        basis_RC = x_NC.new_zeros(rank, C)
        basis_RC[:found] = rows_RC / rows_RC.norm(dim=1, keepdim=True)
    # A direction and its opposite are alike; LAPACK may give either.
    largest_R1 = basis_RC.abs().argmax(1, keepdim=True)
    basis_RC *= basis_RC.gather(1, largest_R1).sign()
    return basis_RC


def _shrink(x_NR: torch.Tensor) -> torch.Tensor:
    """By how much less than their rounded magnitude those are that do not round to 0 [R], in steps.

    A direction with few such values gets nearly the mean of all directions.
    """
    q_NR = x_NR.abs().round()
    found_NR = q_NR > 0
    less_R, count_R = ((q_NR - x_NR.abs()) * found_NR).sum(0), found_NR.sum(0)
    mean = less_R.sum() / count_R.sum().clamp(min=1)
    shrink_R = (less_R + SHRINK_PRIOR * mean) / (count_R + SHRINK_PRIOR)
    return shrink_R.clamp(0, 0.5)


def _to_numpy(x: torch.Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(x.numpy())


class FittedTransform:
    """`Transformed` with the tables of a cache: what converts logits to records and back.

    device   where it computes, and where the targets that it gives lie
    """

    def __init__(self, spec: Transformed, tables: Tables, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self._basis_RC, self._mean_C, self._shrink_R = (
            torch.from_numpy(tables[name]).to(device).float()
            for name in ("basis", "mean", "shrink")
        )

    def encode(self, logits_BC: torch.Tensor, rows: Rows | None = None) -> Records:
        spec, step = self.spec, self.spec.step
        z_BC = _centred(logits_BC.to(self.device).float())
        codes_BR = ((z_BC - self._mean_C) @ self._basis_RC.T / step).round()
        y_BC = self._mean_C + (step * self._shrunk(codes_BR, self._shrink_R)) @ self._basis_RC
        columns = {"coefficients": codes_BR}
        if len(self._basis_RC) < z_BC.shape[1]:
            error_BC = z_BC - y_BC
            # Rows that the basis holds to the bound need nothing.
            outside_B = error_BC.square().mean(1).sqrt() > step
            columns["escapes"] = (error_BC / step * outside_B[:, None]).round()
            y_BC += columns["escapes"] * step
        top_Bk = z_BC.topk(spec.k, dim=1).indices.sort(1).values
        gaps_Bk = z_BC.gather(1, top_Bk) - y_BC.gather(1, top_Bk)
        columns["corrections"] = (gaps_Bk / (step / CORRECTIONS)).round()
        # A class id, then the distances between ids, all at least 1: no id is stored as 0.
        columns["classes"] = top_Bk.diff(dim=1, prepend=-torch.ones_like(top_Bk[:, :1]))
        return Records({name: _to_codes(x, name, spec) for name, x in columns.items()})

    def decode(self, records: Records, num_classes: int) -> Target:
        step = self.spec.step
        y_BC = self._sum(records.columns["coefficients"])
        if "escapes" in records.columns and records.columns["escapes"].any():
            y_BC += self._tensor(records.columns["escapes"]) * step
        ids_Bk = move(_class_ids(records.columns["classes"], num_classes), self.device)
        corrections_Bk = self._tensor(records.columns["corrections"]) * (step / CORRECTIONS)
        named_Bk = y_BC.gather(1, ids_Bk) + corrections_Bk
        # In place, as fresh memory for all classes takes as long as a pass over it. No other class
        # is above one of the k largest, as none was.
        y_BC.clamp_(max=named_Bk.amin(1, keepdim=True)).scatter_(1, ids_Bk, named_Bk)
        return Target(y_BC.sub_(named_Bk.amax(1, keepdim=True)), None, None, num_classes)

    def error_bound(self, gaps: torch.Tensor) -> torch.Tensor:
        """Of one of the k largest logits, whatever its gap."""
        return torch.full_like(gaps, self.spec.step / CORRECTIONS / 2 + LEAST_ERROR)

    def compare(
        self, records: Records, live_BC: torch.Tensor, allowance: Allowance, rows: Rows
    ) -> RowErrors:
        target, again = (self.decode(x, live_BC.shape[1]) for x in (records, self.encode(live_BC)))
        relative_BC = live_BC - live_BC.amax(1, keepdim=True)
        lag_B = -relative_BC.gather(1, target.top_class()[:, None])[:, 0]
        # Of two near ones, one may be stored too high and the other too low.
        agrees_B = lag_B <= allowance.largest_B + 2 * self.error_bound(lag_B)
        kl_B = distillation_losses(live_BC, target)
        # Errors e of the logits give a KL of about e^2 / 2, so that of two errors is at most twice
        # the sum of each one's.
        codec_B = distillation_losses(live_BC, again).clamp(min=0)
        allowed_B = 2 * codec_B + allowance.typical_B.square() + LEAST_ERROR
        error_B = _centred(target.logits_BK - live_BC).square().mean(1).sqrt()
        allowed_error_B = self.spec.step + allowance.largest_B + LEAST_ERROR
        return RowErrors(agrees_B.double(), kl_B, allowed_B, error_B, error_B / allowed_error_B)

    def _sum(self, codes_BR: NDArray[np.int16]) -> torch.Tensor:
        """y of these coefficients [B, C]: a matrix product over the directions that are used."""
        used = np.flatnonzero(codes_BR.any(0))
        used_U = move(torch.from_numpy(used), self.device)
        codes_BU = self._shrunk(self._tensor(codes_BR.take(used, 1)), self._shrink_R[used_U])
        basis_UC = self._basis_RC.index_select(0, used_U)
        return torch.addmm(self._mean_C, codes_BU, basis_UC, alpha=self.spec.step)

    def _shrunk(self, codes_BR: torch.Tensor, shrink_R: torch.Tensor) -> torch.Tensor:
        return codes_BR - codes_BR.sign() * shrink_R

    def _tensor(self, codes: NDArray[np.int16]) -> torch.Tensor:
        # As 16-bit integers to the device, where they become floats.
        return move(torch.from_numpy(np.ascontiguousarray(codes)), self.device).float()


def _to_codes(values: torch.Tensor, name: str, spec: Transformed) -> NDArray[Any]:
    """Raises UsageError for a value that 16 bits do not hold."""
    if values.numel() and int(values.abs().max()) > MAX_CODE:
        raise UsageError(
            f"a row of logits is {float(values.abs().max()) * spec.step:.3g} nats from the mean of "
            f"the calibration set, and {name} at distortion {spec.distortion:g} hold "
            f"{MAX_CODE * spec.step:.3g}: use a larger --distortion, or --record dense"
        )
    kind = np.uint16 if name == "classes" else np.int16
    return np.ascontiguousarray(values.cpu().numpy().astype(kind))


def _class_ids(distances_Bk: NDArray[np.uint16], num_classes: int) -> torch.Tensor:
    """Raises CacheCorrupt for what `encode` cannot have given."""
    ids_Bk = distances_Bk.astype(np.int64).cumsum(1) - 1
    if ids_Bk.size and (not distances_Bk.all() or ids_Bk[:, -1].max() >= num_classes):
        raise CacheCorrupt(f"a record names no {ids_Bk.shape[1]} of {num_classes} classes")
    return torch.from_numpy(ids_Bk)
