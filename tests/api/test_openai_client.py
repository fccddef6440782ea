"""OpenAI's own client, as published, against this server over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.jobs.job import Job
from tests.api.api_server import Api, assert_refused, serving
from tests.serving.floor import png, publish

openai = pytest.importorskip("openai", reason="pip install openai")

TOKENS = {name: f"token-of-{name}-{'x' * 20}" for name in ("mine", "predict")}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    home = tmp_path_factory.mktemp("home")
    with serving(home, max_body_bytes=100_000, max_dataset_bytes=50_000) as api:
        publish(api.floor.store, "fish")
        yield api


@pytest.fixture(scope="module")
def client(api: Api) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0, timeout=20) as client:
        yield client


def archive(*greys: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for place, grey in enumerate(greys):
            packed.writestr(f"{'ab'[place % 2]}/{place}.png", png(grey))
    return file.getvalue()


def uploaded(client: Any, first: int = 1, name: str = "pets.zip") -> Any:
    return client.files.create(file=(name, archive(first, first + 1, first + 2, first + 3)), purpose="fine-tune")


def finished(api: Api, job_id: str, state: str, **how: Any) -> Job:
    """As a worker would."""
    store: Any = api.services.jobs
    while (job := store.claim("worker", 30.0)).id != job_id:
        store.finish(job.id, job.attempt, "cancelled")
    store.append_event(job.id, job.attempt, "epoch", {"epoch": 1, "loss": 0.5, "val_accuracy": 0.75})
    done: Job = store.finish(job.id, job.attempt, state, **how)
    return done


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_a_data_set(api: Api, client: Any) -> None:
    file = uploaded(client)
    assert (file.object, file.purpose, file.status, file.filename) == ("file", "fine-tune", "processed", "pets.zip")
    dataset = api.http.get(f"/datasets/{file.id}").json()
    assert (dataset["labels"], dataset["images"], dataset["bytes"]) == (["a", "b"], 4, file.bytes)
    assert uploaded(client).id == file.id
    assert client.files.retrieve(file.id) == file
    assert client.files.retrieve(file.id[:10]) == file
    assert client.files.delete(file.id[:10]).model_dump() == {"id": file.id, "object": "file", "deleted": True}
    for ask in (client.files.retrieve, client.files.delete):
        with pytest.raises(openai.NotFoundError) as failed:
            ask(file.id)
        assert failed.value.code == "dataset_not_found"


def test_files_come_in_pages_that_the_client_turns(client: Any) -> None:
    made = [uploaded(client, 10 * n, f"{n}.zip").id for n in range(1, 4)]
    listed = [one.id for one in client.files.list(limit=1) if one.id in made]
    assert listed == made[::-1]
    assert [one.id for one in client.files.list(limit=2, order="asc") if one.id in made] == made
    assert list(client.files.list(purpose="batch")) == []
    with pytest.raises(openai.NotFoundError) as failed:
        client.files.list(after="nobody")
    assert failed.value.param == "after"


@pytest.mark.parametrize("folder", ["", "C:\\pictures\\", "/home/me/"])
def test_folders_of_the_sender_stay_with_them(client: Any, folder: str) -> None:
    assert "/" not in uploaded(client, 200, f"{folder}of me.zip").filename


def test_what_cannot_be_a_data_set_is_told(client: Any) -> None:
    for content, code in ((b"no archive", "bad_archive"), (b"", "bad_archive"), (archive(1), "bad_dataset")):
        with pytest.raises(openai.BadRequestError) as failed:
            client.files.create(file=("x.zip", content), purpose="fine-tune")
        assert failed.value.code == code
    with pytest.raises(openai.UnprocessableEntityError, match="expected 'fine-tune', got 'batch'") as refused:
        client.files.create(file=("x.zip", archive(1, 2, 3, 4)), purpose="batch")
    assert refused.value.param == "purpose"
    with pytest.raises(openai.APIStatusError) as large:
        client.files.create(file=("x.zip", b"x" * 60_000), purpose="fine-tune")
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")


HEAD = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nxx\r\n'
FORMS: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "closing boundary"),
    "no form": (b"hello", 400, "multipart body"),
    "no end": (HEAD + FILE, 400, "closing boundary"),
    "no file": (HEAD + b"--b--\r\n", 422, "got none"),
    "two files": (HEAD + FILE + FILE + b"--b--\r\n", 400, "one file"),
    "another field": (HEAD + FILE + HEAD.replace(b"purpose", b"other") + b"--b--\r\n", 422, "got 'other'"),
    "no purpose": (FILE + b"--b--\r\n", 422, "purpose: expected 'fine-tune', got none"),
    "a long field": (HEAD.replace(b"fine-tune", b"x" * 2000) + FILE + b"--b--\r\n", 400, "at most 1000 bytes"),
    "many fields": (HEAD * 21 + FILE + b"--b--\r\n", 400, "at most 20 fields"),
    "a long header": (HEAD.replace(b"form-data", b"x" * 20_000) + b"--b--\r\n", 400, "multipart body"),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms_that_are_none(api: Api, case: str) -> None:
    content, status, words = FORMS[case]
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = api.http.post("/v1/files", content=content, headers=kind)
    told = assert_refused(answer, status, {400: "bad_request", 422: "invalid_request"}[status])
    assert words in told["error"]["message"]
    assert not list((api.services.settings.datasets_dir / "uploads").iterdir()), "nothing is left of it"


def test_a_body_that_is_no_form(api: Api) -> None:
    for kind in ("application/zip", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300):
        assert_refused(api.http.post("/v1/files", content=b"x", headers={"content-type": kind}), 400, "bad_request")


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_from_its_request_to_its_model(api: Api, client: Any) -> None:
    file = uploaded(client, 60)
    job = client.fine_tuning.jobs.create(
        model=api.services.settings.backbone,
        training_file=file.id[:12],
        suffix="pets",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto"}}},
    )
    assert (job.object, job.status, job.training_file) == ("fine_tuning.job", "queued", file.id)
    assert (job.fine_tuned_model, job.finished_at, job.error) == (None, None, None)
    assert (job.hyperparameters.n_epochs, job.seed, job.method.type) == (3, 7, "supervised")
    ours = api.http.get(f"/train/{job.id}").json()
    assert (ours["task"], ours["method"]) == ("pets", "auto")
    assert ours["recipe"] == {"search": "auto", "epochs": 3, "seed": 7}
    version = publish(api.floor.store, "pets")
    finished(api, job.id, "succeeded", version=version)
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert (job.status, job.fine_tuned_model) == ("succeeded", f"pets@{version}")
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    with pytest.raises(openai.ConflictError) as failed:
        client.fine_tuning.jobs.cancel(job.id)
    assert failed.value.code == "job_finished"


def test_words_of_a_recipe_go_through(api: Api, client: Any) -> None:
    file = uploaded(client, 70)
    how = {"n_epochs": 2, "lr": 0.01, "prompts": 5, "learning_rate_multiplier": "auto"}
    job = client.fine_tuning.jobs.create(
        model=api.services.settings.backbone, training_file=file.id, suffix="pets",
        method={"type": "vpt_deep", "vpt_deep": {"hyperparameters": how}},
    )  # fmt: skip
    ours = api.http.get(f"/train/{job.id}").json()
    assert (ours["method"], ours["recipe"]) == ("vpt_deep", {"epochs": 2, "lr": 0.01, "prompts": 5})
    plain = client.fine_tuning.jobs.create(
        model=api.services.settings.backbone, training_file=file.id, suffix="pets", hyperparameters={"search": "quick"}
    )
    assert api.http.get(f"/train/{plain.id}").json()["recipe"] == {"search": "quick"}
    ask = {"model": api.services.settings.backbone, "training_file": file.id, "suffix": "pets"}
    bare, again = (client.fine_tuning.jobs.create(**ask, extra_headers={"Idempotency-Key": "k"}) for _ in range(2))
    assert (bare.id, api.http.get(f"/train/{bare.id}").json()["recipe"]) == (again.id, {"search": "auto"})


def test_events_newest_first_and_in_pages(api: Api, client: Any) -> None:
    job = client.fine_tuning.jobs.create(
        model=api.services.settings.backbone, training_file=uploaded(client, 80).id, suffix="pets"
    )
    finished(api, job.id, "failed", error={"code": "bad_dataset", "detail": "two pictures only"})
    seen = list(client.fine_tuning.jobs.list_events(job.id, limit=1))
    assert [one.message.split(":")[0] for one in seen] == ["failed", "epoch", "started", "queued"]
    assert [(one.level, one.type) for one in seen[:2]] == [("error", "message"), ("info", "metrics")]
    assert seen[1].data == {"epoch": 1, "loss": 0.5, "val_accuracy": 0.75}
    assert "val_accuracy 0.75" in seen[1].message
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error.code, failed.error.message) == ("failed", "bad_dataset", "two pictures only")
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.list_events(job.id, after="job_x-1")


def test_jobs_newest_first_in_pages_and_cancelled(api: Api, client: Any) -> None:
    file = uploaded(client, 90)
    ask = {"model": api.services.settings.backbone, "training_file": file.id}
    made = [client.fine_tuning.jobs.create(**ask, suffix=f"pets-{n}").id for n in range(5)]
    listed = [one.id for one in client.fine_tuning.jobs.list(limit=2) if one.id in made]
    assert listed == made[::-1]
    assert client.fine_tuning.jobs.cancel(made[0]).status == "cancelled"
    assert client.fine_tuning.jobs.retrieve(made[0]).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list(after="nobody")
    with pytest.raises(openai.NotFoundError) as failed:
        client.fine_tuning.jobs.retrieve("job_nobody")
    assert failed.value.code == "job_not_found"


WRONG: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "another model": ({"model": "gpt-4o"}, 404, "model_not_found", "model"),
    "no data set": ({"training_file": "0" * 64}, 404, "dataset_not_found", None),
    "a name that is none": ({"suffix": "No Name"}, 422, "invalid_request", "suffix"),
    "no name": ({"suffix": None}, 422, "invalid_request", "suffix"),
    "a validation file": ({"validation_file": "x"}, 422, "invalid_request", "validation_file"),
    "metadata": ({"metadata": {"a": "b"}}, 422, "invalid_request", "metadata"),
    "a word of nobody": ({"speed": 3}, 422, "invalid_request", "speed"),
    "no epochs": ({"hyperparameters": {"n_epochs": 0}}, 422, "invalid_request", "hyperparameters.n_epochs"),
    "an unknown recipe": ({"hyperparameters": {"epochz": 1}}, 422, "invalid_request", "hyperparameters.epochz"),
    "a multiplier": (
        {"hyperparameters": {"learning_rate_multiplier": 0.5}}, 422, "invalid_request",
        "hyperparameters.learning_rate_multiplier",
    ),
    "a negative seed": ({"seed": -1}, 422, "invalid_request", "hyperparameters.seed"),
    "another method": ({"method": {"type": "dpo", "dpo": {}}}, 422, "unknown_method", None),
    "no method": ({"method": {}}, 422, "invalid_request", "method.type"),
    "parameters that are none": (
        {"method": {"type": "supervised", "supervised": {"hyperparameters": 3}}}, 422, "invalid_request", "method",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_name_the_field(api: Api, client: Any, case: str) -> None:
    changes, status, code, param = WRONG[case]
    ask = {"model": api.services.settings.backbone, "training_file": uploaded(client, 100).id, "suffix": "pets"}
    answer = api.http.post("/v1/fine_tuning/jobs", json={**ask, **changes})
    told = assert_refused(answer, status, code)["error"]
    assert (told["param"], told["type"]) == (param, "invalid_request_error")


def test_a_request_that_is_no_json(api: Api) -> None:
    kind = {"content-type": "application/json"}
    for path in ("/v1/fine_tuning/jobs", "/v1/embeddings"):
        assert_refused(api.http.post(path, content=b"{", headers=kind), 400, "bad_request")


# --- models and embeddings --------------------------------------------------------------------------------------------


def test_models_are_the_backbone_and_the_tasks(api: Api, client: Any) -> None:
    backbone = api.services.settings.backbone
    listed = [one.id for one in client.models.list()]
    assert listed[0] == backbone
    assert "fish" in listed
    version = api.floor.store.aliases("fish")["live"].targets[0].version
    for name in (backbone, "fish", "fish@live", f"fish@{version}", f"fish@{version[:8]}"):
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == (name, "model", "lensrack")
    for name, code in (("nobody", "task_not_found"), ("fish@old", "alias_not_found")):
        with pytest.raises(openai.NotFoundError) as failed:
            client.models.retrieve(name)
        assert failed.value.code == code


def test_embeddings_are_the_backbones_features(api: Api, client: Any) -> None:
    pictures = [base64.b64encode(png(grey)).decode() for grey in (7, 9)]
    model = api.services.settings.backbone
    told = client.embeddings.create(model=model, input=[pictures[0], f"data:image/png;base64,{pictures[1]}"])
    assert [one.index for one in told.data] == [0, 1]
    for one, grey in zip(told.data, (7, 9), strict=True):
        ours = api.http.post("/embed", content=png(grey), headers={"content-type": "image/png"}).json()
        np.testing.assert_array_equal(np.asarray(one.embedding), ours["embeddings"][0])
        plain = client.embeddings.create(
            model=model, input=base64.b64encode(png(grey)).decode(), encoding_format="float", dimensions=3
        )
        assert plain.data[0].embedding == ours["embeddings"][0]


PICTURE = base64.b64encode(png(1)).decode()
BAD: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "another model": ({"model": "fish"}, 404, "model_not_found", "model"),
    "an address": ({"input": "https://example.org/a.png"}, 422, "invalid_request", "input"),
    "words": ({"input": "a cat"}, 422, "invalid_request", "input"),
    "tokens": ({"input": [1, 2]}, 422, "invalid_request", None),
    "nothing": ({"input": []}, 422, "invalid_request", None),
    "no picture": ({"input": ["YWJj"]}, 415, "unsupported_image", None),
    "too many": ({"input": [PICTURE] * 17}, 422, "invalid_request", None),
    "other dimensions": ({"dimensions": 2}, 422, "invalid_request", "dimensions"),
    "another encoding": ({"encoding_format": "x"}, 422, "invalid_request", "encoding_format"),
}


@pytest.mark.parametrize("case", BAD)
def test_pictures_that_are_none(api: Api, case: str) -> None:
    changes, status, code, param = BAD[case]
    ask = {"model": api.services.settings.backbone, "input": PICTURE}
    told = assert_refused(api.http.post("/v1/embeddings", json={**ask, **changes}), status, code)["error"]
    assert param is None or told["param"] == param


def test_what_is_not_there_fails_in_their_words(api: Api, client: Any) -> None:
    assert_refused(api.http.get("/v1/nowhere"), 404, "not_found")
    assert_refused(api.http.delete("/v1/models"), 405, "method_not_allowed")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="fish", messages=[])


def test_from_asyncio(api: Api) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="any", max_retries=0) as client:
            return [model.id async for model in client.models.list()]

    assert "fish" in asyncio.run(ask())


def test_with_keys(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A key sees its own; what is another's does not exist."""
    home = tmp_path_factory.mktemp("keys")
    rows = [
        {"id": "mine", "scopes": ["train", "predict"], "token": TOKENS["mine"], "tasks": "acme-"},
        {"id": "predict", "scopes": ["predict"], "token": TOKENS["predict"], "images_per_s": 0.02},
    ]
    (home / "keys").write_text("\n".join(map(json.dumps, rows)))
    with serving(home, keys_file=home / "keys") as api:
        publish(api.floor.store, "acme-fish")
        publish(api.floor.store, "zeta-fish")

        def client(token: str) -> Any:
            return openai.OpenAI(base_url=f"{api.url}/v1", api_key=token, max_retries=0, timeout=20)

        with client("wrong") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
            stranger.models.list()
        assert unknown.value.type == "authentication_error"
        with client(TOKENS["predict"]) as lesser, pytest.raises(openai.PermissionDeniedError) as lacking:
            uploaded(lesser)
        assert lacking.value.type == "permission_error"
        with client(TOKENS["predict"]) as lesser, pytest.raises(openai.RateLimitError) as limited:
            lesser.embeddings.create(model=api.services.settings.backbone, input=[PICTURE] * 2)
        assert (limited.value.code, limited.value.type) == ("rate_limited", "rate_limit_error")
        assert int(limited.value.response.headers["retry-after"]) > 0
        with client(TOKENS["mine"]) as mine:
            model = api.services.settings.backbone
            assert [one.id for one in mine.models.list()] == [model, "acme-fish"]
            with pytest.raises(openai.NotFoundError):
                mine.models.retrieve("zeta-fish")
            file = uploaded(mine)
            ask = {"model": model, "training_file": file.id}
            assert mine.fine_tuning.jobs.create(**ask, suffix="acme-pets").organization_id == "acme-"
            with pytest.raises(openai.PermissionDeniedError, match="begin with 'acme-'"):
                mine.fine_tuning.jobs.create(**ask, suffix="zeta-pets")


def test_a_file_that_falls_silent_is_ended(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("slow"), upload_silence_s=0.3, body_timeout_s=0.1) as slow:
        kind = "multipart/form-data; boundary=b"
        head = f"POST /v1/files HTTP/1.1\nHost: localhost\nContent-Type: {kind}\nContent-Length: 1000"
        status, got = slow.raw(head=head, body=HEAD)
        assert status == 408, got
        assert b"upload_silent" in got
        assert httpx.get(f"{slow.url}/healthz").status_code == 200
