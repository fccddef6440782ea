"""What OpenAI's clients are answered, as models: the schema documents these, and answers are checked against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class FileObject(BaseModel):
    """A data set."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"]
    status: Literal["processed"]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class Hyperparameters(BaseModel):
    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    learning_rate_multiplier: Literal["auto"]


class JobFailure(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    """A training job. `method` holds `type` and, under the name that this says, the hyper-parameters."""

    id: str
    object: Literal["fine_tuning.job"]
    model: str
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    organization_id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: None
    result_files: list[str]
    hyperparameters: Hyperparameters
    method: dict[str, Any]
    seed: int
    trained_tokens: None
    user_provided_suffix: str
    error: JobFailure | None


class FineTuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["metrics", "message"]
    message: str
    data: dict[str, Any]


class _Page(BaseModel):
    object: Literal["list"]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileList(_Page):
    data: list[FileObject]


class FineTuningJobList(_Page):
    data: list[FineTuningJob]


class FineTuningEventList(_Page):
    data: list[FineTuningEvent]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Embedding(BaseModel):
    """`embedding`: numbers, or base64 of little-endian float32, as the request says."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage
