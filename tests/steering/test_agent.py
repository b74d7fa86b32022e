"""A layer's agent with every stage of `conf/`: one distribution; learned, averaged, kept."""

from __future__ import annotations

import copy

import pytest
import torch

from crl_exp.analysis.row_random import RowRandom
from crl_exp.generation.controller import one_length
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.running import OnlineCorrelation
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, collect
from crl_exp.steering.policy.networks import Distribution
from crl_exp.steering.stages.base import Observation
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, ORDERS, PLAIN, built
from tests.helpers.tiny_steering import agent, grpo, pipeline, ppo, random_sae, rolled_out

REWARD = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0])
# What each stage learns by itself.
LEARNED = {
    ("fusion", "learnable_mix"): ["m"],
    ("activation", "jumprelu_learnable"): ["log_theta_C"],
    ("activation", "sparse_gate"): ["gate_C"],
    ("activation", "sparse_attention"): ["attention.weight", "attention.bias"],
    ("activation", "sparse_attention_author"): ["attention.weight", "attention.bias"],
}


def with_option(group: str, name: str, order=tuple(PLAIN), **changes) -> LayerAgent:
    stages = {g: built(g, name if g == group else PLAIN[g]) for g in PLAIN}
    sae = random_sae(2, tiny.D_MODEL)
    return agent(sae, tiny.D_MODEL, pipeline(order, **stages), **changes)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), EACH)
def test_ratio_is_one_at_the_first_minibatch_in_every_order(group, name) -> None:
    """Of a rollout over answers of several tokens, with noise, and rows that end early."""
    noisy = {"noise": built("noise", "gaussian")} if group != "noise" else {}
    agents = []
    for order in ORDERS:
        stages = {g: built(g, name if g == group else PLAIN[g]) for g in PLAIN} | noisy
        agents.append(
            agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline(order, **stages), scale=0.3)
        )
    for made, played in zip(agents, rolled_out(agents), strict=True):
        learner = LayerLearner(made, ppo(minibatches=2, lr_policy=1.0, lr_critic=1.0))
        rollout = collect(2, played, REWARD, learner.algorithm)
        learner.update(rollout, 1, torch.Generator().manual_seed(0))
        ratio_N = learner.first_ratio_N
        assert ratio_N is not None and len(ratio_N) == (len(rollout.log_prob_N) + 1) // 2
        torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), atol=1e-4, rtol=0)
    later = made.distribution(rollout.observed).logits_BC
    moved_N = selection.log_prob(later, rollout.choice_NK) - rollout.log_prob_N
    assert moved_N.abs().max() > 0.05, "the parameters did move: the ratio could be another"


@pytest.mark.parametrize(("critic", "algorithm"), [("v", ppo()), ("q", ppo()), ("v", grpo())])
def test_ratio_is_one_with_every_critic_and_algorithm(critic, algorithm) -> None:
    made = with_option("mask", "active", critic=critic, with_critic=algorithm.uses_critic, k=3)
    played = rolled_out([made])[0]
    learner = LayerLearner(made, algorithm)
    watched = learner.update(collect(2, played, REWARD, algorithm), 1, torch.Generator())
    ratio_N = learner.first_ratio_N
    assert ratio_N is not None
    torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), atol=1e-4, rtol=0)
    assert ("critic_loss" in watched) == algorithm.uses_critic
    assert all(step.action.value_B is None for step in played.steps) != algorithm.uses_critic


