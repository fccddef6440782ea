"""`python -m server bench overload`: the goodput of a server that receives three times the load that it can handle.

A real server with one task. A closed loop measures its capacity, in answers a second; then an open loop, whose requests
arrive by a Poisson process however slow the answers are, sends a multiple of it; then the capacity again. Reported: the
answers by status, the goodput as a share of the capacity, latencies of accepted requests (from the moment a request was
due), the values of Retry-After, and the server's memory. Requests come from a separate process. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lensrack import wire
from server import __version__
from server.cli.sample_pictures import draw
from server.settings import Settings

from .load_generator import NO_ANSWER, Answer, LoadResult, Plan, generate
from .plain_client import PlainClient
from .temporary_server import temporary_server

TASK = "fruit"
MIB = 2**20
SAMPLE_S = 0.1
REFUSED = (429, 503)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with temporary_server() as (url, home, pid):
        backbone, plan = _prepared(url, home, options)
        generate(replace(plan, seconds=min(1.0, options.capacity_seconds)))  # lazy initialisation is not measured
        before = generate(plan)
        server = _processes(pid)
        with _memory(server) as memory:
            flood = _flooded(plan, _rate(before, options.capacity_seconds), options)
            places = _places(url)
        after = generate(plan)
        memory["after"] = _rss_mib(server)
    figures = report(options, before, flood, after)
    figures |= {"rss_mib": memory, "backbone": backbone, "places": places, "fronts": Settings().fronts}
    print(table(figures))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(
        prog="python -m server bench overload",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of overload")
    parser.add_argument("--times", type=float, default=3.0, help="load as a multiple of the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=10.0, help="seconds of each closed loop")
    parser.add_argument("--clients", type=int, default=64, help="clients of the closed loop: two full batches")
    parser.add_argument("--seed", type=int, default=0, help="seed of the arrivals")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


def _prepared(url: str, home: Path, options: argparse.Namespace) -> tuple[dict[str, Any], Plan]:
    """One fitted task, whose worker has nothing to do afterwards. Returns the backbone and the closed loop's plan."""
    draw(home / "pictures")
    with closing(PlainClient(url)) as client:
        dataset = client.upload(home / "pictures" / TASK / "train")
        client.ended(client.train(TASK, dataset, "linear", {"epochs": 1}))
        ready = wire.Ready.model_validate(client.get("/readyz"))
    place = urlsplit(url)
    plan = Plan(
        host=place.hostname or "",
        port=place.port or 0,
        path=f"/predict/{TASK}",
        picture=str(next((home / "pictures" / TASK / "test").rglob("*.png"))),
        content_type="image/png",
        seconds=options.capacity_seconds,
        clients=options.clients,
    )
    return (ready.backbone.model_dump() if ready.backbone else {}), plan


def _flooded(plan: Plan, capacity: float, options: argparse.Namespace) -> LoadResult:
    if not capacity:
        raise RuntimeError("the closed loop got no answers: there is no capacity to ask for a multiple of")
    return generate(replace(plan, seconds=options.seconds, rate=options.times * capacity, seed=options.seed))


def _places(url: str) -> int:
    """Places of the queue under the load just applied."""
    with closing(PlainClient(url)) as client:
        return int(wire.Rack.model_validate(client.get("/rack")).places)


# --- memory -----------------------------------------------------------------------------------------------------------


def _rss_mib(server: Sequence[Any]) -> float:
    """Memory of all processes. Pages that several of them share count several times: only the growth is reported."""
    return float(round(sum(each.memory_info().rss for each in server) / MIB, 1))


def _processes(pid: int) -> list[Any]:
    """The server's processes, without the idle worker."""
    import psutil  # of the extra `dev`

    server = psutil.Process(pid)
    return [server, *(each for each in server.children(recursive=True) if "work" not in each.cmdline())]


@contextmanager
def _memory(server: Sequence[Any]) -> Iterator[dict[str, float]]:
    """Resident memory at the beginning and at its peak."""
    memory, over = {"before": _rss_mib(server)}, threading.Event()
    memory["peak"] = memory["before"]

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            memory["peak"] = max(memory["peak"], _rss_mib(server))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield memory
    finally:
        over.set()
        watching.join()


# --- the report -------------------------------------------------------------------------------------------------------


def report(options: argparse.Namespace, before: LoadResult, flood: LoadResult, after: LoadResult) -> dict[str, Any]:
    capacities = [_rate(seen, options.capacity_seconds) for seen in (before, after)]
    goodput = _rate(flood, options.seconds)
    return {
        "benchmark": "overload",
        "lensrack": __version__,
        "options": {name: value for name, value in vars(options).items() if name != "json"},
        "machine": {"cores": os.cpu_count(), "load_average": os.getloadavg()},
        "capacity": {"before": round(capacities[0], 1), "after": round(capacities[1], 1)},
        "closed_loop": _latencies(_accepted(before.answers)),
        "asked": len(flood.answers),
        "asked_per_s": round(len(flood.answers) / options.seconds, 1),
        "by_status": {str(status): count for status, count in sorted(_by_status(flood).items())},
        "goodput": round(goodput, 1),
        "goodput_share": [round(goodput / capacity, 3) if capacity else None for capacity in capacities],
        "accepted": _halves(flood, options.seconds),
        "refused": _latencies([answer for answer in flood.answers if answer.status in REFUSED]),
        "retry_after": _retry_after(flood),
        "generator": _generator(flood, options.seconds),
    }


