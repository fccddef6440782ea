"""A full queue lets in who has less than a share of it: one tenant's flood is no reason to send another one away.

    fewer rows taken than there are places                                          everybody
    somebody else has rows, too, and who asks has less than an equal share          up to a quarter more: `room_for`

Taking turns (`scheduler`) makes a quiet tenant's rows the next ones; without this they would not get to wait at all.
Who holds what counts from the promise of a place to the answer.

Pure policy: no asyncio.
"""

from __future__ import annotations

import math
from collections import Counter


def room_for(most: int) -> int:
    """Rows that there must be room for where `most` may wait: those of the quiet come on top."""
    return most + math.ceil(most / 4)


class Shares:
    """Rows by tenant."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()

    def take(self, tenant: str, rows: int) -> None:
        self._held[tenant] += rows

    def give_back(self, tenant: str, rows: int) -> None:
        self._held[tenant] -= rows
        if not self._held[tenant]:
            del self._held[tenant]

    def quiet(self, tenant: str, rows: int, places: int) -> bool:
        """Whether the tenant, with so many rows more, has no more than its share beside others that have some."""
        others = len(self._held) - (tenant in self._held)
        return others > 0 and (self._held[tenant] + rows) * (others + 1) <= places

    def check_integrity(self, total: int) -> None:
        assert all(rows > 0 for rows in self._held.values()), "rows of tenants"
        assert self._held.total() == total, "rows of all tenants"