@pytest.mark.parametrize(("group", "name"), LEARNED, ids="/".join)
def test_what_a_stage_learns_is_part_of_the_agent(group, name) -> None:
    """It moves by the policy's loss, is averaged, and comes back from a checkpoint."""
    made = with_option(group, name)
    names = [f"pipeline.stages.{group}.{n}" for n in LEARNED[group, name]]
    assert [n for n, _ in made.named_parameters() if n.startswith("pipeline")] == names
    if name == "jumprelu_learnable":
        with torch.no_grad():  # in the middle of the logits, or no logit is near its threshold
            made.pipeline.stages["activation"].log_theta_C.fill_(-2.0)  # type: ignore[union-attr, operator]
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    learner = LayerLearner(made, ppo(average=0.75, lr_policy=0.1))
    rollout = collect(2, rolled_out([made])[0], REWARD, learner.algorithm)
    learner.update(rollout, 1, torch.Generator())
    now, mean = dict(made.named_parameters()), dict(learner.averaged.named_parameters())
    for n in names:
        assert not torch.equal(now[n], before[n])
        torch.testing.assert_close(mean[n], 0.75 * before[n] + 0.25 * now[n])
    other = LayerLearner(with_option(group, name, seed=5), ppo(average=0.75, lr_policy=0.1))
    other.load(copy.deepcopy(learner.state()))
    for n, value in {**now, **{f"mean {n}": p for n, p in mean.items()}}.items():
        source = other.averaged if n.startswith("mean ") else other.agent
        assert torch.equal(dict(source.named_parameters())[n.removeprefix("mean ")], value)


def test_only_the_named_stages_learn() -> None:
    for group, name in EACH:
        learned = [n for n, _ in with_option(group, name).pipeline.named_parameters()]
        assert len(learned) == len(LEARNED.get((group, name), [])), (group, name)


# --- the critic's kinds ---


def test_a_q_critic_by_hand() -> None:
    """π = (3/4, 1/4, 0): V = .75 · 2 + .25 · 6 = 3. Chosen {1, 0}: mean 4; nothing chosen: 0."""
    logits = torch.tensor([[3.0, 1.0, 0.0]]).log()
    q = torch.tensor([[2.0, 6.0, 100.0]])
    now = Distribution.of(logits, q, "q")
    assert now.value_B is not None and now.value_B.tolist() == pytest.approx([3.0])
    assert now.estimate(torch.tensor([[1, 0]])).tolist() == [4.0]
    assert now.estimate(torch.tensor([[1, -1]])).tolist() == [6.0]
    assert now.estimate(torch.tensor([[-1, -1]])).tolist() == [0.0]
    v = Distribution.of(logits, torch.tensor([[0.7]]), "v")
    assert v.value_B is not None and v.value_B.tolist() == pytest.approx([0.7])
    assert v.estimate(torch.tensor([[1, 0]])).tolist() == pytest.approx([0.7])
    assert Distribution.of(logits, None, "v").value_B is None


def test_a_q_critic_learns_at_the_chosen_feature_only() -> None:
    made = with_option("fusion", "add", critic="q", k=1)
    played = rolled_out([made])[0]
    learner = LayerLearner(made, ppo(lr_critic=0.1))
    assert made.critic is not None
    before = made.critic[-1].bias.detach().clone()  # type: ignore[union-attr, operator]
    rollout = collect(2, played, REWARD, learner.algorithm)
    learner.update(rollout, 1, torch.Generator())
    moved = (made.critic[-1].bias != before).nonzero()[:, 0].tolist()  # type: ignore[union-attr]
    assert moved == sorted(set(rollout.choice_NK.flatten().tolist()))


# --- memory of earlier tokens ---


