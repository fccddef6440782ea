"""All requests and responses. The server and the clients share these models and nothing else.

Times ending in `_s` are seconds; `*_at` are seconds since the Unix epoch (UTC).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

TASK_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
ALIAS_PATTERN = r"^[a-z][a-z0-9_-]{0,31}$"
VERSION_PATTERN = r"^[0-9a-f]{64}$"

TaskName = Annotated[str, Field(pattern=TASK_PATTERN)]
AliasName = Annotated[str, Field(pattern=ALIAS_PATTERN)]
Version = Annotated[str, Field(pattern=VERSION_PATTERN)]
JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
PublishPolicy = Literal["always", "if_better", "never"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class Message(BaseModel):
    """A message from the server: unknown fields are ignored, so that an older client can read a newer server."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Request(BaseModel):
    """A message to the server: unknown fields are refused as mistakes."""

    model_config = ConfigDict(extra="forbid")


class Problem(Message):
    """An error, RFC 9457 `application/problem+json`, with a stable `code` and the request's id."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""
    code: str
    request_id: str = ""


# --- predictions ----------------------------------------------------------------------------------------------------


class EncodedImage(Request):
    """An image file in base64."""

    b64: str


class PredictRequest(Request):
    """The JSON form of a predict body; raw bytes and multipart need no model."""

    images: list[EncodedImage] = Field(min_length=1)


class Prediction(Message):
    """A label, its index among the version's labels, and its probability, 0 to 1."""

    label: str
    index: int
    score: float


class PredictResponse(Message):
    """`predictions[i]` are the `top_k` best labels of image i, best first.

    An ensemble also has `versions`, in the order of the request; `version` is then all of them, joined by `+`.
    """

    task: str
    version: str
    versions: list[str] | None = None
    predictions: list[list[Prediction]]


class TaskResult(Message):
    """The result of one task in a response for several: either predictions or an error."""

    version: str | None = None
    versions: list[str] | None = None
    predictions: list[list[Prediction]] | None = None
    error: Problem | None = None


class ManyPredictResponse(Message):
    """The results of a prediction by several tasks, by task."""

    results: dict[str, TaskResult]


class Looked(Message):
    """Attention as shares that add up to 1: `grid` [h][w] on each patch of the picture as the network sees it,
    `prompts` on the learned prompts, `rest` on the class token and registers."""

    grid: list[list[float]]
    prompts: float
    rest: float


class Attention(Message):
    """`last`: the class token's attention in the last block, averaged over heads. `rollout`: attention rollout through
    all blocks. `crop_mode` and `crop_pct` say which part of the picture the network saw."""

    task: str
    version: str
    last: Looked
    rollout: Looked
    crop_mode: str
    crop_pct: float


class EmbedResponse(Message):
    """`embeddings[i]` are the backbone's features of image i, [D]; `fingerprint` identifies the backbone."""

    fingerprint: str
    embeddings: list[list[float]]


GEOMETRY_HEADER = "Lensrack-Geometry"


class Geometry(Message):
    """How a picture is resized to `size` pixels a side, in timm's terms; `fill` is the RGB colour of a border.

    In a header: `size=224; interpolation=bicubic; crop_pct=0.875; crop_mode=center; fill=0,0,0`.
    """

    EXAMPLE: ClassVar[str] = "size=224; interpolation=bicubic; crop_pct=0.875; crop_mode=center; fill=0,0,0"

    size: int
    interpolation: str
    crop_pct: float
    crop_mode: str
    fill: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, preprocess: Mapping[str, Any]) -> Geometry:
        """Return the geometry of a version's `preprocess`. A border has the colour of the normalisation's mean."""
        fields = {name: preprocess[name] for name in ("size", "interpolation", "crop_pct", "crop_mode")}
        if fields["crop_mode"] == "border":
            fields["fill"] = tuple(min(255, max(0, round(255 * value))) for value in preprocess["mean"])
        return cls(**fields)

    @classmethod
    def parse(cls, header: str) -> Geometry | None:
        """Read the header; None if it is malformed."""
        fields: dict[str, Any] = dict(re.findall(r"([a-z_]+)=([^;\s]+)", header[:400]))
        fields["fill"] = fields.get("fill", "0,0,0").split(",")
        try:
            return cls(**fields)
        except ValidationError:
            return None

    @property
    def header(self) -> str:
        """The text of the header; equal geometries have equal texts."""
        fields = {**self.model_dump(), "fill": ",".join(map(str, self.fill))}
        return "; ".join(f"{name}={value}" for name, value in fields.items())


