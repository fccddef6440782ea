"""The names of splits as people spell them: train, Training, training_set, val_dir, test2017, seg_train.

A name is taken for a split where nothing else is in it (`split_of`), or where folders side by side differ in their
splits only (`splits_among`): seg_train and seg_test are splits, bullet_train beside taxi is not.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Final

from server.datasets.example import Split

ALIASES: Final[dict[str, Split]] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}

_DECORATION: Final = {
    "data", "dataset", "dir", "directory", "examples", "files", "folder", "image", "images", "img", "imgs", "photos",
    "pics", "pictures", "samples", "set", "split", "subset",
}  # fmt: skip
_UNLABELLED: Final = {"pred", "predict", "prediction", "unlabeled", "unlabelled"}  # beside splits: not for training
_WORD: Final = re.compile(r"[^\W\d_]+")
_HUMP: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")
_GLUED: Final = re.compile(rf"\b({'|'.join(ALIASES)})({'|'.join(_DECORATION)})\b")  # trainset, testimages


def split_of(name: str) -> Split | None:
    """The split that a name means by itself; None for any other name."""
    split, rest = _parsed(name)
    return split if not rest else None


def splits_among(names: Collection[str]) -> dict[str, Split | None]:
    """The folders among `names` that are splits. None: pictures without labels, as in seg_pred beside seg_train."""
    parsed = {name: _parsed(name) for name in names}
    kinds: dict[tuple[str, ...], set[Split]] = defaultdict(set)
    for split, rest in parsed.values():
        if split is not None:
            kinds[rest].add(split)
    families = {rest for rest, splits in kinds.items() if not rest or len(splits) > 1}
    found: dict[str, Split | None] = {
        name: split for name, (split, rest) in parsed.items() if split is not None and rest in families
    }
    if found:
        found |= {name: None for name in names if name not in found and _without(name, _UNLABELLED) in families}
    return found


def is_wrapper(name: str) -> bool:
    """Whether a name says nothing but that there are pictures: images, data, Dataset."""
    words = _words(name)
    return bool(words) and all(word in _DECORATION for word in words)


def _parsed(name: str) -> tuple[Split | None, tuple[str, ...]]:
    """The split in a name, with the words beside it; None unless exactly one word is a split."""
    splits = [ALIASES[word] for word in _words(name) if word in ALIASES]
    return (splits[0], _without(name, ALIASES) or ()) if len(splits) == 1 else (None, ())


def _without(name: str, words: Collection[str]) -> tuple[str, ...] | None:
    """The words of a name without these and without decoration; None where it has none of these."""
    all_words = _words(name)
    if not any(word in words for word in all_words):
        return None
    return tuple(word for word in all_words if word not in words and word not in _DECORATION)


def _words(name: str) -> list[str]:
    words = _GLUED.sub(r" \1 \2 ", _HUMP.sub(" ", name).casefold())
    return _WORD.findall(words)
