"""Every request and response, once. The server and both clients import these models and nothing else of each other.

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
    """What comes from the server: unknown fields are ignored, so that an older client reads a newer server."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Request(BaseModel):
    """What goes to the server: an unknown field is a mistake and is refused."""

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
    b64: str


class PredictRequest(Request):
    """The JSON form of a predict body; bytes and multipart need no model."""

    images: list[EncodedImage] = Field(min_length=1)


class Prediction(Message):
    label: str
    index: int
    score: float


class PredictResponse(Message):
    """`predictions[i]` are the `top_k` best labels of image i, best first.

    `versions` is there where several answered together, in the order of the request; `version` then joins them by `+`.
    """

    task: str
    version: str
    versions: list[str] | None = None
    predictions: list[list[Prediction]]


class TaskResult(Message):
    """One task's share of a many-task answer: either the predictions or the problem."""

    version: str | None = None
    versions: list[str] | None = None
    predictions: list[list[Prediction]] | None = None
    error: Problem | None = None


class ManyPredictResponse(Message):
    results: dict[str, TaskResult]


class Looked(Message):
    """Where attention went, in shares that add up to 1: `grid` [h][w] of each patch of the picture as the network sees
    it, `prompts` of the learned prompts, `rest` of the class token and registers."""

    grid: list[list[float]]
    prompts: float
    rest: float


class Attention(Message):
    """`last`: the class token's attention in the last block, its heads averaged. `rollout`: followed through all
    blocks. `crop_mode` and `crop_pct` say which part of the picture the network saw."""

    task: str
    version: str
    last: Looked
    rollout: Looked
    crop_mode: str
    crop_pct: float


class EmbedResponse(Message):
    """`embeddings[i]` are the backbone's features of image i, [D]; `fingerprint` names the backbone they belong to."""

    fingerprint: str
    embeddings: list[list[float]]


GEOMETRY_HEADER = "Lensrack-Geometry"


class Geometry(Message):
    """How a picture becomes `size` pixels a side, in timm's words; `fill` is the colour of a border, RGB.

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
        """Of a version's `preprocess`. A border has the colour of the normalisation's mean."""
        told = {name: preprocess[name] for name in ("size", "interpolation", "crop_pct", "crop_mode")}
        if told["crop_mode"] == "border":
            told["fill"] = tuple(min(255, max(0, round(255 * value))) for value in preprocess["mean"])
        return cls(**told)

    @classmethod
    def parse(cls, header: str) -> Geometry | None:
        """None where it is no such header."""
        fields: dict[str, Any] = dict(re.findall(r"([a-z_]+)=([^;\s]+)", header[:400]))
        fields["fill"] = fields.get("fill", "0,0,0").split(",")
        try:
            return cls(**fields)
        except ValidationError:
            return None

    @property
    def header(self) -> str:
        """The same text for the same geometry."""
        told = {**self.model_dump(), "fill": ",".join(map(str, self.fill))}
        return "; ".join(f"{name}={value}" for name, value in told.items())


# --- tasks, versions, aliases -----------------------------------------------------------------------------------------


class AliasTarget(Message):
    version: str
    weight: float = 1.0


class Alias(Message):
    """Where an alias points. `etag` goes into `If-Match` to move it only if nobody else has."""

    name: str
    targets: list[AliasTarget]
    revision: int
    changed_at: float

    @property
    def etag(self) -> str:
        return f'"{self.revision}"'


class AliasUpdate(Request):
    """Point an alias at one version; with a `weight` below 1 the rest of the traffic stays where it is (canary)."""

    version: str
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0


class AliasChange(Message):
    alias: str
    targets: list[AliasTarget]
    revision: int
    changed_at: float


class AliasHistory(Message):
    """Where an alias has pointed, oldest first; the last change is the present."""

    changes: list[AliasChange]


class PinRequest(Request):
    """Keep the version from being evicted, or no longer."""

    pinned: bool = True


class RollbackRequest(Request):
    alias: AliasName = "live"


ImportFormat = Literal["auto", "vpt", "spt", "cvpt", "peft", "timm"]
"""Other people's checkpoints; `auto` looks at the names of the arrays."""


class VersionInfo(Message):
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
    tasks: list[Task]


class Method(Message):
    name: str
    meaning: str


class MethodList(Message):
    """What `method` in a train request can be, besides `auto`. `baselines` can be fitted and reported, not served: they
    are asked for with the policy `never`, or in a comparison."""

    methods: list[Method]
    baselines: list[Method] = []


class RackSeat(Message):
    """A version on the device. `in_use`: requests that hold it now; `requests`: predictions since the start."""

    slot: int
    task: str
    version: str
    bytes: int
    in_use: int
    pinned: bool
    requests: int = 0


