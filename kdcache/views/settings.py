"""The settings of the paper: what the teacher and the student see of an image.

Beyer et al. 2022 (arXiv 2106.05237), section 3. In: a setting's name and the view options that were
given. Out: the student's view, the teacher's, and how a cache for it is made. What stays true: a
setting is a pure function from the student's view to the teacher's, so online training and a cache
of any age agree on what either sees. `SETTINGS` has them by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kdcache.choices import RowOrder as RowOrder
from kdcache.errors import UsageError, did_you_mean
from kdcache.views.spec import EVAL_SCALE, Crop, ViewSpec

CUSTOM = "custom"  # the name where no setting fits
PAPER_AVERAGE = 1024  # the crops that the paper averages over
MIN_SCALES = {"inception": 0.05, "whole": 1.0}  # where none is given; else EVAL_SCALE
_SEED_BIT = 1 << 63


def other_seed(seed: int) -> int:
    """The teacher's seed of independent noise: the student's with its highest bit flipped.

    A bijection and its own inverse. Crops of two seeds have nothing to do with each other.
    """
    return seed ^ _SEED_BIT


@dataclass(frozen=True)
class Setting:
    """What teacher and student see.

    name                its name; paper: the paper's name for it (figure 3)
    sees                one line for people
    crop, mixing        of the student's view
    teacher_crop        of the teacher's own view, never mixed; None: it sees the student's pixels
    independent         the teacher's crops and flips are drawn with another seed
    row_order           of a cache: "view" where the teacher sees what the student sees
    num_averaged_views  the target is the mean probability over this many views of the teacher's;
                        0: of one view
    """

    name: str
    paper: str
    sees: str
    crop: Crop
    mixing: bool = False
    teacher_crop: Crop | None = None
    independent: bool = False
    row_order: RowOrder = "view"
    num_averaged_views: int = 0

    @property
    def fixed(self) -> bool:
        """There is one target for each sample, whatever the epoch."""
        return self.row_order == "dataset" and not self.independent

    def student_view_spec(self, given: dict[str, Any], natural_size_px: int) -> ViewSpec:
        """What the student sees; `given` are the view options that were given, by field.

        Raises UsageError for an option that makes another setting of it, naming that one.
        """
        self._require(given)
        own = {"crop": self.crop, "mixup": float(self.mixing), "flip": self.crop != "whole"}
        return make_view_spec({**own, **given}, natural_size_px)

    def teacher_view_spec(
        self, student: ViewSpec, *, size_px: int | None = None
    ) -> ViewSpec | None:
        """What a live teacher sees beside this view of the student's.

        None where it sees the student's own pixels, and where it looks at many views (`average`).
        size_px is the teacher's where it differs: then boxes, pairs, weights, mirrors and order are
        the same, at another size.
        """
        seen = self.cache_view_spec(student, size_px=size_px)
        return None if self.num_averaged_views or seen == student else seen

    def cache_view_spec(self, student: ViewSpec, *, size_px: int | None = None) -> ViewSpec:
        """The view that the teacher answers, be it the student's.

        With `average`, it is views 0 ... average - 1 of this.
        """
        seen = replace(student, size_px=size_px or student.size_px)
        if self.teacher_crop is not None:
            one = self.teacher_crop == "center"
            seen = replace(seen, crop=self.teacher_crop, flip=seen.flip and not one)
        return replace(seen, seed=other_seed(seen.seed)) if self.independent else seen

    def cache_fields(
        self,
        given: dict[str, Any],
        natural_size_px: int,
        *,
        num_views: int = 1,
        row_order: RowOrder | None = None,
        num_averaged_views: int = 0,
    ) -> tuple[ViewSpec, RowOrder, int]:
        """View, order and average of the cache that the setting needs; `given` as of the student.

        Raises UsageError for options that contradict the setting.
        """
        view = self.cache_view_spec(self.student_view_spec(given, natural_size_px))
        if row_order not in (None, self.row_order):
            raise UsageError(
                f"{self.name} needs a cache in {self.row_order} order: leave --row-order out"
            )
        if num_averaged_views and not self.num_averaged_views:
            raise UsageError(
                f"{self.name} has targets of one view: --average-views goes with --setting "
                "fixed-average"
            )
        if self.fixed and num_views != 1:
            raise UsageError(
                f"{self.name} has one answer for each sample: --views 1, not {num_views}"
            )
        return view, self.row_order, num_averaged_views or self.num_averaged_views

    def _require(self, given: dict[str, Any]) -> None:
        """Raise UsageError for view options that make another setting of this one."""
        crop, mixup = given.get("crop", self.crop), given.get("mixup", float(self.mixing))
        if crop != self.crop:
            option, has = f"--crop {crop}", f"has the {self.crop} crop"
        elif bool(mixup) != self.mixing:
            option, has = f"--mixup {mixup:g}", "mixes" if self.mixing else "does not mix"
        elif self.crop == "whole" and given.get("flip"):
            option, has = "--flip", "has the same view every epoch"
        else:
            return
        teachers = crop if self.teacher_crop == self.crop else self.teacher_crop
        would = replace(self, crop=crop, mixing=bool(mixup), teacher_crop=teachers)
        same = [
            other.name
            for other in SETTINGS.values()
            if _kind(other) == _kind(would) and other != self
        ]
        if same:
            raise UsageError(
                f"{self.name} {has}: with {option} it would be {same[0]}; give --setting "
                f"{same[0]}, or leave {option} out"
            )
        raise UsageError(f"{self.name} {has}: leave {option} out, or --setting")

    def _shows(self, student: ViewSpec) -> bool:
        """Whether the student sees such a view."""
        alike = student.crop == self.crop and bool(student.mixup) == self.mixing
        return alike and not (self.crop == "whole" and student.flip)


_PAPER = (
    Setting(
        "fixed-whole",
        "fix/rs",
        "both see all of the image, resized without keeping the aspect ratio: the same view every "
        "epoch",
        "whole",
        row_order="dataset",
    ),
    Setting(
        "fixed-center",
        "fix/cc",
        "the teacher sees the centre crop, the student a random crop, another each epoch",
        "random",
        teacher_crop="center",
        row_order="dataset",
    ),
    Setting(
        "fixed-average",
        "fix/ic_ens",
        "the target is the teacher's mean over many inception crops, the student sees another "
        "inception crop each epoch",
        "inception",
        teacher_crop="inception",
        row_order="dataset",
        num_averaged_views=PAPER_AVERAGE,
    ),
    Setting(
        "independent-random",
        "ind/rc",
        "each sees a random crop of its own, another each epoch",
        "random",
        teacher_crop="random",
        independent=True,
        row_order="dataset",
    ),
    Setting(
        "independent-inception",
        "ind/ic",
        "each sees an inception crop of its own, another each epoch",
        "inception",
        teacher_crop="inception",
        independent=True,
        row_order="dataset",
    ),
    Setting(
        "consistent-random",
        "same/rc",
        "both see the same random crop, another each epoch",
        "random",
    ),
    Setting(
        "consistent-inception",
        "same/ic",
        "both see the same inception crop, another each epoch",
        "inception",
    ),
    Setting(
        "function-matching",
        "function matching",
        "both see the same mixture of two inception crops, another each epoch",
        "inception",
        mixing=True,
    ),
)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _PAPER}
DEFAULT_SETTING = SETTINGS["function-matching"]


def get_setting(name: str) -> Setting:
    """The setting of our name or the paper's. Raises UsageError for another, listing ours."""
    for setting in SETTINGS.values():
        if name in (setting.name, setting.paper):
            return setting
    names = ", ".join(SETTINGS)
    close = did_you_mean(
        name, [known for setting in SETTINGS.values() for known in (setting.name, setting.paper)]
    )
    raise UsageError(f"unknown setting {name!r}: a setting is one of {names}{close}")


def make_view_spec(given: dict[str, Any], natural_size_px: int) -> ViewSpec:
    """The view of these options, by field, where no setting is named."""
    crop = given.get("crop", "inception")
    own = {"size_px": natural_size_px, "min_scale": MIN_SCALES.get(crop, EVAL_SCALE)}
    return ViewSpec(**{**own, **given})


def setting_name(student: ViewSpec, teacher: ViewSpec | None = None) -> str:
    """The name of the setting where the two see this; "custom" where there is none."""
    size_px = (teacher or student).size_px
    for setting in SETTINGS.values():
        alike = (
            not setting.num_averaged_views
            and setting.teacher_view_spec(student, size_px=size_px) == teacher
        )
        if alike and setting._shows(student):
            return setting.name
    return CUSTOM


def _kind(setting: Setting) -> tuple[object, ...]:
    return (
        setting.crop,
        setting.mixing,
        setting.teacher_crop,
        setting.independent,
        setting.num_averaged_views,
    )
