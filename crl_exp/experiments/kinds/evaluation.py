"""Steered against unsteered on the same held-out items, and a row for every steered token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from crl_exp.analysis.statistics import compare
from crl_exp.config.files import replacing
from crl_exp.experiments.kinds.quality import Quality, quality
from crl_exp.experiments.workspace import RunWorkspace
from crl_exp.generation.controller import Unsteered
from crl_exp.runs.items import ItemTexts, items_table, write_items
from crl_exp.steering.answerer import Answering
from crl_exp.steering.answers import Answers
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.policy.actions import NULL
from crl_exp.tasks.base import Item

Used = dict[int, dict[int, dict[str, float]]]
"""By layer and feature: `tokens` at which it was added and its `mean_coefficient`."""

INTERVENTIONS = pa.schema(
    [
        ("split", pa.string()),
        ("item", pa.string()),
        ("token_index", pa.int32()),
        ("layer", pa.int32()),
        ("token", pa.int32()),
        ("features", pa.list_(pa.int32())),
        ("left_alone", pa.bool_()),
        ("coefficients", pa.list_(pa.float32())),
        ("delta_norm", pa.float32()),
        ("log_prob", pa.float32()),
        ("value", pa.float32()),
        ("changed", pa.bool_()),
        ("reward_baseline", pa.float32()),
        ("reward_steered", pa.float32()),
    ]
)
"""One row for each item, steered token and layer. `features` is empty where nothing was added;
`left_alone`: whether because the policy took the null action. `token` is the one produced;
`delta_norm`: length of what was added to the residual. `changed`: whether the item's answer differs
from the unsteered one. The rewards are the item's, unsteered and steered."""


def evaluate_split(
    workspace: RunWorkspace, answerer: Answering, split: str
) -> tuple[dict[str, Any], Answers, Quality]:
    """Compare on one split. Returns the figures, the steered answers, and their likelihoods."""
    baseline = workspace.baseline(split)
    if isinstance(answerer, Unsteered):
        steered = baseline
    else:
        steered = workspace.kept_answers(
            f"steered_{split}", f"steered on {split}", answerer, split, record=True
        )
    for answers in (baseline, steered):
        workspace.warn_of_undefined(answers, split)
    changed = changed_outputs(baseline, steered)
    was, now = (answers.reward_B.double().numpy() for answers in (baseline, steered))
    figures = asdict(compare(was, now, changed))
    figures["delta_ci95"] = list(figures["delta_ci95"])
    figures["invalid_baseline"] = baseline.invalid
    figures["invalid_steered"] = steered.invalid
    likelihoods = quality(workspace, split, steered, torch.from_numpy(changed))
    return figures | likelihoods.figures, steered, likelihoods


def changed_outputs(baseline: Answers, steered: Answers) -> np.ndarray:
    """Whether each answer's tokens differ [n]."""
    pairs = zip(baseline.generation.tokens, steered.generation.tokens, strict=True)
    return np.array([a != b for a, b in pairs])


def evaluate(workspace: RunWorkspace, answerer: Answering) -> tuple[dict[str, Any], Used]:
    """All test sets and validation. Writes interventions.parquet and items.parquet.

    Returns the result's figures and, for features.json, how often each feature was used on test.
    """
    figures: dict[str, Any] = {}
    used: Used = {}
    unsteered: float | None = None
    left_alone: float | None = None
    tables: list[pa.Table] = []
    items_of: list[pa.Table] = []
    steered: dict[str, Answers] = {}
    for split in ["test", *workspace.splits.extra, "validation"]:
        figures[split], answers, likelihoods = evaluate_split(workspace, answerer, split)
        if split == "validation":
            _warn_of_harm(workspace, figures[split])
        steered[split] = answers
        items_of.append(_items(workspace, split, answers, likelihoods))
        if split != "validation":
            tables.append(_interventions(workspace, split, answers))
        if split == "test":
            used, unsteered = _used(answers), _unsteered(answers)
            left_alone = _left_alone(answers) if _has_null_action(answerer) else None
    _write_interventions(workspace.run.path / "interventions.parquet", tables)
    write_items(workspace.run.path, items_of)
    result = dict(figures.pop("test"))
    result["validation"] = figures.pop("validation")
    result["test_sets"] = figures
    benign_in = "benign" if "benign" in workspace.splits.extra else "test"
    items = workspace.splits.named()[benign_in]
    result["over_refusal_baseline"] = over_refusal(items, workspace.baseline(benign_in))
    result["over_refusal_steered"] = over_refusal(items, steered[benign_in])
    result["unsteered_tokens"] = unsteered
    result["left_alone"] = left_alone
    if unsteered:
        workspace.warn(
            f"at {unsteered:.1%} of the test's tokens no feature could be chosen (the mask left "
            "none): nothing was added there"
        )
    if left_alone == 1:
        workspace.warn(
            "the policy leaves every token of the test alone (policy.null_action): its answers are "
            "the unsteered model's"
        )
    result["unique_features"] = len({(la, f) for la, rows in used.items() for f in rows})
    return result, used


def _has_null_action(answerer: Answering) -> bool:
    agents = answerer.agents.values() if isinstance(answerer, PolicyController) else ()
    return any(agent.actions.null for agent in agents)


