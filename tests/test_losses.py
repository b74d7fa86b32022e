"""PPO's pure functions by hand, and a layer's update on a small agent."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from crl_exp import selection
from crl_exp.coefficients import Decay
from crl_exp.engine import Engine, EngineConfig, Generation, Job
from crl_exp.learner import LayerLearner, NonFiniteError, Rollout, collect
from crl_exp.losses import gae, ppo_policy_loss, token_weights, value_loss
from crl_exp.policy import LayerAgent, PolicyController
from crl_exp.stages.activation import Identity, JumpReLU
from crl_exp.stages.base import STAGES
from crl_exp.stages.mask import Active, NoMask
from crl_exp.stages.noise import EpsilonGreedy, Gaussian, NoNoise
from tests import tiny
from tests.tiny_steering import agent, pipeline, ppo, random_sae

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
        logits_NC, _ = made.distribution(obs_ND, acts_NC, token_N)
        choice_NK = selection.sample(logits_NC, made.k, draw)
        log_prob_N = selection.log_prob(logits_NC, choice_NK)
    off_policy_N = 0.25 * torch.randn(n, generator=draw, dtype=torch.float64)
    advantage_N, return_N = torch.randn(2, n, generator=draw, dtype=torch.float64)
    return Rollout(
        obs_ND, choice_NK, token_N, acts_NC, log_prob_N + off_policy_N, advantage_N, return_N,
        torch.arange(n) // 3,
    )  # fmt: skip


@pytest.mark.parametrize("flatten_tokens", [True, False])
def test_gradients_match_finite_differences(flatten_tokens: bool) -> None:
    made = agent(random_sae(2, 6, d_sae=6), 6, pipeline(activation=JumpReLU(-0.3))).double()
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


def rolled_out(agents: list[LayerAgent], seed: int = 0) -> list[Generation]:
    """Recorded answers of several agents in one call, rows that end early among them."""
    lm = tiny.language_model("llama")
    lm.model.generation_config.eos_token_id = [1, 6, 9, 14, 27]  # type: ignore[union-attr]
    engine = Engine(lm, EngineConfig(4 * len(agents), 1.0))
    draw = torch.Generator().manual_seed(seed)
    jobs = [Job(PolicyController({2: made}, Decay(1.0), draw), range(8)) for made in agents]
    return engine.generate(engine.read(tiny.prompts(8)), jobs, 4, record=True)


@pytest.mark.parametrize("noise", [NoNoise(), Gaussian(1.0), EpsilonGreedy(0.5)])
@pytest.mark.parametrize("mask", [NoMask(), Active()])
@pytest.mark.parametrize("activation", [Identity(), JumpReLU(None)])
def test_ratio_is_one_at_the_first_minibatch_in_every_order(noise, mask, activation) -> None:
    orders = list(permutations(STAGES))
    sae = random_sae(2, tiny.D_MODEL)
    agents = [
        agent(sae, tiny.D_MODEL, pipeline(o, noise=noise, mask=mask, activation=activation))
        for o in orders
    ]
    reward_B, lengths = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0]), set()
    for order, made, played in zip(orders, agents, rolled_out(agents), strict=True):
        learner = LayerLearner(made, ppo(minibatches=2, lr_policy=1.0, lr_critic=1.0))
        rollout = collect(2, played, reward_B, learner.ppo)
        assert rollout.log_prob_N.min() < -0.1
        lengths.add(len(rollout.log_prob_N))
        learner.update(rollout, 1, torch.Generator().manual_seed(0))
        ratio_N = learner.first_ratio_N
        assert ratio_N is not None and len(ratio_N) == (len(rollout.log_prob_N) + 1) // 2
        torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), atol=1e-4, rtol=0)
        if order == orders[0]:
            # The parameters did move, so that the ratio could have been another.
            later, _ = made.distribution(
                rollout.obs_ND, rollout.feature_acts_NC, rollout.token_index_N
            )
            moved_N = selection.log_prob(later, rollout.choice_NK) - rollout.log_prob_N
            assert moved_N.abs().max() > 0.1
    assert min(lengths) < 32


def test_collected_tokens_carry_their_own_episode() -> None:
    """Returns, advantages and token numbers of ragged answers that were played in two batches."""
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline())
    played = rolled_out([made])[0]
    reward_B = torch.arange(8.0)
    rollout = collect(2, played, reward_B, ppo(gae_lambda=1.0))
    lengths = [min(len(tokens) + 1, 4) for tokens in played.tokens]
    assert len(set(lengths)) > 1
    pairs = set(zip(rollout.episode_N.tolist(), rollout.token_index_N.tolist(), strict=True))
    assert pairs == {(row, t) for row, length in enumerate(lengths) for t in range(length)}
    assert len(rollout.episode_N) == len(pairs)
    assert torch.equal(rollout.return_N, reward_B[rollout.episode_N])
    with torch.no_grad():
        logits, value_N = made.distribution(rollout.obs_ND, None, rollout.token_index_N)
    torch.testing.assert_close(rollout.advantage_N, rollout.return_N - value_N)
    torch.testing.assert_close(rollout.log_prob_N, selection.log_prob(logits, rollout.choice_NK))
    part = rollout.part(torch.tensor([3, 0]))
    assert torch.equal(part.obs_ND, rollout.obs_ND[[3, 0]])
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
