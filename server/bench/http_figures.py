"""Figures of one run of `bench http`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .load_generator import Seen


@dataclass
class Turns:
    """What was seen of one server under one kind of load, a round an entry. Latencies in ms, of all rounds."""

    cpu_ms: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    asked: int = 0
    answered: int = 0

    def add(self, seen: Seen, cpu: float) -> None:
        good = [one for one in seen.answers if one.status == 200]
        self.asked, self.answered = self.asked + len(seen.answers), self.answered + len(good)
        self.latencies += [(one.done_s - one.due_s) * 1e3 for one in good]
        if good:
            self.cpu_ms.append(cpu / len(good) * 1e3)


Found = dict[str, dict[str, Turns]]  # by load, by server
