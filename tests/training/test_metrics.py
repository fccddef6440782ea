"""What a fitted task is said to achieve, against figures worked out by hand and another library's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from server.training import metrics

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
TARGETS = np.array([0, 1, 1, 2])


def test_by_hand() -> None:
    found = metrics.split_figures(LOGITS, TARGETS)
    assert found["images"] == 4
    assert found["accuracy"] == 0.75
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found["per_class"] == [1.0, 0.5, 1.0]
    assert found["macro_accuracy"] == pytest.approx(2.5 / 3, abs=1e-6)
    assert found["nll"] == pytest.approx(-np.log([0.7, 0.3, 0.5, 0.8]).mean(), abs=1e-6)
    # four different bins: each row's |right − confidence|
    assert found["ece"] == pytest.approx((0.3 + 0.6 + 0.5 + 0.2) / 4, abs=1e-6)


def test_an_accuracy_has_wilson_s_interval() -> None:
    """On 54 pictures ± 13 points. The values are those of scipy.stats.binomtest(…).proportion_ci(method="wilson")."""
    assert metrics.interval(0.5, 54) == [0.3711, 0.6289]
    assert metrics.interval(0.75, 4) == [0.3006, 0.9544] == metrics.split_figures(LOGITS, TARGETS)["interval"]
    assert (metrics.interval(1.0, 54)[1], metrics.interval(0.0, 10)) == (1.0, [0.0, 0.2775])


def test_rows_of_one_bin_make_up_for_each_other() -> None:
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert metrics.calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0)
    assert metrics.calibration_error(logits, np.array([0, 0, 0, 0])) == pytest.approx(0.25)


def test_the_loss_is_torch_s() -> None:
    generator = np.random.default_rng(0)
    logits, targets = 5 * generator.normal(size=(200, 7)), generator.integers(0, 7, 200)
    theirs = F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)).item()
    assert metrics.nll(logits, targets) == pytest.approx(theirs, abs=1e-12)


def test_a_class_without_pictures_has_no_accuracy_and_no_part_in_the_mean() -> None:
    found = metrics.split_figures(LOGITS[:3], TARGETS[:3])
    assert found["per_class"] == [1.0, 0.5, None]
    assert found["macro_accuracy"] == 0.75


def test_many_classes_are_told_by_their_commonest_confusions() -> None:
    classes = 60
    logits = np.zeros((10, classes))
    logits[:, 7] = 1
    found = metrics.split_figures(logits, np.array([3] * 6 + [5] * 3 + [7]))
    assert "confusion" not in found
    assert found["confused"] == [[3, 7, 6], [5, 7, 3]]


@pytest.mark.parametrize("heat", [0.5, 1.0, 2.5])
def test_the_temperature_undoes_what_was_done_to_the_logits(heat: float) -> None:
    generator = np.random.default_rng(1)
    logits = 2 * generator.normal(size=(4000, 5))
    scores = np.exp(metrics.log_softmax(logits))
    targets = np.array([generator.choice(5, p=row / row.sum()) for row in scores])
    assert metrics.temperature(logits * heat, targets) == pytest.approx(heat, rel=0.1)
    warped = metrics.calibration_error(logits * heat, targets)
    mended = metrics.calibration_error(logits * heat / metrics.temperature(logits * heat, targets), targets)
    assert mended < 0.03
    assert mended < warped or heat == 1.0


def test_a_few_pictures_all_right_do_not_make_it_certain() -> None:
    logits = np.array([[2.0, 0.0]] * 5)
    assert 0.3 < metrics.temperature(logits, np.zeros(5, np.int64)) < 1
