"""What a rollout records is the probability of its act, and the update computes it again."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor

from crl_exp.analysis.row_random import layer_keys
from crl_exp.generation.controller import StepContext
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, collect
from crl_exp.steering.stages.base import STAGES, Observation, Stage
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, ORDERS, PLAIN, built
from tests.helpers.tiny_steering import agent, pipeline, ppo, random_sae, rolled_out

N, D_MODEL, D_SAE = 12_000, 6, 6
REWARD = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0])
INTENDED = [pair for pair in EACH if pair[0] != "noise"]
# Noise whose act is recorded, strong enough that the policy's own probability is another.
ON_POLICY = {
    "gaussian": {"std": 2.0, "on_policy": True},
    "epsilon_greedy": {"epsilon": 0.5, "on_policy": True},
}
CHANGED = {
    **{name: ("noise", name, changes) for name, changes in ON_POLICY.items()},
    "cold": ("activation", "gumbel_topk", {"temperature": 0.1}),
    "hot": ("activation", "gumbel_topk", {"temperature": 3.0}),
    "kept": ("activation", "gumbel_topk", {"temperature": 0.5, "top": 4}),
}


def acting(group: str, name: str, k: int = 1, order=STAGES, **changes) -> LayerAgent:
    stages: dict[str, Stage] = {g: built(g, PLAIN[g]) for g in PLAIN}
    stages[group] = built(group, name, **changes)
    return agent(random_sae(2, D_MODEL, D_SAE), D_MODEL, pipeline(order, **stages), 0.5, k=k)


def played(made: LayerAgent, seed: int = 0) -> tuple[Observation, Tensor, Tensor]:
    """The same token played N times: what was observed, chosen [N, K] and recorded [N]."""
    draw, n_features = torch.Generator().manual_seed(1), len(made.allowed_C)
    acts_C = torch.rand(n_features, generator=draw).where(torch.arange(n_features) != 2, 0.0)
    held = {
        "feature_acts_BC": acts_C.expand(N, -1), "seen_BC": (acts_C > 0).expand(N, -1),
        "importance_BC": acts_C.expand(N, -1), "past_B": torch.full((N,), 1.0),
        "prompt_tokens_B": torch.full((N,), 5),
    }  # fmt: skip
    x_BD = torch.randn(1, D_MODEL, generator=draw).expand(N, -1)
    with torch.no_grad():
        out = made(x_BD, held, torch.tensor(1), layer_keys(seed, torch.arange(N), 2), 0.25)
    names = ("obs_BD", "token_index_B", "draw_key_B", "progress_B")
    at = Observation(**{name: out.get(name) for name in names}, **held)  # type: ignore[arg-type]
    return at, out["choice_BK"], out["log_prob_B"]


def deviations(made: LayerAgent) -> Tensor:
    """By how many standard errors the first choices differ from what their rows said, [2, C]:
    how often each feature was chosen, and how often where it was said to be likely."""
    at, choice_BK, log_prob_B = played(made)
    with torch.no_grad():
        logits_BC = made.distribution(at).logits_BC
        torch.testing.assert_close(selection.log_prob(logits_BC, choice_BK), log_prob_B)
        said_BC = selection.probabilities(logits_BC).double()
    off_BC = torch.zeros_like(said_BC).scatter(1, choice_BK[:, :1], 1.0) - said_BC
    variance_BC = said_BC * (1 - said_BC) + 1e-9
    return torch.stack([
        off_BC.sum(0) / variance_BC.sum(0).sqrt(),
        (off_BC * said_BC).sum(0) / (variance_BC * said_BC**2 + 1e-9).sum(0).sqrt(),
    ])  # fmt: skip


@pytest.mark.parametrize(("group", "name"), INTENDED, ids=["/".join(pair) for pair in INTENDED])
def test_every_stage_acts_as_it_records(group, name) -> None:
    for order in ORDERS[::7]:
        assert float(deviations(acting(group, name, order=order)).abs().max()) < 4.5


@pytest.mark.parametrize("which", CHANGED)
def test_what_samples_otherwise_acts_as_it_records(which) -> None:
    group, name, changes = CHANGED[which]
    for order in ORDERS[::7]:
        made = acting(group, name, order=order, **changes)
        assert float(deviations(made).abs().max()) < 4.5


def test_two_features_of_gumbel_topk_come_without_replacement() -> None:
    """Pairs, in their order, are as frequent as recorded; whatever more a draw would keep."""
    for top in (None, 4):
        made = acting("activation", "gumbel_topk", k=2, temperature=0.5, top=top)
        _, choice_BK, log_prob_B = played(made)
        pairs, index_B, count_P = choice_BK.unique(dim=0, return_inverse=True, return_counts=True)
        said_P = torch.zeros(len(pairs)).scatter(0, index_B, log_prob_B.exp())
        assert float(said_P.sum()) == pytest.approx(1.0, abs=0.01)
        off_P = (count_P / N - said_P).abs() / (said_P * (1 - said_P) / N).sqrt()
        assert float(off_P[N * said_P > 10].max()) < 4.5


def test_gumbel_topk_by_hand() -> None:
    """Logits ln 2 and 0 at temperature ½: 4/5 and 1/5, recorded and done."""
    made = acting("activation", "gumbel_topk", temperature=0.5)
    made.correlation_C.fill_(-50.0)
    made.correlation_C[:2] = torch.tensor([log(2.0), 0.0])
    for parameter in made.policy.parameters():
        parameter.data.zero_()
    _, choice_BK, log_prob_B = played(made)
    first_B = choice_BK[:, 0] == 0
    assert log_prob_B[first_B].exp().unique().tolist() == pytest.approx([0.8])
    assert float(first_B.float().mean()) == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize("name", ON_POLICY)
def test_noise_is_off_policy_unless_asked_for(name) -> None:
    """By intent it records the policy's own probability, which isn't that of the act."""
    changes = {**ON_POLICY[name], "on_policy": False}
    made = acting("noise", name, **changes)
    assert played(made)[0].draw_key_B is None
    assert float(deviations(made).abs().max()) > 10


@pytest.mark.parametrize("name", ON_POLICY)
@pytest.mark.parametrize("k", [1, 2])
def test_ratio_is_one_with_noise_that_is_on_policy(name, k) -> None:
    """In a rollout through a model; the noise drawn again, with a schedule, is the same."""
    made = []
    for order in ORDERS[::5]:
        stages = {g: built(g, PLAIN[g]) for g in PLAIN}
        stages["fusion"] = built("fusion", "attention")
        stages["noise"] = built("noise", name, **ON_POLICY[name], schedule="cosine")
        sae = random_sae(2, tiny.D_MODEL)
        made.append(agent(sae, tiny.D_MODEL, pipeline(order, **stages), 0.3, k=k))
    for one, answers in zip(made, rolled_out(made), strict=True):
        learner = LayerLearner(one, ppo(minibatches=2))
        rollout = collect(2, answers, REWARD, learner.algorithm)
        bare = Observation(**{**vars(rollout.observed), "draw_key_B": None})
        own_N = selection.log_prob(one.distribution(bare).logits_BC, rollout.choice_NK).detach()
        assert float((own_N - rollout.log_prob_N).abs().max()) > 0.05, "noise shows in the record"
        learner.update(rollout, 1, torch.Generator().manual_seed(0))
        assert learner.first_ratio_N is not None
        torch.testing.assert_close(
            learner.first_ratio_N, torch.ones_like(learner.first_ratio_N), atol=1e-4, rtol=0
        )


def test_gumbel_always_samples_in_an_evaluation_and_by_the_seed() -> None:
    x_BD = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(1)).expand(500, -1)

    def chosen(name: str, seed: int) -> list[int]:
        one = acting("activation", name)
        one.seed = seed
        context = StepContext(0, list(range(500)), torch.ones(500, dtype=torch.bool))
        action = PolicyController({2: one}, Decay(1.0)).act(2, x_BD, context)
        assert not action.notes, "nothing is kept for an update"
        return action.feature_idx_BK[:, 0].tolist()

    assert len(set(chosen("gumbel_topk", 0))) == 1
    assert len(set(chosen("gumbel_topk_author", 0))) > 1
    assert chosen("gumbel_topk_author", 0) == chosen("gumbel_topk_author", 0)
    assert chosen("gumbel_topk_author", 0) != chosen("gumbel_topk_author", 1)


def test_an_evaluation_samples_alike_in_whatever_parts_a_split_is_answered() -> None:
    """By the item: not anew from the first number in each part, nor by the size of the parts."""
    one, n = acting("activation", "gumbel_topk_author"), 60
    x_ND = torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(1))

    def chosen(size: int) -> list[int]:
        found: list[int] = []
        for items in torch.arange(n).split(size):
            context = StepContext(0, items.tolist(), torch.ones(len(items), dtype=torch.bool))
            action = PolicyController({2: one}, Decay(1.0)).act(2, x_ND[items], context)
            found += action.feature_idx_BK[:, 0].tolist()
        return found

    assert chosen(n) == chosen(7) == chosen(20)
