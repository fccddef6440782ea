"""Two ready tasks for the bundled backbone, so that a fresh server has something true to say.

`python -m server sample-tasks` made them (`cli/sample_tasks.py`) out of real pictures, as any user's job is made.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from prompts_store import AliasConflict, Bundle, Store, StoreError
from server.engine.bundled import FOLDER

log = logging.getLogger(__name__)

LIVE = "live"


def put(store: Store, fingerprint: str, folder: Path = FOLDER / "tasks") -> list[str]:
    """Those that were fitted on this backbone, live, where the store holds no task; their names.

    A store that is away does not keep the server from starting, and gets none.
    """
    try:
        return [] if store.tasks() else _put(store, fingerprint, folder)
    except StoreError as error:
        log.warning("no sample tasks: %s", error)
        return []


def _put(store: Store, fingerprint: str, folder: Path) -> list[str]:
    bundles = (Bundle.parse(file.read_bytes()) for file in sorted(folder.glob("*.safetensors")))
    fitting = [bundle for bundle in bundles if bundle.manifest.backbone.fingerprint == fingerprint]
    for bundle in fitting:
        store.put(bundle)
        with suppress(AliasConflict):  # another server starts on the same store
            store.set_alias(bundle.manifest.task, LIVE, bundle.version, expect=None)
    return [bundle.manifest.task for bundle in fitting]
