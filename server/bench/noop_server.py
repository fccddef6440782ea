"""A normal server whose engine answers immediately: what remains is HTTP, decoding, batching and the rack.

Run by `bench overhead`: `python -m server.bench.noop_server serve …`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np

from server.engine.batch import Logits, Work
from server.engine.engine import Engine


def _at_once(self: Engine, work: Sequence[Work]) -> list[Logits]:
    return [np.zeros(len(seat.labels)) for _, seat in work]


if __name__ == "__main__":
    Engine.run = _at_once  # type: ignore[method-assign]
    importlib.import_module("server.__main__").cli()