def test_what_is_remembered_of_an_answer() -> None:
    """Recorded at each token: what was seen so far, the running mean, the earlier lengths."""
    stages = {"mask": built("mask", "all", keep=1.0), "fusion": built("fusion", "attention")}
    seen_stages = {"mask": built("mask", "generation")}
    one = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline(**stages))
    other = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline(**seen_stages))
    first, second = rolled_out([one, other])
    lm = tiny.language_model("llama")
    for played, made in ((first, one), (second, other)):
        by_row = {}
        for step in sorted(played.steps, key=lambda s: s.token_index):
            names = ("obs_BD", "seen_BC", "importance_BC", "past_B")
            at = {k: step.action.notes.get(k) for k in names}
            for i, row in enumerate(step.rows):
                if step.alive_B[i]:
                    kept = {k: None if t is None else t[i] for k, t in at.items()}
                    by_row.setdefault(row, []).append(kept)
        for row, tokens in by_row.items():
            x_TD = torch.stack([t["obs_BD"] for t in tokens]) * made.std_D + made.mean_D
            acts_TC = made.sae[0].encode(x_TD)[:, made.allowed_C]
            if made is other:
                so_far_TC = (acts_TC > 0).cumsum(0) > 0
                assert torch.equal(torch.stack([t["seen_BC"] for t in tokens]), so_far_TC)
                continue
            prompt = torch.tensor([tiny.prompts(8)[row]])
            hidden = lm.model(prompt, output_hidden_states=True).hidden_states[3][0]  # type: ignore[operator]
            before_TC = made.sae[0].encode(hidden[1:-1])[:, made.allowed_C]
            for t, token in enumerate(tokens):
                mean_C = torch.cat([before_TC, acts_TC[: t + 1]]).mean(0)
                torch.testing.assert_close(token["importance_BC"], mean_C, atol=1e-4, rtol=1e-4)
            with torch.no_grad():
                norm_T = made.policy(torch.stack([t["obs_BD"] for t in tokens])).norm(dim=1)
            past_T = torch.stack([t["past_B"] for t in tokens])
            assert past_T[0].isneginf()
            before_T = norm_T.logcumsumexp(0)[:-1]
            torch.testing.assert_close(past_T[1:], before_T, atol=1e-4, rtol=1e-4)


def test_attention_and_position_over_the_whole_sequence() -> None:
    """The prompt's tokens count: the policy's logits there, against the model's own residuals."""
    one, other = (with_option("fusion", f"{n}_author") for n in ("attention", "position_linear"))
    first, second = rolled_out([one, other])
    lm = tiny.language_model("llama")
    for step in first.steps:
        if step.token_index > 0:
            continue
        for i, row in enumerate(step.rows):
            prompt = torch.tensor([tiny.prompts(8)[row]])
            hidden = lm.model(prompt, output_hidden_states=True).hidden_states[3][0]  # type: ignore[operator]
            with torch.no_grad():
                length_T = one.policy(one.standardise(hidden[:-1])).norm(dim=1)
            past = step.action.notes["past_B"][i]
            torch.testing.assert_close(past, length_T.logsumexp(0), atol=1e-4, rtol=1e-4)
    for step in second.steps:
        lengths = [len(tiny.prompts(8)[row]) for row in step.rows]
        assert step.action.notes["prompt_tokens_B"].tolist() == lengths


