"""Bundles and their stores. Needs numpy, not torch; a backend's own library is imported when that store is opened."""

from prompts_store.alias import ANY, Alias, Expect, Target, Targets
from prompts_store.bundle import MAX_BUNDLE_BYTES, Bundle
from prompts_store.cached_store import CachedStore
from prompts_store.errors import (
    AliasConflict,
    AliasNotFound,
    BadAlias,
    BadStoreUrl,
    BundleError,
    CorruptAliases,
    CorruptBundle,
    KnownStale,
    NoHistory,
    StoreError,
    StoreFull,
    StoreUnavailable,
    TaskNotFound,
    VersionInUse,
    VersionNotFound,
)
from prompts_store.manifest import Backbone, Manifest, Preprocess
from prompts_store.store import Change, Store, VersionInfo
from prompts_store.url import open_store

__all__ = [
    "ANY",
    "MAX_BUNDLE_BYTES",
    "Alias",
    "AliasConflict",
    "AliasNotFound",
    "Backbone",
    "BadAlias",
    "BadStoreUrl",
    "Bundle",
    "BundleError",
    "CachedStore",
    "Change",
    "CorruptAliases",
    "CorruptBundle",
    "Expect",
    "KnownStale",
    "Manifest",
    "NoHistory",
    "Preprocess",
    "Store",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "Target",
    "Targets",
    "TaskNotFound",
    "VersionInUse",
    "VersionInfo",
    "VersionNotFound",
    "open_store",
]