# --- tasks, versions, aliases -----------------------------------------------------------------------------------------


class AliasTarget(Message):
    """A version and its share of the requests; the weights of an alias add up to 1."""

    version: str
    weight: float = 1.0


class Alias(Message):
    """An alias and its target versions. With `etag` as `If-Match`, a change fails if the alias has changed since."""

    name: str
    targets: list[AliasTarget]
    revision: int
    changed_at: float

    @property
    def etag(self) -> str:
        return f'"{self.revision}"'


class AliasUpdate(Request):
    """Point an alias at a version; with a `weight` below 1 the rest of the requests keeps its versions (canary)."""

    version: str
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0


class AliasChange(Message):
    """A state that an alias had from `changed_at` on."""

    alias: str
    targets: list[AliasTarget]
    revision: int
    changed_at: float


class AliasHistory(Message):
    """The states of an alias, oldest first; the last is the present one."""

    changes: list[AliasChange]


class PinRequest(Request):
    """Whether the version is protected from eviction."""

    pinned: bool = True


class RollbackRequest(Request):
    """Restore an alias' previous targets."""

    alias: AliasName = "live"


ImportFormat = Literal["auto", "vpt", "spt", "cvpt", "peft", "timm", "transformers"]
"""Kinds of checkpoints of other tools; `auto` recognises them by the names of the arrays."""
ExportFormat = Literal["onnx", "timm", "bundle"]
ExportInput = Literal["uint8", "float"]


class VersionInfo(Message):
    """A stored version: its manifest, and its size in bytes. `prompt_lengths` is the number of prompts by layer."""

    version: str
    method: str
    labels: list[str]
    prompt_lengths: list[int]
    bytes: int
    created_at: float
    metrics: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    dataset: str | None = None
    parent: str | None = None
    preprocess: dict[str, Any] = {}
    resident: bool = False


class VersionList(Message):
    """The versions of a task, newest first."""

    versions: list[VersionInfo]


class Task(Message):
    """`method`, `classes`, `dataset` and `val_accuracy` are the live version's; `requests` counts the predictions of
    all versions since this server started."""

    task: str
    live: str | None = None
    aliases: list[Alias] = []
    versions: int = 0
    resident: bool = False
    method: str | None = None
    classes: int = 0
    dataset: str | None = None
    val_accuracy: float | None = None
    requests: int = 0


class TaskList(Message):
    """All tasks."""

    tasks: list[Task]


class Method(Message):
    """A method and a sentence about it."""

    name: str
    meaning: str


class MethodList(Message):
    """The values of `method` in a train request, besides `auto`. `baselines` can be fitted and reported, not served:
    only with the publish policy `never`, or in a comparison."""

    methods: list[Method]
    baselines: list[Method] = []


class RackSeat(Message):
    """A version on the device. `in_use`: requests that are using it now; `requests`: predictions since the start."""

    slot: int
    task: str
    version: str
    bytes: int
    in_use: int
    pinned: bool
    requests: int = 0


class Rack(Message):
    """The present state of the device; `seats` are sorted, least recently used first. Counts are since the start.

    `batch_rows` and `batch_tasks` are histograms of forward passes, by their number of rows and of different tasks; a
    key is the upper bound of a bucket, `+Inf` the last. `places` is the present limit of the queue in rows, which
    follows the engine's throughput, up to `max_queue`.
    """

    slots: int
    used_slots: int
    bytes: int
    used_bytes: int
    seats: list[RackSeat]
    hits: int
    loads: int
    evictions: int
    queued: int = 0
    places: int = 0
    max_queue: int = 0
    max_batch: int = 0
    rows: dict[str, int] = {}
    forwards: int = 0
    batch_rows: dict[str, int] = {}
    batch_tasks: dict[str, int] = {}


class Residency(Message):
    """Whether a version is on the device, and whether it is pinned there."""

    task: str
    version: str
    resident: bool
    pinned: bool
    bytes: int


# --- datasets ---------------------------------------------------------------------------------------------------------


class SkippedFile(Message):
    """A file that is not in the dataset, and why."""

    name: str
    reason: str


class Spread(Message):
    """The smallest, the median and the largest value."""

    min: float
    median: float
    max: float


class Copies(Message):
    """One picture that occurs under `count` names; `names` has the first of them, as split/label: path."""

    sha256: str
    count: int
    names: list[str]


