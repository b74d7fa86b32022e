"""What a probe's predictions are worth: accuracy, AUC, calibration, and what chance would give.

Shapes: N items, C classes, R draws, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from crl_exp.config.errors import UserError

BINS = 10
NULL_DRAWS = 1000


def probabilities(score_NC: np.ndarray) -> np.ndarray:
    """Softmax of class scores [N, C]."""
    z_NC = score_NC - score_NC.max(axis=1, keepdims=True)
    share_NC = np.exp(z_NC)
    return share_NC / share_NC.sum(axis=1, keepdims=True)


def auc(prob_NC: np.ndarray, class_N: np.ndarray) -> float:
    """Area under the ROC curve: that an item of a class gets more of it than one that isn't, ties
    counting half. Of two classes that of the second; of more the mean over classes (one against the
    rest). NaN where all items are of one class."""
    n_classes = prob_NC.shape[1]
    asked = [1] if n_classes == 2 else range(n_classes)
    areas = [_area(prob_NC[:, c], class_N == c) for c in asked]
    there = [area for area in areas if not math.isnan(area)]
    return float(np.mean(there)) if there else math.nan


def _area(score_N: np.ndarray, of_it_N: np.ndarray) -> float:
    from scipy.stats import rankdata

    n_of, n_others = int(of_it_N.sum()), int((~of_it_N).sum())
    if not (n_of and n_others):
        return math.nan
    rank_N = rankdata(score_N)  # of equals the mean of their ranks
    return float((rank_N[of_it_N].sum() - n_of * (n_of + 1) / 2) / (n_of * n_others))


def brier(prob_NC: np.ndarray, class_N: np.ndarray) -> float:
    """½ Σ_c (p_c − 1[c is the class])², mean over items: (p − y)² where there are two classes."""
    right_NC = np.eye(prob_NC.shape[1])[class_N]
    return float(((prob_NC - right_NC) ** 2).sum(axis=1).mean() / 2)


def calibration_error(prob_NC: np.ndarray, class_N: np.ndarray, bins: int = BINS) -> float:
    """ECE of the top answer (Naeini et al. 2015; Guo et al., arXiv 1706.04599): over bins of equal
    width, the mean of |share right − mean probability|, each bin weighed by its items. A
    probability of 1 belongs to the last bin."""
    return float(_errors(prob_NC.max(axis=1), (prob_NC.argmax(axis=1) == class_N)[None], bins)[0])


def _errors(top_N: np.ndarray, right_RN: np.ndarray, bins: int) -> np.ndarray:
    """The calibration error of each row of outcomes [R]."""
    bin_N = np.minimum((top_N * bins).astype(int), bins - 1)
    in_NK = np.eye(bins)[bin_N]
    gap_RK = np.abs(right_RN.astype(float) @ in_NK - top_N @ in_NK)
    return gap_RK.sum(axis=1) / len(top_N)


def calibration_null(
    prob_NC: np.ndarray, seed: int, bins: int = BINS, draws: int = NULL_DRAWS
) -> tuple[float, float]:
    """The calibration error that a perfectly calibrated probe of these probabilities has with so
    many items: its mean and its 95 % quantile, by drawing outcomes from them (bias of the ECE:
    Roelofs et al., arXiv 2012.08668). An error below the second is no sign of miscalibration."""
    top_N = prob_NC.max(axis=1)
    random = np.random.default_rng(seed)
    right_RN = random.random((draws, len(top_N))) < top_N
    error_R = _errors(top_N, right_RN, bins)
    return float(error_R.mean()), float(np.quantile(error_R, 0.95))


@dataclass(frozen=True)
class Platt:
    """Scores made into probabilities that hold on other items: softmax(scale · score + shift).

    Platt 1999 for two classes; for more one scale alone (temperature, arXiv 1706.04599).
    """

    scale: float
    shift: float = 0.0

    def probabilities(self, score_NC: np.ndarray) -> np.ndarray:
        made_NC = self.scale * score_NC
        made_NC[:, -1] += self.shift
        return probabilities(made_NC)


def platt(score_NC: np.ndarray, class_N: np.ndarray) -> Platt:
    """Fitted to items that the probe wasn't fitted on, by least cross-entropy.

    Raises `UserError` where the fit doesn't end.
    """
    from scipy.optimize import minimize

    two = score_NC.shape[1] == 2
    items = np.arange(len(class_N))

    def loss(x: np.ndarray) -> float:
        made = Platt(math.exp(x[0]), x[1] if two else 0.0)
        prob_N = made.probabilities(score_NC)[items, class_N]
        # A very weak prior on the scale: of separable items the likelihood has no maximum.
        return float(-np.log(np.maximum(prob_N, 1e-300)).mean() + 1e-4 * x[0] ** 2)

    ended = minimize(loss, np.zeros(2 if two else 1), method="Nelder-Mead")
    if not np.isfinite(ended.fun):
        raise UserError("experiment.calibration: the fit on validation did not end; set it to null")
    return Platt(math.exp(ended.x[0]), float(ended.x[1]) if two else 0.0)


LEVEL = 0.05
FEWEST_DRAWS = 19
"""Below, no draw is rare enough to be called by chance in 5 of 100 cases."""


def chance_band(null_RL: np.ndarray) -> float:
    """What is exceeded without any signal, at any of L layers, in 5 of 100 cases: of R draws the
    ⌈.95 (R + 1)⌉-th smallest of their maxima over layers (Westfall & Young 1993; Phipson & Smyth
    2010: a permutation p-value is at least 1/(R + 1), so that there must be 19)."""
    worst_R = np.sort(null_RL.max(axis=1))
    return float(worst_R[math.ceil((1 - LEVEL) * (len(worst_R) + 1)) - 1])


def readable_from(by_layer: Mapping[int, float], band: float) -> int | None:
    """The first layer whose figure is above the band; None: nowhere."""
    return next((layer for layer, value in sorted(by_layer.items()) if value > band), None)
