"""A planted feature is found by stage 1 and learned by stage 2: docs/planted_feature.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from crl_exp.analysis.statistics import compare
from tests.helpers.planted import DEAD, LAYER, PLANTED, YES, plant
from tests.helpers.tiny import D_SAE
from tests.helpers.tiny_run import lab_of, run_small

SIZES = ["task.n_train=300", "task.n_validation=100", "task.n_test=400", "engine.batch_size=100"]
# Stage 1 is switched off in the logits (weight 0), so that what PPO finds, it finds by itself.
PPO = [
    "method=crl", "fusion.weight=0", "policy.policy_depth=1", "policy.hidden=64",
    "algorithm.n_updates=60", "algorithm.prompts_per_update=50", "algorithm.validate_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("planted")
    return [
        *plant(root),
        *SIZES,
        "coefficient=relative",
        "coefficient.ratio=0.25",
        f"output_dir={root / 'out'}",
    ]


@pytest.fixture(scope="module")
def runs(common) -> dict[str, tuple[dict[str, Any], Path]]:
    """A run of each method: its result and its run directory."""
    methods = {
        "random": ["method=random"], "corrsteer_s": ["method=corrsteer_s"],
        "corrsteer_a": ["method=corrsteer_a"], "crl": PPO,
        "attribution": ["method=attribution"],
    }  # fmt: skip
    same_strength = [*common, "method.multipliers=[1]"]
    return {name: run_small([*same_strength, *more]) for name, more in methods.items()}


def test_there_is_something_to_learn(common):
    accuracy = float(lab_of([*common, "method=none"]).baseline("test").reward_B.mean())
    assert 0.3 < accuracy < 0.6


def test_warmup_ranks_the_planted_feature_first(common):
    statistics = lab_of([*common, "method=corrsteer_s"]).statistics()[LAYER]
    assert statistics.allowed(min_frequency=0.02).tolist() == list(range(DEAD, D_SAE))
    first, second = statistics.best(min_frequency=0.02, k=2)
    assert first == PLANTED
    assert statistics.correlation[first] > statistics.correlation[second] + 0.1


@pytest.mark.parametrize("method", ["corrsteer_s", "corrsteer_a", "attribution"])
def test_a_constant_steers_by_the_planted_feature(method, runs):
    assert set(chosen(runs[method][1])) == {PLANTED}


def test_ppo_learns_to_choose_the_planted_feature(runs):
    counts = chosen(runs["crl"][1])
    assert counts[PLANTED] > 0.8 * counts.total()


@pytest.mark.parametrize("method", ["corrsteer_s", "corrsteer_a", "attribution", "crl"])
def test_it_beats_the_unsteered_model_and_random_features(method, runs):
    result, folder = runs[method]
    assert result["n"] == 400
    assert result["delta"] > 0.2 and result["p_value"] < 0.01
    random = compare(rewards(runs["random"][1]), rewards(folder), np.zeros(400))
    assert random.delta > 0.2 and random.p_value < 0.01


def chosen(folder: Path) -> Counter[int]:
    """How often each feature was added on the test items."""
    table = pq.read_table(folder / "interventions.parquet")
    return Counter(feature for row in table["features"].to_pylist() for feature in row)


def rewards(folder: Path) -> np.ndarray:
    """Whether each test item was answered yes, in the order of the items."""
    table = pq.read_table(folder / "interventions.parquet")
    assert set(table["split"].to_pylist()) == {"test"}
    return np.array([float(token == YES) for token in table["token"].to_pylist()])
