"""The set-ups of the paper: what the teacher and the student see of an image.

Beyer et al. 2022 (arXiv 2106.05237), section 3. In: a set-up's name and the view options that were
given. Out: the student's view, the teacher's, and how a tape of the teacher's answers is made. What
stays true: a set-up is a pure function from the student's view to the teacher's, so online training
and a tape of any age agree on what either sees.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from kdcache.errors import TapeMismatch, UsageError, did_you_mean
from kdcache.spec import MILD_AREA, Crop, Order, TapeSpec, ViewSpec, differences

CUSTOM = "custom"  # the name of what is no set-up of ours
PAPER_AVERAGE = 1024  # the crops that the paper averages over
AREAS = {"inception": 0.05, "whole": 1.0}  # where none is given; else the mild crop's
_SEED_BIT = 1 << 63


def other_seed(seed: int) -> int:
    """The teacher's seed of independent noise: the student's with its highest bit flipped.

    A bijection and its own inverse. Crops of two seeds have nothing to do with each other.
    """
    return seed ^ _SEED_BIT


@dataclass(frozen=True)
class Setup:
    """What teacher and student see.

    name, paper   ours, and the paper's (figure 3)
    sees          one line
    crop, mixing  of the student's view
    teacher_crop  of the teacher's own view, never mixed; None: it sees the student's pixels
    independent   the teacher draws its crops and mirrors with another seed
    order         of a tape: "position" where the teacher sees what the student sees
    average       the teacher's answer is a mean of probabilities over this many views; 0: of one
    """

    name: str
    paper: str
    sees: str
    crop: Crop
    mixing: bool = False
    teacher_crop: Crop | None = None
    independent: bool = False
    order: Order = "position"
    average: int = 0

    @property
    def fixed(self) -> bool:
        """There is one answer to each sample, whatever the epoch."""
        return self.order == "sample" and not self.independent

    def student_view(self, given: dict[str, Any], natural_size_px: int) -> ViewSpec:
        """What the student sees; `given` are the view options that were given, by field.

        Raises UsageError for an option that makes another set-up of it, naming that one.
        """
        self._require(given)
        own = {"crop": self.crop, "mixup": float(self.mixing), "flip": self.crop != "whole"}
        return plain_view({**own, **given}, natural_size_px)

    def teacher_view(self, student: ViewSpec, *, size_px: int | None = None) -> ViewSpec | None:
        """What a live teacher sees beside this view of the student's.

        None where it sees the student's own pixels, and where it looks at many views (`average`).
        size_px is the teacher's where it differs: then boxes, pairs, weights, mirrors and order are
        the same, at another size.
        """
        seen = self.tape_view(student, size_px=size_px)
        return None if self.average or seen == student else seen

    def tape_view(self, student: ViewSpec, *, size_px: int | None = None) -> ViewSpec:
        """The view that the teacher answers, be it the student's.

        With `average`, it is views 0 ... average - 1 of this.
        """
        seen = replace(student, size_px=size_px or student.size_px)
        if self.teacher_crop is not None:
            one = self.teacher_crop == "center"
            seen = replace(seen, crop=self.teacher_crop, flip=seen.flip and not one)
        return replace(seen, seed=other_seed(seen.seed)) if self.independent else seen

    def tape_fields(
        self,
        given: dict[str, Any],
        natural_size_px: int,
        *,
        views: int = 1,
        order: Order | None = None,
        average: int = 0,
    ) -> tuple[ViewSpec, Order, int]:
        """View, order and average of the tape that the set-up needs; `given` as of the student.

        Raises UsageError for options that contradict the set-up.
        """
        view = self.tape_view(self.student_view(given, natural_size_px))
        if order not in (None, self.order):
            raise UsageError(f"{self.name} needs a tape in {self.order} order: leave --order out")
        if average and not self.average:
            raise UsageError(
                f"{self.name} asks of one view at a time: --average goes with --setup fixed-average"
            )
        if self.fixed and views != 1:
            raise UsageError(f"{self.name} has one answer for each sample: --views 1, not {views}")
        return view, self.order, average or self.average

    def require_tape(
        self, tape: TapeSpec, url: str, student: ViewSpec, *, resized: bool = False
    ) -> None:
        """Raise TapeMismatch unless the tape holds what the teacher says in this set-up.

        resized   the student's size was asked for, and the tape's may differ from it. A fixed
                  teacher serves every seed, independent noise every seed but the student's own.
        """
        seen = self._served_by(tape, url)
        if self.independent and seen.seed == student.seed:
            raise TapeMismatch(
                f"{url} has the student's own seed ({student.seed}), so teacher and student would "
                f"see the same crops: give another --view-seed, or {self._remedy}"
            )
        expected = self.tape_view(student, size_px=seen.size_px if resized else None)
        if self.order == "sample":
            expected = replace(expected, seed=seen.seed)
        different = differences(expected, seen)
        if different:
            raise TapeMismatch(
                f"{url} holds other views than the teacher sees in {self.name} "
                f"({'; '.join(different)}): give the options it was made with, or {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"precompute a tape with --setup {self.name}"

    def _served_by(self, tape: TapeSpec, url: str) -> ViewSpec:
        """The tape's view. Raises TapeMismatch where the tape serves another set-up."""
        serves = tape_setup(tape)
        if tape.view is None:
            raise TapeMismatch(
                f"{url} was imported, and its views are not of kdcache's making: leave --setup "
                f"out, or {self._remedy}"
            )
        if serves != self.name:
            other = "leave --setup out" if serves == CUSTOM else f"train with --setup {serves}"
            raise TapeMismatch(
                f"{url} was made for {'no set-up of kdcache' if serves == CUSTOM else serves}, "
                f"not for {self.name}: {other}, or {self._remedy}"
            )
        return tape.view

    def _given_by(self, tape_view: ViewSpec) -> dict[str, Any]:
        """The options of the student's view that a tape's view implies."""
        seed = other_seed(tape_view.seed) if self.independent else tape_view.seed
        given = {"size_px": tape_view.size_px, "min_area": tape_view.min_area, "seed": seed}
        if self.mixing:
            given["mixup"] = tape_view.mixup
        if self.teacher_crop != "center":
            given["flip"] = tape_view.flip
        return given

    def _require(self, given: dict[str, Any]) -> None:
        """Raise UsageError for view options that make another set-up of this one."""
        crop, mixup = given.get("crop", self.crop), given.get("mixup", float(self.mixing))
        if crop != self.crop:
            option, has = f"--crop {crop}", f"has the {self.crop} crop"
        elif bool(mixup) != self.mixing:
            option, has = f"--mixup {mixup:g}", "mixes" if self.mixing else "does not mix"
        elif self.crop == "whole" and given.get("flip"):
            option, has = "--flip", "shows one picture of each image"
        else:
            return
        teachers = crop if self.teacher_crop == self.crop else self.teacher_crop
        would = replace(self, crop=crop, mixing=bool(mixup), teacher_crop=teachers)
        same = [other.name for other in SETUPS if _kind(other) == _kind(would) and other != self]
        if same:
            raise UsageError(
                f"{self.name} {has}: with {option} it would be {same[0]}; give --setup {same[0]}, "
                f"or leave {option} out"
            )
        raise UsageError(f"{self.name} {has}: leave {option} out, or --setup")

    def _shows(self, student: ViewSpec) -> bool:
        """Whether the student sees such a view."""
        alike = student.crop == self.crop and bool(student.mixup) == self.mixing
        return alike and not (self.crop == "whole" and student.flip)

    def _serves(self, tape: TapeSpec) -> bool:
        """Whether the tape is of this set-up, whatever its size, seed and area."""
        seen = tape.view
        if seen is None or (tape.order, bool(tape.average)) != (self.order, bool(self.average)):
            return False
        one = self.fixed and not self.average
        alike = (seen.crop, bool(seen.mixup)) == (self.teacher_crop or self.crop, self.mixing)
        return alike and not (self.fixed and tape.views > 1) and not (one and seen.flip)


