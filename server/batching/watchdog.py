"""The watchdog: a process whose engine hangs, or fails at everything, ends itself, to be started again.

    fine ──► one batch takes longer than `timeout_s`      ┐             │ longer than `grace_s`
      ▲      rows failed, and a picture of zeros, too ────┴► trouble ───┴──► lost: the process ends with EXIT_CODE
      └──────────── the engine answers again ─────────────────┘
                                        not ready, rows are refused (503 engine_unavailable)

A thread that hangs cannot be ended, only its process can; the process manager starts it again. Where the whole
interpreter hangs, so that the watchdog cannot run either, a C thread ends the process: see `HardKill`.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import traceback
from collections.abc import Callable

from server.observability import metrics

from .batcher import Batcher

log = logging.getLogger(__name__)

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
LONGEST_PAUSE_S = 1.0
FAILS = "the engine fails at everything that it is asked"


class HardKill:
    """Ends the process unless armed again in time, with all stacks on stderr. Runs in a C thread, without the GIL."""

    def arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)

    def disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """Watches one engine. Belongs to the event loop of the batcher.

    `probe`: a forward that must succeed, run in the engine's thread · `timeout_s`: 0 turns the watchdog off ·
    `on_lost`: called once, when the engine is given up."""

    def __init__(
        self,
        batcher: Batcher,
        probe: Callable[[], object],
        *,
        timeout_s: float,
        grace_s: float,
        hard_kill: HardKill | None = None,
    ) -> None:
        self._batcher, self._probe, self._timeout_s, self._grace_s = batcher, probe, timeout_s, grace_s
        self._hard_kill = hard_kill or HardKill()
        self._task: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[bool] | None = None
        self._since = 0.0
        self.trouble = ""  # what is wrong, as /readyz says it
        self.lost = False
        self.on_lost: Callable[[], None] = lambda: None
        metrics.ENGINE_UP.set(1)

    def start(self) -> None:
        if self._timeout_s:
            self._task = asyncio.create_task(self._run(), name="watchdog")

    async def stop(self) -> None:
        """Stop watching. The hard kill of a lost process stays armed: its shutdown must not hang either."""
        for task in (self._task, self._probing):
            if task is not None:
                task.cancel()
        await asyncio.gather(*filter(None, [self._task]), return_exceptions=True)
        if self._task is not None and not self.lost:
            self._hard_kill.disarm()

    async def _run(self) -> None:
        while not self.lost:
            self._hard_kill.arm(2 * self._timeout_s + self._grace_s)
            self.look()
            await asyncio.sleep(min(LONGEST_PAUSE_S, self._timeout_s / 8))

    def look(self) -> None:
        """Check once. Never waits for the engine."""
        before, self.trouble = self.trouble, self._diagnosis()
        if self.trouble and not before:
            self._begin_trouble()
        elif before and not self.trouble:
            log.warning("the engine answers again")
            metrics.ENGINE_UP.set(1)
            self._batcher.resume()
        elif self.trouble and self._batcher.clock() - self._since >= self._grace_s:
            self._give_up()

    def _diagnosis(self) -> str:
        thread = self._batcher.thread
        if thread.busy_s() > self._timeout_s:
            return f"the engine has been at one batch for more than {self._timeout_s:g} s"
        if not thread.failures:
            self._probing = None
            return ""
        if self._probing is None or self._probing.done():
            failed = self._probing is not None and self._probing.result() is False
            self._probing = asyncio.get_running_loop().create_task(self._try_out(), name="watchdog-probe")
            return FAILS if failed else ""
        return self.trouble

    async def _try_out(self) -> bool:
        """Run the probe. Where it succeeds, the earlier failures were caused by their rows."""
        try:
            await self._batcher.thread.run_exclusive(self._probe)
        except Exception as error:
            log.error("the engine fails on a picture of zeros, too: %r", error)
            return False
        self._batcher.thread.failures = 0
        return True

    def _begin_trouble(self) -> None:
        self._since = self._batcher.clock()
        metrics.ENGINE_UP.set(0)
        log.critical("%s: this server is not ready any more\n%s", self.trouble, _stack("engine"))
        self._batcher.suspend(self.trouble)

    def _give_up(self) -> None:
        self.lost = True
        log.critical("%s: this process ends itself (%d), to be started again", self.trouble, EXIT_CODE)
        self._hard_kill.arm(3 * self._grace_s + 10)  # an orderly shutdown comes first
        self.on_lost()


def _stack(name: str) -> str:
    """The stacks of the threads whose names begin with `name`."""
    frames = sys._current_frames()
    wanted = [thread for thread in threading.enumerate() if thread.name.startswith(name) and thread.ident in frames]
    return "\n".join(
        f"{thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident or 0])) for thread in wanted
    )
