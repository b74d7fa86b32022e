"""One more action, which adds nothing, and doses: additions, probabilities, learning."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from crl_exp.analysis.row_random import RowRandom, layer_keys
from crl_exp.generation.controller import StepContext, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.policy.actions import NULL, Actions
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, collect
from crl_exp.steering.stages.base import Observation
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, ORDERS, PLAIN, built
from tests.helpers.tiny_steering import agent, grpo, pipeline, ppo, random_sae, rolled_out

REWARD = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0])
DOSES = [0.5, 2.0]
UNIT = 2.0  # what `tiny_steering.agent` gives every feature; its rows are of length 1


def acting(
    options: dict[str, str] | None = None,
    order=tuple(PLAIN),
    noise: dict | None = None,
    **more: Any,
) -> LayerAgent:
    """noise: changes to that stage. more: of the agent."""
    stages = {g: built(g, (options or {}).get(g, PLAIN[g])) for g in PLAIN}
    if noise:
        stages["noise"] = built("noise", (options or {})["noise"], **noise)
    values = {"null_action": True, "k": 1, **more}
    return agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline(order, **stages), **values)


def observed(made: LayerAgent, n: int, same: bool = False) -> Observation:
    """Rows with all that a stage may ask for; in the first no feature is active."""
    draw = torch.Generator().manual_seed(1)
    n_features = len(made.allowed_C)
    acts_BC = torch.randn(n, n_features, generator=draw).clamp(min=0)
    acts_BC[0] = 0
    obs_BD = torch.randn(n, tiny.D_MODEL, generator=draw)
    if same:
        acts_BC, obs_BD = acts_BC[1:2].expand(n, -1), obs_BD[1:2].expand(n, -1)
    return Observation(
        obs_BD, torch.full((n,), 1), acts_BC, acts_BC > 0, acts_BC, torch.ones(n),
        torch.full((n,), 5),
    )  # fmt: skip


def null_share(made: LayerAgent, at: Observation) -> Tensor:
    """Its probability at each row [B]."""
    with torch.no_grad():
        return selection.probabilities(made.distribution(at).logits_BC)[:, -1]


# --- at the start ---


@pytest.mark.parametrize(("group", "name"), EACH, ids=["/".join(pair) for pair in EACH])
def test_it_starts_at_null_start_whatever_the_stages_do(group, name) -> None:
    """At every row where a feature may be chosen; where none may, nor may it."""
    for start, order in zip((0.1, 0.5, 0.9), ORDERS[::11], strict=False):
        for critic, doses in (("v", []), ("q", DOSES)):
            made = acting(
                {group: name}, order, scale=0.0, null_start=start, critic=critic, doses=doses
            )
            at = observed(made, 6)
            found_B = null_share(made, at)
            logits_BX = made.distribution(at).logits_BC
            possible_B = ~logits_BX[:, :-1].isneginf().all(dim=1)
            assert (found_B[possible_B] - start).abs().max() < 1e-6
            assert (found_B[~possible_B] == 0).all()
            assert bool(possible_B[1:].all()), "nothing was looked at"
            assert bool(possible_B[0]) == (name not in ("active", "generation", "all"))


def test_the_features_share_the_rest_as_they_share_all() -> None:
    """Beside the same weights without the null action."""
    made, plain = acting(scale=0.3), acting(null_action=False, scale=0.0)
    with torch.no_grad():
        plain.policy[-1].weight.copy_(made.policy[-1].weight[:-1])  # type: ignore[union-attr, operator, index]
        plain.policy[-1].bias.copy_(made.policy[-1].bias[:-1])  # type: ignore[union-attr, operator, index]
    at = observed(made, 6)
    share_BX = selection.probabilities(made.distribution(at).logits_BC)
    expected_BC = selection.probabilities(plain.distribution(at).logits_BC)
    torch.testing.assert_close(share_BX[:, :-1] / (1 - share_BX[:, -1:]), expected_BC)


# --- what is added ---


def test_a_token_left_alone_keeps_its_residual_to_the_last_bit() -> None:
    """-0.0 too; at the other tokens something is added."""
    controller = PolicyController({2: acting(k=2)}, Decay(1.0), torch.Generator().manual_seed(0))
    x_BD = torch.randn(64, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    x_BD[:, 3] = -0.0
    context = StepContext(0, list(range(64)), torch.ones(64, dtype=torch.bool))
    action = controller.act(2, x_BD, context)
    alone_B = action.feature_idx_BK[:, 0] == NULL
    assert 10 < int(alone_B.sum()) < 54
    after_BD = x_BD + action.delta_BD
    same_B = (after_BD.view(torch.int32) == x_BD.view(torch.int32)).all(dim=1)
    assert torch.equal(same_B, alone_B)
    assert (action.feature_idx_BK[alone_B, 1] == -1).all(), "behind it there is no more"
    assert (action.delta_BD[alone_B].norm(dim=1) == 0).all()


@pytest.mark.parametrize(("progress", "part"), [(0.0, 0.0), (0.1, 0.25), (0.4, 1.0), (0.9, 1.0)])
def test_the_dose_grows_in_rollouts_and_is_whole_in_an_evaluation(progress, part) -> None:
    """The same features are drawn, at a part of the dose; over .4 of the updates."""
    grows, plain = acting(k=2, dose_growth=0.4), acting(k=2)
    x_BD = torch.randn(16, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))

    def added(made: LayerAgent, explore: bool):
        draw = torch.Generator().manual_seed(0) if explore else None
        controller = PolicyController({2: made}, Decay(1.0), draw, progress)
        context = StepContext(0, list(range(16)), torch.ones(16, dtype=torch.bool))
        return controller.act(2, x_BD, context)

    for explore, expected in ((True, part), (False, 1.0)):
        got, whole = added(grows, explore), added(plain, explore)
        assert torch.equal(got.feature_idx_BK, whole.feature_idx_BK)
        torch.testing.assert_close(got.coefficient_BK, expected * whole.coefficient_BK)
        torch.testing.assert_close(got.delta_BD, expected * whole.delta_BD)
        assert bool((whole.delta_BD != 0).any())


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_never_taken_it_changes_nothing_and_always_taken_it_is_the_unsteered_model(bias) -> None:
    made, plain = acting(), acting(null_action=False)
    with torch.no_grad():
        for one, other in zip(plain.policy[-1].parameters(), made.policy[-1].parameters(),  # type: ignore[union-attr, operator]
                              strict=True):  # fmt: skip
            other[:-1], other[-1:] = one, 0
        made.policy[-1].bias[-1] = bias  # type: ignore[union-attr, index, operator]
    lm = tiny.language_model("llama")
    engine = Engine(lm, EngineConfig(8, 1.0, "eager"))
    others = Unsteered() if bias > 0 else PolicyController({2: plain}, Decay(1.0))
    jobs = [Job(PolicyController({2: made}, Decay(1.0)), range(8)), Job(others, range(8))]
    got, expected = engine.generate(engine.read(tiny.prompts(8)), jobs, 6, record=True)
    assert got.tokens == expected.tokens
    for step in got.steps:
        assert ((step.action.feature_idx_BK == NULL) == (bias > 0)).all()
    for step, other in zip(got.steps, expected.steps, strict=bias < 0):
        torch.testing.assert_close(step.action.delta_BD, other.action.delta_BD, rtol=0, atol=0)


@pytest.mark.parametrize("null", [False, True])
def test_what_is_added_is_as_long_as_its_dose(null) -> None:
    (played,) = rolled_out([acting(null_action=null, doses=DOSES)])
    lengths: set[float] = set()
    for step in played.steps:
        added_B = step.action.feature_idx_BK[:, 0] >= 0
        norm_B = step.action.delta_BD[added_B].norm(dim=1)
        dose_B = (step.action.notes["choice_BK"][added_B, 0] // 15).tolist()
        expected = [UNIT * DOSES[dose] for dose in dose_B]
        assert norm_B.tolist() == pytest.approx(expected, rel=1e-5)
        assert step.action.coefficient_BK[added_B, 0].tolist() == pytest.approx(expected)
        lengths |= set(expected)
    assert lengths == {UNIT * dose for dose in DOSES}


def test_of_several_features_none_comes_at_two_doses() -> None:
    for step in rolled_out([acting(k=4, doses=DOSES, null_start=0.2)])[0].steps:
        for chosen in step.action.feature_idx_BK.tolist():
            features = [feature for feature in chosen if feature >= 0]
            assert len(set(features)) == len(features)
            behind = chosen[chosen.index(NULL) + 1 :] if NULL in chosen else []
            assert set(behind) <= {-1}, "once it is drawn there is no more"


# --- choosing, and the probability of a choice ---


def all_choices(actions: Actions, k: int) -> Tensor:
    """Every ordered choice that can be drawn, where all features may be."""
    found = set()
    for order in permutations(range(len(actions)), k):
        kept: list[int] = []
        for one in order:
            taken = {other % actions.n_features for other in kept}
            if actions.n_additions in kept or (
                one < actions.n_additions and one % actions.n_features in taken
            ):
                break
            kept.append(one)
        ended = len(kept) == k or actions.n_additions in kept
        if ended:
            found.add((*kept, *[-1] * (k - len(kept))))
    return torch.tensor(sorted(found))


@pytest.mark.parametrize(
    ("actions", "k"),
    [(Actions(3, 1, True), 1), (Actions(3, 1, True), 2), (Actions(3, 2, True), 2),
     (Actions(3, 2), 3)],
)  # fmt: skip
def test_choices_are_as_frequent_as_recorded(actions, k) -> None:
    """Their probabilities sum to 1, and a chi-square over 40,000 draws doesn't object."""
    n, draw = 40_000, torch.Generator().manual_seed(0)
    logits_1X = torch.randn(1, len(actions), generator=draw)
    choices = all_choices(actions, k)
    said_P = actions.log_prob(logits_1X.expand(len(choices), -1), choices).exp().double()
    assert float(said_P.sum()) == pytest.approx(1.0, abs=1e-5)
    drawn = actions.sample(logits_1X.expand(n, -1), k, RowRandom(0, torch.arange(n))).tolist()
    index = {tuple(choice): i for i, choice in enumerate(choices.tolist())}
    count_P = torch.bincount(
        torch.tensor([index[tuple(one)] for one in drawn]), minlength=len(index)
    )
    off_P = (count_P / n - said_P).abs() / (said_P * (1 - said_P) / n).sqrt()
    assert float(off_P.max()) < 4.5


