"""Where the right feature depends on the prompt a fixed one can't win, and the policy does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from crl_exp.analysis.statistics import compare
from crl_exp.steering.controllers.fixed import Steer
from tests.helpers.planted import DEAD, LAYER, NO, OTHER, PLANTED, YES, plant_conditional
from tests.helpers.planted_table import ONCE, SIZES, STRENGTH, TRAINING, targets
from tests.helpers.tiny import D_SAE
from tests.helpers.tiny_run import lab_of, run_small


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("conditional")
    return [*plant_conditional(root), *SIZES, *STRENGTH, f"output_dir={root / 'out'}"]


@pytest.fixture(scope="module")
def learned(common) -> tuple[dict[str, Any], Path]:
    """PPO without a word of stage 1: `fusion.weight=0`."""
    return run_small([*common, *TRAINING, "fusion.weight=0"])


def rewards(folder: Path, target: dict[str, int]) -> np.ndarray:
    """Whether each test item got its right answer, in the order of the items."""
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    return np.array([float(row["token"] == target[row["item"]]) for row in rows])


@pytest.fixture(scope="module")
def target(common) -> dict[str, int]:
    """The right token of each item."""
    return targets(common)


def test_there_is_something_to_learn(common):
    accuracy = float(lab_of([*common, "method=none"]).baseline("test").reward_B.mean())
    assert 0.35 < accuracy < 0.65


@pytest.mark.parametrize("feature", [PLANTED, OTHER])
def test_either_feature_alone_helps_half_and_hurts_half(feature, common):
    """Steered by CorrSteer's own controller, at the policy's strength."""
    workspace = lab_of([*common, "method=corrsteer_s"])
    coefficient = float(workspace.coefficients(LAYER)[feature])
    answers = workspace.answer(workspace.fixed([Steer(LAYER, feature, coefficient)]), "test")
    wanted = "yes" if feature == PLANTED else "no"
    by_answer = {answer: [] for answer in ("yes", "no")}
    for item, score in zip(workspace.splits.test, answers.scores, strict=True):
        by_answer[str(item.target)].append(score.reward)
    assert np.mean(by_answer[wanted]) > 0.8
    assert np.mean(by_answer["no" if wanted == "yes" else "yes"]) < 0.25


@pytest.mark.slow
def test_no_fixed_feature_wins(common, learned):
    """Not the planted ones, nor any other, at the policy's strength and even chosen on the test."""
    workspace = lab_of([*common, "method=corrsteer_s"])
    coefficient_F, found = workspace.coefficients(LAYER), []
    for feature in workspace.statistics()[LAYER].allowed(0.02).tolist():
        controller = workspace.fixed([Steer(LAYER, feature, float(coefficient_F[feature]))])
        found.append(float(workspace.answer(controller, "test").reward_B.mean()))
    assert len(found) == D_SAE - DEAD
    assert learned[0]["accuracy_steered"] > max(found) + 0.1


def test_the_policy_chooses_by_the_prompt_and_wins(common, learned, target):
    """Other features where yes is right than where no is."""
    result, folder = learned
    counts: dict[int, Counter[int]] = {YES: Counter(), NO: Counter()}
    for row in pq.read_table(folder / "interventions.parquet").to_pylist():
        counts[target[row["item"]]][row["features"][0]] += 1
    overlap = sum((counts[YES] & counts[NO]).values())
    assert overlap < 0.3 * min(count.total() for count in counts.values())
    assert result["delta"] > 0.2 and result["p_value"] < 0.01
    fixed, fixed_folder = run_small([*common, "method=corrsteer_s", ONCE])
    assert fixed["accuracy_steered"] < 0.65
    better = compare(rewards(fixed_folder, target), rewards(folder, target), np.zeros(400))
    assert better.delta > 0.15 and better.p_value < 0.01
