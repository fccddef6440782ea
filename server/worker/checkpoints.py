"""The checkpoints of jobs under way: one file for each job, in a folder that all workers share.

<job>.safetensors        where the next attempt goes on
<job>.<pid>.tmp          one on its way; left only by a crash, and gone with the job's end
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from server.jobs.job import is_id
from server.training import checkpoint
from server.training.checkpoint import Checkpoint

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
REST: Final = 20  # times as long as the last one took to write: one of a whole backbone is a gigabyte


class Checkpoints:
    """Checkpoints by job id, in `folder`, which is made when the first one is written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, job_id: str) -> Checkpoint | None:
        return checkpoint.read(self._path(job_id))

    def keeper(self, job_id: str) -> Callable[[Checkpoint], None]:
        """Writes a fit's state down, but not more often than every `EVERY_S`: some epochs take milliseconds. What
        brings the outcome of another trial is written in any case. A disk that is full costs the checkpoint, which only
        whoever takes the job over would miss, and not the fit."""
        written, rest_s, trials = time.monotonic(), EVERY_S, 0

        def keep(state: Checkpoint) -> None:
            nonlocal written, rest_s, trials
            began = time.monotonic()
            if began - written >= rest_s or len(state.trials) > trials:
                self._write(job_id, state)
                written, trials = time.monotonic(), len(state.trials)
                rest_s = max(EVERY_S, REST * (written - began))

        return keep

    def _write(self, job_id: str, state: Checkpoint) -> None:
        try:
            checkpoint.write(self._path(job_id), state)
        except OSError as error:
            log.warning("job %s: a checkpoint could not be written: %s", job_id, error.strerror or type(error).__name__)

    def forget(self, job_id: str) -> None:
        """With what a crash left half written."""
        for file in self._folder.glob(f"{job_id}.*"):
            file.unlink(missing_ok=True)

    def jobs(self) -> set[str]:
        """The jobs that have any."""
        names = {file.name.partition(".")[0] for file in self._folder.glob("job_*.*")}
        return set(filter(is_id, names))

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.safetensors"