class Duplicates(Message):
    """Pictures with identical bytes. `repeated` maps split → copies beyond the first; `leaked` and `contradictory`
    count pictures in several splits and under several labels, of which `leaks` and `contradictions` list some."""

    repeated: dict[str, int] = {}
    leaked: int = 0
    contradictory: int = 0
    leaks: list[Copies] = []
    contradictions: list[Copies] = []


class DatasetWarning(Message):
    """`code` is stable: leakage, contradictory_labels, duplicates, imbalance, few_images, absent_classes,
    similar_labels, nested_folders, small_images or many_skipped; of feedback: rare_label. `text` is a sentence."""

    code: str
    text: str


class DatasetReport(Message):
    """Statistics of a dataset: sides in pixels, file sizes in bytes, and pictures by colour mode and format."""

    width: Spread
    height: Spread
    bytes: Spread
    modes: dict[str, int] = {}
    formats: dict[str, int] = {}
    duplicates: Duplicates = Duplicates()
    warnings: list[DatasetWarning] = []


class Dataset(Message):
    """A stored dataset. `id` is its content digest; `splits` maps split → label → number of images.

    `parent` is the id of the dataset that this one extends, which may have been deleted since.
    """

    id: str
    name: str = ""
    labels: list[str]
    images: int
    bytes: int
    splits: dict[str, dict[str, int]]
    skipped: list[SkippedFile] = []
    report: DatasetReport | None = None
    created_at: float
    parent: str | None = None


class Thumbnail(Message):
    """One picture of a dataset: `GET /datasets/{id}/thumbnails/{number}` shows it small."""

    number: int
    split: str
    label: str
    name: str
    width: int
    height: int


class ThumbnailList(Message):
    """Some pictures of a dataset."""

    thumbnails: list[Thumbnail]


class DatasetList(Message):
    """All datasets."""

    datasets: list[Dataset]


class Upload(Message):
    """A resumable upload: the server has stored `offset` of its `length` bytes."""

    id: str
    length: int
    offset: int
    expires_at: float


# --- feedback ---------------------------------------------------------------------------------------------------------


class FeedbackItem(Message):
    """A picture, identified by the digest of its bytes, with its correct label. `previous` is its label before, which
    only the response to new feedback has."""

    sha256: str
    label: str
    previous: str | None = None
    bytes: int
    width: int
    height: int
    at: float


class Feedback(Message):
    """The stored feedback, in the order of the request. `warnings`: what training could not use as it is, such as a new
    class with a single picture."""

    task: str
    items: list[FeedbackItem]
    warnings: list[DatasetWarning] = []


class FeedbackPage(Message):
    """`labels` counts all `images` by label; `items` are some of them, newest first; `warnings` as of `Feedback`."""

    task: str
    images: int
    labels: dict[str, int]
    items: list[FeedbackItem]
    warnings: list[DatasetWarning] = []
    next: str | None = None


# --- jobs -------------------------------------------------------------------------------------------------------------


class Condense(Request):
    """Keep the most important prompts of all layers and refit them (Prompt Condensation, arXiv 2305.17223).

    `keep`: shares of the prompts to try, the smallest first, until one loses at most `epsilon` of the validation
    accuracy (0.005 is half a percentage point). `epochs`: of each refit; default: three fifths of the fit's.
    `version`: a version of the task, a prefix of one, or an alias, to condense instead of fitting a new one: with its
    own method and recipe, and by default on its own dataset. If no share is good enough, nothing changes.
    """

    keep: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=20)] | None = None
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None


def _as_condense(condense: object) -> object:
    return ({} if condense else None) if isinstance(condense, bool) else condense


