# Generated from async_client.py by client/generate_sync.py: change that file, then `make sync-client`.
"""The client for synchronous code. It only sends and waits; the rest is in `_core`, `_endpoints` and `_events`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar, cast, overload

import httpx

from . import _client_resize, _endpoints, _sync_runtime, wire
from ._archive import Progress, Source, open_archive
from ._client_base import ClientBase
from ._client_resize import Geometries, Steps
from ._core import Call, Config, Exchange, Reply
from ._endpoints import Images
from ._evaluation import Evaluation, Scoring
from ._events import LOST, EventCursor
from ._images import ImageInput
from ._network import open_http
from ._uploads import DatasetUpload, OnUpload
from .answers import Answer, ManyAnswers, RawResponse
from .errors import InvalidInput, JobFailed, LensrackError

T = TypeVar("T")


class Client(ClientBase):
    """A connection to a lensrack server; safe to share between threads.

    `client.tasks` has the calls for tasks, their versions, aliases and feedback; `client.datasets` those for datasets;
    `client.jobs` those for training jobs. `help(client.tasks)` lists them.

    `base_url` and `api_key` default to LENSRACK_URL (else http://127.0.0.1:8000) and LENSRACK_API_KEY. `timeout` is
    in seconds and covers a call with all its retries; for file transfers it only limits the time without a byte.
    It defaults to LENSRACK_TIMEOUT, else 60, `max_retries` to LENSRACK_RETRIES, else 2. With `client_resize`, pictures
    are resized and cropped for the task's model before they are sent: the same pixels, with less to send and to decode.
    A server on this machine is reached directly, others as HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE
    and SSL_CERT_DIR say. Raises InvalidInput for values that cannot be used.
    """

    tasks: Tasks
    datasets: Datasets
    jobs: Jobs

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = None,
        max_retries: int | None = None,
        client_resize: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        config = Config.of(base_url, api_key, timeout, max_retries)
        self._config = config.changed(client_resize=client_resize)
        self._http = open_http(httpx.Client, config.base_url, transport)
        self._connections = _sync_runtime.Connections(self._http, pooled=transport is None)
        self._geometries = Geometries()
        self._recorder: list[Reply] | None = None
        self._make_groups()

    def _make_groups(self) -> None:
        self.tasks, self.datasets, self.jobs = Tasks(self), Datasets(self), Jobs(self)

    def close(self) -> None:
        """Close the connections, also those of clients made by `with_options`."""
        self._connections.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def with_options(
        self, *, timeout: float | None = None, max_retries: int | None = None, client_resize: bool | None = None
    ) -> Client:
        """Return a client with other options over the same connections; closing either closes both."""
        return self._with_config(self._config.changed(timeout, max_retries, client_resize))

    def _with_config(self, config: Config) -> Client:
        other = copy.copy(self)
        other._config = config
        other._make_groups()
        return other

    def raw_response(self, ask: Callable[[Client], T]) -> RawResponse[T]:
        """Return the value of a call together with its HTTP responses: status, headers, content, request id.

        `ask` makes the call on the client that it is passed, such as `lambda c: c.tasks.get("x")`.
        """
        recording = self._with_config(self._config)
        replies: list[Reply] = []
        recording._recorder = replies
        value, recording._recorder = ask(recording), None
        if not replies:
            raise InvalidInput("raw_response: expected a call that sends a request and waits for its response")
        return RawResponse(value, tuple(replies))

    @overload
    def predict(self, task: str, images: Images, *, top_k: int = ..., key: str | None = ...) -> list[Answer]: ...
    @overload
    def predict(self, task: str, images: ImageInput, *, top_k: int = ..., key: str | None = ...) -> Answer: ...
    def predict(
        self, task: str, images: ImageInput | Images, *, top_k: int = 5, key: str | None = None
    ) -> Answer | list[Answer]:
        """Classify an image, or a list of images, by `task`, `task@alias` or `task@version`; 64 images in each request.

        Each Answer has the `top_k` best labels. `task@live+candidate` runs several versions in one batch and averages
        their probabilities. Requests with the same `key` get the same version of a canary. Raises ApiError and the
        other LensrackErrors.
        """
        if isinstance(images, list | tuple):
            return self._predict(task, images, top_k=top_k, key=key)
        [answer] = self._predict(task, [images], top_k=top_k, key=key)
        return answer

    def _predict(self, task: str, images: Images, *, top_k: int, key: str | None) -> list[Answer]:
        answers: list[Answer] = []
        for part in _endpoints.parts(images):
            answers += self._predict_part(task, part, top_k=top_k, key=key)
        return answers

    def _predict_part(self, task: str, images: Images, *, top_k: int, key: str | None) -> list[Answer]:
        if not self._config.client_resize:
            return self._send(_endpoints.predict(task, images, top_k=top_k, key=key))
        return self._run_steps(_client_resize.predict(self._geometries, task, images, top_k=top_k, key=key))

    @overload
    def map(
        self,
        task: str,
        images: Iterable[ImageInput],
        *,
        top_k: int = ...,
        key: str | None = ...,
        in_flight: int = ...,
        errors: Literal["raise"] = ...,
    ) -> Iterator[Answer]: ...
    @overload
    def map(
        self,
        task: str,
        images: Iterable[ImageInput],
        *,
        top_k: int = ...,
        key: str | None = ...,
        in_flight: int = ...,
        errors: Literal["return"],
    ) -> Iterator[Answer | LensrackError]: ...
    def map(
        self,
        task: str,
        images: Iterable[ImageInput],
        *,
        top_k: int = 5,
        key: str | None = None,
        in_flight: int = 8,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Answer] | Iterator[Answer | LensrackError]:
        """Classify any number of images, which are taken from `images` as needed; yields the answers in the same order.

        `in_flight` requests are open at any time, so that the server can batch them. With `errors="return"` an image
        that fails yields its LensrackError, InvalidInput where it cannot be read, and the others go on.
        """
        _endpoints.check_map(images, in_flight, errors)
        ask = partial(self._answer_or_error, task, top_k=top_k, key=key, errors=errors)
        with closing(_sync_runtime.map_in_order(ask, images, in_flight)) as answers:
            yield from answers

    def _answer_or_error(
        self, task: str, image: ImageInput, *, top_k: int, key: str | None, errors: str
    ) -> Answer | LensrackError:
        try:
            [answer] = self._predict(task, [image], top_k=top_k, key=key)
        except LensrackError as error:
            if errors == "raise":
                raise
            return error
        return answer

    def evaluate(
        self, task: str, folder: str | Path, *, in_flight: int = 8, progress: Progress | None = None
    ) -> Evaluation:
        """Answer all pictures of a folder of class folders, and compare the answers with the folders' names.

        The names are the labels, compared exactly. Pictures that cannot be read are listed, and count in no figure.
        `progress(answered, total)` is called after each picture. Raises InvalidInput for a folder without labelled
        pictures, or where no folder is named after a class of the task; and the other LensrackErrors.
        """
        scoring = _sync_runtime.run(partial(Scoring, task, folder))
        paths = scoring.paths
        _endpoints.check_map(paths, in_flight, "return")
        ask = partial(self._answer_or_error, task, top_k=1, key=None, errors="return")
        with closing(_sync_runtime.map_in_order(ask, paths, in_flight)) as answers:
            for answer in answers:
                if (first := scoring.take(answer)) is not None:
                    scoring.check_labels((self.tasks.version(first.task, first.versions[0])).labels)
                if progress is not None:
                    progress(scoring.taken, len(paths))
        return scoring.result()

    def predict_many(
        self, tasks: Sequence[str], image: ImageInput, *, top_k: int = 5, key: str | None = None
    ) -> ManyAnswers:
        """Classify one image by many tasks; the server decodes it once."""
        if not self._config.client_resize:
            return self._send(_endpoints.predict_many(tasks, image, top_k=top_k, key=key))
        return self._run_steps(_client_resize.predict_many(self._geometries, tasks, image, top_k=top_k, key=key))

    @overload
    def embed(self, images: Images) -> list[list[float]]: ...
    @overload
    def embed(self, images: ImageInput) -> list[float]: ...
    def embed(self, images: ImageInput | Images) -> list[float] | list[list[float]]:
        """Return the frozen backbone's features of an image, [D], or of a list of n images, [n, D]."""
        if isinstance(images, list | tuple):
            parts = [self._send(_endpoints.embed(part)) for part in _endpoints.parts(images)]
            return [embedding for part in parts for embedding in part]
        [embedding] = self._send(_endpoints.embed([images]))
        return embedding

    def feedback(self, task: str, images: ImageInput | Images, label: str, *, new_label: bool = False) -> wire.Feedback:
        """Store the correct label of an image, or of a list of images; `tasks.freeze_feedback` makes a dataset of it.

        The latest label of an image counts. A label that the live version does not have needs `new_label`.
        """
        batch = images if isinstance(images, list | tuple) else [images]
        stored = [
            self._send(_endpoints.feedback(task, part, label, new_label=new_label)) for part in _endpoints.parts(batch)
        ]
        return stored[0].model_copy(update={"items": [item for part in stored for item in part.items]})

    def train(
        self,
        task: str,
        dataset: str,
        method: str = "auto",
        recipe: Mapping[str, Any] | wire.Recipe | Literal["auto", "quick"] = "auto",
        *,
        publish: wire.PublishPolicy = "always",
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> JobHandle:
        """Queue a training job. Retries start it once; an `idempotency_key` of your own extends that to restarts.

        The recipe `auto` searches the hyper-parameters on the validation images, and with the method `auto` the method
        as well; `quick` publishes a plain head within seconds and then fits in full; fields that are set are not
        searched. `publish` says whether the new version goes live: `always`, `never`, or `if_better` than the live
        version on the same validation images. Waiting jobs of higher `priority`, -100 to 100, run first.
        """
        call = _endpoints.train(
            task,
            dataset,
            method=method,
            recipe=recipe,
            publish=publish,
            priority=priority,
            key=idempotency_key,
        )
        return JobHandle(self, self._send(call))

    def compare(
        self,
        task: str,
        dataset: str,
        methods: Sequence[str] | None = None,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        recipe: Mapping[str, Any] | wire.ComparedRecipe | None = None,
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> JobHandle:
        """Queue a comparison, which fits every method (by default all that can be served) with every seed.

        Nothing is stored or published; `task` only names the job. The fields of `recipe` apply to all methods.
        When the job has succeeded, `comparison` returns its table; `lensrack.picture` prints and draws it.
        """
        call = _endpoints.compare(
            task, dataset, methods=methods, seeds=seeds, recipe=recipe, priority=priority, key=idempotency_key
        )
        return JobHandle(self, self._send(call))

    def comparison(self, job: str) -> wire.Comparison:
        """Return the table of a comparison; it has no rows before the job has ended."""
        return self._send(_endpoints.comparison(job))

    def condense(
        self,
        task: str,
        version: str = "live",
        *,
        dataset: str | None = None,
        keep: Sequence[float] | None = None,
        epsilon: float | None = None,
        epochs: int | None = None,
        publish: wire.PublishPolicy = "always",
        priority: int = 0,
        idempotency_key: str | None = None,
    ) -> JobHandle:
        """Queue a job that removes most prompts of a version, or of an alias' version, and refits the rest.

        Of the shares in `keep`, the smallest that loses at most `epsilon` of the validation accuracy becomes a new
        version; if all lose more, the job's `version` is the original. `epochs` is the length of each refit. `dataset`
        defaults to the version's own.
        """
        call = _endpoints.condense(
            task,
            version=version,
            dataset=dataset,
            keep=keep,
            epsilon=epsilon,
            epochs=epochs,
            publish=publish,
            priority=priority,
            key=idempotency_key,
        )
        return JobHandle(self, self._send(call))

    def health(self) -> wire.Health:
        """Return the server's version; `ready` tells whether it can answer predictions."""
        return self._send(_endpoints.health())

    def ready(self) -> wire.Ready:
        """Return whether the server can answer predictions, and with which backbone."""
        return self._send(_endpoints.ready())

    def _run_steps(self, steps: Steps[T]) -> T:
        """Run all steps, one after the other, and return the result of the last."""
        try:
            step = next(steps)
            while True:
                try:
                    outcome = self._send(step) if isinstance(step, Call) else _sync_runtime.run(step)
                except LensrackError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)
        except StopIteration as end:
            return cast(T, end.value)

    def _send(self, call: Call[T]) -> T:
        exchange = Exchange(call, self._config)
        while True:
            try:
                reply = self._attempt(exchange)
            except httpx.RequestError as error:
                pause_s = exchange.broken(error)
            else:
                pause = exchange.answered(reply)
                if pause is None:
                    if self._recorder is not None:
                        self._recorder.append(reply)
                    return exchange.value(reply)
                pause_s = pause
            _sync_runtime.sleep(pause_s)

    def _attempt(self, exchange: Exchange[T]) -> Reply:
        self._connections.check()
        content = bytearray()
        with closing(self._http.send(exchange.request(), stream=True)) as response:
            for chunk in response.iter_bytes():
                content += chunk
                exchange.check_time()
        return Reply(response.status_code, response.headers, bytes(content))


class Tasks:
    """Tasks, their versions, aliases and feedback, and which versions are on the device."""

    def __init__(self, client: Client) -> None:
        self._send = client._send

    def list(self) -> Sequence[wire.Task]:
        """Return all tasks."""
        return self._send(_endpoints.list_tasks())

    def get(self, task: str) -> wire.Task:
        """Return a task with its aliases."""
        return self._send(_endpoints.get_task(task))

    def delete(self, task: str) -> None:
        """Delete a task with all its versions and aliases."""
        return self._send(_endpoints.delete_task(task))

    def versions(self, task: str) -> Sequence[wire.VersionInfo]:
        """Return a task's versions, newest first."""
        return self._send(_endpoints.list_versions(task))

    def version(self, task: str, version: str) -> wire.VersionInfo:
        """Return a version, known by its digest or a unique prefix of it."""
        return self._send(_endpoints.get_version(task, version))

    def delete_version(self, task: str, version: str) -> None:
        """Delete a version. Raises ConflictError while an alias points at it."""
        return self._send(_endpoints.delete_version(task, version))

    def upload(
        self, task: str, bundle: str | Path | bytes | IO[bytes], *, alias: str | None = None
    ) -> wire.VersionInfo:
        """Store a bundle as a version. No alias changes, except `alias`, which then points at it."""
        return self._send(_endpoints.upload_version(task, _endpoints.bundle_bytes(bundle), alias=alias))

    def import_checkpoint(
        self,
        task: str,
        *files: str | Path,
        format: wire.ImportFormat = "auto",  # noqa: A002
        labels: Sequence[str] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        alias: str | None = None,
    ) -> wire.VersionInfo:
        """Store another tool's checkpoint as a version: official VPT, SPT or CVPT, timm's heads, PEFT's LoRA.

        Without `labels` the classes are named 0, 1, …; `preprocess` has any of mean, std, interpolation, crop_pct,
        crop_mode. The checkpoint must have been fitted on the server's backbone; the server can check that only if the
        files contain a backbone.
        """
        call = _endpoints.import_version(task, files, form=format, labels=labels, preprocess=preprocess, alias=alias)
        return self._send(call)

    def download(self, task: str, version: str) -> bytes:
        """Return a bundle's file, checked against its version, which is its digest."""
        return self._send(_endpoints.download_bundle(task, version))

    def export(
        self,
        task: str,
        version: str | None = None,
        *,
        format: wire.ExportFormat = "onnx",  # noqa: A002
        input: wire.ExportInput = "uint8",  # noqa: A002
    ) -> bytes:
        """Return a version, by default the live one, as a file for other tools. It takes the server some seconds.

        `onnx` is the whole model with the task's labels and preprocessing in its metadata; its `input` is pictures,
        uint8 [B, S, S, 3], or normalised `float`, [B, 3, S, S]. `timm` is a state dict as safetensors, of the methods
        that fit into a timm model; `bundle` the stored bundle. Raises ApiError: not_installed where the server lacks
        the packages, not_exportable.
        """
        if version is None:
            version = _endpoints.live_version(self.get(task))
        return self._send(_endpoints.export_version(task, version, form=format, takes=input))

    def alias(self, task: str, alias: str = "live") -> wire.Alias:
        """Return an alias with its targets and its `etag`."""
        return self._send(_endpoints.get_alias(task, alias))

    def set_alias(
        self, task: str, alias: str, version: str, *, weight: float = 1.0, if_match: str | None = None
    ) -> wire.Alias:
        """Point an alias at a version; with a `weight` below 1, for that share of the requests only (canary).

        With `if_match`, an Alias' `etag`, raises PreconditionFailedError if the alias has changed since.
        """
        return self._send(_endpoints.set_alias(task, alias, version, weight=weight, if_match=if_match))

    def delete_alias(self, task: str, alias: str) -> None:
        """Delete an alias; its versions stay."""
        return self._send(_endpoints.delete_alias(task, alias))

    def history(self, task: str, alias: str = "live") -> Sequence[wire.AliasChange]:
        """Return the states of an alias, oldest first."""
        return self._send(_endpoints.alias_history(task, alias))

    def rollback(self, task: str, alias: str = "live") -> wire.Alias:
        """Restore an alias' previous targets; a second rollback undoes the first."""
        return self._send(_endpoints.rollback(task, alias))

    def feedback(
        self, task: str, *, cursor: str | None = None, limit: int = 50, label: str | None = None
    ) -> wire.FeedbackPage:
        """Return the number of images by label and a page of feedback, newest first; `next` is the next cursor."""
        return self._send(_endpoints.list_feedback(task, cursor=cursor, limit=limit, label=label))

    def iterate_feedback(self, task: str, *, label: str | None = None) -> Iterator[wire.FeedbackItem]:
        """Yield all feedback of a task, newest first; pages are requested as needed."""
        cursor: str | None = None
        while True:
            page = self.feedback(task, cursor=cursor, limit=500, label=label)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def delete_feedback(self, task: str, sha256: str) -> None:
        """Delete the feedback about an image, known by the sha256 of its bytes."""
        return self._send(_endpoints.delete_feedback(task, sha256))

    def freeze_feedback(self, task: str, *, name: str | None = None, parent: str | None = None) -> wire.Dataset:
        """Make a dataset of the live version's dataset, or of `parent`, corrected and extended by all feedback.

        `skipped` lists what was left out: a new class needs two pictures. Raises ConflictError (nothing_new) where the
        feedback changes nothing.
        """
        return self._send(_endpoints.freeze_feedback(task, name=name, parent=parent))

    def load(self, task: str) -> wire.Residency:
        """Load a task's version, by default the live one, onto the device; `task` may be `task@alias`."""
        return self._send(_endpoints.load(task))

    def unload(self, task: str) -> wire.Residency:
        """Remove a task's version from the device; the next prediction loads it again."""
        return self._send(_endpoints.unload(task))

    def pin(self, task: str, *, pinned: bool = True) -> wire.Residency:
        """Protect a task's version from eviction, or with `pinned=False` no longer."""
        return self._send(_endpoints.pin(task, pinned=pinned))


class Datasets:
    """Immutable labelled images, known by their content digest."""

    def __init__(self, client: Client) -> None:
        self._send = client._send

    def upload(
        self,
        source: Source,
        *,
        name: str | None = None,
        label_column: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
    ) -> wire.Dataset:
        """Store a folder of class folders, or a zip or tar (plain, gz, zst, bz2 or xz) of one; a parquet file; an npz.

        `label_column` is the labels' column of a parquet file or a table, where it has not a customary name.
        `progress(bytes_sent, bytes_total)` is called as bytes are sent. `skipped` of the result names the pictures
        that could not be read, and the links, which are not followed.

        A large source is sent in pieces: when the connection breaks, the upload continues where it stopped.
        `on_upload(id)` is called when such an upload has begun; a later call continues it with `resume=id`.
        """
        with closing(_sync_runtime.run(partial(open_archive, source))) as archive:
            return self._store(
                DatasetUpload(
                    archive,
                    name=name,
                    label_column=label_column,
                    progress=progress,
                    resume=resume,
                    on_upload=on_upload,
                )
            )

    def add(
        self,
        source: Source,
        parent: str,
        *,
        name: str | None = None,
        label_column: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
    ) -> wire.Dataset:
        """Store the pictures of dataset `parent` and those of `source` as a new dataset.

        A picture that is in both takes its label from `source` and stays in its split. The rest is as in `upload`.
        """
        with closing(_sync_runtime.run(partial(open_archive, source))) as archive:
            return self._store(
                DatasetUpload(
                    archive,
                    name=name,
                    parent=parent,
                    label_column=label_column,
                    progress=progress,
                    resume=resume,
                    on_upload=on_upload,
                )
            )

    def _store(self, upload: DatasetUpload) -> wire.Dataset:
        while upload.dataset is None:
            try:
                upload.take(self._send(upload.call()))
            except LensrackError as error:
                _sync_runtime.sleep(upload.lost(error))
        return upload.dataset

    def list(self) -> Sequence[wire.Dataset]:
        """Return all datasets."""
        return self._send(_endpoints.list_datasets())

    def get(self, dataset: str) -> wire.Dataset:
        """Return a dataset with its report."""
        return self._send(_endpoints.get_dataset(dataset))

    def delete(self, dataset: str) -> None:
        """Delete a dataset."""
        return self._send(_endpoints.delete_dataset(dataset))


class Jobs:
    """Training jobs."""

    def __init__(self, client: Client) -> None:
        self._client, self._send = client, client._send

    def list(
        self,
        *,
        cursor: str | None = None,
        limit: int = 50,
        task: str | None = None,
        state: wire.JobState | None = None,
    ) -> wire.JobList:
        """Return a page of jobs, newest first; its `next` is the cursor of the next page."""
        return self._send(_endpoints.list_jobs(cursor=cursor, limit=limit, task=task, state=state))

    def iterate(self, *, task: str | None = None, state: wire.JobState | None = None) -> Iterator[wire.Job]:
        """Yield all jobs, newest first; pages are requested as needed."""
        cursor: str | None = None
        while True:
            page = self.list(cursor=cursor, task=task, state=state)
            yield from page.jobs
            if page.next is None:
                return
            cursor = page.next

    def get(self, job: str) -> wire.Job:
        """Return a job in its present state."""
        return self._send(_endpoints.get_job(job))

    def handle(self, job: str) -> JobHandle:
        """Return a handle for a job that was started elsewhere."""
        return JobHandle(self._client, self.get(job))

    def cancel(self, job: str) -> wire.Job:
        """Cancel a job: a waiting job ends at once, a running one within a training step."""
        return self._send(_endpoints.cancel_job(job))

    def events(self, job: str, *, after: int = 0, wait_s: float = 0.0) -> wire.JobEvents:
        """Return a page of events; the server waits up to `wait_s` seconds (at most 30) for the first."""
        return self._send(_endpoints.job_events(job, after=after, wait_s=wait_s))


class JobHandle:
    """A started job; `job` is its last known state."""

    def __init__(self, client: Client, job: wire.Job) -> None:
        self._client = client
        self.job = job

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} of task {self.job.task}: {self.state}>"

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def state(self) -> wire.JobState:
        return self.job.state

    def refresh(self) -> wire.Job:
        """Request the job's present state, which is also kept as `job`."""
        self.job = self._client.jobs.get(self.id)
        return self.job

    def cancel(self) -> wire.Job:
        """Cancel the job: a waiting job ends at once, a running one within a training step."""
        self.job = self._client.jobs.cancel(self.id)
        return self.job

    def events(
        self,
        *,
        after: int = 0,
        timeout: float | None = None,
        progress: bool = False,
    ) -> Iterator[wire.JobEvent]:
        """Yield every event once, as it happens, until the job ends; reconnects when the connection breaks.

        With `progress`, also an event `progress` about once a second while the job's progress changes. Raises
        RequestTimeout when the job has not ended after `timeout` seconds.
        """
        cursor = EventCursor(self.id, after, timeout, progress=progress)
        while not cursor.finished:
            call = cursor.call()
            try:
                new = cursor.take(self._client._send(call))
            except LOST as error:
                _sync_runtime.sleep(cursor.lost(error))
                continue
            yield from new
            _sync_runtime.sleep(cursor.rest_s(new))

    def wait(self, timeout: float | None = None) -> wire.Job:
        """Wait for the job to succeed and return it. Raises JobFailed, and RequestTimeout after `timeout` seconds."""
        for _ in self.events(timeout=timeout):
            pass
        job = self.refresh()
        if job.state != "succeeded":
            raise JobFailed(job)
        return job
