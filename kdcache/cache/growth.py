"""Adding views to a cache: three steps, each of which leaves a cache that can be read.

In: the manifest in the store, and that of the same cache with more views. Out: the manifest that
the store then has. What stays true: until the last step every reader sees the old number of views;
a growth that was killed is finished by the next writer, whatever it came to do.
"""

from __future__ import annotations

from kdcache.cache.layout import GROUP
from kdcache.cache.manifest import Manifest, load_manifest
from kdcache.cache.store import Store
from kdcache.errors import StorageConflict

ANOTHER_PATH = "choose another path"


def finish_growth(store: Store, stored: Manifest) -> Manifest:
    """Finish a growth that has begun: its arrays must all be there before another begins."""
    if stored.grown_views is None:
        return stored
    return grow(store, stored, stored.grown(stored.grown_views))


def grow(store: Store, stored: Manifest, grown: Manifest) -> Manifest:
    """Replace the manifest by one with more views, all of whose shards are there.

    Raises StorageConflict where another process adds other views meanwhile, StorageError.
    """
    try:
        # Both forms of every array are right, then the arrays are replaced, and at last the number
        # of views is raised.
        if stored.grown_views is None:
            stored = _replaced(store, stored, stored.growing(grown))
        for key in grown.zarr_json.keys() - {GROUP}:
            store.replace(key, stored.zarr_json[key], grown.zarr_json[key])
        return _replaced(store, stored, grown)
    except StorageConflict:
        # Of several processes that finish the same views, one may be a step ahead.
        found = load_manifest(store, ANOTHER_PATH)
        if found.spec.num_views < grown.spec.num_views:
            raise
        return found


def _replaced(store: Store, old: Manifest, new: Manifest) -> Manifest:
    """Raises StorageConflict where another process has changed the manifest meanwhile."""
    store.replace(GROUP, old.zarr_json[GROUP], new.zarr_json[GROUP])
    return new