SETUPS = (
    Setup(
        "fixed-whole",
        "fix/rs",
        "both see all of the image, squashed into the square: one picture for ever",
        "whole",
        order="sample",
    ),
    Setup(
        "fixed-center",
        "fix/cc",
        "the teacher sees the centre crop, the student a mild random crop, another each epoch",
        "random",
        teacher_crop="center",
        order="sample",
    ),
    Setup(
        "fixed-average",
        "fix/ic_ens",
        "the teacher's answer is its mean over many inception crops, the student sees another "
        "inception crop each epoch",
        "inception",
        teacher_crop="inception",
        order="sample",
        average=PAPER_AVERAGE,
    ),
    Setup(
        "independent-mild",
        "ind/rc",
        "each sees a mild random crop of its own, another each epoch",
        "random",
        teacher_crop="random",
        independent=True,
        order="sample",
    ),
    Setup(
        "independent-inception",
        "ind/ic",
        "each sees an inception crop of its own, another each epoch",
        "inception",
        teacher_crop="inception",
        independent=True,
        order="sample",
    ),
    Setup(
        "consistent-mild",
        "same/rc",
        "both see the same mild random crop, another each epoch",
        "random",
    ),
    Setup(
        "consistent-inception",
        "same/ic",
        "both see the same inception crop, another each epoch",
        "inception",
    ),
    Setup(
        "function-matching",
        "function matching",
        "both see the same mixture of two inception crops, another each epoch",
        "inception",
        mixing=True,
    ),
)
DEFAULT = SETUPS[-1]


