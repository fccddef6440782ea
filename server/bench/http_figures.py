"""Figures of one run of `bench http`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .load_generator import LoadResult


@dataclass
class Measurements:
    """Figures of one server under one kind of load: `cpu_ms` has one entry per round, latencies are in ms, of all
    rounds."""

    cpu_ms: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    requests: int = 0
    answered: int = 0

    def add(self, result: LoadResult, cpu: float) -> None:
        good = [answer for answer in result.answers if answer.status == 200]
        self.requests, self.answered = self.requests + len(result.answers), self.answered + len(good)
        self.latencies += [(answer.done_s - answer.due_s) * 1e3 for answer in good]
        if good:
            self.cpu_ms.append(cpu / len(good) * 1e3)


LoadResults = dict[str, dict[str, Measurements]]  # by load, by server
