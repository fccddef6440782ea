"""How much is tried: a little with the tests, LENSRACK_FUZZ times as much with `make fuzz`."""

from __future__ import annotations

import os

TIMES = int(os.environ.get("LENSRACK_FUZZ", "1"))
EXAMPLES = 6 * TIMES


def large() -> bool:
    return TIMES > 1
