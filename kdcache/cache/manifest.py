"""The manifest: what a cache is, in the attributes of its Zarr group.

In: a spec and its layout. Out: every zarr.json of a cache; or the reverse. What stays true: a
changed byte of any zarr.json is an error; a cache of each earlier version is read, and its
`identity`, which keys the checksums of its shards, is the one that was stored with it. The number
of views is no part of the identity: a cache grows by a new manifest.

docs/cache-format.md has the format of each version.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdcache.cache import layout as layouts
from kdcache.cache.layout import GROUP, Layout
from kdcache.cache.records import Records, Tables
from kdcache.cache.spec import CACHE_VERSION, CacheSpec
from kdcache.cache.store import Store
from kdcache.errors import CacheCorrupt, UsageError
from kdcache.spec import digest, parse_json, require_version

KEY = "kdcache"
# Stands in the place of the digest while it is computed: as long, so that nothing else moves.
NO_DIGEST = "0" * 64
WHAT_IS_A_CACHE = "a cache is the folder that `kdcache precompute --out` or `kdcache import` made"


@dataclass(frozen=True)
class Manifest:
    """What a cache is.

    version        of the stored manifest
    identity       keys the checksums of shards: 16 hex digits over all that decides a record
    metadata       what may differ between equal caches: teacher's name, software, device
    render_digest  of some rendered views, where the cache was made; None where it is not known
    zarr_json      every zarr.json, by its key in the store
    tables         of a calibrated record codec: the SHA-256 of each one's object, by its key
    grown_views    while the arrays are being replaced: the views that the cache then has; all are
                   complete
    """

    version: int
    identity: str
    spec: CacheSpec
    layout: Layout
    metadata: dict[str, Any]
    render_digest: str | None
    zarr_json: dict[str, bytes]
    tables: dict[str, str]
    grown_views: int | None = None

    @staticmethod
    def of(
        spec: CacheSpec, metadata: dict[str, Any], render_digest: str | None, tables: Tables
    ) -> tuple[Manifest, dict[str, bytes]]:
        """Of a new cache, and the objects of its tables by key."""
        layout = Layout.of(spec)
        if (shards := spec.num_views * layout.shards(spec.num_samples)) > layouts.MAX_SHARDS:
            raise UsageError(
                f"a cache of {spec.num_views:,} views would have {shards:,} shards, and at most "
                f"{layouts.MAX_SHARDS:,} can be: record fewer views"
            )
        objects = layouts.metadata(spec, layout, {}, tables)
        made = {key: data for key, data in objects.items() if not key.endswith(GROUP)}
        zarr_json = {key: data for key, data in objects.items() if key not in made}
        digests = {key: hashlib.sha256(data).hexdigest() for key, data in made.items()}
        # Records are of these tables: with the same options and other tables it is another cache.
        identity = digest({"spec": spec.identity, "tables": digests}) if made else spec.identity
        found = Manifest(
            CACHE_VERSION, identity, spec, layout, metadata, render_digest, {}, digests
        )
        return _written(found, zarr_json), made

    def grown(self, num_views: int) -> Manifest:
        """The same cache with so many views, as the current version writes it."""
        spec = replace(self.spec, num_views=num_views)
        found = replace(self, spec=spec, grown_views=None)
        return _written(found, layouts.resize(self.zarr_json, num_views, self.table_names))

    def growing(self, grown: Manifest) -> Manifest:
        """This one while its arrays are being replaced by those of `grown`, one after another."""
        found = replace(self, grown_views=grown.spec.num_views)
        return _written(found, self.zarr_json, grown.zarr_json)

    @property
    def table_names(self) -> set[str]:
        return {key.partition("/")[0] for key in self.tables}

    def encode(self, view: int, start: int, records: Records) -> dict[str, bytes]:
        """The object of each column, for the shard whose first row is `start`."""
        return layouts.encode(self.zarr_json, view, start, records)

    def seal(self, name: str, view: int, shard: int, data: bytes) -> bytes:
        """SHA-256 of an object and of where it belongs."""
        place = f"kdcache {self.identity} {name} {view} {shard}\n".encode()
        return hashlib.sha256(place + data).digest()


def load_manifest(store: Store, remedy: str = WHAT_IS_A_CACHE) -> Manifest:
    """The manifest of the cache in a store.

    remedy   what to do where something else is in the store: the end of that error

    Raises UsageError where there is no cache, CacheCorrupt for a damaged manifest, StorageError.
    """
    foreign = f"{store.url} exists and is not a cache; {remedy}"
    text = store.read(GROUP)
    if text is None:
        if store.sizes() or Path(store.url).is_file():
            raise UsageError(foreign)
        raise UsageError(f"no cache at {store.url}: make one with `kdcache precompute`")
    try:
        arrays = {name: store.read(f"{name}/{GROUP}") for name in _array_names(text)}
        return read_manifest(text, arrays)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        if store.read(GROUP) != text:  # views were added between reading it and the arrays
            return load_manifest(store, remedy)
        if KEY.encode() not in text:
            raise UsageError(foreign) from None
        line = f"the manifest of {store.url} is damaged ({error}): recreate the cache"
        raise CacheCorrupt(line) from error


def read_manifest(text: bytes, arrays: Mapping[str, bytes | None]) -> Manifest:
    """The manifest of any version.

    text     the group's zarr.json
    arrays   by name, each array's zarr.json

    Raises UsageError for a later version, ValueError and its like for anything else that is wrong.
    """
    found = parse_json(text)["attributes"][KEY]
    version = require_version("caches", found["spec"]["version"], CACHE_VERSION)
    own = found["digest"].encode()
    # Over the stored text and not over parsed JSON, so that a changed byte anywhere is noticed.
    if hashlib.sha256(text.replace(own, NO_DIGEST.encode())).hexdigest().encode() != own:
        raise ValueError("its digest is not that of its contents")
    zarr_json = {GROUP: text}
    for name, expected in found["arrays"].items():
        key, data = f"{name}/{GROUP}", arrays[name]
        # While views are added, an array's zarr.json is the old one or the new one.
        known = (expected, found.get("grown_arrays", {}).get(name))
        if data is None or hashlib.sha256(data).hexdigest() not in known:
            raise ValueError(f"{key} is {'missing' if data is None else 'not what was written'}")
        zarr_json[key] = data
    metadata = found["metadata" if version > 1 else "info"]
    if not isinstance(metadata, dict):
        raise ValueError("its metadata has no names")
    made = Manifest(
        version,
        # The stored one, which keys the checksums, and not one computed from a newer spec.
        found["identity"] if version > 1 else digest(found["spec"]),
        CacheSpec.from_json(found["spec"], metadata),
        Layout(**found["layout"]),
        metadata,
        found["render_digest" if version > 1 else "pixels"],
        zarr_json,
        found.get("tables", {}),
        found.get("grown_views"),
    )
    layouts.require_arrays(zarr_json, made.spec, made.layout, made.grown_views)
    return made


def read_tables(store: Store, manifest: Manifest) -> Tables:
    """The tables of a cache, by name. Raises CacheCorrupt where one is not what was written."""
    objects = {key: store.read(key) or b"" for key in manifest.tables}
    for key, data in objects.items():
        if hashlib.sha256(data).hexdigest() != manifest.tables[key]:
            raise CacheCorrupt(
                f"{store.url}/{key} is {'damaged' if data else 'missing'}, and no record can be "
                "decoded without it: recreate the cache, or restore this file"
            )
    return layouts.decode_tables({**manifest.zarr_json, **objects}, manifest.table_names)


def _array_names(text: bytes) -> list[str]:
    """The arrays that a group's zarr.json names. Raises ValueError and its like for another one."""
    return list(parse_json(text)["attributes"][KEY]["arrays"])


