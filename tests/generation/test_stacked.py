"""Policies of one shape and setting act as one: stacked weights give what each gives by itself."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.grouping import PaddedRows, Teams, sized
from crl_exp.generation.results import Generation, Job
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers import policy as policy_team
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.controllers.vector import FixedVectors
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import LayerLearner, collect
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, PLAIN, built
from tests.helpers.tiny_steering import AddVector, agent, pipeline, ppo, random_sae

KINDS = ("llama", "gemma2", "gpt2")
PROMPTS = tiny.prompts(9, seed=1)
NEW_TOKENS = 8
SAE = random_sae(2, tiny.D_MODEL)
NEAR = {"atol": 1e-6, "rtol": 1e-6}


@cache
def model(kind: str) -> LanguageModel:
    """Many tokens end an answer: members lose their rows at different tokens."""
    lm = tiny.language_model(kind)
    lm.model.generation_config.eos_token_id = [1, *range(6, 60, 5)]  # type: ignore[union-attr]
    return lm


def engine(kind: str, batch_size: int = 64) -> Engine:
    return Engine(model(kind), EngineConfig(batch_size, 1.0, "eager"))


def learned(seed: int, explore: bool = True, progress: float = 0.5, **options) -> PolicyController:
    """A policy with weights and random numbers of its own. options: stages, and of `setting`."""
    stages = {group: built(group, options.pop(group, PLAIN[group])) for group in PLAIN}
    made = agent(SAE, tiny.D_MODEL, pipeline(**stages), seed=seed, **options)
    draw = torch.Generator().manual_seed(seed) if explore else None
    return PolicyController({2: made}, Decay(0.9), draw, progress)


def by_themselves(patch: pytest.MonkeyPatch) -> None:
    """Nobody has a batch key: every controller is called for its own rows."""
    patch.setattr(Teams, "batch_key", lambda self, controller, layer: None)


def answers(kind: str, jobs: list[Job], batch_size: int = 64) -> list[Generation]:
    made = engine(kind, batch_size)
    return made.generate(made.read(PROMPTS), jobs, NEW_TOKENS, record=True)


def assert_same(got: list[Generation], expected: list[Generation]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens and len(a.steps) == len(b.steps)
        for x, y in zip(a.steps, b.steps, strict=True):
            assert (x.layer, x.token_index, x.rows) == (y.layer, y.token_index, y.rows)
            assert torch.equal(x.alive_B, y.alive_B)
            assert_same_action(x.action, y.action)


def assert_same_action(a: Action, b: Action) -> None:
    assert torch.equal(a.feature_idx_BK, b.feature_idx_BK)
    assert a.notes.keys() == b.notes.keys()
    one, other = ({**vars(action), **action.notes} for action in (a, b))
    for name in one.keys() - {"notes"}:
        assert (one[name] is None) == (other[name] is None), name
        if one[name] is not None:
            torch.testing.assert_close(one[name], other[name], **NEAR)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [64, 10])
def test_stacked_answers_equal_unstacked_ones(kind, batch_size, monkeypatch) -> None:
    """Members with different numbers of rows, other controllers between them, two batch_keys."""
    draw = torch.Generator().manual_seed(0)
    push = {2: 3 * torch.randn(tiny.D_MODEL, generator=draw)}
    fixed = [FixedFeatures([Steer(2, i, 3.0 + i)], {2: SAE}, Decay(0.9)) for i in range(3)]
    controllers: list[Controller] = [
        learned(1, mask="generation", fusion="attention"), fixed[0], learned(2), learned(3),
        AddVector(push), learned(4, mask="generation", fusion="attention"), fixed[1],
        FixedVectors(push, {2: 2}, Decay(1.0)), learned(5, mask="all", explore=False),
        learned(6, mask="all", explore=False), fixed[2], FixedVectors(push, {2: 2}, Decay(1.0)),
    ]  # fmt: skip
    jobs = [
        Job(controller, [(i + j) % 9 for j in range(3 + i % 4)])
        for i, controller in enumerate(controllers)
    ]
    got = answers(kind, jobs, batch_size)
    assert len({len(tokens) for answer in got for tokens in answer.tokens}) > 4
    with monkeypatch.context() as patch:
        by_themselves(patch)
        assert_same(got, answers(kind, jobs, batch_size))


def rows_of(n: int, seed: int) -> Tensor:
    return torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(seed))


def assert_team_equals_members(members: list[PolicyController], sizes: list[int]) -> None:
    """Over four tokens, so that what stages remember counts."""
    store = Engine(model("llama"), EngineConfig(9, 1.0, "eager")).read(PROMPTS)
    from crl_exp.generation.prompt_features import PromptActs

    def context(n: int) -> StepContext:
        items = list(range(n))
        return StepContext(0, items, torch.ones(n, dtype=torch.bool), {}, PromptActs(store, items))

    alone = [context(n) for n in sizes]
    shared, team = StepContext.joined(alone), Teams().of(members, 2)
    assert team is not None
    for token in range(4):
        x_ND = rows_of(sum(sizes), token)
        for one in (shared, *alone):
            one.token_index = token
        got = team.act(x_ND, shared, sizes)
        for i, x_RD in enumerate(x_ND.split(sizes)):
            at = sum(sizes[:i])
            expected = members[i].act(2, x_RD, alone[i])
            assert_same_action(got.part(slice(at, at + sizes[i])), expected)


@pytest.mark.parametrize(("group", "name"), EACH, ids=["/".join(pair) for pair in EACH])
@pytest.mark.parametrize("critic", ["v", "q"])
def test_every_stage_can_be_stacked(group, name, critic) -> None:
    """Learnable numbers of the stages differ from member to member, as the weights do."""
    options = {"policy_depth": 1, "critic": critic, group: name}
    members = [learned(seed, **options) for seed in range(3)]
    assert len({member.batch_key(2) for member in members}) == 1
    assert_team_equals_members(members, [4, 2, 3])


def test_one_length_and_noise_that_is_on_policy_can_be_stacked() -> None:
    for combine in ("sum", "one_length"):
        members = [learned(seed, combine=combine, k=3, noise="gaussian") for seed in range(3)]
        for member in members:
            member.agents[2].pipeline.stages["noise"].on_policy = True
        assert len({member.batch_key(2) for member in members}) == 1
        assert_team_equals_members(members, [4, 2, 3])


@pytest.mark.parametrize("explore", [True, False])
def test_the_null_action_and_doses_can_be_stacked(explore) -> None:
    """Doses and biases differ from member to member; at half of the updates the dose is .625."""
    options = {"null_action": True, "k": 2, "mask": "active", "noise": "epsilon_greedy",
               "dose_growth": 0.8}  # fmt: skip
    members = [
        learned(seed, explore, doses=[0.5 + seed, 0.25], null_start=0.2 + 0.3 * seed, **options)
        for seed in range(3)
    ]
    assert len({member.batch_key(2) for member in members}) == 1
    assert_team_equals_members(members, [4, 2, 3])


@pytest.mark.parametrize("together", [1, 2])
def test_a_team_without_critic_and_one_cut_into_pieces(together, monkeypatch) -> None:
    members = [learned(seed, with_critic=False, noise="gaussian") for seed in range(4)]
    monkeypatch.setitem(policy_team.LOGITS_TOGETHER, "cpu", together * 5 * 15)
    assert_team_equals_members(members, [5, 5, 1, 5])


DIFFERENT = {
    "depth": {"policy_depth": 1},
    "nonlinearity": {"policy_depth": 1, "nonlinearity": "tanh"},
    "critic's kind": {"critic": "q"},
    "no critic": {"with_critic": False},
    "k": {"k": 1},
    "mask": {"mask": "active"},
    "fusion": {"fusion": "multiply"},
    "online": {"online": True},
    "progress": {"progress": 0.25},
    "greedy": {"explore": False},
    "length": {"combine": "one_length"},
    "null action": {"null_action": True},
    "doses": {"doses": [0.5, 1.0]},
    "dose growth": {"dose_growth": 0.5},
}


def test_only_alike_policies_are_stacked() -> None:
    first = learned(0)
    assert learned(1).batch_key(2) == first.batch_key(2)
    batch_keys = {name: learned(1, **changes).batch_key(2) for name, changes in DIFFERENT.items()}
    assert len({first.batch_key(2), *batch_keys.values()}) == 1 + len(DIFFERENT), batch_keys
    weaker = learned(1)
    weaker.agents[2].pipeline.stages["fusion"].weight = 0.5  # type: ignore[assignment]
    slower, elsewhere = learned(1), learned(1)
    slower.decay = Decay(0.8)
    other = random_sae(2, tiny.D_MODEL, seed=1)
    elsewhere.agents[2].sae = [other]
    for changed in (weaker, slower, elsewhere):
        assert changed.batch_key(2) != first.batch_key(2)
    # Which features may be steered is stacked, unless the encoder's columns depend on it.
    for mask, alike in (("none", True), ("active", False)):
        one, two = learned(0, mask=mask), learned(1, mask=mask)
        two.agents[2].allowed_C.copy_(torch.arange(15))
        assert (one.batch_key(2) == two.batch_key(2)) is alike
        if alike:
            assert_team_equals_members([one, two], [3, 3])


class Counting(TorchDispatchMode):
    """Operators that are run: on a GPU, each of them is one kernel or a few."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def operators(members: list[Controller], sizes: list[int]) -> int:
    team = Teams().of(members, 2)
    assert team is not None
    n = sum(sizes)
    context = StepContext(1, list(range(n)), torch.ones(n, dtype=torch.bool))
    x_ND = rows_of(n, 0)
    team.act(x_ND, context, sizes)  # what comes once a batch
    with Counting() as counted:
        team.act(x_ND, context, sizes)
    return counted.n


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 3, 4, 5, 4, 3, 2]], ids=["even", "uneven"])
def test_more_members_cost_no_more_kernels(sizes) -> None:
    policies: list[Controller] = [learned(seed) for seed in range(8)]
    assert operators(policies, sizes) <= operators(policies[:4], sizes[:4])
    one = operators(policies[:1], sizes[:1])
    assert operators(policies, sizes) < 2 * one
    fixed: list[Controller] = [
        FixedFeatures([Steer(2, i, 1.0)], {2: SAE}, Decay(0.9)) for i in range(8)
    ]
    assert operators(fixed, sizes) == operators(fixed[:4], sizes[:4])


