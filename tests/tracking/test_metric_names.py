"""The names that charts are made by: the journal's, which are MLflow's too."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from crl_exp.generation.controller import Action
from crl_exp.generation.results import Step
from crl_exp.steering.policy.actions import Actions
from crl_exp.steering.policy.rollout_metrics import watch_choices
from tests.helpers.mlflow_reading import children, client, history, runs, with_database
from tests.helpers.tiny_run import run_small

BY_LAYER = {
    "policy_loss", "critic_loss", "grad_norm_policy", "grad_norm_critic", "unique_features",
    "mean_activation", "top_correlation", "approx_kl", "clip_fraction", "entropy",
    "mean_coefficient", "unsteered_tokens",
}  # fmt: skip
OF_ALL_LAYERS = {"reward", "seconds_rollout", "seconds_update"}
FINAL = {
    "eval/accuracy_baseline", "eval/accuracy_steered", "eval/delta", "eval/delta_low",
    "eval/delta_high", "eval/p_value", "eval/invalid", "eval/runtime", "eval/n",
    "eval/unique_features",
}  # fmt: skip


@pytest.mark.slow
def test_names_of_a_run(tiny_files, tmp_path):
    """A real run of two layers, from its config to MLflow."""
    with_database(tmp_path)
    _, path = run_small(
        [*tiny_files.overrides(), "tracking=mlflow", "tracking.system_seconds=0.05", "layers=list",
         f"output_dir={tmp_path}"]
    )  # fmt: skip
    lines = [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]
    wanted = OF_ALL_LAYERS | {f"layer_{n}/{name}" for n in (0, 2) for name in BY_LAYER}
    assert [set(line["metrics"]) for line in lines] == [wanted, {"validation_reward"}] * 2
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    (child,) = children(uri)
    assert wanted | FINAL <= child.data.metrics.keys()
    assert "system/cpu_utilization_percentage" in child.data.metrics
    assert [s for s, _ in history(uri, child.info.run_id, "layer_2/mean_activation")] == [1, 2]
    data = json.loads((path / "data.json").read_text())
    inputs = client(uri).get_run(child.info.run_id).inputs
    assert inputs is not None
    (used,) = inputs.dataset_inputs
    assert used.dataset.digest == data["digest"] == json.loads(
        (path / "result.json").read_text()
    )["data_digest"]  # fmt: skip
    assert data["n"] == {"train": 24, "validation": 8, "test": 16}
    code = json.loads((path / "code.json").read_text())
    assert child.data.tags["git_commit"] == code["git_commit"]
    assert len(runs(uri)) == 2


class Doubling:
    """An SAE of three features: twice the residual's first three numbers, if positive."""

    asked = 0

    def encode(self, x_BD: torch.Tensor) -> torch.Tensor:
        self.asked += len(x_BD)
        return 2 * x_BD[:, :3].relu()


def agent_and_steps(n_tokens: int = 2, **notes: torch.Tensor):
    """Features 2 and 0 may be chosen. Tokens of two answers, the second answer over by token 1."""
    agent = SimpleNamespace(
        layer=5, sae=[Doubling()], allowed_C=torch.tensor([2, 0]),
        correlation_C=torch.tensor([0.1, 0.3]), mean_D=torch.ones(4), std_D=torch.full((4,), 2.0),
        actions=Actions(2),
    )  # fmt: skip
    obs_BD = torch.tensor([[0.5, 0.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    steps = []
    for token in range(n_tokens):
        action = Action(
            delta_BD=torch.zeros(2, 4),
            feature_idx_BK=torch.tensor([[2], [0 if token else -1]]),
            coefficient_BK=torch.tensor([[4.0 + token], [9.0]]),
            notes={"obs_BD": obs_BD, "choice_BK": torch.tensor([[0], [1 if token else -1]]),
                   **notes},
        )  # fmt: skip
        steps.append(Step(5, token, [0, 1], torch.tensor([True, token == 0]), action))
    other = SimpleNamespace(layer=6, alive_B=None, action=None)
    return agent, SimpleNamespace(steps=[*steps, other])


def test_what_is_watched_of_a_rollout():
    """Feature 2 twice, at residual 2·1+1 = 3 so with activation 6; once nothing; one token over."""
    agent, played = agent_and_steps()
    found = watch_choices(agent, played)  # type: ignore[arg-type]
    assert found == pytest.approx(
        {"unique_features": 1, "mean_coefficient": 4.5, "unsteered_tokens": 1 / 3,
         "top_correlation": 0.1, "mean_activation": 6.0}
    )  # fmt: skip


def test_activations_that_were_recorded_are_not_computed_again():
    agent, played = agent_and_steps(feature_acts_BC=torch.tensor([[7.0, 1.0], [1.0, 1.0]]))
    assert watch_choices(agent, played)["mean_activation"] == 7.0  # type: ignore[arg-type]
    assert agent.sae[0].asked == 0


def test_few_tokens_are_encoded_of_a_long_rollout():
    agent, played = agent_and_steps(n_tokens=1000)
    assert watch_choices(agent, played)["mean_activation"] == 6.0  # type: ignore[arg-type]
    assert 64 <= agent.sae[0].asked <= 128
