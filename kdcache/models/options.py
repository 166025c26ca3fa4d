"""The options of what a teacher's output means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdcache.choices import TeacherOutput
from kdcache.errors import UsageError
from kdcache.options import TEACHER, option


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the numbers that a teacher gives are, and of which classes."""

    output: TeacherOutput = option(
        "logits",
        name="--teacher-output",
        help="What the teacher gives. Logits are recorded; probabilities become their logarithms.",
        group=TEACHER,
    )
    class_names: Path | None = option(
        None,
        help="Names of the teacher's classes, one per line in its order. The data's classes are "
        "found among them by name.",
        default_text="the teacher's own, where they are known",
        group=TEACHER,
        metavar="FILE",
    )

    def read_class_names(self) -> tuple[str, ...]:
        """The lines of the file; () without one. Raises UsageError where it cannot be read."""
        if self.class_names is None:
            return ()
        try:
            lines = self.class_names.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read --class-names {self.class_names}: {error}") from error
        return tuple(line.strip() for line in lines if line.strip())
