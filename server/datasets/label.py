"""Labels: kept exactly as they are written. Only what no version of a task could hold is refused.

Labels that look alike (in Unicode form, case, blanks or invisible characters) stay different classes, of which the
report warns. `look` is the project's only normalisation, and it never becomes a label.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Final

from server.errors import BadRequest

MAX_LABEL: Final = 200

_REFUSED: Final = {"Cc", "Cs", "Zl", "Zp"}  # as in a bundle's manifest: controls, surrogates, separators
_INVISIBLE: Final = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}


def label_of(text: str) -> str:
    """The text unchanged, as a label. Raises `BadRequest` bad_dataset for what cannot be one."""
    if all(unicodedata.category(letter) in _INVISIBLE for letter in text):
        raise _bad(f"class {_shown(text)} has a name without any letter")
    if len(text) > MAX_LABEL:
        raise _bad(f"class {_shown(text)} has {len(text)} characters; at most {MAX_LABEL} are allowed")
    if refused := [letter for letter in text if unicodedata.category(letter) in _REFUSED]:
        character = f"the control character U+{ord(refused[0]):04X}"
        raise _bad(f"class {_shown(text)} has {character} in its name; rename it")
    return text


def look(label: str) -> str:
    """What a reader sees of a label: NFC, without invisible characters, single blanks inside and none at the ends."""
    visible = (letter for letter in unicodedata.normalize("NFC", label) if unicodedata.category(letter) != "Cf")
    return " ".join("".join(visible).split())


def known_label(label: str, known: Collection[str]) -> str | None:
    """The known label that is meant: the same one, else the only one that looks the same."""
    if label in known:
        return label
    alike = [other for other in known if look(other) == look(label)]
    return alike[0] if len(alike) == 1 else None


def similar_labels(labels: Iterable[str]) -> list[list[str]]:
    """The groups of labels that look the same but for their case."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[look(label).casefold()].append(label)
    return [group for group in groups.values() if len(group) > 1]


def _shown(text: str) -> str:
    return repr(text[:40]) + ("…" if len(text) > 40 else "")


def _bad(detail: str) -> BadRequest:
    return BadRequest(detail, code="bad_dataset")
