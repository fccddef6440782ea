# Generated from async_client.py by client/generate_sync.py: change that file, then `make sync-client`.
"""The client for ordinary code. It sends and it sleeps; everything else is in `_core`, `_calls` and `_events`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar, cast, overload

import httpx

from . import _calls, _steps, _sync_runtime, wire
from ._archive import Progress, Source, open_archive
from ._calls import Images
from ._core import DIRECT, Call, Config, Exchange, Reply
from ._events import LOST, EventCursor
from ._images import ImageInput
from ._steps import Geometries, Steps
from ._uploads import OnUpload, Uploading
from .answers import Answer, ManyAnswers, RawResponse
from .errors import InvalidInput, JobFailed, LensrackError

T = TypeVar("T")


class Client:
    """A connection to a lensrack server; safe to share between threads.

    `base_url` and `api_key` default to LENSRACK_URL (else http://127.0.0.1:8000) and LENSRACK_API_KEY. `timeout` is
    in seconds and covers a call with all its retries; file transfers may take longer, but not stay silent for longer.
    It defaults to LENSRACK_TIMEOUT, else 60, `max_retries` to LENSRACK_RETRIES, else 2. With `client_resize`, pictures
    are cut to the size of the task's model before they are sent: the same pixels, and less to send and to decode.
    """

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
        known = Config.of(base_url, api_key, timeout, max_retries)
        self._config = known.changed(client_resize=client_resize)
        self._http = httpx.Client(transport=transport, mounts=None if transport else DIRECT)
        self._geometries = Geometries()
        self._heard: list[Reply] | None = None
        self._furnish()

    def _furnish(self) -> None:
        self.tasks, self.datasets, self.jobs = Tasks(self), Datasets(self), Jobs(self)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def with_options(
        self, *, timeout: float | None = None, max_retries: int | None = None, client_resize: bool | None = None
    ) -> Client:
        """The same client with other habits, over the same connections: closing either closes both."""
        return self._like(self._config.changed(timeout, max_retries, client_resize))

    def _like(self, config: Config) -> Client:
        other = copy.copy(self)
        other._config = config
        other._furnish()
        return other

    def raw_response(self, ask: Callable[[Client], T]) -> RawResponse[T]:
        """What `ask` makes of this client, with the HTTP answers behind it: status, headers, content, request id.

        `ask` is a method of this client, called on the client that it is given, such as `lambda c: c.tasks.get("x")`.
        """
        heard = self._like(self._config)
        replies: list[Reply] = []
        heard._heard = replies
        value, heard._heard = ask(heard), None
        if not replies:
            raise InvalidInput("raw_response: expected a call that asks the server and waits for its answer")
        return RawResponse(value, tuple(replies))

    @overload
    def predict(self, task: str, images: Images, *, top_k: int = ..., key: str | None = ...) -> list[Answer]: ...
    @overload
    def predict(self, task: str, images: ImageInput, *, top_k: int = ..., key: str | None = ...) -> Answer: ...
    def predict(
        self, task: str, images: ImageInput | Images, *, top_k: int = 5, key: str | None = None
    ) -> Answer | list[Answer]:
        """Ask a task (`task`, `task@alias` or `task@version`) about an image, or about a list of them at once.

        `task@live+candidate` asks several versions in one batch and averages their probabilities.
        Requests with the same `key` see the same side of a canary. Raises ApiError and the other LensrackErrors.
        """
        if isinstance(images, list | tuple):
            return self._predict(task, images, top_k=top_k, key=key)
        [answer] = self._predict(task, [images], top_k=top_k, key=key)
        return answer

    def _predict(self, task: str, images: Images, *, top_k: int, key: str | None) -> list[Answer]:
        if not self._config.client_resize:
            return self._send(_calls.predict(task, images, top_k=top_k, key=key))
        return self._take(_steps.predict(self._geometries, task, images, top_k=top_k, key=key))

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
        """Ask a task about any number of images, one after the other taken from `images`: their answers, in that order.

        `in_flight` requests are on their way at any time, which the server answers in one batch. With `errors="return"`
        an image that got no answer has its LensrackError in its place, and the others go on.
        """
        _calls.check_map(images, in_flight, errors)
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

    def predict_many(
        self, tasks: Sequence[str], image: ImageInput, *, top_k: int = 5, key: str | None = None
    ) -> ManyAnswers:
        """Ask many tasks about one image, which the server decodes once."""
        if not self._config.client_resize:
            return self._send(_calls.predict_many(tasks, image, top_k=top_k, key=key))
        return self._take(_steps.predict_many(self._geometries, tasks, image, top_k=top_k, key=key))

    @overload
    def embed(self, images: Images) -> list[list[float]]: ...
    @overload
    def embed(self, images: ImageInput) -> list[float]: ...
    def embed(self, images: ImageInput | Images) -> list[float] | list[list[float]]:
        """The frozen backbone's features of an image, [D], or of a list of them, [n, D]."""
        if isinstance(images, list | tuple):
            return self._send(_calls.embed(images))
        [embedding] = self._send(_calls.embed([images]))
        return embedding

    def feedback(self, task: str, images: ImageInput | Images, label: str, *, new_label: bool = False) -> wire.Feedback:
        """Say what an image, or a list of them, shows; `tasks.freeze_feedback` makes a dataset of what was said.

        The last word about an image counts. A label that the live version does not know needs `new_label`.
        """
        given = images if isinstance(images, list | tuple) else [images]
        return self._send(_calls.feedback(task, given, label, new_label=new_label))

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
        """Queue a training job. Retries cannot start it twice; a key of your own holds that over restarts too.

        The recipe `auto` finds the hyper-parameters on the validation images, and with the method `auto` the method,
        too; `quick` answers with a plain head within seconds and fits in full afterwards; fields that are given hold.
        `publish` says whether the new version goes live: `always`, `never`, or `if_better` than the live one on the
        same validation images. Waiting jobs of higher `priority`, -100 to 100, come first.
        """
        call = _calls.train(
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
        """Queue a comparison: every method, all that can be served by default, fitted with every seed.

        Nothing is stored or published; `task` is only what the job goes under. `recipe` fields hold for all methods.
        When the job has succeeded, `comparison` gives its table; `lensrack.picture` prints and draws it.
        """
        call = _calls.compare(
            task, dataset, methods=methods, seeds=seeds, recipe=recipe, priority=priority, key=idempotency_key
        )
        return JobHandle(self, self._send(call))

    def comparison(self, job: str) -> wire.Comparison:
        """What a comparison has found; its rows come with its end."""
        return self._send(_calls.comparison(job))

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
        """Queue a job that leaves out most prompts of a version, or of what an alias points at, and refits the rest.

        Of the shares `keep`, the smallest that loses at most `epsilon` of the validation accuracy becomes a new
        version; where none does, the job's `version` is the one that it began with. `epochs` is for each share tried.
        Without a `dataset` it is the version's own.
        """
        call = _calls.condense(
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
        return self._send(_calls.health())

    def ready(self) -> wire.Ready:
        """Whether predictions can be answered, and by which backbone."""
        return self._send(_calls.ready())

    def _take(self, steps: Steps[T]) -> T:
        """All steps, one after the other."""
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
                    if self._heard is not None:
                        self._heard.append(reply)
                    return exchange.value(reply)
                pause_s = pause
            _sync_runtime.sleep(pause_s)

    def _attempt(self, exchange: Exchange[T]) -> Reply:
        content = bytearray()
        with closing(self._http.send(exchange.request(), stream=True)) as response:
            for chunk in response.iter_bytes():
                content += chunk
                exchange.check_time()
        return Reply(response.status_code, response.headers, bytes(content))


class Tasks:
    """Tasks, their versions and aliases, and their place on the device."""

    def __init__(self, client: Client) -> None:
        self._send = client._send

    def list(self) -> Sequence[wire.Task]:
        return self._send(_calls.list_tasks())

    def get(self, task: str) -> wire.Task:
        return self._send(_calls.get_task(task))

    def delete(self, task: str) -> None:
        return self._send(_calls.delete_task(task))

    def versions(self, task: str) -> Sequence[wire.VersionInfo]:
        """Newest first."""
        return self._send(_calls.list_versions(task))

    def version(self, task: str, version: str) -> wire.VersionInfo:
        return self._send(_calls.get_version(task, version))

    def delete_version(self, task: str, version: str) -> None:
        return self._send(_calls.delete_version(task, version))

    def upload(
        self, task: str, bundle: str | Path | bytes | IO[bytes], *, alias: str | None = None
    ) -> wire.VersionInfo:
        """Store a bundle; aliases stay where they are unless one is given."""
        return self._send(_calls.upload_version(task, _calls.bundle_bytes(bundle), alias=alias))

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

        Without `labels` classes are called 0, 1, …; `preprocess` has any of mean, std, interpolation, crop_pct,
        crop_mode. That it was fitted on the server's backbone is your word where it does not hold one itself.
        """
        call = _calls.import_version(task, files, form=format, labels=labels, preprocess=preprocess, alias=alias)
        return self._send(call)

    def download(self, task: str, version: str) -> bytes:
        """A bundle's file, checked against its version."""
        return self._send(_calls.download_bundle(task, version))

    def alias(self, task: str, alias: str = "live") -> wire.Alias:
        return self._send(_calls.get_alias(task, alias))

    def set_alias(
        self, task: str, alias: str, version: str, *, weight: float = 1.0, if_match: str | None = None
    ) -> wire.Alias:
        """Point an alias at a version, below weight 1 for that share of the requests only.

        With `if_match`, an Alias' `etag`, only if nobody else has moved it; otherwise PreconditionFailedError.
        """
        return self._send(_calls.set_alias(task, alias, version, weight=weight, if_match=if_match))

    def delete_alias(self, task: str, alias: str) -> None:
        return self._send(_calls.delete_alias(task, alias))

    def history(self, task: str, alias: str = "live") -> Sequence[wire.AliasChange]:
        """Where an alias has pointed, oldest first."""
        return self._send(_calls.alias_history(task, alias))

    def rollback(self, task: str, alias: str = "live") -> wire.Alias:
        """Point an alias where it pointed before."""
        return self._send(_calls.rollback(task, alias))

    def feedback(
        self, task: str, *, cursor: str | None = None, limit: int = 50, label: str | None = None
    ) -> wire.FeedbackPage:
        """How much feedback each label has, and a page of it, newest first; `next` is the following page's cursor."""
        return self._send(_calls.list_feedback(task, cursor=cursor, limit=limit, label=label))

    def iterate_feedback(self, task: str, *, label: str | None = None) -> Iterator[wire.FeedbackItem]:
        """All that was said about a task's images, newest first, page by page."""
        cursor: str | None = None
        while True:
            page = self.feedback(task, cursor=cursor, limit=500, label=label)
            yield from page.items
            if page.next is None:
                return
            cursor = page.next

    def delete_feedback(self, task: str, sha256: str) -> None:
        """Withdraw what was said about an image."""
        return self._send(_calls.delete_feedback(task, sha256))

    def freeze_feedback(self, task: str, *, name: str | None = None, parent: str | None = None) -> wire.Dataset:
        """A dataset of what the live version was fitted on, or of `parent`, and of all feedback, which corrects it."""
        return self._send(_calls.freeze_feedback(task, name=name, parent=parent))

    def load(self, task: str) -> wire.Residency:
        return self._send(_calls.load(task))

    def unload(self, task: str) -> wire.Residency:
        return self._send(_calls.unload(task))

    def pin(self, task: str, *, pinned: bool = True) -> wire.Residency:
        return self._send(_calls.pin(task, pinned=pinned))


class Datasets:
    """Immutable labelled images, known by their content digest."""

    def __init__(self, client: Client) -> None:
        self._send = client._send

    def upload(
        self,
        source: Source,
        *,
        name: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
    ) -> wire.Dataset:
        """Store a folder of class folders, or a zip, tar, tar.gz or tar.zst of one; a parquet file; an npz.

        `progress(bytes_sent, bytes_total)` is called as the bytes leave. `skipped` of the answer names the pictures
        that could not be read, and the links, which are not followed.

        What is large goes in pieces: when the line breaks, the upload goes on where it stood. `on_upload(id)` is
        called when such an upload has begun; with `resume=id` a later call goes on with it.
        """
        with closing(_sync_runtime.run(partial(open_archive, source))) as archive:
            return self._store(Uploading(archive, name=name, progress=progress, resume=resume, on_upload=on_upload))

    def add(
        self,
        source: Source,
        parent: str,
        *,
        name: str | None = None,
        progress: Progress | None = None,
        resume: str | None = None,
        on_upload: OnUpload | None = None,
    ) -> wire.Dataset:
        """Store a dataset's pictures and more of them as a new dataset, whose `parent` is the first.

        A picture that the parent has takes the label it has in `source` and stays in its split. The rest is as in
        `upload`.
        """
        with closing(_sync_runtime.run(partial(open_archive, source))) as archive:
            return self._store(
                Uploading(archive, name=name, parent=parent, progress=progress, resume=resume, on_upload=on_upload)
            )

    def _store(self, upload: Uploading) -> wire.Dataset:
        while upload.dataset is None:
            try:
                upload.take(self._send(upload.call()))
            except LensrackError as error:
                _sync_runtime.sleep(upload.lost(error))
        return upload.dataset

    def list(self) -> Sequence[wire.Dataset]:
        return self._send(_calls.list_datasets())

    def get(self, dataset: str) -> wire.Dataset:
        return self._send(_calls.get_dataset(dataset))

    def delete(self, dataset: str) -> None:
        return self._send(_calls.delete_dataset(dataset))


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
        """One page, newest first; its `next` is the cursor of the following one."""
        return self._send(_calls.list_jobs(cursor=cursor, limit=limit, task=task, state=state))

    def iterate(self, *, task: str | None = None, state: wire.JobState | None = None) -> Iterator[wire.Job]:
        """All of them, page by page."""
        cursor: str | None = None
        while True:
            page = self.list(cursor=cursor, task=task, state=state)
            yield from page.jobs
            if page.next is None:
                return
            cursor = page.next

    def get(self, job: str) -> wire.Job:
        return self._send(_calls.get_job(job))

    def handle(self, job: str) -> JobHandle:
        """A handle to follow a job that was started elsewhere."""
        return JobHandle(self._client, self.get(job))

    def cancel(self, job: str) -> wire.Job:
        """A waiting job ends at once, a running one within a step."""
        return self._send(_calls.cancel_job(job))

    def events(self, job: str, *, after: int = 0, wait_s: float = 0.0) -> wire.JobEvents:
        """One page of events; held by the server up to `wait_s` (at most 30) until there is one."""
        return self._send(_calls.job_events(job, after=after, wait_s=wait_s))


class JobHandle:
    """A job that was started. `job` is what was last heard of it."""

    def __init__(self, client: Client, job: wire.Job) -> None:
        self._client = client
        self.job = job

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def state(self) -> wire.JobState:
        return self.job.state

    def refresh(self) -> wire.Job:
        self.job = self._client.jobs.get(self.id)
        return self.job

    def cancel(self) -> wire.Job:
        self.job = self._client.jobs.cancel(self.id)
        return self.job

    def events(
        self,
        *,
        after: int = 0,
        timeout: float | None = None,
    ) -> Iterator[wire.JobEvent]:
        """Every event once, as it happens, up to the last one; a connection that breaks is taken up again.

        Raises RequestTimeout when the job has not ended after `timeout` seconds.
        """
        cursor = EventCursor(self.id, after, timeout)
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
        """The job when it has succeeded. Raises JobFailed, and RequestTimeout after `timeout` seconds."""
        for _ in self.events(timeout=timeout):
            pass
        job = self.refresh()
        if job.state != "succeeded":
            raise JobFailed(job)
        return job
