"""The manifest: a bundle's metadata as canonical JSON, with every check on it.

Untrusted manifests and those of our own trainer pass the same checks, all in `from_json`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

from prompts_store import names, strict_json
from prompts_store.errors import BundleError, excerpt

FORMAT: Final = 1
MAX_MANIFEST_BYTES: Final = 2**20
MAX_LABELS: Final = 10_000
MAX_LABEL_CHARS: Final = 200
MAX_LAYERS: Final = 256
MAX_PROMPTS: Final = 1000
MAX_IMAGE_SIZE: Final = 4096
_FAR_FUTURE: Final = 1e11  # seconds: the year 5138; beyond it a clock is broken or the unit is wrong
_OPTIONAL: Final = {"pool"}  # not written where it is None: bundles that are older than the field keep their bytes
_UNPRINTABLE: Final = {"Cc", "Cs", "Zl", "Zp"}  # controls, surrogates, line and paragraph separators

Interpolation = Literal["bilinear", "bicubic", "lanczos", "nearest"]
CropMode = Literal["center", "squash", "border"]
Pool = Literal["cls", "image", "image_and_prompts"]


@dataclass(frozen=True)
class Backbone:
    """The network a bundle was fitted on. `fingerprint`: sha256 hex over architecture name and weights."""

    arch: str
    fingerprint: str


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes [size, size, 3] and is normalised: (pixel / 255 - mean) / std, per channel."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    crop_pct: float
    crop_mode: CropMode


@dataclass(frozen=True)
class Manifest:
    """The metadata of a bundle.

    `labels[i]` names logit i. `prompt_lengths[l]` is the number of prompts of layer l; 0 is allowed.
    `created_at` is in seconds since the Unix epoch; `parent` is the version this one was fitted from.
    `pool` says which tokens the head reads; None, which is not written, means the backbone's own pooling.
    """

    task: str
    method: str
    backbone: Backbone
    labels: tuple[str, ...]
    prompt_lengths: tuple[int, ...]
    preprocess: Preprocess
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    dataset: str | None
    parent: str | None
    created_at: float
    lensrack_version: str
    format: int = FORMAT
    pool: Pool | None = None

    def to_json(self) -> str:
        """Return canonical JSON: sorted keys, no spaces, no NaN. Raises BundleError for what JSON cannot hold."""
        content = {name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value is not None}
        return strict_json.dumps(content, "manifest")

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read and check a manifest. Raises BundleError, which names the field, the expected and the actual value."""
        size = len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        if size > MAX_MANIFEST_BYTES:
            raise BundleError(f"manifest: expected at most {MAX_MANIFEST_BYTES} bytes of JSON, got {size}")
        return cls(**_object(strict_json.loads(text, "manifest"), "manifest", _MANIFEST, cls))


# --- checks: each takes a value and the name of its field, and returns the value in its Python type -------------------

_Check = Callable[[Any, str], Any]


def _refuse(where: str, expected: str, got: object) -> BundleError:
    return BundleError(f"{where}: expected {expected}, got {excerpt(got)}")


def _object(value: Any, where: str, checks: dict[str, _Check], cls: type) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(where, "an object", value)
    present = [field.name for field in fields(cls) if field.name not in _OPTIONAL or field.name in value]
    if missing := [name for name in present if name not in value]:
        raise BundleError(f"{where}: expected the field {missing[0]!r}, got none")
    if unknown := [name for name in value if name not in checks]:
        raise BundleError(f"{where}: expected only the fields {', '.join(present)}, got {excerpt(unknown[0])}")
    return {name: checks[name](value[name], f"{where}: {name}") for name in present}


def _matching(pattern: re.Pattern[str], meaning: str) -> _Check:
    def check(value: Any, where: str) -> str:
        if not (isinstance(value, str) and pattern.fullmatch(value)):
            raise _refuse(where, f"{meaning} ({pattern.pattern})", value)
        return value

    return check


def _printable(most: int) -> _Check:
    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= most:
            raise _refuse(where, f"text of 1 to {most} characters", value)
        if any(unicodedata.category(char) in _UNPRINTABLE for char in value):
            raise _refuse(where, "text without control characters", value)
        return value

    return check


def _one_of(choices: Iterable[str]) -> _Check:
    allowed = tuple(choices)

    def check(value: Any, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _refuse(where, f"one of {', '.join(allowed)}", value)
        return value

    return check


def _integer(least: int, most: int) -> _Check:
    def check(value: Any, where: str) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _refuse(where, f"an integer from {least} to {most}", value)
        return value

    return check


def _number(above: float, most: float) -> _Check:
    def check(value: Any, where: str) -> float:
        if type(value) not in (int, float) or not above < value <= most:
            raise _refuse(where, f"a number above {above:g} and at most {most:g}", value)
        return float(value)

    return check


def _items(item: _Check, least: int, most: int, what: str) -> _Check:
    def check(value: Any, where: str) -> tuple[Any, ...]:
        count = f"{least}" if least == most else f"{least} to {most}"
        if not isinstance(value, list):
            raise _refuse(where, f"a list of {count} {what}", value)
        if not least <= len(value) <= most:
            raise BundleError(f"{where}: expected {count} {what}, got {len(value)}")
        return tuple(item(entry, f"{where}[{index}]") for index, entry in enumerate(value))

    return check


def _labels(value: Any, where: str) -> tuple[str, ...]:
    labels: tuple[str, ...] = _items(_printable(MAX_LABEL_CHARS), 1, MAX_LABELS, "labels")(value, where)
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            raise _refuse(where, "unique labels", f"{label} twice")
        seen.add(label)
    return labels


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refuse(where, "an object", value)
    return value


def _optional(check: _Check) -> _Check:
    return lambda value, where: None if value is None else check(value, where)


_BACKBONE: Final[dict[str, _Check]] = {
    "arch": _printable(200),
    "fingerprint": _matching(names.VERSION, "a sha256 in hex"),
}
_PREPROCESS: Final[dict[str, _Check]] = {
    "size": _integer(1, MAX_IMAGE_SIZE),
    "mean": _items(_number(-1000, 1000), 3, 3, "numbers"),
    "std": _items(_number(0, 1000), 3, 3, "numbers"),
    "interpolation": _one_of(get_args(Interpolation)),
    "crop_pct": _number(0, 1),
    "crop_mode": _one_of(get_args(CropMode)),
}
_MANIFEST: Final[dict[str, _Check]] = {
    "task": _matching(names.TASK, "a task name"),
    "method": _matching(names.METHOD, "a method name"),
    "backbone": lambda value, where: Backbone(**_object(value, where, _BACKBONE, Backbone)),
    "labels": _labels,
    "prompt_lengths": _items(_integer(0, MAX_PROMPTS), 1, MAX_LAYERS, "layers"),
    "preprocess": lambda value, where: Preprocess(**_object(value, where, _PREPROCESS, Preprocess)),
    "metrics": _mapping,
    "recipe": _mapping,
    "dataset": _optional(_printable(200)),
    "parent": _optional(_matching(names.VERSION, "a version")),
    "created_at": _number(-1, _FAR_FUTURE),
    "lensrack_version": _printable(64),
    "format": _integer(FORMAT, FORMAT),
    "pool": _one_of(get_args(Pool)),
}