def test_an_evaluation_takes_it_where_it_has_more_than_half() -> None:
    """By hand, k = 2: .6; .4 and the best feature, behind which it has .4/.7 of what is left; .2,
    where two features are more likely than it still after the first; none may be chosen."""
    inf = float("inf")
    share_BX = torch.tensor([[0.3, 0.1, 0.0, 0.6], [0.3, 0.2, 0.1, 0.4], [0.31, 0.29, 0.2, 0.2]])
    logits_BX = torch.cat([share_BX.log(), torch.full((1, 4), -inf)])
    found = Actions(3, 1, True).greedy(logits_BX, 2).tolist()
    assert found == [[3, -1], [0, 3], [0, 1], [-1, -1]]
    assert Actions(3, 2).greedy(torch.tensor([[0.0, 5, 1, 3, 4, 2]]), 3).tolist() == [[1, 3, 5]]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize(
    ("name", "strong"), [("gaussian", {"std": 2.0}), ("epsilon_greedy", {"epsilon": 1.0})]
)
def test_noise_acts_on_it_too(name, strong, on_policy) -> None:
    """An even choice is even over features and null action, whatever it had; std 2 moves it."""
    made = acting({"noise": name}, noise={**strong, "on_policy": on_policy}, scale=0.3,
                  null_start=0.97)  # fmt: skip
    n = 4000
    at = observed(made, n, same=True)
    x_BD = at.obs_BD * made.std_D + made.mean_D
    with torch.no_grad():
        out = made(x_BD, {}, torch.tensor(1), layer_keys(0, torch.arange(n), 2), 0.0)
    drawn = float((out["choice_BK"] == 15).float().mean())
    quiet = float(null_share(made, at)[0])
    if name == "epsilon_greedy":
        assert drawn == pytest.approx(1 / 16, abs=0.02) and quiet > 0.8
    else:
        assert abs(drawn - quiet) > 0.02
    names = ("draw_key_B", "progress_B")
    seen = Observation(out["obs_BD"], out["token_index_B"], **{n: out.get(n) for n in names})
    again = made.actions.log_prob(made.distribution(seen).logits_BC, out["choice_BK"])
    torch.testing.assert_close(again, out["log_prob_B"])
    said = null_share(made, seen)
    assert float(said.mean()) == pytest.approx(drawn if on_policy else quiet, abs=0.02)


