"""A client for what a benchmark needs besides its measurements: data sets, jobs, waiting. In plain HTTP, because
nothing of the server imports the SDK."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from lensrack import wire

WAIT_S = 600.0
LOOK_AGAIN_S = 0.1


class PlainClient:
    """Raises RuntimeError with the server's message if the server refuses."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=WAIT_S)

    def close(self) -> None:
        self._http.close()

    def cancel(self, job: str) -> None:
        self._http.post(f"/train/{job}/cancel")

    def train(self, task: str, dataset: str, method: str, recipe: dict[str, Any], publish: str = "always") -> str:
        request = {"task": task, "dataset": dataset, "method": method, "recipe": recipe, "publish": publish}
        return str(_answer(self._http.post("/train", json=request))["id"])

    def upload(self, folder: Path) -> str:
        """Upload a folder of class folders; return the data set's id."""
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file in sorted(folder.rglob("*.png")):
                archive.write(file, file.relative_to(folder))
        headers = {"Content-Type": "application/zip"}
        return str(_answer(self._http.post("/datasets", content=packed.getvalue(), headers=headers))["id"])

    def ended(self, job: str) -> None:
        self.until(lambda: self.job(job).finished)
        if (record := self.job(job)).state != "succeeded":
            raise RuntimeError(f"the job that makes task {record.task} ended as {record.state}: {record.error}")

    def job(self, job: str) -> wire.Job:
        return wire.Job.model_validate(self.get(f"/train/{job}"))

    def get(self, path: str) -> Any:
        return _answer(self._http.get(path))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise RuntimeError(f"the server did not finish within {WAIT_S:g} s")
            time.sleep(LOOK_AGAIN_S)


def _answer(response: httpx.Response) -> Any:
    if response.is_error:
        raise RuntimeError(f"the server answered {response.status_code}: {response.text[:500]}")
    return response.json()
