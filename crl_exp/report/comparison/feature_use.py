"""Which features a run added, beside those that stage 1 found: overlap, diversity, correlation.

Read from features.json. CorrSteer's own feature of a layer is the first of those found there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from crl_exp.report.comparison.rows import Row, SweepComparison
from crl_exp.runs.records import Record

LAST = 0.1  # of the updates, that a loss at the end of training is a mean of


@dataclass(frozen=True)
class LayerUse:
    """One run at one layer, on the test items.

    found: the features that stage 1 ranks first, best first. used: those added, each with `tokens`
    at which it was. allowed: how many could be chosen.
    """

    layer: int
    record: Record
    found: tuple[dict[str, Any], ...]
    used: tuple[dict[str, Any], ...]
    allowed: int

    @cached_property
    def made(self) -> dict[str, Any]:
        """What was made of it and is asked for again, by a name of its maker's."""
        return {}

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Place among those found, from 1, by feature."""
        return {row["feature"]: i for i, row in enumerate(self.found, start=1)}

    @cached_property
    def share(self) -> np.ndarray:
        """Share of the additions that went to each feature used [U]."""
        tokens = np.array([row["tokens"] for row in self.used], dtype=float)
        return tokens / tokens.sum()

    def metrics(self) -> dict[str, float]:
        """What the figures show; docs/report.md says what each means."""
        return dict(self._metrics)

    @cached_property
    def _metrics(self) -> dict[str, float]:
        common = np.array([row["feature"] in self.ranks for row in self.used])
        first = np.array([self.ranks.get(row["feature"]) == 1 for row in self.used])
        correlation = np.array([row["correlation"] for row in self.used])
        n_found, n_used = len(self.found), len(self.used)
        return {
            "found": n_found,
            "used": n_used,
            "in_common": int(common.sum()),
            "used_found": float(common.mean()),
            "chance": min(n_found / self.allowed, 1.0) if self.allowed else float("nan"),
            "jaccard": float(common.sum() / (n_found + n_used - common.sum())),
            "additions_found": float(self.share @ common),
            "additions_corrsteer": float(self.share @ first),
            "entropy": float(-(self.share * np.log(self.share)).sum()) + 0.0,
            "r_added": float(self.share @ correlation),
            "r_best_found": float(self.found[0]["correlation"]),
            "r_mean_found": float(np.mean([row["correlation"] for row in self.found])),
        }

    @cached_property
    def critic_loss(self) -> float:
        """Mean over the last tenth of the updates; nan where there is no critic."""
        name = f"layer_{self.layer}/critic_loss"
        lines = self.record.journal
        losses = [line["metrics"][name] for line in lines if name in line["metrics"]]
        return float(np.mean(losses[-max(1, round(LAST * len(losses))) :] if losses else np.nan))


def layer_uses(row: Row) -> dict[int, list[LayerUse]]:
    """By layer, a row's runs that added features there, with those that stage 1 found."""
    found = {la: [use for use in uses if use.found] for la, uses in all_uses(row).items()}
    return {layer: uses for layer, uses in found.items() if uses}


def all_uses(row: Row) -> dict[int, list[LayerUse]]:
    """Likewise, with runs that have no stage 1, such as those of a given list of features."""
    if "uses" not in row.made:
        row.made["uses"] = _all_uses(row)
    return row.made["uses"]


def _all_uses(row: Row) -> dict[int, list[LayerUse]]:
    found: dict[int, list[LayerUse]] = {}
    for run in row.runs:
        for layer, said in run.features.items():
            if said["used"]:
                use = LayerUse(
                    int(layer), run, tuple(said["found"]), tuple(said["used"]),
                    said.get("allowed", 0),
                )  # fmt: skip
                found.setdefault(int(layer), []).append(use)
    return dict(sorted(found.items()))


def learned(sweep: SweepComparison) -> list[Row]:
    """Rows whose features were chosen by a trained policy, and that added some."""
    return [row for row in sweep.rows if any(run.journal for run in row.runs) and layer_uses(row)]


def metric_lines(sweep: SweepComparison) -> tuple[list[str], list[list[Any]]]:
    """Head and lines of by_layer.csv: one for each run and layer."""
    head: list[str] = []
    lines = []
    for row in sweep.rows:
        settings = dict(row.label.settings)
        for layer, uses in layer_uses(row).items():
            for use in uses:
                values = {**use.metrics(), "critic_loss": use.critic_loss}
                options = [settings.get(key, "") for key in sweep.varied]
                head = ["method", *sweep.varied, "layers", "seed", "layer", *values]
                numbers = ["" if np.isnan(value) else value for value in values.values()]
                lines.append(
                    [row.family, *options, " ".join(map(str, row.layers)),
                     use.record.config["seed"], layer, *numbers]
                )  # fmt: skip
    return head, lines