def setup_of(name: str) -> Setup:
    """The set-up of our name or the paper's. Raises UsageError for another, listing ours."""
    for setup in SETUPS:
        if name in (setup.name, setup.paper):
            return setup
    names = ", ".join(setup.name for setup in SETUPS)
    close = did_you_mean(name, [known for setup in SETUPS for known in (setup.name, setup.paper)])
    raise UsageError(f"unknown set-up {name!r}: a set-up is one of {names}{close}")


def plain_view(given: dict[str, Any], natural_size_px: int) -> ViewSpec:
    """The view of these options, by field, where no set-up is named."""
    crop = given.get("crop", "inception")
    own = {"size_px": natural_size_px, "min_area": AREAS.get(crop, MILD_AREA)}
    return ViewSpec(**{**own, **given})


def setup_name(student: ViewSpec, teacher: ViewSpec | None = None) -> str:
    """The name of the set-up where the two see this (`teacher_view`); "custom" for none of ours."""
    size_px = (teacher or student).size_px
    for setup in SETUPS:
        alike = not setup.average and setup.teacher_view(student, size_px=size_px) == teacher
        if alike and setup._shows(student):
            return setup.name
    return CUSTOM


def tape_setup(tape: TapeSpec) -> str:
    """The name of the set-up that a tape serves; "custom" for none of ours."""
    return next((setup.name for setup in SETUPS if setup._serves(tape)), CUSTOM)


def cached_view(
    setup: Setup | None, tape: TapeSpec, url: str, given: dict[str, Any], natural_size_px: int
) -> tuple[str, ViewSpec]:
    """The set-up's name and the student's view of a run from this tape.

    What is not given comes from the tape; where no set-up is named, that comes from the tape too,
    or is "custom" where the options contradict it. Raises TapeMismatch where the tape serves
    another set-up or other views than the named one, UsageError for options that contradict that.
    """
    if setup is not None:
        implied = setup._given_by(setup._served_by(tape, url))
        view = setup.student_view({**implied, **given}, natural_size_px)
        setup.require_tape(tape, url, view, resized="size_px" in given)
        return setup.name, view
    if tape.order == "position":
        assert tape.view is not None
        view = replace(tape.view, **given)
        return setup_name(view), view
    serves = tape_setup(tape)
    if serves != CUSTOM:
        with contextlib.suppress(UsageError, TapeMismatch):
            return cached_view(setup_of(serves), tape, url, given, natural_size_px)
    view = plain_view({"mixup": 0, **given}, natural_size_px)
    if view.mixup:
        raise UsageError(f"{url} answers single images: train with --mixup 0")
    return CUSTOM, view


def _kind(setup: Setup) -> tuple[object, ...]:
    return setup.crop, setup.mixing, setup.teacher_crop, setup.independent, setup.average