def test_weights_are_stacked_once_a_call_and_anew_after_an_update(monkeypatch) -> None:
    stacked: list[int] = []
    stack = policy_team.stack_module_state

    def counted(agents):
        stacked.append(len(agents))
        return stack(agents)

    monkeypatch.setattr(policy_team, "stack_module_state", counted)
    monkeypatch.setattr("crl_exp.generation.decode.COMPACT_BELOW", 0.0)
    agents: list[LayerAgent] = [agent(SAE, tiny.D_MODEL, pipeline(), seed=seed) for seed in (0, 1)]
    draw, one_engine = torch.Generator().manual_seed(0), engine("llama")
    jobs = [Job(PolicyController({2: made}, Decay(0.9), draw), range(9)) for made in agents]

    def play() -> list[Generation]:
        prompts = one_engine.read(PROMPTS)
        return one_engine.generate(prompts, jobs, NEW_TOKENS, record=True)

    before = play()
    assert stacked == [2], "once for all tokens"
    reward_B = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0, 1])
    learner = LayerLearner(agents[1], ppo(lr_policy=0.1))
    learner.update(collect(2, before[1], reward_B, learner.algorithm), 1, torch.Generator())
    after = play()
    assert stacked == [2, 2]
    assert torch.equal(after[0].steps[0].action.delta_BD, before[0].steps[0].action.delta_BD)
    log_probs = [made[1].steps[0].action.log_prob_B for made in (before, after)]
    assert not torch.allclose(log_probs[0], log_probs[1])  # type: ignore[arg-type]


