"""Whole runs with options that aren't one file in `conf/`: scores, signs, critics."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny_run import random_sae_weights, run_small, save_sae


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
