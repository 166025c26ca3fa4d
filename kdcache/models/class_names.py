"""Which of a teacher's classes are the data's: by name, where the teacher's names are known.

In: the names of a teacher's classes, and those of the data. Out: the teacher's class of each of the
data's. What stays true: an order is never guessed; where some names are found and others are not,
that is an error and not a warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.errors import ClassesMismatch

SHOWN = 3


@dataclass(frozen=True)
class ClassNames:
    """Of a teacher's classes, in its order.

    names   all names of each class; the first one is shown
    own     the names are those of the data that it was trained on, so that other data have others
    """

    names: tuple[tuple[str, ...], ...]
    own: bool

    def __len__(self) -> int:
        return len(self.names)

    @staticmethod
    def of(names: Sequence[str]) -> ClassNames:
        return ClassNames(tuple((name,) for name in names), own=True)


def match_classes(
    teacher: str, known: ClassNames, data: object, class_names: Sequence[str]
) -> tuple[int, ...] | None:
    """The teacher's class of each of the data's classes; None where their names are of other kinds.

    teacher, data   what they are called, for a message

    Raises ClassesMismatch where the teacher lacks some of the data's classes, or where a name or
    two of them stand for several.
    """
    places: dict[str, list[int]] = {}
    for i, names in enumerate(known.names):
        for name in dict.fromkeys(map(_plain, names)):
            places.setdefault(name, []).append(i)
    found = [places.get(_plain(name), []) for name in class_names]
    missing = [name for name, ids in zip(class_names, found, strict=True) if not ids]
    if len(missing) == len(found) and not known.own:
        return None
    if missing:
        # The class at the same place tells more than a name alone.
        there = [known.names[i][0] for i in range(min(len(known), SHOWN))]
        raise ClassesMismatch(
            f"{teacher} was trained on other classes than {data}: it has no "
            f"{_list(missing)}, but {_list(there, len(known))}"
        )
    for name, ids in zip(class_names, found, strict=True):
        if len(ids) > 1:
            raise ClassesMismatch(
                f"{len(ids)} classes of {teacher} are called {name!r}: number {ids[0]} and "
                f"{ids[1]}; name them apart with --class-names"
            )
    ids = [one for (one,) in found]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        same = [n for n, i in zip(class_names, ids, strict=True) if i == twice]
        raise ClassesMismatch(
            f"classes {_list(same)} of {data} are one class of {teacher}, {known.names[twice][0]!r}"
        )
    return tuple(ids)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _list(names: Sequence[str], count: int | None = None) -> str:
    more = (len(names) if count is None else count) - SHOWN
    shown = ", ".join(map(repr, names[:SHOWN]))
    return f"{shown} and {more:,} more" if more > 0 else shown
