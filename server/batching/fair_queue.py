"""Start-time fair queueing among keys that share one resource.

Every key has a start tag, the virtual time at which it may be served next. The waking key with the smallest tag is
served, virtual time moves to that tag, and the key's tag grows by 1 / weight. A key that wakes up starts at the present
virtual time: it neither saves up while it sleeps nor pays for what others took. (Goyal, Vin, Cheng: Start-time Fair
Queueing, SIGCOMM 1996; section 3 for turns inside of turns.)

Between two keys that both wait all the time, what they got, divided by their weights, differs by 1 / weight of the one
plus 1 / weight of the other at most, however unevenly the thing itself comes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class _Tag:
    step: float  # virtual time that one service costs: 1 / weight
    start: float  # tag of the next service
    head: int | None = None  # order of arrival of what waits first; None while it sleeps


class FairQueue:
    """Keys and their start tags. The owner holds what waits, and says when a key begins and ceases to wait."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self._weight = weight
        self._keys: dict[str, _Tag] = {}
        self._heap: list[tuple[float, int, str]] = []  # an entry counts while it is what its key says of itself
        self._awake = 0
        self._now = 0.0  # virtual time

    def wait(self, key: str, head: int) -> None:
        """The key waits; `head` is the arrival number of its first item. It breaks ties, so that items of one
        request are served together."""
        turn = self._keys.get(key) or self._open(key)
        if turn.head is None:
            self._awake += 1
            turn.start = max(turn.start, self._now)
        turn.head = head
        heapq.heappush(self._heap, (turn.start, head, key))

    def sleep(self, key: str) -> None:
        """The key waits no more."""
        self._awake -= 1
        self._keys[key].head = None

    def first(self) -> str | None:
        """The key to serve next; None when none waits."""
        while self._heap:
            start, head, key = self._heap[0]
            turn = self._keys.get(key)
            if turn is not None and turn.head == head and turn.start == start:
                return key
            heapq.heappop(self._heap)
        return None

    def serve(self, key: str, *, early: bool = False) -> None:
        """Charge the key for one service; `wait` or `sleep` must follow. `early`: ahead of its turn, virtual time
        stays."""
        turn = self._keys[key]
        if not early:
            self._now = max(self._now, turn.start)
        turn.start += turn.step

    def near(self, key: str) -> bool:
        """Whether the key's turn is at most one service of its own away."""
        turn = self._keys[key]
        return turn.start <= self._now + turn.step

    def alone(self, key: str) -> bool:
        """Whether this key alone waits."""
        return self._awake == 1 and self._keys[key].head is not None

    def forget_idle(self) -> list[str]:
        """Forget the keys that do not wait and whose tag is past: they are like new keys. Returns them."""
        idle = [key for key, turn in self._keys.items() if turn.head is None and turn.start <= self._now]
        for key in idle:
            del self._keys[key]
        return idle

    def check_integrity(self, awake: set[str]) -> None:
        """Raise AssertionError unless exactly these keys wait."""
        assert {key for key, turn in self._keys.items() if turn.head is not None} == awake, "keys that wait"
        assert self._awake == len(awake), "count of keys that wait"
        entries = {(start, head, key) for start, head, key in self._heap}
        for key in awake:
            turn = self._keys[key]
            assert (turn.start, turn.head, key) in entries, "a key that waits has no entry"

    def _open(self, key: str) -> _Tag:
        turn = self._keys[key] = _Tag(step=1.0 / self._weight(key), start=self._now)
        return turn
