"""The hyper-parameters of a job, every default once.

The general defaults are here; a method overrides them (`Method.defaults`), and a job overrides both. A bundle's
manifest records the complete recipe, so that a fit can be repeated although defaults change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from server.engine.spec import TASK_POOLS, TaskPool
from server.errors import Unprocessable

from .augment import Augment
from .presets import find_preset, overlaid

_CHOICES: Final = {
    "init": ("uniform", "tokens", "tokens_mean", "tokens_kmeans"),
    "optimizer": ("sgd", "adamw"),
    "augment": get_args(Augment),
    "class_weights": ("none", "balanced"),
}


@dataclass(frozen=True)
class Condense:
    """How fitted prompts are reduced in number (`condense.py`).

    `keep`: the shares of all prompts to try, the smallest first. `epsilon`: the validation accuracy that may be lost.
    `epochs`: of each refit; None: three fifths of the recipe's. `version`: the stored version to condense; None: the
    job's own fit is condensed.
    """

    keep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    epsilon: float = 0.005
    epochs: int | None = None
    version: str | None = None

    @classmethod
    def parse(cls, value: object) -> Condense | None:
        """Parse the `condense` field of a job's or a manifest's recipe; true means all defaults.

        Raises Unprocessable (invalid_request).
        """
        if value is None or isinstance(value, Condense):
            return value
        settings = {} if value is True else value
        known = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping) or settings.keys() - set(known):
            raise Unprocessable(f"condense: expected true, or some of {known}, got {str(value)[:100]}")
        condense = cls(**{name: item for name, item in settings.items() if item is not None})
        condense = replace(condense, keep=tuple(sorted(set(condense.keep))))
        if not condense.keep or not 0 < condense.keep[0] <= condense.keep[-1] < 1:
            raise Unprocessable(f"condense: expected shares to keep between 0 and 1, got {list(condense.keep)}")
        return condense


@dataclass(frozen=True)
class Recipe:
    """`lr` is the learning rate itself. The VPT paper's `base_lr` becomes lr = base_lr · batch_size / 256 in `resolve`.

    Schedule: linear warm-up over `warmup_epochs`, then a cosine to zero, per step. `validation` is the share of the
    training images held out, class by class, where the dataset has no validation split.
    `prompt_layers`: the first and the last layer with prompts, counted from 0; None: all layers of the method. The
    layers before the first run once for all epochs. `init`: initial prompts, drawn by the method or tokens of the
    task's own pictures (`token_init`). `class_weights`: `balanced` weighs a class by the inverse of its share.
    `patience`: stop when the validation loss has not improved for so many epochs; 0: run all epochs. The parameters of
    the epoch with the lowest validation loss are kept (docs/results/accuracy.md says why). `pool`: what the head reads,
    see `engine/pooling.py`; None: the backbone's own pooling. `condense`: the condensation after the fit, if any.
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


_FIELDS: Final = {field.name for field in fields(Recipe)}

Search = Literal["none", "auto", "quick"]
SEARCHES: Final[tuple[Search, ...]] = get_args(Search)


@dataclass(frozen=True)
class RecipeRequest:
    """The recipe of a job: the fields that it sets, and how the others are found.

    `search`: `none` takes the method's defaults. `auto` searches for them. `quick` publishes a head on the frozen
    features first, and then does the same as `none`. `budget`: pictures that a search may pass through the backbone
    before the full fit; None: the search's default.
    """

    search: Search
    budget: int | None
    fields: dict[str, Any]

    @classmethod
    def parse(cls, recipe: Mapping[str, Any]) -> RecipeRequest:
        """Parse a job's recipe as it is stored. Raises Unprocessable (invalid_request)."""
        fields = {name: value for name, value in recipe.items() if name not in ("search", "budget")}
        search = recipe.get("search", "none")
        if search not in SEARCHES:
            raise Unprocessable(f"unknown search {search!r}: expected one of {', '.join(SEARCHES)}")
        return cls(search, recipe.get("budget"), fields)


def resolve(defaults: Mapping[str, object], fields: Mapping[str, Any]) -> Recipe:
    """The recipe of general defaults, a method's `defaults`, a preset's fields and a job's `fields`, the later ones
    overriding the earlier. Raises Unprocessable (invalid_request)."""
    values = {name: value for name, value in fields.items() if value is not None}
    if (preset := values.pop("preset", None)) is not None:
        values = overlaid(values, find_preset(preset).fields)
    base_lr = values.pop("base_lr", None)
    if base_lr is not None and "lr" in values:
        raise Unprocessable("expected lr or base_lr, not both: lr = base_lr · batch_size / 256")
    if unknown := sorted(values.keys() - _FIELDS):
        raise Unprocessable(
            f"unknown recipe fields {unknown}: expected some of {sorted(_FIELDS | {'base_lr', 'preset'})}"
        )
    recipe = Recipe(**{**defaults, **values})
    if base_lr is not None:
        recipe = replace(recipe, lr=base_lr * recipe.batch_size / 256)
    _check_choices(recipe)
    return replace(
        recipe,
        warmup_epochs=min(recipe.warmup_epochs, recipe.epochs - 1),
        prompt_layers=_layers(recipe.prompt_layers),
        condense=Condense.parse(recipe.condense),
    )


def _check_choices(recipe: Recipe) -> None:
    for name, choices in _CHOICES.items():
        if (value := getattr(recipe, name)) not in choices:
            raise Unprocessable(f"unknown {name} {value!r}: expected {' or '.join(map(repr, choices))}")
    if recipe.pool not in (None, *TASK_POOLS):
        raise Unprocessable(f"unknown pool {recipe.pool!r}: expected {' or '.join(map(repr, TASK_POOLS))}")


def _layers(layers: Sequence[int] | None) -> tuple[int, int] | None:
    if layers is None:
        return None
    first, last = layers
    if not 0 <= first <= last:
        raise Unprocessable(f"prompt_layers: expected [first, last] with 0 <= first <= last, got {[first, last]}")
    return first, last
