"""`python -m server bench overload`: what is left of a server that is asked for three times what it can do.

A real server with one task. A closed loop finds its capacity, in answers a second; then an open loop, whose questions
come by a Poisson process however slow the answers are, asks for a multiple of it; then the capacity again. Told: the
answers by status, the goodput as a share of the capacity, latencies of what was accepted (from the moment a question
was due), what Retry-After said, and the server's memory. Questions come from a process of their own. Nothing is
asserted.
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

from .load_generator import NO_ANSWER, Answer, Plan, Seen, generate
from .own_server import own_server
from .plain_client import PlainClient

TASK = "fruit"
MIB = 2**20
SAMPLE_S = 0.1
REFUSED = (429, 503)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    with own_server() as (url, home, pid):
        backbone, plan = _prepared(url, home, options)
        generate(replace(plan, seconds=min(1.0, options.capacity_seconds)))  # whatever is set up lazily is not measured
        before = generate(plan)
        server = _processes(pid)
        with _memory(server) as memory:
            flood = _flooded(plan, _rate(before, options.capacity_seconds), options)
            places = _places(url)
        after = generate(plan)
        memory["after"] = _rss_mib(server)
    found = report(options, before, flood, after)
    found |= {"rss_mib": memory, "backbone": backbone, "places": places, "fronts": Settings().fronts}
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = (__doc__ or "").split("\n\n")[1]
    parser = argparse.ArgumentParser(
        prog="python -m server bench overload",
        description=about,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload")
    parser.add_argument("--times", type=float, default=3.0, help="the capacity is asked for")
    parser.add_argument("--capacity-seconds", type=float, default=10.0, help="of each closed loop")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop: two full batches")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--json", type=Path, help="where to save the figures as well")
    return parser.parse_args(arguments)


def _prepared(url: str, home: Path, options: argparse.Namespace) -> tuple[dict[str, Any], Plan]:
    """One task, fitted; its worker has nothing to do afterwards. The backbone, and the closed loop's plan."""
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


def _flooded(plan: Plan, capacity: float, options: argparse.Namespace) -> Seen:
    if not capacity:
        raise RuntimeError("the closed loop got no answers: there is no capacity to ask for a multiple of")
    return generate(replace(plan, seconds=options.seconds, rate=options.times * capacity, seed=options.seed))


def _places(url: str) -> int:
    """Of the queue, after what it has just been asked."""
    with closing(PlainClient(url)) as client:
        return int(wire.Rack.model_validate(client.get("/rack")).places)


# --- memory -----------------------------------------------------------------------------------------------------------


def _rss_mib(server: Sequence[Any]) -> float:
    """Of all its processes. Pages that several of them share count several times: it is the growth that is told."""
    return float(round(sum(each.memory_info().rss for each in server) / MIB, 1))


def _processes(pid: int) -> list[Any]:
    """Those of the server; its worker, which has nothing to do, is none of them."""
    import psutil  # of the extra `dev`

    server = psutil.Process(pid)
    return [server, *(each for each in server.children(recursive=True) if "work" not in each.cmdline())]


@contextmanager
def _memory(server: Sequence[Any]) -> Iterator[dict[str, float]]:
    """Resident memory at the beginning and at its highest."""
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


def report(options: argparse.Namespace, before: Seen, flood: Seen, after: Seen) -> dict[str, Any]:
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
        "refused": _latencies([one for one in flood.answers if one.status in REFUSED]),
        "retry_after": _told(flood),
        "generator": _generator(flood, options.seconds),
    }


def _rate(seen: Seen, seconds: float) -> float:
    """Answers a second that came within the time; those that were under way at its end came too late to count."""
    return sum(one.done_s <= seconds for one in _accepted(seen.answers)) / seconds


def _accepted(answers: Sequence[Answer]) -> list[Answer]:
    return [one for one in answers if one.status == 200]


def _by_status(seen: Seen) -> Counter[int]:
    return Counter(one.status for one in seen.answers)


