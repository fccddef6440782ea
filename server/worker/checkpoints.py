"""The checkpoints of unfinished jobs: one file for each job, in a folder that all workers share.

<job>.safetensors        the state from which the next attempt resumes
<job>.<pid>.tmp          a file being written; one that a crash left is removed at the job's end
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from server.jobs.job import is_id
from server.training import checkpoint
from server.training.checkpoint import Checkpoint, OnCheckpoint

log = logging.getLogger(__name__)

EVERY_S: Final = 1.0
REST: Final = 20  # pause after a write, in multiples of its duration: the checkpoint of a whole backbone is a gigabyte


class Checkpoints:
    """Checkpoints by job id, in `folder`, which is created with the first file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, job_id: str) -> Checkpoint | None:
        return checkpoint.read(self._path(job_id))

    def recorder(self, job_id: str) -> OnCheckpoint:
        """A callback that writes a fit's checkpoints, at most every `EVERY_S`, since some epochs take milliseconds, and
        in any case after another trial. On a full disk the checkpoint is lost, which only an attempt that takes the job
        over would need, and the fit goes on."""
        written, pause_s, trials = time.monotonic(), EVERY_S, 0

        def on_checkpoint(state: Checkpoint) -> None:
            nonlocal written, pause_s, trials
            began = time.monotonic()
            if began - written >= pause_s or len(state.trials) > trials:
                self._write(job_id, state)
                written, trials = time.monotonic(), len(state.trials)
                pause_s = max(EVERY_S, REST * (written - began))

        return on_checkpoint

    def _write(self, job_id: str, state: Checkpoint) -> None:
        try:
            checkpoint.write(self._path(job_id), state)
        except OSError as error:
            log.warning("job %s: a checkpoint could not be written: %s", job_id, error.strerror or type(error).__name__)

    def forget(self, job_id: str) -> None:
        """Remove the job's checkpoint, and temporary files that a crash left."""
        for file in self._folder.glob(f"{job_id}.*"):
            file.unlink(missing_ok=True)

    def jobs(self) -> set[str]:
        """The ids of the jobs that have files here."""
        names = {file.name.partition(".")[0] for file in self._folder.glob("job_*.*")}
        return set(filter(is_id, names))

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}.safetensors"