def test_a_team_loses_its_members_one_by_one(monkeypatch) -> None:
    """Rows that end leave at once, so members leave too; the others go on as before."""
    monkeypatch.setattr("crl_exp.generation.decode.COMPACT_BELOW", 1.0)
    sizes: list[int] = []
    team_of = Teams.of

    def counted(self, members, layer):
        sizes.append(len(members))
        return team_of(self, members, layer)

    monkeypatch.setattr(Teams, "of", counted)
    jobs = [Job(learned(seed, mask="generation"), [seed, seed + 1]) for seed in range(6)]
    got = answers("llama", jobs)
    assert sizes[0] == 6 and min(sizes) < 6
    with monkeypatch.context() as patch:
        by_themselves(patch)
        assert_same(got, answers("llama", jobs))


def test_places() -> None:
    rows = torch.arange(6.0)
    uneven = PaddedRows.of([3, 1, 2], rows.device)
    assert uneven.padded(rows).tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert uneven.flat(uneven.padded(rows)).tolist() == rows.tolist()
    even = PaddedRows.of([2, 2, 2], rows.device)
    assert even.padded(rows).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert even.flat(even.padded(rows)).tolist() == rows.tolist()
    assert sized(torch.tensor([[1.0], [2.0], [3.0]]), [2, 1, 1]).tolist() == [[1], [1], [2], [3]]
    assert sized(torch.tensor([[7.0]]), [2]).tolist() == [[7], [7]]
