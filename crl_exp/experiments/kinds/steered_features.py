"""features.json: by layer, the best features that stage 1 found and those that were added."""

from __future__ import annotations

from typing import Any

from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.steering.answerer import Answering
from crl_exp.steering.controllers.fixed import FixedFeatures
from crl_exp.steering.feature_statistics.store import LayerStatistics

FEATURE_COLUMNS = (
    "correlation",
    "score",
    "coefficient",
    "frequency",
    "frequency_rewarded",
    "frequency_unrewarded",
)


def features_of(
    workspace: RunWorkspace, used: dict[int, dict[int, dict[str, float]]], answerer: Answering
) -> dict[str, Any]:
    """features.json: by layer, the best found in stage 1 and those added on the test set.

    chosen: where they are fixed, with the coefficients that they are added with.
    """
    layers: dict[str, Any] = {}
    chosen: dict[int, list[dict[str, Any]]] = {}
    for steer in answerer.steers if isinstance(answerer, FixedFeatures) else []:
        one = {"feature": steer.feature_idx, "coefficient": steer.coefficient}
        chosen.setdefault(steer.layer, []).append(one)
    stage_1 = "feature_statistics" in workspace.exp.needs
    measured = workspace.statistics() if stage_1 else {}
    for layer in sorted({*measured, *used, *chosen}):
        rows = used.get(layer, {})
        if layer in measured:
            layers[str(layer)] = _measured_features(workspace, layer, measured[layer], rows)
        else:
            sae = workspace.saes[layer]
            layers[str(layer)] = {"n": None, "allowed": None, "found": [], "used": [
                {"feature": feature, "neuronpedia": sae.link(feature), **more}
                for feature, more in rows.items()
            ]}  # fmt: skip
        if layer in chosen:
            layers[str(layer)]["chosen"] = chosen[layer]
    return layers


def _measured_features(
    workspace: RunWorkspace,
    layer: int,
    statistics: LayerStatistics,
    used: dict[int, dict[str, float]],
) -> dict[str, Any]:
    coefficient_F = workspace.coefficients(layer).cpu()
    columns = {**statistics.by_feature, "coefficient": coefficient_F}

    def row(feature: int, more: dict) -> dict[str, Any]:
        values = {name: float(columns[name][feature]) for name in FEATURE_COLUMNS}
        sign = 1 if values["correlation"] >= 0 else -1
        link = workspace.saes[layer].link(feature)
        return {"feature": feature, **values, "sign": sign, "neuronpedia": link, **more}

    best = statistics.best(workspace.exp.warmup.min_frequency, workspace.exp.warmup.keep)
    return {
        "n": statistics.n,
        "allowed": len(statistics.allowed(workspace.exp.warmup.min_frequency)),
        "found": [row(feature, {}) for feature in best],
        "used": [row(feature, more) for feature, more in used.items()],
    }
