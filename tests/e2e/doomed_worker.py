"""Real worker processes, some of which kill themselves at a named point of a job, as a power cut would.

Each is a fork of one process that has loaded torch already, so that a dozen of them start in the time of one. What they
run is `python -m server work`; the points are reached by wrapping the functions that the worker calls there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def forge() -> ForkServerContext:
    """Where workers come from; its first one takes the time that torch takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server.app.worker", "tests.e2e.doomed_worker"])
    return context


def start(context: ForkServerContext, home: Path, settings: Mapping[str, str], point: str | None = None) -> BaseProcess:
    """A worker in `home` that dies at `point`, one of POINTS, or lives until it is told otherwise."""
    process = context.Process(target=_work, args=(str(home), dict(settings), point), daemon=True)
    process.start()
    return process


def _work(home: str, settings: dict[str, str], point: str | None) -> None:
    log = os.open(Path(home) / "workers.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in os.environ if name.startswith("LENSRACK_")]:
        del os.environ[name]
    os.environ.update({"LENSRACK_HOME": home, **{f"LENSRACK_{key.upper()}": value for key, value in settings.items()}})
    from server.__main__ import cli
    from server.worker import checkpoints

    checkpoints.EVERY_S, checkpoints.REST = 0.0, 0  # type: ignore[misc]  # these fits last a second: each epoch is kept
    if point is not None:
        POINTS[point]()
    sys.argv = ["server", "work"]
    cli()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(owner: Any, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Die once `owner.name` has done what it does and `when`, given its arguments, holds."""
    original = getattr(owner, name)

    def doomed(*arguments: Any, **options: Any) -> Any:
        answer = original(*arguments, **options)
        if answer is not None and when(*arguments):
            _die()
        return answer

    setattr(owner, name, doomed)


def _claimed() -> None:
    for store in _job_stores():
        _after(store, "claim")


def _mid_epoch() -> None:
    from server.worker.heartbeat import Heartbeat

    on_progress = Heartbeat.on_progress

    def doomed(heartbeat: Any, progress: Any) -> None:
        on_progress(heartbeat, progress)
        if progress.epoch == 4 and progress.step == 1 and not progress.epoch_ended:
            _die()

    Heartbeat.on_progress = doomed  # type: ignore[method-assign]


def _mid_comparison() -> None:
    """In the third fit of four, when its first epoch has been written down."""
    from server.worker.heartbeat import Heartbeat

    on_progress = Heartbeat.on_progress

    def doomed(heartbeat: Any, progress: Any) -> None:
        on_progress(heartbeat, progress)
        if (progress.trial, progress.epoch, progress.step) == (3, 2, 1):
            _die()

    Heartbeat.on_progress = doomed  # type: ignore[method-assign]


def _while_writing_a_checkpoint() -> None:
    """The third one: written whole, not yet in its place."""
    replace, seen = Path.replace, [0]

    def doomed(path: Path, target: Path) -> Path:
        if path.parent.name == "checkpoints":
            seen[0] += 1
            if seen[0] == 3:
                _die()
        return replace(path, target)

    Path.replace = doomed  # type: ignore[method-assign, assignment]


def _after_put() -> None:
    for store in _stores():
        _after(store, "put")


def _after_the_alias_moved() -> None:
    for store in _stores():
        _after(store, "set_alias")


def _stores() -> list[type]:
    from prompts_store.file_store import FileStore
    from prompts_store.redis_store import RedisStore

    return [FileStore, RedisStore]


def _job_stores() -> list[type]:
    from server.jobs.redis_store import RedisJobStore
    from server.jobs.sqlite_store import SqliteJobStore

    return [SqliteJobStore, RedisJobStore]


def _slow() -> None:
    """Nothing dies: each step takes a moment more, so that somebody may come in between."""
    from server.worker.heartbeat import Heartbeat

    on_progress = Heartbeat.on_progress

    def slower(heartbeat: Any, progress: Any) -> None:
        time.sleep(0.02)
        on_progress(heartbeat, progress)

    Heartbeat.on_progress = slower  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    "claimed": _claimed,
    "mid_epoch": _mid_epoch,
    "while_writing_a_checkpoint": _while_writing_a_checkpoint,
    "after_put": _after_put,
    "mid_comparison": _mid_comparison,
    "after_the_alias_moved": _after_the_alias_moved,
    "slow": _slow,
}