# --- learning ---


@pytest.mark.parametrize(
    ("critic", "algorithm"), [("v", ppo()), ("q", ppo()), ("v", grpo())], ids=["v", "q", "grpo"]
)
@pytest.mark.parametrize("k", [1, 3])
def test_ratio_is_one_with_every_critic_and_algorithm(critic, algorithm, k) -> None:
    """Noise that is on-policy, a mask that leaves nothing at some tokens, doses, rows that end."""
    made = acting(
        {"mask": "active", "noise": "gaussian"}, noise={"on_policy": True}, critic=critic, k=k,
        with_critic=algorithm.uses_critic, doses=DOSES,
    )  # fmt: skip
    played = rolled_out([made])[0]
    learner = LayerLearner(made, algorithm)
    rollout = collect(2, played, REWARD, algorithm)
    assert bool(made.actions.is_null(rollout.choice_NK).any())
    watched = learner.update(rollout, 1, torch.Generator())
    ratio_N = learner.first_ratio_N
    assert ratio_N is not None
    torch.testing.assert_close(ratio_N, torch.ones_like(ratio_N), atol=1e-4, rtol=0)
    assert all(value == value for value in watched.values())


@pytest.mark.parametrize("wanted", [True, False])
def test_it_is_learned_where_it_is_rewarded(wanted) -> None:
    """Answers whose first token was left alone are rewarded, or those others."""
    made = acting(scale=0.0)
    algorithm = ppo(lr_policy=0.05, ent_coef=0.0)
    learner = LayerLearner(made, algorithm)
    for step in range(4):
        played = rolled_out([made], seed=step)[0]
        first = next(s for s in played.steps if s.token_index == 0)
        reward_B = ((first.action.feature_idx_BK[:, 0] == NULL) == wanted).float()
        learner.update(collect(2, played, reward_B, algorithm), step + 1, torch.Generator())
    share = float(null_share(made, rollout_of(first)).mean())
    assert (share > 0.6) if wanted else (share < 0.4)


