"""The columns of a parquet file that hold pictures and labels, by Hugging Face's features, else by type and name.

pictures   a struct of bytes and path, or plain binary
labels     integers, with the names of Hugging Face's ClassLabel if there are any, or text
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from server.datasets.dataset import bad_dataset
from server.errors import BadRequest

from .member_names import printable

IMAGE_NAMES: Final = ("image", "img", "picture")
LABEL_NAMES: Final = ("label", "labels", "class", "category", "target")
MAX_SHOWN: Final = 20  # columns in a message


@dataclass(frozen=True, slots=True)
class Columns:
    """`nested`: a picture's bytes are in a struct, beside a path that is never followed. `names`: the label of each
    number; without them a value is its own label."""

    image: str
    nested: bool
    label: str
    names: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The columns to read, as paths in the file's schema: never a picture's path."""
        return (f"{self.image}.bytes" if self.nested else self.image), self.label


def columns_of(file: str, schema: pa.Schema, label_column: str | None = None) -> Columns:
    """The columns of pictures and labels; `label_column` is the latter's if given.

    Raises `BadRequest` bad_dataset that says what the file has instead, with `no_pictures` where it has no pictures.
    """
    features = _features(schema.metadata or {})
    images = [field.name for field in schema if _is_image(field.type)]
    labels = [field.name for field in schema if _is_label(field.type)]
    image = _choose([name for name in images if _kind(features, name) == "Image"] or images, IMAGE_NAMES)
    classes = [name for name in labels if _kind(features, name) == "ClassLabel"]
    if label_column is not None:
        label = _by_name(labels, [label_column])
    else:
        label = _choose(classes, LABEL_NAMES) if classes else _by_name(labels, LABEL_NAMES)
    if image is None:
        raise _no_column(file, schema, "one column of images (struct of bytes and path, or binary)", not images)
    if label is None:
        named = f"called {printable(label_column or 'label', 40)}"
        kind = "integers or text" if label_column else "integers or text, a ClassLabel or"
        raise _no_column(file, schema, f"one column of labels ({kind} {named})")
    nested = pa.types.is_struct(schema.field(image).type)
    return Columns(image, nested, label, class_names(file, schema, label))


def class_names(file: str, schema: pa.Schema, label: str) -> tuple[str, ...]:
    """The names of a ClassLabel's numbers; empty for any other column. Raises `BadRequest` bad_dataset."""
    features = _features(schema.metadata or {})
    if _kind(features, label) != "ClassLabel" or not pa.types.is_integer(schema.field(label).type):
        return ()
    names = features[label].get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad_dataset(f"{file}: expected a ClassLabel with a list of names, got {printable(json.dumps(names), 60)}")
    return tuple(names)


def plain_columns(schema: pa.Schema) -> list[str]:
    """The columns of integers or text, of which a table of labels consists."""
    return [field.name for field in schema if _is_label(field.type)]


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    fields = [kind.field(i) for i in range(kind.num_fields)]
    return [_is_binary(field.type) for field in fields if field.name == "bytes"] == [True]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a pandas category
        return _is_text(kind.value_type)
    return bool(pa.types.is_integer(kind)) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _choose(candidates: Collection[str], preferred: Collection[str]) -> str | None:
    """The only candidate, else the only one with a customary name."""
    return next(iter(candidates)) if len(candidates) == 1 else _by_name(candidates, preferred)


def _by_name(candidates: Collection[str], names: Collection[str]) -> str | None:
    """The first of `names`, most customary first, that exactly one column has."""
    return next((name for name in names if list(candidates).count(name) == 1), None)


def _no_column(file: str, schema: pa.Schema, expected: str, no_pictures: bool = False) -> BadRequest:
    columns = [f"{printable(field.name, 40)}: {printable(str(field.type), 60)}" for field in list(schema)[:MAX_SHOWN]]
    detail = f"{file}: expected {expected}, found {', '.join(columns) or 'no columns'}"
    return BadRequest(detail, code="bad_dataset", no_pictures=no_pictures)


# --- Hugging Face's features ------------------------------------------------------------------------------------------


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """column → its description by Hugging Face's library; empty where there is none that can be read."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], name: str) -> object:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None
