"""What the text of a task names, and what comes of logits."""

from __future__ import annotations

import numpy as np
import pytest

from server.errors import BadRequest
from server.serving.answers import best, probabilities
from server.serving.resolver import Ref


def test_best_breaks_ties_by_index_and_survives_large_logits():
    ranked = best(probabilities(np.array([5.0, 1e4, 1e4, -1e4], np.float32)), "abcd", 3)
    assert [(one.label, one.index) for one in ranked] == [("b", 1), ("c", 2), ("a", 0)]
    assert ranked[0].score == pytest.approx(0.5)
    assert ranked[2].score == 0.0


def test_references_are_read_strictly():
    assert Ref.parse("fish") == Ref("fish", "live")
    assert Ref.parse("fish@v@w") == Ref("fish", "v@w")


@pytest.mark.parametrize("text", ["fish@live+", "fish@+live", "fish@live++live", "fish+bird", "fish@ "])
def test_an_ensemble_is_read_strictly(text: str):
    with pytest.raises(BadRequest) as caught:
        Ref.parse_all(text)
    assert caught.value.code == "bad_task_name"


def test_where_one_version_is_wanted_an_ensemble_is_refused():
    with pytest.raises(BadRequest):
        Ref.parse("fish@live+candidate")
