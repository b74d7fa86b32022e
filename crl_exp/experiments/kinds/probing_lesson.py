"""What the probes of `experiment=probing` are to read, and how one layer's are fitted and judged.

Shapes: N items, D d_model, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from crl_exp.analysis import probes
from crl_exp.analysis.probes import Platt
from crl_exp.analysis.regression import Regression, fit, fit_two
from crl_exp.analysis.row_random import own_seed
from crl_exp.config.errors import UserError
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.steering.methods.baselines.options import right_options
from crl_exp.steering.methods.baselines.probe_steering import rewarded

SPLITS = ("train", "validation", "test")


class ProbeSettings(Protocol):
    """What `Probing` says of a layer's probes; see there."""

    penalties: list[float]
    control_draws: int
    bins: int
    calibration: str | None


@dataclass
class AtLayer:
    """What was found at one layer. validation: accuracy there, by which penalty and layer are
    chosen. answers: the class read for each item, by split. control, control_train: of each draw,
    accuracy on test and on train."""

    penalty: float
    validation: float
    figures: dict[str, float]
    answers: dict[str, list[int]]
    control: list[float]
    control_train: list[float]


@dataclass
class Lesson:
    """What the probes are to read. class_N: of each item by split, -1 where it has none. known:
    which have one."""

    class_N: dict[str, Tensor]
    known: dict[str, Tensor]
    n_classes: int

    @classmethod
    def of(cls, target: str, workspace: RunWorkspace) -> Lesson:
        """Raises `UserError` where there is nothing to tell apart."""
        options = workspace.exp.task.constrained_to or []
        classes = right_options if target == "option" else rewarded
        class_N = {split: classes(workspace, split) for split in SPLITS}
        known = {split: of_N >= 0 for split, of_N in class_N.items()}
        made = cls(class_N, known, len(options) if target == "option" else 2)
        for split in SPLITS:
            if not known[split].any():
                raise UserError(
                    f"experiment=probing: no item of {split} has one right option alone, so there "
                    "is nothing to read; set experiment.target=reward"
                )
        if len(made.classes("train").unique()) < 2:
            raise UserError(
                "experiment=probing: all training items are of one class, so there is nothing to "
                "tell apart; use a task of medium difficulty or more items (task.n_train=…)"
            )
        return made

    def classes(self, split: str) -> Tensor:
        """Of the items that have one."""
        return self.class_N[split][self.known[split]]

    def right(self, split: str, answer_N: list[int]) -> np.ndarray:
        """Whether each answer to an item with a class is that class."""
        answered_N = torch.tensor(answer_N)[self.known[split]]
        return (answered_N == self.classes(split)).double().numpy()

    def permuted(self, draws: int, seed: int) -> Iterator[Tensor]:
        """The training items' classes in another order, the same at every layer."""
        class_N = self.classes("train")
        for draw in range(draws):
            generator = torch.Generator().manual_seed(own_seed("permuted labels", seed, draw))
            yield class_N[torch.randperm(len(class_N), generator=generator)]

    @property
    def larger_class(self) -> float:
        """Share of the test items that are of the class which most training items are of: what is
        right without reading anything."""
        most = self.classes("train").bincount(minlength=self.n_classes).argmax()
        return share(self.classes("test") == most)


def fit_probes(
    x_ND: Tensor, class_N: Tensor, n_classes: int, penalties: list[float]
) -> dict[float, Regression]:
    """By the faster way where there are two classes: control draws are 19 fits a layer."""
    if n_classes == 2:
        return fit_two(x_ND, class_N, penalties)
    return fit(x_ND, class_N, n_classes, penalties)


def best_penalty(
    fitted: dict[float, Regression], asked_ND: Tensor, wanted_N: Tensor
) -> tuple[float, float]:
    """The penalty that does best on these items (the largest of equals), and its accuracy there."""
    right = {p: share(one.classes(asked_ND) == wanted_N) for p, one in fitted.items()}
    best = max(sorted(right, reverse=True), key=lambda p: right[p])
    return best, right[best]


def share(right_N: Tensor) -> float:
    return float(right_N.double().mean())


def at_layer(
    settings: ProbeSettings,
    lesson: Lesson,
    x: Mapping[str, Tensor],
    seed: int,
    check: Callable[[], None],
) -> AtLayer:
    """Fit, choose the penalty, and fit again to permuted labels.

    x: by split, residuals [N, D] of every item. check: called between fits; may end the run.
    """
    x_ND, class_N = x["train"][lesson.known["train"]], lesson.classes("train")
    fitted = fit_probes(x_ND, class_N, lesson.n_classes, settings.penalties)
    asked_ND, wanted_N = (
        x["validation"][lesson.known["validation"]],
        lesson.classes("validation"),
    )
    penalty, right = best_penalty(fitted, asked_ND, wanted_N)
    probe = fitted[penalty]
    test_ND, test_N = x["test"][lesson.known["test"]], lesson.classes("test")
    control, control_train = [], []
    for permuted_N in lesson.permuted(settings.control_draws, seed):
        check()
        null = fit_probes(x_ND, permuted_N, lesson.n_classes, [penalty])[penalty]
        control.append(share(null.classes(test_ND) == test_N))
        control_train.append(share(null.classes(x_ND) == permuted_N))
    scores = asked_ND, wanted_N, test_ND, test_N
    return AtLayer(
        penalty, right, _figures(settings, probe, *scores, seed=seed),
        {split: probe.classes(x[split]).tolist() for split in ("validation", "test")},
        control, control_train,
    )  # fmt: skip


def _figures(
    settings: ProbeSettings, probe: Regression, asked_ND: Tensor, wanted_N: Tensor,
    test_ND: Tensor, test_N: Tensor, seed: int,
) -> dict[str, float]:  # fmt: skip
    score_NC, class_N = probe.scores(test_ND).numpy(), test_N.numpy()
    prob_NC = probes.probabilities(score_NC)
    draws = own_seed("calibration null", seed, 0)
    null, null_high = probes.calibration_null(prob_NC, draws, settings.bins)
    found = {
        "accuracy": float((prob_NC.argmax(axis=1) == class_N).mean()),
        "auc": probes.auc(prob_NC, class_N),
        "brier": probes.brier(prob_NC, class_N),
        "ece": probes.calibration_error(prob_NC, class_N, settings.bins),
        "ece_null": null,
        "ece_null_high": null_high,
    }
    if settings.calibration == "platt":
        made: Platt = probes.platt(probe.scores(asked_ND).numpy(), wanted_N.numpy())
        held_NC = made.probabilities(score_NC)
        found["ece_platt"] = probes.calibration_error(held_NC, class_N, settings.bins)
        found["brier_platt"] = probes.brier(held_NC, class_N)
    return found
