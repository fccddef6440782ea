"""Exports a version for other tools, in a process of its own: `python -m server.app.exporter FORMAT INPUT FILE`.

The exporters need the backbone in float32 on the CPU, whatever the engine runs, and hold the interpreter for seconds;
the process gives both back. It reads the bundle from standard input and prints a failure as JSON: status, code, detail.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from prompts_store import Bundle
from server.errors import DeadlineExceeded, DiskFull, Internal, ServiceError
from server.settings import Settings

from .worker_pool import worker_environment

COMMAND: Final = (sys.executable, "-m", "server.app.exporter")
REFUSED: Final = 3  # the exit status after a failure that is printed
LONGEST_S: Final = 600.0


def export(settings: Settings, bundle: Bundle, form: str, takes: str, path: Path) -> None:
    """Write a version as `form` (onnx, timm) to `path`; slow, call in a thread.

    Raises ServiceError: not_exportable, wrong_backbone, not_installed, deadline_exceeded, disk_full, internal.
    """
    try:
        done = subprocess.run(
            [*COMMAND, form, takes, str(path)],
            input=bundle.data,
            stdout=subprocess.PIPE,
            env=worker_environment(settings, 0),
            timeout=LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"the export was not finished within {LONGEST_S:g} s") from error
    if done.returncode == REFUSED:
        raise _failure(**json.loads(done.stdout.splitlines()[-1]))
    if done.returncode:
        raise Internal(f"the export ended with status {done.returncode}; the server's log has the details")


def _failure(status: int, code: str, detail: str) -> ServiceError:
    error = ServiceError(detail, code=code)
    error.status = status
    return error


def exported(settings: Settings, bundle: Bundle, form: str, takes: str) -> bytes:
    """Return a version as a file, in this process. Raises ServiceError."""
    from server.exporting.to_onnx import Input, to_onnx
    from server.exporting.to_timm import to_timm
    from server.methods.registry import Registry

    from .backbone import load_backbone

    exact = settings.model_copy(update={"device": "cpu", "dtype": "float32", "packed": False})
    backbone, registry = load_backbone(exact, exact.threads or os.cpu_count() or 1), Registry.installed()
    registry.check(bundle, backbone.spec)
    return to_timm(bundle, backbone) if form == "timm" else to_onnx(bundle, backbone, registry, Input(takes))


def main(form: str, takes: str, path: str) -> int:
    """Export the bundle of standard input to a file; return the exit status."""
    settings = Settings()
    os.nice(settings.worker_nice)
    bundle = Bundle.parse(sys.stdin.buffer.read(), max_bytes=settings.max_bundle_bytes)
    try:
        data = exported(settings, bundle, form, takes)
        try:
            Path(path).write_bytes(data)
        except OSError as error:
            raise DiskFull("the export could not be written: the disk is full or failing") from error
    except ServiceError as error:
        print(json.dumps({"status": error.status, "code": error.code, "detail": error.detail}))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
