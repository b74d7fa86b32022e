"""What of the config reaches a layer's update, and the networks it updates; by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, collect
from tests.helpers import tiny
from tests.helpers.tiny_steering import (
    agent,
    grpo,
    pipeline,
    ppo,
    random_sae,
    rolled_out,
    setting,
    statistics,
)
from tests.steering.test_losses import small_rollout


def test_ppo_takes_its_own_lambda() -> None:
    """δ: .2−.5, .1−.2, 1−.1; each takes half of the next one's."""
    value_BT, alive_BT = torch.tensor([[0.5, 0.2, 0.1]]), torch.ones(1, 3, dtype=torch.bool)
    got = ppo(gae_lambda=0.5).advantages(value_BT, alive_BT, torch.ones(1))
    torch.testing.assert_close(got, torch.tensor([[-0.125, 0.35, 0.9]]))


def test_advantages_of_a_minibatch_by_hand() -> None:
    """Mean 2, deviation (of the sample) 1; a single one can't be standardised."""
    three = torch.tensor([1.0, 2.0, 3.0])
    assert ppo(normalize_advantage=True).scaled(three).tolist() == pytest.approx([-1, 0, 1])
    assert ppo(normalize_advantage=True).scaled(three[2:]).tolist() == [3.0]
    assert ppo(normalize_advantage=False).scaled(three).tolist() == [1.0, 2.0, 3.0]
    assert grpo().scaled(three).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("depth", "name", "kind"), [
    (0, "relu", nn.ReLU), (1, "relu", nn.ReLU), (2, "gelu", nn.GELU), (3, "silu", nn.SiLU),
    (2, "tanh", nn.Tanh),
])  # fmt: skip
def test_networks_have_the_depth_and_nonlinearity_asked_for(depth, name, kind) -> None:
    """Hidden layers of 8; the last layer starts at zero."""
    sae = random_sae(2, 6, d_sae=5)
    statistics_, allowed_C = statistics(2, 6, 5), torch.arange(5)
    chosen = setting(policy_depth=depth, critic_depth=3 - depth, nonlinearity=name, critic="q")
    made = LayerAgent(sae, statistics_, allowed_C, torch.ones(5), pipeline(), chosen)
    assert made.critic is not None
    for network, hidden in ((made.policy, depth), (made.critic, 3 - depth)):
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        sizes = [6, *[8] * hidden, 5]
        assert [(one.in_features, one.out_features) for one in linear] == list(pairwise(sizes))
        assert sum(isinstance(layer, kind) for layer in network) == hidden
        assert len(network) == 2 * hidden + 1
        assert not linear[-1].weight.any() and not linear[-1].bias.any()


def test_settings_of_the_algorithm_reach_the_update() -> None:
    made = agent(random_sae(2, 6, d_sae=6), 6, pipeline()).double()
    rollout = small_rollout(made)
    learner = LayerLearner(
        made, ppo(epochs=3, minibatches=2, clip_coef=0.05, max_grad_norm=1e-3, weight_decay=0.25)
    )
    optimizers = (learner.policy_optimizer, learner.critic_optimizer)
    assert [o.param_groups[0]["weight_decay"] for o in optimizers] == [0.25, 0.25]
    with torch.no_grad():
        log_prob_N = selection.log_prob(
            made.distribution(rollout.observed).logits_BC, rollout.choice_NK
        )
    away_N = ((log_prob_N - rollout.log_prob_N).exp() - 1).abs()
    assert (away_N > 0.05).sum() > (away_N > 0.2).sum(), "0.05 and 0.2 can't be told apart"
    watched = learner._minibatch(rollout, 1)
    assert watched["clip_fraction"] == pytest.approx(float((away_N > 0.05).double().mean()))
    for name in ("policy", "critic"):
        grads = [p.grad for n, p in made.named_parameters() if n.startswith(name)]
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        assert watched[f"grad_norm_{name}"] > 1e-3
        assert float(norm) == pytest.approx(1e-3, rel=1e-2)
    learner.update(rollout, 1, torch.Generator().manual_seed(0))
    steps = [state["step"] for o in optimizers for state in o.state.values()]
    assert {int(step) for step in steps} == {1 + 3 * 2}


def test_tokens_are_weighed_as_flatten_tokens_says() -> None:
    """Answers of 1 and 3 tokens; at ratio 1 the loss is minus the weighted advantage."""
    made = agent(random_sae(2, 6, d_sae=6), 6, pipeline()).double()
    whole = small_rollout(made, n=4)
    with torch.no_grad():
        now = made.distribution(whole.observed).logits_BC
    whole.log_prob_N = selection.log_prob(now, whole.choice_NK)
    whole.episode_N = torch.tensor([0, 1, 1, 1])
    whole.advantage_N = torch.tensor([1.0, 2.0, 3.0, 7.0], dtype=torch.float64)
    for flatten, expected in ((True, -13 / 4), (False, -(1 + 12 / 3) / 2)):
        changes = {"flatten_tokens": flatten, "normalize_advantage": False}
        watched = LayerLearner(made, ppo(**changes, lr_policy=1e-9))._minibatch(whole, 1)
        assert watched["policy_loss"] == pytest.approx(expected)


@pytest.mark.parametrize("minibatches", [1, 2, 3, 5])
def test_answers_weigh_alike_in_a_rollout_however_it_is_cut(minibatches: int) -> None:
    """Answers of 1 and 24 tokens. At ratio 1 the loss of the one whose advantage is 1 is half."""
    made = agent(random_sae(2, 6, d_sae=6), 6, pipeline()).double()
    whole = small_rollout(made, n=25)
    with torch.no_grad():
        now = made.distribution(whole.observed).logits_BC
    whole.log_prob_N = selection.log_prob(now, whole.choice_NK)
    whole.episode_N = torch.tensor([0] + [1] * 24)
    changes = {"flatten_tokens": False, "normalize_advantage": False, "minibatches": minibatches}
    for answer in (0, 1):
        whole.advantage_N = (whole.episode_N == answer).double()
        learner = LayerLearner(made, ppo(**changes, lr_policy=1e-12, lr_critic=1e-12))
        watched = learner.update(whole, 1, torch.Generator().manual_seed(3))
        assert watched["policy_loss"] == pytest.approx(-1 / 2, rel=1e-5)


def test_a_layer_learns_from_its_own_steps() -> None:
    """Steps of another layer, with other probabilities, change nothing."""
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline())
    played, reward_B = rolled_out([made])[0], torch.arange(8.0)
    alone = collect(2, played, reward_B, ppo())
    for step in list(played.steps):
        action = replace(step.action, log_prob_B=torch.zeros_like(step.alive_B).float())
        played.steps.append(replace(step, layer=3, action=action))
    among = collect(2, played, reward_B, ppo())
    assert torch.equal(among.log_prob_N, alone.log_prob_N)
    assert torch.equal(among.observed.obs_BD, alone.observed.obs_BD)
    assert not collect(3, played, reward_B, ppo()).log_prob_N.any()