def _warn_of_harm(workspace: RunWorkspace, validation: dict[str, Any]) -> None:
    """What did best there is kept: where it does worse than nothing all that was tried did."""
    was, now = validation["accuracy_baseline"], validation["accuracy_steered"]
    if now < was:
        way_out = workspace.exp.method.nothing_instead
        workspace.warn(
            f"on validation this does worse than the unsteered model, {100 * was:.1f} → "
            f"{100 * now:.1f} % of {validation['n']} items, and it is used all the same"
            f"{f'; {way_out}' if way_out else ''}"
        )


def _items(workspace: RunWorkspace, split: str, answers: Answers, likelihoods: Quality) -> pa.Table:
    """A split's items with their rewards and answers, and how likely these are in free text."""
    baseline, items = workspace.baseline(split), workspace.splits.named()[split]
    of_each = [
        [None] * len(items) if read_I is None else read_I.tolist()
        for read_I in (likelihoods.was_I, likelihoods.now_I)
    ]
    return items_table(
        split, [item.item_id for item in items], baseline.reward_B.tolist(),
        answers.reward_B.tolist(), changed_outputs(baseline, answers).tolist(),
        [item.group for item in items],
        ItemTexts(
            [item.user for item in items], [item.target for item in items],
            baseline.generation.texts, answers.generation.texts,
        ),
        (of_each[0], of_each[1]) if workspace.options is None else None,
    )  # fmt: skip


def over_refusal(items: Sequence[Item], answers: Answers) -> float | None:
    """Share of the benign items that were not answered; null where there are none."""
    scores = zip(items, answers.scores, strict=True)
    rewards = [score.reward for item, score in scores if item.benign]
    return 1.0 - sum(rewards) / len(rewards) if rewards else None


def _interventions(workspace: RunWorkspace, split: str, answers: Answers) -> pa.Table:
    """The steered tokens of a split as a table."""
    items = workspace.splits.named()[split]
    changed = changed_outputs(workspace.baseline(split), answers)
    was, now = workspace.baseline(split).reward_B.tolist(), answers.reward_B.tolist()
    columns: dict[str, list] = {name: [] for name in INTERVENTIONS.names}
    for one in answers.steered:
        features, coefficients = one.feature_idx_NK.tolist(), one.coefficient_NK.tolist()
        delta_norms, tokens = one.delta_norm_N.tolist(), one.token_N.tolist()
        nothing = [None] * len(tokens)
        log_probs = nothing if one.log_prob_N is None else one.log_prob_N.tolist()
        values = nothing if one.value_N is None else one.value_N.tolist()
        for i, row in enumerate(one.rows):
            kept = [k for k, feature in enumerate(features[i]) if feature >= 0]
            columns["split"].append(split)
            columns["item"].append(items[row].item_id)
            columns["token_index"].append(one.token_index)
            columns["layer"].append(one.layer)
            columns["token"].append(tokens[i])
            columns["features"].append([features[i][k] for k in kept])
            columns["left_alone"].append(features[i][:1] == [NULL])
            columns["coefficients"].append([coefficients[i][k] for k in kept])
            columns["delta_norm"].append(delta_norms[i])
            columns["log_prob"].append(log_probs[i])
            columns["value"].append(values[i])
            columns["changed"].append(bool(changed[row]))
            columns["reward_baseline"].append(was[row])
            columns["reward_steered"].append(now[row])
    return pa.table(columns, schema=INTERVENTIONS)


def _write_interventions(path: Path, tables: list[pa.Table]) -> None:
    with replacing(path, path.with_suffix(".partial")) as file:
        pq.write_table(pa.concat_tables(tables), file, compression="zstd")


def _unsteered(answers: Answers) -> float | None:
    """Share of the tokens, of all layers, at which the controller found nothing to add, though it
    didn't choose to; null for the unsteered model."""
    empty, n = 0, 0
    for one in answers.steered:
        chosen_NK = one.feature_idx_NK
        if chosen_NK.shape[1] == 0:  # a direction that is no feature
            continue
        empty += int(((chosen_NK < 0).all(dim=1) & (chosen_NK[:, 0] != NULL)).sum())
        n += len(chosen_NK)
    return empty / n if n else None


def _left_alone(answers: Answers) -> float | None:
    """Share of the tokens, of all layers, at which the policy took the null action first."""
    firsts = [one.feature_idx_NK[:, 0] for one in answers.steered]
    return float((torch.cat(firsts) == NULL).double().mean()) if firsts else None


def _used(answers: Answers) -> Used:
    """By layer and feature: tokens at which it was added, and its mean coefficient."""
    count: Counter[tuple[int, int]] = Counter()
    total: Counter[tuple[int, int]] = Counter()
    for one in answers.steered:
        features = one.feature_idx_NK.flatten().tolist()
        coefficients = one.coefficient_NK.flatten().tolist()
        for feature, coefficient in zip(features, coefficients, strict=True):
            if feature >= 0:
                count[one.layer, feature] += 1
                total[one.layer, feature] += coefficient
    used: Used = {}
    for (layer, feature), n in count.most_common():
        mean = total[layer, feature] / n
        used.setdefault(layer, {})[feature] = {"tokens": n, "mean_coefficient": mean}
    return used