def rollout_of(step) -> Observation:
    return Observation(step.action.notes["obs_BD"], step.action.notes["token_index_B"])


def test_where_no_feature_may_be_chosen_nothing_is_learned_and_nothing_breaks() -> None:
    made = acting({"mask": "active"}, scale=0.3)
    at = observed(made, 1)
    now = made.distribution(at)
    choice = made.actions.sample(now.logits_BC, 1, RowRandom(0, torch.arange(1)))
    assert choice.tolist() == [[-1]] and made.actions.greedy(now.logits_BC, 1).tolist() == [[-1]]
    (
        made.actions.log_prob(now.logits_BC, choice) + selection.entropy(now.logits_BC)
    ).sum().backward()
    gradients = [p.grad for p in made.policy.parameters() if p.grad is not None]
    assert gradients and all(bool((g == 0).all()) for g in gradients)


def test_its_bias_is_kept_averaged_and_comes_back() -> None:
    made, other = acting(null_start=0.2, doses=DOSES), acting(seed=3, doses=DOSES)
    learner, second = LayerLearner(made, ppo(average=0.5)), LayerLearner(other, ppo(average=0.5))
    learner.update(collect(2, rolled_out([made])[0], REWARD, ppo()), 1, torch.Generator())
    second.load(learner.state())
    for one, again in ((learner.agent, second.agent), (learner.averaged, second.averaged)):
        for name, value in one.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
    assert "dose_M" in learner.agent.state_dict()
    assert "dose_M" not in acting().state_dict(), "checkpoints without doses stay as they were"


def test_correlations_that_go_on_count_the_dose_and_leave_out_the_null_action() -> None:
    from crl_exp.steering.feature_statistics.running import pooled, steps_of

    made = acting(online=True, doses=DOSES, k=2)
    played = rolled_out([made])[0]
    got_BC = pooled(steps_of(played, 2), 8, "last_prompt", made.actions)
    (first,) = [s for s in played.steps if s.token_index == 0]
    seen = set()
    for i, row in enumerate(first.rows):
        acts = first.action.notes["feature_acts_BC"][i].clone()
        features = first.action.feature_idx_BK[i].tolist()
        for feature, coefficient in zip(features, first.action.coefficient_BK[i], strict=True):
            seen.add(feature if feature < 0 else 0)
            if feature >= 0:
                acts[feature - 1] = coefficient  # all but feature 0 may be steered
        assert torch.equal(got_BC[row], acts)
    assert seen == {0, -1, NULL}