class Recipe(Request):
    """Hyper-parameters of a job; fields that are not set take the method's defaults, or are searched.

    `search`: `auto` searches the fields that are not set on the validation images, by at most about `budget` forward
    passes of images; `quick` publishes a head on the frozen features within seconds and then fits in full; `none` only
    fits. Default: `auto` for the method `auto`, `none` for any other; a baseline is never searched.
    `preset`: a published recipe, and for a search its grid; fields that are set replace the preset's.
    `lr` is the learning rate itself. `base_lr` is the VPT paper's: lr = base_lr · batch_size / 256. Set one or none.
    `prompt_layers`: the first and the last layer with prompts, from 0.
    `init`: the initial prompts: `uniform` as the method draws them, or tokens of the task's images, layer by layer
    (SPT, ICML 2024): random `tokens`, their means, or the centres of their k-means clusters.
    `patience`: epochs without a better validation loss after which the fit stops and keeps its best epoch; 0: never.
    `pool`: what the head reads: the class token, the mean of the image's tokens, or of these and the last layer's
    prompts; default: the backbone's own pooling.
    `condense`: remove most prompts after the fit; true takes the defaults of Condense.
    """

    search: Literal["auto", "quick", "none"] | None = None
    budget: Annotated[int, Field(ge=1, le=10**9)] | None = None
    preset: Literal["vpt", "cvpt"] | None = None

    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    lr: Annotated[float, Field(gt=0, le=1e4)] | None = None
    base_lr: Annotated[float, Field(gt=0, le=1e5)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=10)] | None = None
    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] | None = None
    prompts: Annotated[int, Field(ge=0, le=1000)] | None = None
    prompt_layers: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(min_length=2, max_length=2)] | None = None
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    init: Literal["uniform", "tokens", "tokens_mean", "tokens_kmeans"] | None = None
    class_weights: Literal["none", "balanced"] | None = None
    augment: Literal["none", "flip", "crop"] | None = None
    patience: Annotated[int, Field(ge=0, le=1000)] | None = None
    pool: Literal["cls", "image", "image_and_prompts"] | None = None
    validation: Annotated[float, Field(gt=0, lt=0.9)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    condense: Annotated[
        Condense | None, BeforeValidator(_as_condense, json_schema_input_type=Condense | bool | None)
    ] = None

    @model_validator(mode="after")
    def _one_learning_rate(self) -> Recipe:
        if self.lr is not None and self.base_lr is not None:
            raise ValueError("expected lr or base_lr, not both: lr = base_lr · batch_size / 256")
        return self


def _as_recipe(recipe: object) -> object:
    return {"search": recipe} if recipe in ("auto", "quick") else recipe


RecipeOrWord = Annotated[Recipe, BeforeValidator(_as_recipe, json_schema_input_type=Recipe | Literal["auto", "quick"])]


class TrainRequest(Request):
    """`method` is a method's name, or `auto` to choose one. `recipe`: `auto` and `quick` stand for {"search": …}.

    `publish`: whether the new version goes live: `always`, `never`, or only `if_better` than the version that is live
    at that time, on the same validation images. Waiting jobs of higher `priority` run first.
    `dataset` may be omitted if `recipe.condense` names a version, whose dataset is then used.
    """

    task: TaskName
    dataset: str | None = None
    method: str = "auto"
    # a factory, so that the schema states no default of another type than its enum: generators refuse such a field
    recipe: RecipeOrWord = Field(default_factory=lambda: Recipe(search="auto"))
    publish: PublishPolicy = "always"
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _requires_dataset(self) -> TrainRequest:
        if self.dataset is None and (self.recipe.condense is None or self.recipe.condense.version is None):
            raise ValueError("expected a dataset, which only a job that condenses a version can omit")
        return self


class JobProgress(Message):
    """The progress of a running job. `eta_s`: seconds left as an estimate, None until something has been timed.

    `phase`: reading (the pictures), features (caching what the frozen layers give), search, head (a preliminary
    version), fit, condense, compare or publish. `share`: the estimated share of the work that is done, 0 to 1. While a
    search tries recipes, `trial` of `trials` is running; epochs and steps are the trial's. `val_accuracy` and `val_nll`
    are the last evaluated epoch's.
    """

    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    val_accuracy: float | None = None
    eta_s: float | None = None
    trial: int = 0
    trials: int = 0
    phase: str = ""
    share: float | None = None
    val_nll: float | None = None


class JobError(Message):
    """Why a job has failed: a stable code and a sentence."""

    code: str
    detail: str


class Job(Message):
    """A job. `attempt` counts its starts; `version` is the version that it has made, `metrics` what it measured."""

    id: str
    task: str
    dataset: str
    method: str
    recipe: dict[str, Any] = {}
    publish: PublishPolicy = "always"
    priority: int = 0
    state: JobState
    attempt: int = 0
    progress: JobProgress = JobProgress()
    version: str | None = None
    metrics: dict[str, Any] = {}
    error: JobError | None = None
    cancel_requested: bool = False
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


class JobList(Message):
    """A page of jobs, newest first; `next` is the cursor of the next page."""

    jobs: list[Job]
    next: str | None = None


class JobEvent(Message):
    """`seq` counts from 1 without gaps.

    Types: queued, started, epoch, trial, live_unusable, published, kept, retried, cancel_requested, and the three end
    states. An event `progress` is not stored: its data are a `JobProgress`, and its `seq` is that of the event before.
    """

    seq: int
    type: str
    at: float
    data: dict[str, Any] = {}


class JobEvents(Message):
    """A page of events; `next` is the last `seq` seen, and `finished` says that no more will come. `progress` is the
    job's at that moment."""

    events: list[JobEvent]
    next: int
    finished: bool
    progress: JobProgress | None = None


# --- comparisons ------------------------------------------------------------------------------------------------------


class ComparedRecipe(Request):
    """Hyper-parameters of every fit of a comparison; others are each method's defaults. `epochs` does not apply to
    heads alone, whose epochs cost almost nothing."""

    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    warmup_epochs: Annotated[float, Field(ge=0, le=1000)] | None = None
    prompts: Annotated[int, Field(ge=1, le=1000)] | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    class_weights: Literal["none", "balanced"] | None = None
    augment: Literal["none", "flip", "crop"] | None = None
    patience: Annotated[int, Field(ge=0, le=1000)] | None = None
    validation: Annotated[float, Field(gt=0, lt=0.9)] | None = None


class CompareRequest(Request):
    """Fit several methods on one dataset, each with every seed, and report their accuracy and cost.

    Nothing is stored or published: `task` only names the job. `methods`: default all that can be served; baselines are
    possible as well.
    """

    task: TaskName
    dataset: str
    methods: Annotated[list[str], Field(min_length=1, max_length=50)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=20)] = [0, 1, 2]
    recipe: ComparedRecipe = ComparedRecipe()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _requires_unique(self) -> CompareRequest:
        for name, values in (("methods", self.methods or []), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected no duplicates, got {values}")
        return self


class ComparedFit(Message):
    """One fit. A fit without accuracies has diverged. `fit_s`: seconds, including reading the pictures; `cpu_s`:
    seconds of the worker's CPU time, which depends less on other load on the machine."""

    method: str
    seed: int
    lr: float
    epochs: int
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    parameters: int | None = None
    bundle_bytes: int | None = None
    forward_passes: int | None = None
    fit_s: float
    cpu_s: float = 0.0


class ComparedMethod(Message):
    """A method over its seeds: means, and standard deviations if there are several.

    `parameters`: number of fitted parameters; `bundle_bytes`: size of a version in the store, `lens_bytes` on the
    device; `forward_cost`: measured time of its rows as a multiple of the plain ViT's. A baseline, which cannot be
    served, has none of the last three.
    """

    method: str
    servable: bool = True
    fits: int
    diverged: int = 0
    val_accuracy: float | None = None
    val_accuracy_std: float | None = None
    test_accuracy: float | None = None
    test_accuracy_std: float | None = None
    parameters: int | None = None
    bundle_bytes: int | None = None
    lens_bytes: int | None = None
    forward_cost: float | None = None
    fit_s: float = 0.0
    cpu_s: float = 0.0


class Comparison(Message):
    """The results of a comparison; `rows` is empty until it has ended. `dataset_split`: the split of the accuracy that
    counts, `test` if the dataset has test pictures."""

    id: str = ""
    task: str
    title: str = ""
    dataset: str = ""
    state: JobState = "succeeded"
    dataset_split: Literal["val", "test"] = "val"
    rows: list[ComparedMethod] = []
    fits: list[ComparedFit] = []


# --- health -----------------------------------------------------------------------------------------------------------


class Backbone(Message):
    """The backbone that is served; `image_size` in pixels a side, `depth` in blocks, `dim` is its width."""

    arch: str
    fingerprint: str
    trained: bool
    device: str
    dtype: str
    image_size: int
    depth: int
    dim: int


class Ready(Message):
    """Whether predictions can be answered; `checks` has the state of each part, `notes` are hints for people."""

    ready: bool
    backbone: Backbone | None = None
    notes: list[str] = []
    checks: dict[str, str] = {}


class Health(Message):
    """The server process answers; `version` is the version of its software."""

    status: Literal["ok"]
    version: str


# --- sessions -------------------------------------------------------------------------------------------------------


class SignIn(Request):
    """A key to exchange for a session cookie. `repr` hides it."""

    key: str = Field(min_length=1, max_length=300, repr=False)


class Session(Message):
    """`keys`: whether the server requires keys. `key` is the id of the request's key, if any; `scopes` lists
    what the request may do, and `tasks` is the prefix of the task names that it may use."""

    keys: bool
    key: str | None = None
    name: str = ""
    scopes: list[Literal["predict", "train", "admin"]] = []
    tasks: str = ""
