"""Whole runs with options that aren't one file in `conf/`: scores, signs, critics."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers.tiny_run import random_sae_weights, run_small, save_sae


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), f"output_dir={tmp_path / 'out'}"]


@pytest.mark.parametrize(
    "more",
    [
        ["policy.critic=q", "policy.k=2", "activation=jumprelu"],
        ["policy=mlp", "policy.nonlinearity=tanh", "policy.critic=q", "fusion=learnable_mix"],
        ["algorithm=grpo", "policy.k=3", "mask=active"],
        ["warmup.score=composite", "warmup.negative=clip"],
        ["warmup.score=mutual_information", "warmup.negative=steer"],
        ["method.online_correlation=true", "warmup.negative=clip"],
        ["activation=jumprelu_learnable", "activation.stage1=true", "noise=gaussian",
         "noise.schedule=cosine", "order=[mask,activation,noise,fusion]"],
        ["mask=all", "fusion=attention", "activation=softmax"],
    ],
    ids=lambda more: ",".join(more),
)  # fmt: skip
def test_a_run_with_these_options(more, common):
    result, folder = run_small([*common, *more])
    assert result["n"] == 16 and 0 <= result["unsteered_tokens"] <= 1
    assert (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("method", ["crl", "corrsteer_a", "corrsteer_s"])
def test_features_that_go_with_failure_are_steered_against(method, common):
    """With `steer` the found list is by size, and coefficients are below 0 where r is."""
    steered = [*common, f"method={method}", "warmup.negative=steer", "coefficient=mean_positive"]
    _, folder = run_small(steered)
    for layer in json.loads((folder / "features.json").read_text()).values():
        found = layer["found"]
        sizes = [abs(row["correlation"]) for row in found]
        assert sizes == sorted(sizes, reverse=True)
        assert any(row["correlation"] < 0 for row in found)
        for row in found:
            assert row["score"] == pytest.approx(abs(row["correlation"]))
            assert (row["coefficient"] < 0) == (row["correlation"] < 0)


def test_tokens_without_a_choice_are_counted_and_said(common, tiny_files, tmp_path):
    """An SAE none of whose features is active on the test: `active` leaves nothing to choose."""
    weights = random_sae_weights(1)
    weights["threshold"] = torch.full_like(weights["threshold"], 1e9)
    save_sae(tmp_path / "saes", 1, weights)
    dead = [*common, f"sae.folder={tmp_path / 'saes'}", "warmup.min_frequency=0"]
    result, folder = run_small([*dead, "mask=active"])
    assert result["unsteered_tokens"] == 1.0 and result["delta"] == 0
    assert any("no feature could be chosen" in text for text in result["warnings"])
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert journal[0]["metrics"]["layer_1/unsteered_tokens"] == 1.0
    free, _ = run_small([*dead, "mask=inactive"])
    assert free["unsteered_tokens"] == 0.0
    assert run_small([*common, "method=none"])[0]["unsteered_tokens"] is None


def test_exploration_fades_as_the_schedule_says(common):
    """Logits that leave one feature, and an even choice with probability 1, then .9, …, .1."""
    fading = ["noise=epsilon_greedy", "noise.epsilon=1", "noise.schedule=linear",
              "fusion.weight=1e6", "algorithm.n_updates=10", "algorithm.prompts_per_update=20",
              "algorithm.minibatches=1"]  # fmt: skip
    _, folder = run_small([*common, *fading])
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    name = "layer_1/unique_features"
    found = [line["metrics"][name] for line in journal if name in line["metrics"]]
    assert len(found) == 10
    assert found[0] > 12 and found[-1] < 7


@pytest.mark.parametrize("online", [True, False])
def test_correlations_go_on_where_asked_for(online, common):
    """Two updates of 8 answers on top of the 24 of stage 1."""
    flag = f"method.online_correlation={str(online).lower()}"
    _, folder = run_small([*common, flag, "algorithm.prompts_per_update=8"])
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["learners"][1]
    for kept in (state["agent"], state["averaged"]):
        assert ("online.n" in kept) == online
        if online:
            assert float(kept["online.n"]) == 24 + 2 * 8


def test_without_stage_2_the_correlation_alone_steers(common):
    """The zero policy's logits are stage 1's scores, so that the first of them is taken."""
    _, folder = run_small([*common, "method.stage2=false"])
    assert not (folder / "checkpoint.pt").exists()
    first = json.loads((folder / "features.json").read_text())["1"]["found"][0]["feature"]
    rows = pq.read_table(folder / "interventions.parquet")["features"].to_pylist()
    assert len(rows) == 16 and all(row == [first] for row in rows)
