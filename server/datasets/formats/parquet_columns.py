"""Which columns of a parquet file hold pictures and labels: by Hugging Face's features, or else by types and names.

pictures   a struct of bytes and path, or plain binary
labels     integers, with the names of Hugging Face's ClassLabel where there are such, or text
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from server.datasets.dataset import bad
from server.errors import BadRequest

from .member_names import shown

IMAGE_NAMES: Final = ("image", "img", "picture")
LABEL_NAMES: Final = ("label", "labels", "class", "category", "target")
MAX_SHOWN: Final = 20  # columns in a message


@dataclass(frozen=True, slots=True)
class Columns:
    """`nested`: a picture's bytes lie in a struct, beside a path that is never followed. `names` are of the labels'
    numbers; without them a label is called as it is written."""

    image: str
    nested: bool
    label: str
    names: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """What is to be read, as paths in the file's schema. A picture's path is not among them."""
        return (f"{self.image}.bytes" if self.nested else self.image), self.label


def columns_of(about: str, schema: pa.Schema) -> Columns:
    """Raises `BadRequest` bad_dataset that says what was expected and what the file has."""
    features = _features(schema.metadata or {})
    images = [field.name for field in schema if _is_image(field.type)]
    labels = [field.name for field in schema if _is_label(field.type)]
    image = _chosen([name for name in images if _kind(features, name) == "Image"] or images, IMAGE_NAMES)
    classes = [name for name in labels if _kind(features, name) == "ClassLabel"]
    label = _chosen(classes, LABEL_NAMES) if classes else _named(labels, LABEL_NAMES)
    if image is None or label is None:
        raise _unknown(about, schema, "image" if image is None else "label")
    nested = pa.types.is_struct(schema.field(image).type)
    names = _class_names(about, features[label]) if label in classes else ()
    return Columns(image, nested, label, names if pa.types.is_integer(schema.field(label).type) else ())


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    found = [kind.field(i) for i in range(kind.num_fields)]
    return [_is_binary(field.type) for field in found if field.name == "bytes"] == [True]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # what pandas calls a category
        return _is_text(kind.value_type)
    return bool(pa.types.is_integer(kind)) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _chosen(found: Collection[str], preferred: Collection[str]) -> str | None:
    """The only one, or the only one with a name that everybody gives it."""
    return next(iter(found)) if len(found) == 1 else _named(found, preferred)


def _named(found: Collection[str], names: Collection[str]) -> str | None:
    """The first of the names in their order of frequency, if it is there once."""
    return next((name for name in names if list(found).count(name) == 1), None)


def _unknown(about: str, schema: pa.Schema, what: str) -> BadRequest:
    expected = {
        "image": "one column of images (struct of bytes and path, or binary)",
        "label": "one column of labels (integers or text, a ClassLabel or called label)",
    }
    there = [f"{shown(field.name, 40)}: {shown(str(field.type), 60)}" for field in list(schema)[:MAX_SHOWN]]
    return bad(f"{about}: expected {expected[what]}, found {', '.join(there) or 'no columns'}")


# --- Hugging Face's features ------------------------------------------------------------------------------------------


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """column → what Hugging Face's library says of it; empty where it says nothing that can be read."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], name: str) -> object:
    feature = features.get(name)
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(about: str, feature: Mapping[str, Any]) -> tuple[str, ...]:
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise bad(f"{about}: expected a ClassLabel with a list of names, got {shown(json.dumps(names), 60)}")
    return tuple(names)
