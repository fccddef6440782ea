"""A client that openapi-python-client generates from the schema: every operation, and real tasks asked with it."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.api.api_server import Api, serving
from tests.api.test_api_datasets import zipped
from tests.serving.floor import png, publish

pytest.importorskip("openapi_python_client", reason="the extra `clients`")

NAME = "generated_lensrack"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home")) as made:
        publish(made.floor.store)
        yield made


@pytest.fixture(scope="module")
def generated(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a client's package, which can be imported."""
    folder = tmp_path_factory.mktemp("generated")
    (folder / "schema.json").write_text(api.http.get("/openapi.json").text)
    (folder / "config.json").write_text('{"post_hooks": []}')
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", "schema.json", "--meta", "none"]
    done = subprocess.run(
        [*command, "--output-path", NAME, "--config", "config.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "will not be generated" not in done.stdout, done.stdout
    sys.path.insert(0, str(folder))
    yield folder / NAME
    sys.path.remove(str(folder))


def operation(path: str) -> ModuleType:
    return importlib.import_module(f"{NAME}.api.{path}")


def model(name: str) -> Any:
    return getattr(importlib.import_module(f"{NAME}.models"), name)


def test_every_operation_is_built_under_a_readable_name(generated: Path) -> None:
    schema = json.loads((generated.parent / "schema.json").read_text())
    ids = [each["operationId"] for operations in schema["paths"].values() for each in operations.values()]
    built = {path.stem: path for path in generated.glob("api/*/*.py") if path.stem != "__init__"}
    assert sorted(built) == sorted(ids)
    assert all(len(name) < 30 for name in ids), "names, not paths"
    for path in built.values():
        operation(f"{path.parent.name}.{path.stem}")  # it can be imported
    untyped = [name for name in ids if name.startswith("openai_") and "Any" in operation_answer(built[name])]
    assert untyped == []


def operation_answer(path: Path) -> str:
    return path.read_text().partition("def _parse_response(")[2].partition("\n")[0].partition("->")[2]


@pytest.mark.usefixtures("generated")
def test_tasks_are_asked_pictures_and_archives_sent(api: Api) -> None:
    with importlib.import_module(NAME).Client(base_url=api.url) as client:
        ask_with(client)


def ask_with(client: Any) -> None:
    file = importlib.import_module(f"{NAME}.types").File
    ask = operation("predictions.predict").sync
    single = ask("fish", client=client, body=file(payload=io.BytesIO(png())), top_k=2)
    assert [len(of_image) for of_image in single.predictions] == [2]
    pictures = [file(payload=io.BytesIO(png(grey)), file_name="a.png", mime_type="image/png") for grey in (3, 4)]
    form = ask("fish", client=client, body=model("PredictFilesBody")(images=pictures))
    assert len(form.predictions) == 2
    wrong = ask("nobody", client=client, body=file(payload=io.BytesIO(png())))
    assert (type(wrong).__name__, wrong.code) == ("Problem", "task_not_found")
    upload = operation("datasets.upload_dataset").sync
    dataset = upload(client=client, body=file(payload=io.BytesIO(zipped())), name="pets")
    assert (dataset.name, dataset.images) == ("pets", 6)
    request = model("TrainRequest")(task="pets", dataset=dataset.id, method="linear")
    job = operation("jobs.train").sync(client=client, body=request)
    assert operation("jobs.get_job").sync(job.id, client=client).state == "queued"
    assert operation("open_ai.openai_get_job").sync(job.id, client=client).training_file == dataset.id
