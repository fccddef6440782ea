"""`python -m server sample-tasks`: fits the bundled tasks again.

The pictures are real and come with Python packages: handwritten digits (scikit-learn; Alpaydin and Kaynak, 1998, CC BY
4.0) and faces beside other things (scikit-image; a part of Labeled Faces in the Wild, Huang et al., 2007). They take
the path of a user's pictures: an archive, a dataset, a job, a worker.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompts_store import open_store
from server.app.stores import open_datasets, open_jobs
from server.app.worker import build_worker
from server.engine.bundled import BUNDLED, FOLDER
from server.settings import Settings

SIDE = 64  # pixels: enlarged once, so that clients send what the task was fitted on
HELD_BACK = 4  # every fourth picture is a test picture
LabelledImages = tuple[NDArray[np.uint8], list[str]]


def digits() -> LabelledImages:
    """Images uint8 [1797, 8, 8] and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).round().astype(np.uint8), [str(digit) for digit in data.target]


def faces() -> LabelledImages:
    """Images uint8 [200, 25, 25] and their labels; the first half are faces."""
    from skimage.data import lfw_subset

    images = np.asarray(lfw_subset() * 255).round().astype(np.uint8)  # type: ignore[no-untyped-call]
    return images, ["face" if index < len(images) // 2 else "other" for index in range(len(images))]


# images, method, recipe, and the class of which one test picture is bundled as a sample
TASKS: dict[str, tuple[Callable[[], LabelledImages], str, dict[str, Any], str]] = {
    "digits": (digits, "linear", {"search": "auto"}, "7"),
    "faces": (faces, "vpt_deep", {"epochs": 6, "prompts": 5}, "face"),
}


def make(folder: Path = FOLDER) -> dict[str, float]:
    """Fit the tasks on the bundled backbone and write FOLDER/tasks and FOLDER/pictures; returns test accuracies."""
    accuracies = {}
    for name in ("tasks", "pictures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for task, (pictures, method, recipe, sample) in TASKS.items():
        with TemporaryDirectory() as home:
            root = Path(home) / "pictures"
            _write(root, *pictures())
            first = min((root / "test" / sample).iterdir())
            shutil.copy(first, folder / "pictures" / f"{sample}.png")
            bundle, accuracies[task] = _fit(Path(home), root, task, method, recipe)
            (folder / "tasks" / f"{task}.safetensors").write_bytes(bundle)
    return accuracies


def _write(root: Path, images: NDArray[np.uint8], labels: list[str]) -> None:
    """Class folders under train/ and test/."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = root / ("test" if index % HELD_BACK == 0 else "train") / label
        part.mkdir(parents=True, exist_ok=True)
        enlarged = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        enlarged.save(part / f"{index:04d}.png", optimize=True)


def _fit(home: Path, root: Path, task: str, method: str, recipe: dict[str, Any]) -> tuple[bytes, float]:
    settings = Settings(home=home / "data", backbone=BUNDLED, store="", jobs="", workers=0)
    with tarfile.open(home / "pictures.tar", "w") as archive:
        archive.add(root, arcname=".")
    dataset = open_datasets(settings).ingest(home / "pictures.tar")
    with closing(open_jobs(settings)) as jobs, closing(open_store(settings.store_url)) as store:
        job = jobs.submit(task, dataset.id, method, recipe, max_attempts=1)
        build_worker(settings, "sample-tasks").work_once()
        done = jobs.get(job.id)
        if done.version is None:
            raise RuntimeError(f"the job for {task} ended as {done.state}: {done.error}")
        return store.get(task, done.version).data, float(done.metrics["test_accuracy"])
