"""Every error that kdcache raises on purpose, grouped by what the user can do about it.

    KDCacheError
    ├── UsageError (ValueError)           change the command or the argument
    │   └── ClassesMismatch               use a model and data of the same classes
    ├── DatasetCorrupt                    convert the images again, or fix the storage
    ├── CacheMismatch                     use the cache, data and spec that belong together
    ├── CacheIncomplete                   run `kdcache precompute` again
    ├── CacheCorrupt                      delete the named part and precompute it again
    ├── CheckpointCorrupt                 remove the named file, and resume from the one before
    ├── Stopped                           resume the run
    ├── TimedOut (TimeoutError)           end what hangs, or give a longer --timeout
    ├── NonFinite                         fix the model or lower the learning rate
    ├── ProcessLost                       read the error of the other process
    ├── StorageError (OSError)            free space, or get permission to write
    │   └── StorageConflict               give each writer its own part
    └── MissingDependency (ImportError)   install what is named

A message says what was expected, what was found, where, and what to do, in one line.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class KDCacheError(Exception):
    """Base of all errors that kdcache raises on purpose."""


class UsageError(KDCacheError, ValueError):
    """An argument is wrong."""


class ClassesMismatch(UsageError):
    """A model distinguishes other classes than the data has."""


class DatasetCorrupt(KDCacheError):
    """A dataset file is truncated, damaged or foreign."""


class CacheMismatch(KDCacheError):
    """A cache was made from other data, another teacher or another view spec than asked for."""


class CacheIncomplete(KDCacheError):
    """A cache lacks views or shards that were asked for."""


class CacheCorrupt(KDCacheError):
    """A byte of a cache is not what was written."""


class CheckpointCorrupt(KDCacheError):
    """A checkpoint of a run is truncated, damaged or foreign."""


class Stopped(KDCacheError):
    """A signal ended a run before its last step; its checkpoint is saved."""

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after step {step:,}; checkpoint saved")
        self.signal = signal
        self.step = step


class NonFinite(KDCacheError):
    """A model gave NaN or infinity where a number is needed."""


class PeerFailed(KDCacheError):
    """Another process of the run has ended before this one."""


class TimedOut(KDCacheError, TimeoutError):
    """Something was waited for for too long."""


class StorageError(KDCacheError, OSError):
    """The disk or the store refused to write."""


class StorageConflict(StorageError):
    """Another writer has put other bytes where this one was to write."""


class MissingDependency(KDCacheError, ImportError):
    """An optional package is not installed."""


def conflict_at(url: str, key: str) -> StorageConflict:
    """The error of an object that another writer has put with other bytes."""
    return StorageConflict(f"{url}/{key} is there with other bytes than were to be written")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known one that is most like it, if any is."""
    close = get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
