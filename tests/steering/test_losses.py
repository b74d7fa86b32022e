"""PPO's pure functions by hand, and a layer's update on a small agent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crl_exp.analysis.row_random import RowRandom
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, NonFiniteError, Rollout, collect
from crl_exp.steering.policy.losses import (
    gae,
    group_advantage,
    ppo_policy_loss,
    token_weights,
    value_loss,
)
from crl_exp.steering.stages.base import Observation
from crl_exp.steering.stages.threshold import JumpReLU
from tests.helpers import tiny
from tests.helpers.tiny_steering import agent, grpo, pipeline, ppo, random_sae, rolled_out

RATIO = torch.tensor([1.5, 0.5, 1.1, 0.5, 1.5], dtype=torch.float64)
ADVANTAGE = torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)


def test_clipped_loss_by_hand() -> None:
    """Gains 2.4 (clipped), 1, −1.1, −0.8 (clipped), −1.5, weighted .1, .2, .3, .2, .2."""
    old = torch.full((5,), -1.0, dtype=torch.float64)
    new = (old + RATIO.log()).requires_grad_()
    got = ppo_policy_loss(new, old, ADVANTAGE, WEIGHT, clip_coef=0.2)
    assert got.loss.item() == pytest.approx(-(0.24 + 0.2 - 0.33 - 0.16 - 0.3))
    assert float(got.clip_fraction) == pytest.approx(0.1 + 0.2 + 0.2 + 0.2)
    kl = 0.1 * 0.0945349 + 0.2 * 0.1931472 + 0.3 * 0.0046898 + 0.2 * 0.1931472 + 0.2 * 0.0945349
    assert float(got.approx_kl) == pytest.approx(kl, rel=1e-5)
    torch.testing.assert_close(got.ratio_N, RATIO)
    got.loss.backward()
    # d(−wρA)/d log π = −wρA, and nothing where the clip holds.
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0.0, -0.2, 0.33, 0.0, 0.3])


def test_value_loss_by_hand() -> None:
    value, target = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert float(value_loss(value, target, torch.tensor([0.25, 0.75]))) == 0.25 + 3.0


def test_gae_by_hand() -> None:
    """Answers of 3, 1 and 2 tokens; what stands after an end is never read."""
    nan = float("nan")
    value_BT = torch.tensor([[0.5, 0.2, 0.1], [0.3, nan, nan], [0.4, 0.8, nan]])
    alive_BT = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    reward_B = torch.tensor([1.0, 0.0, 1.0])
    got = gae(value_BT, alive_BT, reward_B, 0.5)
    # δ: .2−.5, .1−.2, 1−.1 | 0−.3 | .8−.4, 1−.8
    by_hand = [[-0.125, 0.35, 0.9], [-0.3, 0.0, 0.0], [0.5, 0.2, 0.0]]
    torch.testing.assert_close(got, torch.tensor(by_hand))
    monte_carlo = gae(value_BT, alive_BT, reward_B, 1.0)
    whole = [[0.5, 0.8, 0.9], [-0.3, 0.0, 0.0], [0.6, 0.2, 0.0]]
    torch.testing.assert_close(monte_carlo, torch.tensor(whole))
    one_step = gae(value_BT, alive_BT, reward_B, 0.0)
    deltas = [[-0.3, -0.1, 0.9], [-0.3, 0.0, 0.0], [0.4, 0.2, 0.0]]
    torch.testing.assert_close(one_step, torch.tensor(deltas))


def test_group_advantage_by_hand() -> None:
    """Groups [1, 0, 0, 0]: mean .25, deviation √3/4; [1, 1, 1, 1]: nothing to tell apart."""
    got = group_advantage(torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 0.2, 0.4, 0.2, 0.4]), 4)
    high, low = 3**0.5, -1 / 3**0.5
    assert got.tolist() == pytest.approx([high, low, low, low, 0, 0, 0, 0, -1, 1, -1, 1], abs=1e-5)


def test_grpo_gives_all_tokens_of_an_answer_its_advantage() -> None:
    alive_BT = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    got = grpo(group_size=2).advantages(None, alive_BT, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert got.tolist() == [[1.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert grpo(group_size=3).answered([7, 2]) == [7, 7, 7, 2, 2, 2]
    assert ppo().answered([7, 2]) == [7, 2]


def test_token_weights_both_ways() -> None:
    episode_N = torch.tensor([7, 2, 7, 7, 5])
    assert token_weights(episode_N, True).tolist() == pytest.approx([0.2] * 5)
    third, ninth = 1 / 3, 1 / 9
    assert token_weights(episode_N, False).tolist() == pytest.approx(
        [ninth, third, ninth, ninth, third]
    )


# --- a layer's update ---


def small_rollout(made: LayerAgent, n: int = 12, seed: int = 0) -> Rollout:
    """Made-up tokens of episodes with 3 tokens each, in float64."""
    draw = torch.Generator().manual_seed(seed)
    obs_ND = torch.randn(n, 6, generator=draw, dtype=torch.float64)
    acts_NC = torch.rand(n, len(made.allowed_C), generator=draw, dtype=torch.float64)
    token_N = torch.arange(n) % 3
    with torch.no_grad():
        observed = Observation(obs_ND, token_N, acts_NC)
        logits_NC = made.distribution(observed).logits_BC
        choice_NK = selection.sample(logits_NC, made.k, RowRandom(seed, torch.arange(n)))
        log_prob_N = selection.log_prob(logits_NC, choice_NK)
    off_policy_N = 0.25 * torch.randn(n, generator=draw, dtype=torch.float64)
    advantage_N, return_N = torch.randn(2, n, generator=draw, dtype=torch.float64)
    return Rollout(
        observed, choice_NK, log_prob_N + off_policy_N, advantage_N, return_N,
        torch.arange(n) // 3,
    )  # fmt: skip


@pytest.mark.parametrize("flatten_tokens", [True, False])
def test_gradients_match_finite_differences(flatten_tokens: bool) -> None:
    made = agent(random_sae(2, 6, d_sae=6), 6, pipeline(activation=JumpReLU(-0.3, False))).double()
    learner = LayerLearner(
        made, ppo(lr_policy=0.0, lr_critic=0.0, max_grad_norm=1e9, ent_coef=0.1,
                  flatten_tokens=flatten_tokens)
    )  # fmt: skip
    rollout, before = small_rollout(made), {k: v.clone() for k, v in made.state_dict().items()}

    def losses() -> dict[str, float]:
        seen = learner._minibatch(rollout, 1)
        return {
            "policy": seen["policy_loss"] - 0.1 * seen["entropy"],
            "critic": seen["critic_loss"],
        }

    losses()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    assert {name.split(".")[0] for name in gradients} == {"policy", "critic"}
    for name, parameter in made.named_parameters():
        loss, step = name.split(".")[0], 1e-6
        for index in range(0, parameter.numel(), 3):
            flat = parameter.data.view(-1)
            flat[index] += step
            above = losses()[loss]
            flat[index] -= 2 * step
            below = losses()[loss]
            flat[index] += step
            slope = (above - below) / (2 * step)
            assert float(gradients[name].view(-1)[index]) == pytest.approx(slope, abs=1e-7), name
    assert any(float(g.abs().max()) > 1e-3 for g in gradients.values())
    for name, value in made.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_collected_tokens_carry_their_own_episode() -> None:
    """Returns, advantages and token numbers of ragged answers that were played in two batches."""
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline())
    played = rolled_out([made])[0]
    reward_B = torch.arange(8.0)
    rollout = collect(2, played, reward_B, ppo(gae_lambda=1.0))
    lengths = [min(len(tokens) + 1, 4) for tokens in played.tokens]
    assert len(set(lengths)) > 1
    token_N = rollout.observed.token_index_B
    pairs = set(zip(rollout.episode_N.tolist(), token_N.tolist(), strict=True))
    assert pairs == {(row, t) for row, length in enumerate(lengths) for t in range(length)}
    assert len(rollout.episode_N) == len(pairs)
    assert torch.equal(rollout.return_N, reward_B[rollout.episode_N])
    with torch.no_grad():
        now = made.distribution(rollout.observed)
    assert now.value_B is not None
    torch.testing.assert_close(rollout.advantage_N, rollout.return_N - now.value_B)
    torch.testing.assert_close(
        rollout.log_prob_N, selection.log_prob(now.logits_BC, rollout.choice_NK)
    )
    part = rollout.part(torch.tensor([3, 0]))
    assert torch.equal(part.observed.obs_BD, rollout.observed.obs_BD[[3, 0]])
    assert torch.equal(part.choice_NK, rollout.choice_NK[[3, 0]])


@pytest.mark.parametrize(
    ("spoil", "name"),
    [("advantage_N", "policy_loss"), ("return_N", "critic_loss")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(spoil: str, name: str, value: float) -> None:
    made = agent(random_sae(5, 6, d_sae=6), 6, pipeline()).double()
    learner, rollout = LayerLearner(made, ppo()), small_rollout(made)
    getattr(rollout, spoil)[0] = value
    before = {k: v.clone() for k, v in made.policy.state_dict().items()}
    with pytest.raises(NonFiniteError, match=rf"update 7, layer 5: {name} is"):
        learner.update(rollout, 7, torch.Generator().manual_seed(0))
    if name == "policy_loss":
        assert all(torch.equal(v, before[k]) for k, v in made.policy.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    made = agent(random_sae(5, 6, d_sae=6), 6, pipeline()).double()
    learner, rollout = LayerLearner(made, ppo()), small_rollout(made)
    weight = made.policy[0].weight
    assert isinstance(weight, Tensor)
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weight.detach().clone()
    with pytest.raises(NonFiniteError, match="update 3, layer 5: gradient of policy_loss"):
        learner.update(rollout, 3, torch.Generator().manual_seed(0))
    assert torch.equal(weight, before)


def test_learning_rate_is_annealed_to_the_last_update() -> None:
    made = agent(random_sae(5, 6, d_sae=6), 6, pipeline()).double()
    learner = LayerLearner(made, ppo(anneal_lr=True, n_updates=4, lr_policy=0.4, lr_critic=0.8))
    rates = []
    for step in (1, 2, 4):
        learner.update(small_rollout(made), step, torch.Generator().manual_seed(0))
        optimizers = (learner.policy_optimizer, learner.critic_optimizer)
        rates.append([o.param_groups[0]["lr"] for o in optimizers])
    assert rates == [
        pytest.approx([0.4, 0.8]),
        pytest.approx([0.3, 0.6]),
        pytest.approx([0.1, 0.2]),
    ]


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_averaged_weights_by_hand(decay: float) -> None:
    made = agent(random_sae(5, 6, d_sae=6), 6, pipeline()).double()
    learner = LayerLearner(made, ppo(average=decay, lr_policy=0.1))
    expected = made.state_dict()["policy.0.weight"].clone()
    for step in (1, 2, 3):
        learner.update(small_rollout(made, seed=step), step, torch.Generator().manual_seed(0))
        expected = decay * expected + (1 - decay) * made.state_dict()["policy.0.weight"]
    torch.testing.assert_close(learner.averaged.state_dict()["policy.0.weight"], expected)
    assert learner.averaged.sae[0] is made.sae[0]