class Rack(Message):
    """The device at this moment; `seats` least recently used first. Counts are since the start.

    `batch_rows` and `batch_tasks` count forwards by their number of rows and of different tasks; a key is the upper
    end of a range that begins above the key before it, `+Inf` the last. As many rows may wait as there are `places`,
    which follows what the engine does in a second, up to `max_queue`.
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
    """Whether a task's live version sits on the device, and whether it is pinned there."""

    task: str
    version: str
    resident: bool
    pinned: bool
    bytes: int


# --- datasets ---------------------------------------------------------------------------------------------------------


class SkippedFile(Message):
    name: str
    reason: str


class Spread(Message):
    min: float
    median: float
    max: float


class Copies(Message):
    """One picture under `count` names, the first of them in `names`, as split/label: path."""

    sha256: str
    count: int
    names: list[str]


class Duplicates(Message):
    """Pictures of exactly the same bytes. `repeated` maps split → pictures beyond the first; `leaked` are in several
    splits and `contradictory` under several labels: how many different pictures, of which the first are listed."""

    repeated: dict[str, int] = {}
    leaked: int = 0
    contradictory: int = 0
    leaks: list[Copies] = []
    contradictions: list[Copies] = []


class DatasetWarning(Message):
    """`code` is stable: leakage, contradictory_labels, duplicates, imbalance, few_images, absent_classes,
    small_images or many_skipped. `text` is a sentence."""

    code: str
    text: str


class DatasetReport(Message):
    """What a dataset is made of: sides in pixels, bytes of a file, and pictures by colour mode and format."""

    width: Spread
    height: Spread
    bytes: Spread
    modes: dict[str, int] = {}
    formats: dict[str, int] = {}
    duplicates: Duplicates = Duplicates()
    warnings: list[DatasetWarning] = []


class Dataset(Message):
    """A stored dataset. `id` is its content digest; `splits` maps split → label → number of images.

    `parent` is the id of the dataset that this one added to, which may have been deleted since.
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
    thumbnails: list[Thumbnail]


class DatasetList(Message):
    datasets: list[Dataset]


class Upload(Message):
    """An upload that can go on after its connection broke: `offset` of its `length` bytes are safe on the server."""

    id: str
    length: int
    offset: int
    expires_at: float


# --- feedback ---------------------------------------------------------------------------------------------------------


class FeedbackItem(Message):
    """A picture, known by the digest of its bytes, and the label that it should have been given. `previous` is what
    was said of it before, in the answer to a new word only."""

    sha256: str
    label: str
    previous: str | None = None
    bytes: int
    width: int
    height: int
    at: float


class Feedback(Message):
    """What was stored, in the order in which it was sent."""

    task: str
    items: list[FeedbackItem]


class FeedbackPage(Message):
    """`labels` counts all `images` by label; `items` are some of them, newest first."""

    task: str
    images: int
    labels: dict[str, int]
    items: list[FeedbackItem]
    next: str | None = None


# --- jobs -------------------------------------------------------------------------------------------------------------


class Condense(Request):
    """Fewer prompts than were fitted (Prompt Condensation, arXiv 2305.17223): the best of all layers, fitted again.

    `keep`: shares of the prompts that are tried, the smallest first, until one loses no more than `epsilon` of the
    validation accuracy (0.005 is half a point). `epochs`: of each refit; left out, three fifths of the fit's.
    `version`: a version of the task, the beginning of one, or an alias, to condense instead of fitting a new one: with
    its own method and recipe, and on its own dataset where none is named. Where no share is good enough it stays.
    """

    keep: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=20)] | None = None
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    epochs: Annotated[int, Field(ge=1, le=1000)] | None = None
    version: Annotated[str, Field(min_length=1, max_length=64)] | None = None


def _switched(condense: object) -> object:
    return ({} if condense else None) if isinstance(condense, bool) else condense


class Recipe(Request):
    """Hyper-parameters of a job; what is left out takes the method's default, or is searched.

    `search`: `auto` finds what is left out on the validation images and takes at most about `budget` images through the
    backbone for it; `quick` publishes a head on the frozen features within seconds and fits in full afterwards; `none`
    just fits. Left out, it is `auto` for the method `auto` and `none` for any other; a baseline is never searched.
    `preset`: a published recipe, and for a search its grid; fields that are given replace the preset's.
    `lr` is the learning rate itself. `base_lr` is the VPT paper's: lr = base_lr · batch_size / 256. Give one or none.
    `prompt_layers`: the first and the last layer that get prompts, from 0.
    `init`: how prompts begin: `uniform` as the method draws them, or as tokens of the task's own images, layer by layer
    (SPT, ICML 2024): random `tokens`, their means, or the centres of their k-means clusters.
    `patience`: epochs without a better validation loss after which the fit stops and keeps its best epoch; 0: never.
    `pool`: what the head reads: the class token, the mean of the image's tokens, or of these and the last layer's
    prompts; left out, what the backbone was made with.
    `condense`: leave out most prompts after the fit; true takes the defaults of Condense.
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
    condense: Annotated[Condense | None, BeforeValidator(_switched, json_schema_input_type=Condense | bool | None)] = (
        None
    )

    @model_validator(mode="after")
    def _one_learning_rate(self) -> Recipe:
        if self.lr is not None and self.base_lr is not None:
            raise ValueError("give lr or base_lr, not both: lr = base_lr * batch_size / 256")
        return self