def _written(
    manifest: Manifest, zarr_json: dict[str, bytes], grown: dict[str, bytes] | None = None
) -> Manifest:
    """With the group's zarr.json, which holds digests of the arrays', and its own.

    zarr_json   of each array, by its key
    grown       what will replace these; until it has, either is right
    """
    attributes: dict[str, Any] = {
        "digest": NO_DIGEST,
        "identity": manifest.identity,
        "spec": manifest.spec.to_json(),
        "layout": asdict(manifest.layout),
        "arrays": _digests(zarr_json),
        "render_digest": manifest.render_digest,
        "metadata": manifest.metadata,
    }
    if manifest.tables:
        attributes["tables"] = manifest.tables
    if grown is not None:
        attributes |= {"grown_views": manifest.grown_views, "grown_arrays": _digests(grown)}
    text = layouts.group_json({KEY: attributes})
    own = hashlib.sha256(text).hexdigest()
    text = text.replace(NO_DIGEST.encode(), own.encode())
    return replace(manifest, version=CACHE_VERSION, zarr_json={**zarr_json, GROUP: text})


def _digests(zarr_json: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each array's zarr.json, by the array's name."""
    arrays = {key.partition("/")[0]: text for key, text in zarr_json.items() if key != GROUP}
    return {name: hashlib.sha256(text).hexdigest() for name, text in arrays.items()}
