"""What a probe's predictions are worth, by hand; and that noise is called readable in 5 of 100."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crl_exp.analysis import probes


def two_classes(*of_the_second: float) -> np.ndarray:
    return np.array([[1 - p, p] for p in of_the_second])


def test_a_calibration_error_is_of_the_top_answer():
    """Of the positive class it would be .50."""
    error = probes.calibration_error(two_classes(0.22, 0.78), np.array([0, 0]))
    assert error == pytest.approx(0.28)


def test_a_probability_of_one_belongs_to_the_last_bin():
    error = probes.calibration_error(two_classes(0.95, 1.0), np.array([1, 0]))
    assert error == pytest.approx(0.475)
    assert probes.calibration_error(two_classes(0.0), np.array([0])) == 0


@pytest.mark.parametrize(("n", "mean", "high"), [(100, 0.099, 0.138), (1500, 0.026, 0.037)])
def test_a_perfectly_calibrated_probe_has_a_calibration_error(n, mean, high):
    """Of top answers spread evenly from .5 to 1; figures of arXiv 2012.08668's kind, simulated."""
    draw = np.random.default_rng(0)
    prob_NC = two_classes(*draw.random(n))
    null, null_high = probes.calibration_null(prob_NC, seed=1)
    errors = []
    for _ in range(300):
        class_N = (draw.random(n) < prob_NC[:, 1]).astype(int)
        errors.append(probes.calibration_error(prob_NC, class_N))
    assert null == pytest.approx(np.mean(errors), rel=0.1)
    assert np.mean(np.array(errors) > null_high) == pytest.approx(0.05, abs=0.035)
    # Ten bins over [0, 1] hold a top answer of two classes in five of them alone.
    assert null < mean and null_high < high


def test_areas_by_hand():
    prob_NC = two_classes(0.1, 0.4, 0.35, 0.8)
    assert probes.auc(prob_NC, np.array([0, 0, 1, 1])) == pytest.approx(0.75)
    assert probes.auc(prob_NC, np.array([1, 1, 0, 0])) == pytest.approx(0.25)
    assert probes.auc(two_classes(0.5, 0.5, 0.5), np.array([0, 1, 1])) == 0.5, "ties count half"
    assert math.isnan(probes.auc(prob_NC, np.array([1, 1, 1, 1]))), "one class has none"


def test_the_area_is_that_of_another_implementation():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    prob_NC = probes.probabilities(draw.normal(size=(60, 3)).round(1))
    class_N = draw.integers(0, 3, 60)
    other = metrics.roc_auc_score(class_N, prob_NC, multi_class="ovr", average="macro")
    assert probes.auc(prob_NC, class_N) == pytest.approx(other)


def test_brier_is_the_squared_error_of_the_second_class():
    assert probes.brier(two_classes(0.3, 0.9), np.array([0, 1])) == pytest.approx(0.05)
    assert probes.brier(np.array([[1.0, 0, 0]]), np.array([2])) == 1.0


def test_platt_gives_probabilities_that_hold():
    """Scores three times too sure, and shifted."""
    draw = np.random.default_rng(0)
    logit_N = draw.normal(size=4000)
    class_N = (draw.random(4000) < 1 / (1 + np.exp(-logit_N))).astype(int)
    score_NC = np.stack([np.zeros(4000), 3 * (logit_N + 0.5)], axis=1)
    made = probes.platt(score_NC[:2000], class_N[:2000])
    assert made.scale == pytest.approx(1 / 3, rel=0.15)
    assert made.shift == pytest.approx(-0.5, abs=0.15)
    before, after = (
        probes.calibration_error(prob_NC, class_N[2000:])
        for prob_NC in (
            probes.probabilities(score_NC[2000:]),
            made.probabilities(score_NC[2000:]),
        )
    )
    assert after < 0.05 < before


def test_platt_changes_nothing_that_it_was_given():
    score_NC = np.array([[0.0, 1.0], [0.0, -1.0]])
    made = probes.Platt(1.0, 5.0)
    made.probabilities(score_NC)
    assert score_NC.tolist() == [[0.0, 1.0], [0.0, -1.0]]


def test_platt_of_separable_scores_ends():
    made = probes.platt(np.array([[0.0, 9.0], [0.0, -9.0]]), np.array([1, 0]))
    assert np.isfinite([made.scale, made.shift]).all()


@pytest.mark.parametrize("draws", [19, 39])
def test_noise_is_called_readable_in_five_of_a_hundred(draws):
    """30 layers whose accuracies go together, as those of neighbours do, without any signal."""
    draw = np.random.default_rng(0)
    cholesky = np.linalg.cholesky(0.7 ** np.abs(np.subtract.outer(range(30), range(30))))
    said = 0
    for _ in range(1000):
        value_RL = 0.5 + 0.02 * (draw.normal(size=(draws + 1, 30)) @ cholesky.T)
        band = probes.chance_band(value_RL[1:])
        said += probes.readable_from(dict(enumerate(value_RL[0])), band) is not None
    assert said / 1000 == pytest.approx(0.05, abs=0.021)


def test_by_its_own_band_a_layer_is_readable_by_chance():
    """What `chance_band` is for: the maximum over layers is left out, and half the runs say so."""
    draw = np.random.default_rng(0)
    said = 0
    for _ in range(200):
        value_RL = draw.normal(size=(40, 30))
        own_L = np.quantile(value_RL[1:], 0.975, axis=0)
        said += bool((value_RL[0] > own_L).any())
    assert said / 200 > 0.3


def test_readable_from_is_the_lowest_layer_above_the_band():
    by_layer = {10: 0.8, 2: 0.5, -1: 0.5, 5: 0.7}
    assert probes.readable_from(by_layer, 0.6) == 5
    assert probes.readable_from(by_layer, 0.9) is None