def _spelled_out(recipe: object) -> object:
    return {"search": recipe} if recipe in ("auto", "quick") else recipe


RecipeOrWord = Annotated[
    Recipe, BeforeValidator(_spelled_out, json_schema_input_type=Recipe | Literal["auto", "quick"])
]


class TrainRequest(Request):
    """`method` names one, or `auto` chooses among all. `recipe`: `auto` and `quick` stand for {"search": …}.

    `publish`: whether the new version goes live `always`, `never`, or only `if_better` than the version that is
    live by then, judged on the same validation images. Waiting jobs of higher `priority` come first.
    `dataset` may be left out where `recipe.condense` names a version that tells its own.
    """

    task: TaskName
    dataset: str | None = None
    method: str = "auto"
    recipe: RecipeOrWord = Recipe(search="auto")
    publish: PublishPolicy = "always"
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _on_something(self) -> TrainRequest:
        if self.dataset is None and (self.recipe.condense is None or self.recipe.condense.version is None):
            raise ValueError("expected a dataset: only a job that condenses a version can do without")
        return self


class JobProgress(Message):
    """How far a running job is. `eta_s` is None until an epoch has been timed.

    While a search tries recipes, `trial` of `trials` is under way; epochs and steps are the trial's.
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


class JobError(Message):
    code: str
    detail: str


class Job(Message):
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
    jobs: list[Job]
    next: str | None = None


class JobEvent(Message):
    """`seq` counts from 1 without gaps.

    Types: queued, started, epoch, live_unusable, published, kept, retried, cancel_requested, and the three end states.
    """

    seq: int
    type: str
    at: float
    data: dict[str, Any] = {}


class JobEvents(Message):
    events: list[JobEvent]
    next: int
    finished: bool


# --- comparisons ------------------------------------------------------------------------------------------------------


class ComparedRecipe(Request):
    """What holds for every fit of a comparison; the rest is each method's own default. `epochs` does not hold for heads
    alone, whose epochs cost next to nothing."""

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
    """Fit several methods on one dataset, each with every seed, and tell what they reach and cost.

    Nothing is stored or published: `task` is only what the job goes under. `methods`: all that can be served, where
    none are named; baselines can be named as well.
    """

    task: TaskName
    dataset: str
    methods: Annotated[list[str], Field(min_length=1, max_length=50)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=20)] = [0, 1, 2]
    recipe: ComparedRecipe = ComparedRecipe()
    priority: Annotated[int, Field(ge=-100, le=100)] = 0

    @model_validator(mode="after")
    def _once_each(self) -> CompareRequest:
        for name, values in (("methods", self.methods or []), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: expected each once, got {values}")
        return self


class ComparedFit(Message):
    """One fit. Without accuracies it diverged. `fit_s`: seconds, reading the pictures included; `cpu_s`: of the
    worker's CPU time, in which a busy machine shows less."""

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
    """A method over its seeds: means, and standard deviations where there are several.

    `parameters` were fitted; `bundle_bytes` is what a version takes in the store, `lens_bytes` on the device;
    `forward_cost` is the measured time of its rows as a multiple of the plain ViT's. A baseline, which cannot be
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
    """What a comparison has found; `rows` come with its end. `dataset_split`: whose accuracy counts, `test` where the
    dataset has test pictures."""

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
    arch: str
    fingerprint: str
    trained: bool
    device: str
    dtype: str
    image_size: int
    depth: int
    dim: int


class Ready(Message):
    ready: bool
    backbone: Backbone | None = None
    notes: list[str] = []
    checks: dict[str, str] = {}


class Health(Message):
    status: Literal["ok"]
    version: str


# --- sessions -------------------------------------------------------------------------------------------------------


class SignIn(Request):
    """A key, to be exchanged for a session cookie. `repr` does not show it."""

    key: str = Field(min_length=1, max_length=300, repr=False)


class Session(Message):
    """`keys`: the server asks for keys. `key` is the id of the one that came, if any; `scopes` is what may be done, and
    `tasks` how the names of its tasks begin."""

    keys: bool
    key: str | None = None
    name: str = ""
    scopes: list[Literal["predict", "train", "admin"]] = []
    tasks: str = ""