def _rate(result: LoadResult, seconds: float) -> float:
    """Answers a second within the time; requests still in flight at its end do not count."""
    return sum(answer.done_s <= seconds for answer in _accepted(result.answers)) / seconds


def _accepted(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.status == 200]


def _by_status(result: LoadResult) -> Counter[int]:
    return Counter(answer.status for answer in result.answers)


def _halves(flood: LoadResult, seconds: float) -> dict[str, Any]:
    """Latencies of all accepted requests and of those due in the second half: an ever-growing queue would show
    there."""
    accepted = _accepted(flood.answers)
    late = _latencies([answer for answer in accepted if answer.due_s >= seconds / 2])
    return {**_latencies(accepted), "second_half": late}


def _latencies(answers: Sequence[Answer]) -> dict[str, float | None]:
    ordered = sorted((answer.done_s - answer.due_s) * 1e3 for answer in answers)
    return {f"p{share}_ms": _percentile(ordered, share) for share in (50, 99)}


def _percentile(ordered: Sequence[float], share: int) -> float | None:
    """The nearest rank, which is a measured latency; None without latencies."""
    return round(ordered[math.ceil(share / 100 * len(ordered)) - 1], 1) if ordered else None


def _retry_after(flood: LoadResult) -> dict[str, Any]:
    """The values of Retry-After in refusals, in seconds."""
    refused = [answer.retry_after for answer in flood.answers if answer.status in REFUSED]
    stated = [float(seconds) for seconds in refused if seconds is not None]
    figures = {"min": min(stated), "median": statistics.median(stated), "max": max(stated)} if stated else {}
    return {"refused": len(refused), "missing": len(refused) - len(stated), **figures}


def _generator(flood: LoadResult, seconds: float) -> dict[str, Any]:
    """How punctual the load generator was, and its share of a core."""
    lags = sorted((answer.sent_s - answer.due_s) * 1e3 for answer in flood.answers)
    last = max((answer.done_s for answer in flood.answers), default=seconds)
    return {
        "cores": round(flood.cpu_s / max(last, seconds), 3),
        "late_p99_ms": _percentile(lags, 99),
        "connections": flood.connections,
    }


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| {report['options']['times']:g}× capacity for {report['options']['seconds']:g} s | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in _rows(report)])


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    accepted, waits, memory, client = (report[name] for name in ("accepted", "retry_after", "rss_mib", "generator"))
    yield "front ends (0: all in one process)", f"{report['fronts']}"
    yield "capacity before, after (answers/s)", f"{report['capacity']['before']}, {report['capacity']['after']}"
    yield "p50, p99 of the closed loop (ms)", _both(report["closed_loop"])
    yield "asked (questions/s)", f"{report['asked']} ({report['asked_per_s']})"
    yield "answers by status", ", ".join(f"{_status(code)}: {count}" for code, count in report["by_status"].items())
    before, after = (f"{share:.1%}" if share is not None else "?" for share in report["goodput_share"])
    yield "goodput (answers/s)", f"{report['goodput']}: {before} of the capacity before, {after} of that after"
    yield "p50, p99 of the accepted (ms)", _both(accepted)
    yield "the same, second half", _both(accepted["second_half"])
    yield "places in the queue, at capacity (ms)", f"{report['places']}, {_full_queue_ms(report)}"
    yield "p50, p99 of the refused (ms)", _both(report["refused"])
    yield "refusals without Retry-After", f"{waits['missing']} of {waits['refused']}"
    yield (
        "Retry-After min, median, max (s)",
        ", ".join(f"{waits.get(name, '–')}" for name in ("min", "median", "max")),
    )
    yield "server's RSS before, peak, after (MiB)", ", ".join(f"{memory[name]}" for name in ("before", "peak", "after"))
    yield (
        "the generator",
        (f"{client['cores']} of a core, {client['late_p99_ms']} ms late (p99), {client['connections']} connections"),
    )


def _both(latencies: dict[str, Any]) -> str:
    return f"{latencies['p50_ms']}, {latencies['p99_ms']}"


def _status(code: str) -> str:
    return "none" if code == str(NO_ANSWER) else code


def _full_queue_ms(report: dict[str, Any]) -> float | None:
    """The waiting time behind a full queue: the latency that an accepted request has to expect."""
    capacity = report["capacity"]["before"]
    return round(report["places"] / capacity * 1e3, 1) if capacity else None


if __name__ == "__main__":
    main()
