"""Ready sweeps over what isn't a stage: their points act differently on a tiny model.

Those over stages and their order are told apart on made-up logits (tests/steering/test_effects.py).
Shapes: B rows, C allowed features, F d_sae, D d_model.
"""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.methods.crl import CRL
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import collect
from tests.helpers.tiny_run import SMALL, TinyFiles, lab_of
from tests.steering.test_effects import without_seeds

LAYER = SMALL["layers.layer"]
ADD_AT_FIRST = {"fusion=attention", "fusion=position_linear"}
"""What adds at the first token, where there is no other yet."""


def learned(agent: LayerAgent) -> None:
    """Give the networks weights as of training: of each feature the same, whichever are allowed."""
    draw = torch.Generator().manual_seed(1)
    of_feature_FX = torch.randn(agent.sae[0].d_sae, 64, generator=draw)[agent.allowed_C]
    last = agent.policy[-1]
    with torch.no_grad():
        last.weight += 0.3 * of_feature_FX[:, : last.weight.shape[1]]  # type: ignore[operator]
        last.bias += 0.3 * of_feature_FX[:, -1]  # type: ignore[operator]
        for number in agent.pipeline.parameters():  # e.g. what learnable_mix multiplies by
            number += 0.5


def acts(point: list[str], files: TinyFiles, folder) -> tuple[Tensor, Tensor]:
    """At the first token, where all points meet the same residuals: the probability of each
    feature [B, F] after a rollout was learned from, and what is added then [B, D]."""
    tiny = [*files.overrides(), f"output_dir={folder}"]
    workspace = lab_of([*point, *tiny])
    method = workspace.exp.method
    assert isinstance(method, CRL)
    torch.manual_seed(0)
    agents = method.free_agents(workspace)
    agent = agents[LAYER]
    learned(agent)

    def play():
        explore = torch.Generator().manual_seed(2)
        return workspace.play(
            PolicyController(agents, workspace.exp.decay, explore), list(range(24))
        )

    played, reward_B = play()
    observed = collect(LAYER, played, reward_B, workspace.exp.algorithm).observed
    assert not observed.token_index_B.any()
    if agent.online is not None:
        agent.follow(played, reward_B)
    with torch.no_grad():
        probability_BC = agent.distribution(observed).logits_BC.softmax(dim=1)
    probability_BF = probability_BC.new_zeros(len(probability_BC), agent.sae[0].d_sae)
    probability_BF[:, agent.allowed_C] = probability_BC
    again, _ = play()
    return probability_BF, torch.cat([step.action.delta_BD for step in again.steps])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["negatives", "online", "several_features"])
def test_the_points_act_differently(name, tiny_files, tmp_path) -> None:
    found = {}
    for point in without_seeds(name):
        if ADD_AT_FIRST & set(point):
            continue  # `fusions` has them at later tokens
        found[" ".join(point)] = acts(point, tiny_files, tmp_path)
    assert len(found) > 6
    for (one, first), (other, second) in combinations(found.items(), 2):
        assert any(
            not torch.allclose(a, b, atol=1e-4) for a, b in zip(first, second, strict=True)
        ), f"the same acts:\n{one}\n{other}"
