"""The hyper-parameters of a job, every default once.

General defaults here, a method's own where it says so (`Method.defaults`), the job's where it asks. What a bundle's
manifest records is the whole: nobody has to know the defaults of the day to repeat a fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from server.engine.spec import TASK_POOLS, TaskPool
from server.errors import Unprocessable

from .augment import Augment
from .presets import beneath, published

_CHOICES: Final = {
    "init": ("uniform", "tokens", "tokens_mean", "tokens_kmeans"),
    "optimizer": ("sgd", "adamw"),
    "augment": get_args(Augment),
    "class_weights": ("none", "balanced"),
}


@dataclass(frozen=True)
class Condense:
    """How prompts are made fewer once they are fitted (`condense.py`).

    `keep`: shares of all prompts that are tried, the smallest first. `epsilon`: validation accuracy that may be lost.
    `epochs`: of each refit; None: three fifths of the recipe's. `version`: the stored one that is condensed, instead of
    what the job fits; None in a recipe whose own fit is.
    """

    keep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    epsilon: float = 0.005
    epochs: int | None = None
    version: str | None = None

    @classmethod
    def of(cls, told: object) -> Condense | None:
        """From what a job or a manifest says of it; true is all defaults. Raises Unprocessable (invalid_request)."""
        if told is None or isinstance(told, Condense):
            return told
        given = {} if told is True else told
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or given.keys() - set(known):
            raise Unprocessable(f"condense: expected true, or some of {known}, got {str(told)[:100]}")
        own = cls(**{name: value for name, value in given.items() if value is not None})
        own = replace(own, keep=tuple(sorted(set(own.keep))))
        if not own.keep or not 0 < own.keep[0] <= own.keep[-1] < 1:
            raise Unprocessable(f"condense: expected shares to keep between 0 and 1, got {list(own.keep)}")
        return own


@dataclass(frozen=True)
class Recipe:
    """`lr` is the learning rate itself. The VPT paper's `base_lr` becomes lr = base_lr · batch_size / 256 in `resolve`.

    Schedule: linear warm-up over `warmup_epochs`, then a cosine to zero, per step. `validation` is the share of the
    training images held out, class by class, where the dataset has no validation split.
    `prompt_layers`: the first and the last layer with prompts, from 0; None: wherever the method has them. What lies
    before the first is computed once for all epochs. `init`: how prompts begin, as the method draws them or as tokens
    of the task's own pictures (`token_init`). `class_weights`: `balanced` weighs a class by the inverse of its share.
    `patience`: stop when the validation loss has not improved for so many epochs, and keep the best epoch's
    parameters; 0 runs to the end and keeps the last's. `pool`: what the head reads, see `engine/pooling.py`; None: what
    the backbone was made with. `condense`: what follows the fit, if anything.
    """

    epochs: int = 20
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 3e-3
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_epochs: float = 2
    prompts: int = 10
    prompt_layers: tuple[int, int] | None = None
    prompt_dropout: float = 0.0
    init: str = "uniform"
    label_smoothing: float = 0.0
    class_weights: str = "none"
    augment: Augment = "none"
    patience: int = 0
    pool: TaskPool | None = None
    validation: float = 0.15
    seed: int = 0
    condense: Condense | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Search = Literal["none", "auto", "quick"]
SEARCHES: Final[tuple[Search, ...]] = get_args(Search)


@dataclass(frozen=True)
class RecipeRequest:
    """What a job asks for: how its recipe is found, and the fields that it holds to.

    `none` fits with these fields and the method's defaults. `auto` searches what they leave open. `quick` publishes a
    head on the frozen features first, and goes on as `none`. `budget`: pictures through the backbone that a search may
    take before the full fit; None leaves that to the search.
    """

    search: Search
    budget: int | None
    fields: dict[str, Any]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> RecipeRequest:
        """From a job's recipe as it is stored. Raises Unprocessable (invalid_request)."""
        fields = {name: value for name, value in told.items() if name not in ("search", "budget")}
        search = told.get("search", "none")
        if search not in SEARCHES:
            raise Unprocessable(f"unknown search {search!r}: expected one of {', '.join(SEARCHES)}")
        return cls(search, told.get("budget"), fields)


def resolve(defaults: Mapping[str, object], wanted: Mapping[str, Any]) -> Recipe:
    """General defaults, then a method's, a preset's, and the job's. Raises Unprocessable (invalid_request)."""
    asked = {key: value for key, value in wanted.items() if value is not None}
    if (preset := asked.pop("preset", None)) is not None:
        asked = beneath(asked, published(preset).fields)
    base_lr = asked.pop("base_lr", None)
    if base_lr is not None and "lr" in asked:
        raise Unprocessable("give lr or base_lr, not both: lr = base_lr · batch_size / 256")
    known = {field.name for field in fields(Recipe)}
    if unknown := sorted(asked.keys() - known):
        raise Unprocessable(
            f"unknown recipe fields {unknown}: expected some of {sorted(known | {'base_lr', 'preset'})}"
        )
    recipe = Recipe(**{**defaults, **asked})
    if base_lr is not None:
        recipe = replace(recipe, lr=base_lr * recipe.batch_size / 256)
    for name, choices in _CHOICES.items():
        if (value := getattr(recipe, name)) not in choices:
            raise Unprocessable(f"unknown {name} {value!r}: expected {' or '.join(map(repr, choices))}")
    if recipe.pool not in (None, *TASK_POOLS):
        raise Unprocessable(f"unknown pool {recipe.pool!r}: expected {' or '.join(map(repr, TASK_POOLS))}")
    return replace(
        recipe,
        warmup_epochs=min(recipe.warmup_epochs, recipe.epochs - 1),
        prompt_layers=_layers(recipe.prompt_layers),
        condense=Condense.of(recipe.condense),
    )


def _layers(asked: Sequence[int] | None) -> tuple[int, int] | None:
    if asked is None:
        return None
    first, last = asked
    if not 0 <= first <= last:
        raise Unprocessable(f"prompt_layers: expected [first, last] with 0 <= first <= last, got {[first, last]}")
    return first, last
