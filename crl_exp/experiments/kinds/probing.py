"""Probing: what a linear probe reads off the residual, layer by layer, and what chance reads.

Nothing is steered. Shapes: N items, D d_model, C classes, R draws, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from crl_exp.analysis import probes
from crl_exp.analysis.probes import FEWEST_DRAWS
from crl_exp.analysis.statistics import compare, share_interval
from crl_exp.analysis.winners_curse import warnings
from crl_exp.config.errors import did_you_mean
from crl_exp.experiments.base import ExperimentKind
from crl_exp.experiments.kinds.probing_lesson import (
    SPLITS,
    AtLayer,
    Lesson,
    at_layer,
    best_penalty,
    fit_probes,
)
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.runs import preemption
from crl_exp.runs.items import ItemTexts, items_table, write_items
from crl_exp.runs.preemption import CheckpointTimer
from crl_exp.runs.result import Figure, Result, Series
from crl_exp.steering.methods.baselines.probe import all_last_residuals
from crl_exp.steering.workspace import SteeringConfig

TARGETS = ("option", "reward")
INPUT = -1
"""The site before layer 0."""
PROBE, ON_VALIDATION = "probe", "probe_on_validation"
CONTROL, CAPACITY = "permuted_labels", "permuted_labels_train"
"""Series: of the probe; of probes of permuted labels, on test and on what they were fitted to."""


@dataclass
class Probing(ExperimentKind):
    """At each layer a logistic regression on the last prompt token's residual (Alain & Bengio,
    arXiv 1610.01644), and the same with the training labels permuted (control tasks: Hewitt &
    Liang, arXiv 1909.03368).

    A layer is called readable where the test accuracy is above what permuted labels reach at any
    layer in 95 of 100 draws, so that of noise "readable" is said in 5 runs of 100, however many
    layers there are. The best layer is chosen on validation. Site -1 is the input of layer 0.

    target: what is read; option, the item's right option, or reward, whether the unsteered model's
        answer is rewarded (from .5 up).
    penalties: L2 penalties of the weights on standardised residuals, beside the mean cross-entropy;
        the one that does best on validation is taken (the largest of equals).
    control_draws: permutations of the labels, each for all layers together, with the probe's own
        penalty; 19 or more.
    bins: of the calibration error, over the probability of the top answer.
    calibration: platt, scores are also made into probabilities on validation; null, they aren't.
    input_site: look at the input of layer 0 too.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"model", "task", "layers", "engine"})
    label: ClassVar[str | None] = "linear probe by layer"

    target: str
    penalties: list[float]
    control_draws: int
    bins: int
    calibration: str | None
    input_site: bool

    def needs(self, exp: SteeringConfig) -> frozenset[str]:
        return frozenset({"layers"})

    def faults(self) -> list[str]:
        found = []
        if self.target not in TARGETS:
            near = did_you_mean(self.target, TARGETS)
            found.append(
                f"experiment.target={self.target}: must be one of {', '.join(TARGETS)}{near}"
            )
        if not self.penalties or not all(penalty > 0 for penalty in self.penalties):
            found.append(f"experiment.penalties={self.penalties}: must be positive numbers")
        if not FEWEST_DRAWS <= self.control_draws <= 10_000:
            found.append(
                f"experiment.control_draws={self.control_draws}: must be {FEWEST_DRAWS} or more "
                "(with fewer nothing is rare enough to be above chance), at most 10000"
            )
        if not 2 <= self.bins <= 1000:
            found.append(f"experiment.bins={self.bins}: must be from 2 to 1000")
        if self.calibration not in ("platt", None):
            found.append(f"experiment.calibration={self.calibration}: must be platt or null")
        return found

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        if self.target == "option" and not exp.task.constrained_to:
            return [
                f"experiment=probing reads which option is right, and {exp.task.why_no_options()}; "
                "set experiment.target=reward, whether the unsteered answer is rewarded"
            ]
        return []

    def run(self, workspace: RunWorkspace) -> Result:
        with workspace.timed("train"):
            lesson = Lesson.of(self.target, workspace)
            by_layer = self._probes(workspace, lesson)
        with workspace.timed("evaluate"):
            return self._result(workspace, lesson, by_layer)

    def _probes(self, workspace: RunWorkspace, lesson: Lesson) -> dict[int, AtLayer]:
        """Layer by layer, saved as they come."""
        layers = [INPUT] * self.input_site + list(workspace.layers)
        checkpoint = workspace.run.checkpoint()
        pace = CheckpointTimer(workspace.exp.checkpoint)
        kept = (checkpoint.load() or {}).get("by_layer", {})
        found = {layer: AtLayer(**one) for layer, one in kept.items()}

        def save() -> None:
            checkpoint.save({"by_layer": {layer: asdict(one) for layer, one in found.items()}})

        def check() -> None:
            if preemption.asked():
                save()  # what other layers have told isn't asked again
            preemption.check()

        todo = [layer for layer in layers if layer not in found]
        with workspace.bar("probing layers", len(layers), len(layers) - len(todo)) as advance:
            for layer in todo:
                found[layer] = self._at(workspace, lesson, layer, check)
                advance(1)
                pace.after_step(save)
        if pace.unsaved:
            save()
        return {layer: found[layer] for layer in layers}

    def _at(
        self, workspace: RunWorkspace, lesson: Lesson, layer: int, check: Callable[[], None]
    ) -> AtLayer:
        x = {split: all_last_residuals(workspace, split, [layer]) for split in SPLITS}
        return at_layer(self, lesson, x, workspace.exp.seed, check)

    def _result(
        self, workspace: RunWorkspace, lesson: Lesson, by_layer: dict[int, AtLayer]
    ) -> Result:
        best = max(by_layer, key=lambda layer: by_layer[layer].validation)
        kept, n = by_layer[best], len(lesson.classes("test"))
        for one in by_layer.values():
            right_N = lesson.right("validation", one.answers["validation"])
            workspace.tried.add(right_N, "layers of the probe")
        for few in warnings(workspace.tried.choices()):
            workspace.warn(few)
        band = probes.chance_band(np.array([one.control for one in by_layer.values()]).T)
        accuracy = {layer: one.figures["accuracy"] for layer, one in by_layer.items()}
        first = probes.readable_from(accuracy, band)
        figures = {
            "validation/accuracy": _wilson(kept.validation, len(lesson.classes("validation"))),
            **{
                name: _wilson(value, n) if name == "accuracy" else Figure(value, n=n)
                for name, value in kept.figures.items()
            },
            "best_layer": Figure(best),
            "readable_from": Figure(first),
            "chance_band": Figure(band, n=n),
            "larger_class": Figure(lesson.larger_class, n=n),
            **self._of_length(workspace, lesson),
        }
        more = self._answers(workspace, kept) if self.target == "option" else {}
        return Result(
            self.name, "validation/accuracy", figures, self._series(by_layer, lesson),
            [_readable(first, band, self.control_draws, len(by_layer)), _best(best, kept, n)], more,
        )  # fmt: skip

    def _of_length(self, workspace: RunWorkspace, lesson: Lesson) -> dict[str, Figure]:
        """The cheapest explanation, which every residual that knows its position holds: a probe of
        the prompt's number of tokens alone."""
        x_N1 = {
            split: torch.tensor([[float(len(ids))] for ids in workspace.prompt_ids(split)])
            for split in SPLITS
        }
        known = {split: x_N1[split][lesson.known[split]] for split in SPLITS}
        fitted = fit_probes(
            known["train"], lesson.classes("train"), lesson.n_classes, self.penalties
        )
        penalty, _ = best_penalty(fitted, known["validation"], lesson.classes("validation"))
        prob_NC = probes.probabilities(fitted[penalty].scores(known["test"]).numpy())
        asked_N, n = lesson.classes("test").numpy(), len(lesson.classes("test"))
        right = float((prob_NC.argmax(axis=1) == asked_N).mean())
        return {
            "prompt_length/accuracy": _wilson(right, n),
            "prompt_length/auc": Figure(probes.auc(prob_NC, asked_N), n=n),
        }

    def _series(self, by_layer: dict[int, AtLayer], lesson: Lesson) -> list[Series]:
        n, n_validation, n_train = (
            len(lesson.classes(split)) for split in ("test", "validation", "train")
        )
        chance = {"reference": lesson.larger_class, "reference_name": "larger class"}

        def over(make: Callable[[AtLayer], Figure]) -> dict[int, Figure]:
            return {layer: make(one) for layer, one in by_layer.items()}

        def figure(name: str) -> dict[int, Figure]:
            return over(lambda one: Figure(one.figures[name], n=n))

        def ends(values: list[float], n: int) -> Figure:
            return Figure(float(np.mean(values)), min(values), max(values), n)

        found = [
            Series(
                PROBE, "accuracy", over(lambda one: _wilson(one.figures["accuracy"], n)),
                better=1, interval="wilson", **chance,
            ),
            Series(
                ON_VALIDATION, "accuracy", over(lambda one: _wilson(one.validation, n_validation)),
                better=1, split="validation", interval="wilson", **chance,
            ),
            Series(
                CONTROL, "accuracy", over(lambda one: ends(one.control, n)),
                interval="all draws", **chance,
            ),
            Series(
                CAPACITY, "accuracy", over(lambda one: ends(one.control_train, n_train)),
                split="train", interval="all draws",
            ),
            Series(PROBE, "auc", figure("auc"), better=1, reference=0.5, reference_name="chance"),
            Series(PROBE, "brier", figure("brier"), better=-1),
            Series(PROBE, "ece", figure("ece"), better=-1),
            Series(
                "perfectly_calibrated", "ece",
                over(lambda one: Figure(
                    one.figures["ece_null"], None, one.figures["ece_null_high"], n
                )),
                interval="95 % of draws are below",
            ),
        ]  # fmt: skip
        if self.calibration is not None:
            found += [
                Series("probe_platt", name, figure(f"{name}_platt"), better=-1)
                for name in ("brier", "ece")
            ]
        return found

    def _answers(self, workspace: RunWorkspace, kept: AtLayer) -> dict[str, Any]:
        """The probe's options as answers beside the unsteered ones, so that it can be paired with
        any run that steers. Writes items.parquet; returns the figures of the comparison."""
        texts = workspace.exp.task.constrained_to or []
        tables, figures = [], {}
        for split in ("test", "validation"):
            items, baseline = workspace.splits.named()[split], workspace.baseline(split)
            said = [texts[option] for option in kept.answers[split]]
            now = np.array([score.reward for score in workspace.exp.task.score(items, said)])
            was = baseline.reward_B.double().numpy()
            other = np.array([a != b for a, b in zip(said, baseline.generation.texts, strict=True)])
            figures[split] = asdict(compare(was, now, other))
            figures[split]["delta_ci95"] = list(figures[split]["delta_ci95"])
            tables.append(
                items_table(
                    split, [item.item_id for item in items], was.tolist(), now.tolist(),
                    other.tolist(), [item.group or "" for item in items],
                    ItemTexts(
                        [item.user for item in items], [item.target for item in items],
                        baseline.generation.texts, said,
                    ),
                )
            )  # fmt: skip
        write_items(workspace.run.path, tables)
        return {**figures["test"], "validation": figures["validation"], "test_sets": {}}


def _wilson(share: float, n: int) -> Figure:
    return Figure(share, *share_interval(share, n), n)


def _readable(first: int | None, band: float, draws: int, n_layers: int) -> str:
    where = f"any of {n_layers} sites" if n_layers > 1 else "this site"
    reach = f"{100 * band:.1f} %, which {draws} permutations of the labels stay below at {where}"
    if first is None:
        return f"readable nowhere: no test accuracy is above {reach} in 95 of 100 cases"
    return f"readable from layer {first}: test accuracy above {reach} in 95 of 100 cases"


def _best(layer: int, kept: AtLayer, n: int) -> str:
    figures = kept.figures
    low, high = share_interval(figures["accuracy"], n)
    said = (
        f"best on validation at layer {layer}: {100 * figures['accuracy']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}] of {n:,} test items, calibration error "
        f"{figures['ece']:.3f}"
    )
    high = figures["ece_null_high"]
    verdict = "no more than" if figures["ece"] <= high else "more than"
    return f"{said}, {verdict} the {high:.3f} that a perfectly calibrated probe stays below"