def _halves(flood: Seen, seconds: float) -> dict[str, Any]:
    """Latencies of the whole and of what was due in its second half: a queue without an end would show there."""
    accepted = _accepted(flood.answers)
    late = _latencies([one for one in accepted if one.due_s >= seconds / 2])
    return {**_latencies(accepted), "second_half": late}


def _latencies(answers: Sequence[Answer]) -> dict[str, float | None]:
    ordered = sorted((one.done_s - one.due_s) * 1e3 for one in answers)
    return {f"p{share}_ms": _percentile(ordered, share) for share in (50, 99)}


def _percentile(ordered: Sequence[float], share: int) -> float | None:
    """The nearest rank: a latency that was measured. None of nothing."""
    return round(ordered[math.ceil(share / 100 * len(ordered)) - 1], 1) if ordered else None


def _told(flood: Seen) -> dict[str, Any]:
    """What the refusals' Retry-After said, in seconds."""
    refused = [one.retry_after for one in flood.answers if one.status in REFUSED]
    told = [float(seconds) for seconds in refused if seconds is not None]
    figures = {"min": min(told), "median": statistics.median(told), "max": max(told)} if told else {}
    return {"refused": len(refused), "missing": len(refused) - len(told), **figures}


def _generator(flood: Seen, seconds: float) -> dict[str, Any]:
    """Whether the asking was in time, and what of a core it took."""
    lags = sorted((one.sent_s - one.due_s) * 1e3 for one in flood.answers)
    last = max((one.done_s for one in flood.answers), default=seconds)
    return {
        "cores": round(flood.cpu_s / max(last, seconds), 3),
        "late_p99_ms": _percentile(lags, 99),
        "connections": flood.connections,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| {found['options']['times']:g}× capacity for {found['options']['seconds']:g} s | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in _rows(found)])


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    accepted, told, memory, made = (found[name] for name in ("accepted", "retry_after", "rss_mib", "generator"))
    yield "front ends (0: all in one process)", f"{found['fronts']}"
    yield "capacity before, after (answers/s)", f"{found['capacity']['before']}, {found['capacity']['after']}"
    yield "p50, p99 of the closed loop (ms)", _both(found["closed_loop"])
    yield "asked (questions/s)", f"{found['asked']} ({found['asked_per_s']})"
    yield "answers by status", ", ".join(f"{_status(code)}: {count}" for code, count in found["by_status"].items())
    before, after = (f"{share:.1%}" if share is not None else "?" for share in found["goodput_share"])
    yield "goodput (answers/s)", f"{found['goodput']}: {before} of the capacity before, {after} of that after"
    yield "p50, p99 of the accepted (ms)", _both(accepted)
    yield "the same, second half", _both(accepted["second_half"])
    yield "places in the queue, at capacity (ms)", f"{found['places']}, {_full_queue_ms(found)}"
    yield "p50, p99 of the refused (ms)", _both(found["refused"])
    yield "refusals without Retry-After", f"{told['missing']} of {told['refused']}"
    yield "Retry-After min, median, max (s)", ", ".join(f"{told.get(name, '–')}" for name in ("min", "median", "max"))
    yield "server's RSS before, peak, after (MiB)", ", ".join(f"{memory[name]}" for name in ("before", "peak", "after"))
    yield (
        "the generator",
        (f"{made['cores']} of a core, {made['late_p99_ms']} ms late (p99), {made['connections']} connections"),
    )


def _both(latencies: dict[str, Any]) -> str:
    return f"{latencies['p50_ms']}, {latencies['p99_ms']}"


def _status(code: str) -> str:
    return "none" if code == str(NO_ANSWER) else code


def _full_queue_ms(found: dict[str, Any]) -> float | None:
    """What waiting behind a full queue takes: the latency that an accepted question has to expect."""
    capacity = found["capacity"]["before"]
    return round(found["places"] / capacity * 1e3, 1) if capacity else None


if __name__ == "__main__":
    main()
