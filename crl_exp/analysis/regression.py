"""Logistic regression, in float64 and without a random number. Shapes: N items, D features,
C classes, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crl_exp.config.errors import UserError


@dataclass
class Regression:
    """Class scores x ↦ ((x − mean) / std) W + b. mean_D, std_D: of the items it was fitted on."""

    mean_D: Tensor
    std_D: Tensor
    W_DC: Tensor
    b_C: Tensor

    def scores(self, x_BD: Tensor) -> Tensor:
        """Log-probabilities [B, C] up to a constant a row."""
        x_BD = x_BD.to(self.W_DC.device, torch.float64)
        return ((x_BD - self.mean_D) / self.std_D) @ self.W_DC + self.b_C

    def classes(self, x_BD: Tensor) -> Tensor:
        """The likeliest class [B]; of equals the first."""
        return self.scores(x_BD).argmax(dim=1)

    @property
    def direction_CD(self) -> Tensor:
        """Gradient of each class's score by the residual, minus the mean of all classes'."""
        raw_CD = (self.W_DC / self.std_D[:, None]).T
        return raw_CD - raw_CD.mean(dim=0)

    def to(self, device: torch.device) -> Regression:
        return Regression(*(t.to(device) for t in vars(self).values()))


def fit(
    x_ND: Tensor, class_N: Tensor, n_classes: int, penalties: Sequence[float]
) -> dict[float, Regression]:
    """Softmax regression on standardised x by L-BFGS, one for each penalty.

    Minimises the mean cross-entropy plus penalty/2 · ‖W‖² (b is free): a mean, so that a penalty
    is as strong whatever N is. Two classes: logistic regression, with sklearn's
    C = 2 / (N · penalty). A dimension that never changes is left as it is, and takes no part.
    Raises `UserError` where a fit doesn't end.
    """
    mean_D, std_D, constant_D, z_ND = _standardised(x_ND)
    problem = _Problem(z_ND.numpy(), class_N.cpu().numpy(), n_classes)
    found, start = {}, np.zeros((z_ND.shape[1] + 1) * n_classes)
    for penalty in sorted(penalties, reverse=True):  # each begins where a stronger one ended
        start = problem.minimise(penalty, start)
        weights = torch.from_numpy(start.reshape(-1, n_classes).copy())
        W_DC = weights[:-1].masked_fill(constant_D[:, None], 0.0)
        found[penalty] = Regression(mean_D, std_D, W_DC, weights[-1])
    return found


def fit_two(x_ND: Tensor, class_N: Tensor, penalties: Sequence[float]) -> dict[float, Regression]:
    """What `fit` gives for two classes, several times as fast for some hundred dimensions.

    By Newton's method with halved steps (iteratively reweighted least squares). The two classes'
    weights are opposite at the optimum, so that one vector v = w_1 - w_0 is sought, with
    penalty/4 · ‖v‖². Raises `UserError` where a fit doesn't end.
    """
    mean_D, std_D, constant_D, z_ND = _standardised(x_ND)
    z_NX = np.concatenate([z_ND.numpy(), np.ones((len(z_ND), 1))], axis=1)
    sign_N = 2.0 * class_N.cpu().numpy() - 1
    found, v_X = {}, np.zeros(z_NX.shape[1])
    for penalty in sorted(penalties, reverse=True):
        v_X = _newton(z_NX, sign_N, penalty, v_X)
        half_X = torch.from_numpy(v_X / 2)
        weights = torch.stack([-half_X, half_X], dim=1)
        W_DC = weights[:-1].masked_fill(constant_D[:, None], 0.0)
        found[penalty] = Regression(mean_D, std_D, W_DC, weights[-1])
    return found


def _newton(z_NX: np.ndarray, sign_N: np.ndarray, penalty: float, v_X: np.ndarray) -> np.ndarray:
    """Minimises mean log(1 + exp(-sign · z v)) + penalty/4 · ‖v‖², the intercept free."""
    n, ridge_X = len(z_NX), np.full(z_NX.shape[1], penalty / 2)
    ridge_X[-1] = 0.0

    def loss(v_X: np.ndarray) -> float:
        return float(np.logaddexp(0, -sign_N * (z_NX @ v_X)).mean() + ridge_X @ v_X**2 / 2)

    now = loss(v_X)
    for _ in range(100):
        share_N = 1 / (1 + np.exp(sign_N * (z_NX @ v_X)))  # of the other class
        slope_X = -(z_NX.T @ (sign_N * share_N)) / n + ridge_X * v_X
        if np.abs(slope_X).max() < 1e-9:
            return v_X
        root_NX = z_NX * np.sqrt(share_N * (1 - share_N) / n)[:, None]
        curve_XX = root_NX.T @ root_NX
        # The intercept alone has no penalty: where all items are sure, nothing else curves it.
        curve_XX[np.diag_indices_from(curve_XX)] += np.maximum(ridge_X, 1e-12)
        step_X, size = np.linalg.solve(curve_XX, slope_X), 1.0
        while (ahead := loss(v_X - size * step_X)) > now and size > 1e-6:
            size /= 2
        if size <= 1e-6:  # rounding is all that is left
            return v_X
        v_X, now = v_X - size * step_X, ahead
    raise UserError(f"penalties: the regression with penalty {penalty} did not end; leave it out")


def _standardised(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and deviation [D], which dimensions never change [D], and x by them, 0 there [N, D]."""
    x_ND = x_ND.double().cpu()
    mean_D, std_D = x_ND.mean(dim=0), x_ND.std(dim=0, correction=0)
    # A constant in floating point has a deviation of rounding's size, which must not be blown up.
    constant_D = std_D <= 1e-7 * x_ND.abs().amax(dim=0)
    std_D = torch.where(constant_D, 1.0, std_D)
    return mean_D, std_D, constant_D, ((x_ND - mean_D) / std_D).masked_fill(constant_D, 0.0)


class _Problem:
    """The loss of standardised items and its gradient."""

    def __init__(self, z_ND: np.ndarray, class_N: np.ndarray, n_classes: int):
        self.z_NX = np.concatenate([z_ND, np.ones((len(z_ND), 1))], axis=1)
        self.onehot_NC = np.eye(n_classes)[class_N]

    def loss(self, flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
        w_XC = flat.reshape(-1, self.onehot_NC.shape[1])
        score_NC = self.z_NX @ w_XC
        score_NC -= score_NC.max(axis=1, keepdims=True)
        log_sum_N = np.log(np.exp(score_NC).sum(axis=1))
        inside_XC = w_XC.copy()
        inside_XC[-1] = 0  # the intercepts
        entropy = float((log_sum_N - (score_NC * self.onehot_NC).sum(axis=1)).mean())
        share_NC = np.exp(score_NC - log_sum_N[:, None])
        slope_XC = self.z_NX.T @ (share_NC - self.onehot_NC) / len(share_NC)
        slope_XC += penalty * inside_XC
        return entropy + penalty / 2 * float((inside_XC**2).sum()), slope_XC.ravel()

    def minimise(self, penalty: float, start: np.ndarray) -> np.ndarray:
        from scipy.optimize import minimize

        options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 20}
        ended = minimize(
            self.loss, start, args=(penalty,), jac=True, method="L-BFGS-B", options=options
        )
        if not ended.success:
            raise UserError(
                f"method.penalties: the regression with penalty {penalty} did not end "
                f"({ended.message}); leave it out"
            )
        return ended.x