def test_context_scale_reads_the_length_of_the_residual_itself() -> None:
    """(‖x‖ − 4) / 1.5 with stage 1's mean and deviation, x before it was standardised."""
    made = with_option("fusion", "context_scale")
    x_BD = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(2))
    obs_BD = made.standardise(x_BD)
    share_B1 = ((x_BD.norm(dim=1) - 4.0) / 1.5).sigmoid()[:, None]
    weight = made.pipeline.stages["fusion"].weight
    expected = made.policy(obs_BD) + weight * share_B1 * made.correlation_C
    at = Observation(obs_BD, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(made.distribution(at).logits_BC, expected)


# --- correlations that go on ---


def test_online_correlation_equals_one_pass_over_both() -> None:
    draw = torch.Generator().manual_seed(0)
    stage1, rollout = torch.rand(50, 5, generator=draw), torch.rand(8, 3, generator=draw)
    y1, allowed = (torch.rand(50, generator=draw) > 0.5).float(), torch.tensor([0, 2, 4])
    online = OnlineCorrelation(Moments.of(stage1, y1), allowed, "max", "keep")
    got = online.update(rollout, REWARD)
    z, y = torch.cat([stage1[:, allowed], rollout]), torch.cat([y1, REWARD])
    both = torch.cat([z, y[:, None]], dim=1)
    torch.testing.assert_close(got, torch.corrcoef(both.double().T)[:3, 3])
    again = OnlineCorrelation(Moments.of(stage1, y1), allowed, "max", "clip")
    again.load_state_dict(online.state_dict())
    assert torch.equal(again.update(rollout, REWARD), online.update(rollout, REWARD).clamp(min=0))


@pytest.mark.parametrize("coefficient", [2.0, -2.0])
@pytest.mark.parametrize("pooling", ["max", "mean", "last_prompt"])
def test_a_rollout_moves_the_correlations_of_both_agents(pooling, coefficient) -> None:
    """Chosen features count at their coefficient; checked against a loop over the tokens."""
    made = with_option("fusion", "add", online=True, k=2)
    assert made.online is not None
    made.online.pooling = pooling
    made.coefficient_C.fill_(coefficient)
    learner, played = LayerLearner(made, ppo()), rolled_out([made])[0]
    expected = copy.deepcopy(made.online)
    z_BC = torch.zeros(8, len(made.allowed_C))
    for row in range(8):
        tokens = []
        for step in sorted(played.steps, key=lambda s: s.token_index):
            if row in step.rows and step.alive_B[step.rows.index(row)]:
                i = step.rows.index(row)
                acts = step.action.notes["feature_acts_BC"][i].clone()
                for j in step.action.notes["choice_BK"][i].tolist():
                    acts[j] = coefficient
                tokens.append(acts)
        pools = {"max": torch.stack(tokens).amax(0), "mean": torch.stack(tokens).mean(0)}
        z_BC[row] = pools.get(pooling, tokens[0])
    learner.follow(played, REWARD)
    torch.testing.assert_close(made.correlation_C, expected.update(z_BC, REWARD).float())
    assert torch.equal(learner.averaged.correlation_C, made.correlation_C)
    assert any("online.mean_C" in name for name in learner.state()["agent"])


@pytest.mark.parametrize("combine", ["sum", "one_length"])
def test_several_features_may_be_no_longer_than_one(combine) -> None:
    """What is added is the logged coefficients times the rows, and of the length asked for."""
    made = with_option("fusion", "add", k=3, combine=combine)
    W_dec_FD = made.sae[0].W_dec_FD
    for step in rolled_out([made])[0].steps:
        action = step.action
        rows_BKD = W_dec_FD[action.feature_idx_BK]
        delta_BD = (action.coefficient_BK[..., None] * rows_BKD).sum(1)
        torch.testing.assert_close(action.delta_BD, delta_BD)
        plain_BD = (2.0 * rows_BKD).sum(1)
        if combine == "one_length":  # unit rows, each at coefficient 2
            torch.testing.assert_close(delta_BD.norm(dim=1), torch.full((len(delta_BD),), 2.0))
            plain_BD = plain_BD * 2.0 / plain_BD.norm(dim=1, keepdim=True)
        torch.testing.assert_close(delta_BD, plain_BD)
    empty = one_length(torch.tensor([[-1, -1], [0, -1]]), torch.full((2, 2), 2.0), W_dec_FD)
    assert empty.tolist() == [[1.0], pytest.approx([1.0])]


def test_an_empty_mask_steers_nothing() -> None:
    """At a row where the mask leaves nothing: no feature, nothing added, probability one."""
    made = with_option("mask", "active", k=2)
    obs = torch.zeros(2, tiny.D_MODEL)
    acts = torch.zeros(2, len(made.allowed_C))
    acts[1, 4] = 1.0
    now = made.distribution(Observation(obs, torch.zeros(2, dtype=torch.long), acts))
    choice = selection.sample(now.logits_BC, 2, RowRandom(0, torch.arange(2)))
    assert choice.tolist() == [[-1, -1], [4, -1]]
    assert selection.log_prob(now.logits_BC, choice).tolist() == [0.0, 0.0]
    assert selection.entropy(now.logits_BC).tolist() == [0.0, 0.0]
