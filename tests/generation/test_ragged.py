"""Answers that end early leave the batch, and what else is in a batch changes nothing of a row."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from crl_exp.generation import decode
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.decode import Decoding
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.grouping import JobRows
from crl_exp.generation.results import Generation, Job, Step
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.methods.residual_means import ResidualObserver
from crl_exp.steering.policy.agent import LayerAgent
from crl_exp.steering.policy.learner import collect
from tests.helpers import tiny
from tests.helpers.stage_options import built
from tests.helpers.tiny_steering import AddVector, agent, pipeline, ppo, random_sae

KINDS = ("llama", "gemma2", "gpt2")
PROMPTS = tiny.prompts(9, seed=1)
NEW_TOKENS = 10
REWARD = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0, 1])
MEMORIES = {
    "generation": ("mask", "generation"),
    "all": ("mask", "all"),
    "past": ("fusion", "attention"),
}


@cache
def model(kind: str) -> LanguageModel:
    """Many tokens end an answer, so that answers of several lengths come about."""
    lm = tiny.language_model(kind)
    lm.model.generation_config.eos_token_id = [1, *range(6, 60, 5)]  # type: ignore[union-attr]
    return lm


def engine(kind: str, batch_size: int = 64) -> Engine:
    return Engine(model(kind), EngineConfig(batch_size, 1.0, "eager"))


@cache
def policy(memory: str) -> LayerAgent:
    """An agent with a stage that remembers earlier tokens."""
    group, name = MEMORIES[memory]
    stages = pipeline(**{group: built(group, name)})
    return agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, stages, scale=0.3)


def controllers() -> list[Controller]:
    draw = torch.Generator().manual_seed(0)
    push_D = 3 * torch.randn(tiny.D_MODEL, generator=draw)
    learned = [
        PolicyController({2: policy(memory)}, Decay(0.9), torch.Generator().manual_seed(n))
        for n, memory in enumerate(MEMORIES)
    ]
    return [
        AddVector({1: push_D}),
        *learned,
        Unsteered(),
        PolicyController({2: policy("past")}, Decay(1.0)),
    ]


def answers(kind: str, batch_size: int = 64, only: list[int] | None = None) -> list[Generation]:
    """Every controller's answers to every prompt, all in one call, or those of some of them."""
    made = engine(kind, batch_size)
    chosen = [c for i, c in enumerate(controllers()) if only is None or i in only]
    jobs = [Job(controller, range(len(PROMPTS))) for controller in chosen]
    return made.generate(made.read(PROMPTS), jobs, NEW_TOKENS, record=True)


def assert_same(got: list[Generation], expected: list[Generation]) -> None:
    """The same tokens and choices, and additions to 1e-5. Log-probabilities and values come through
    a policy of large random weights, which magnifies the same rounding: they agree to 5e-5."""
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens and a.texts == b.texts
        assert len(a.steps) == len(b.steps)
        for x, y in zip(a.steps, b.steps, strict=True):
            assert (x.layer, x.token_index, x.rows) == (y.layer, y.token_index, y.rows)
            assert x.token_B is not None and y.token_B is not None
            assert torch.equal(x.token_B, y.token_B)
            assert torch.equal(x.action.feature_idx_BK, y.action.feature_idx_BK)
            torch.testing.assert_close(x.action.delta_BD, y.action.delta_BD, atol=1e-5, rtol=1e-5)
            for one, other in zip(numbers(x), numbers(y), strict=True):
                torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)


def numbers(step: Step) -> list[Tensor]:
    action = step.action
    found = [action.delta_BD, action.coefficient_BK, action.log_prob_B, action.value_B]
    return [t for t in [*found, *action.notes.values()] if t is not None]


class Counting(Decoding):
    """Counts the rows that go through the model, pass by pass."""

    passes: list[int]

    def _hooks(self, token_index: int):
        self.passes.append(len(self.alive_R))
        return super()._hooks(token_index)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    counted: list[int] = []
    monkeypatch.setattr(Counting, "passes", counted, raising=False)
    monkeypatch.setattr("crl_exp.generation.engine.Decoding", Counting)
    return counted


@pytest.mark.parametrize("kind", KINDS)
def test_compacted_answers_equal_uncompacted_ones(kind, monkeypatch, passes) -> None:
    """With stages that remember earlier tokens, and rows that end at many different tokens."""
    monkeypatch.setattr(decode, "COMPACT_BELOW", 0.0)
    expected = answers(kind)
    assert len(set(passes)) == 1, "nothing leaves"
    lengths = {len(tokens) for answer in expected for tokens in answer.tokens}
    assert len(lengths) > 4
    for share in (1.0, 0.75):
        passes.clear()
        monkeypatch.setattr(decode, "COMPACT_BELOW", share)
        assert_same(answers(kind), expected)
        assert len(set(passes)) > (3 if share == 1.0 else 1) and passes == sorted(
            passes, reverse=True
        )
    monkeypatch.setattr(decode, "COMPACT_BELOW", 1.0)
    passes.clear()
    alone = answers(kind, only=[0])[0]
    living = [sum(len(tokens) >= t for tokens in alone.tokens) for t in range(len(passes))]
    assert passes == [len(PROMPTS), *living[1:]], "each ended row is out of the next pass"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4, 7])
def test_the_batch_changes_nothing_of_a_row(kind: str, batch_size: int) -> None:
    """Of other sizes, so with other padding, other rows beside it and in another order."""
    assert_same(answers(kind, batch_size), answers(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_other_jobs_change_nothing_of_a_job(kind: str) -> None:
    together = answers(kind)
    for index, answer in enumerate(together):
        assert_same(answers(kind, only=[index]), [answer])


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_padding_lies_changes_nothing(kind: str) -> None:
    """Stored prompts are left-padded; here the padding is moved behind each prompt's keys."""
    lm = model(kind)
    store = engine(kind).read(PROMPTS)
    items = list(range(len(PROMPTS)))
    plain, moved = store.batch(items), store.batch(items)
    width = plain.valid_BT.shape[1]
    shift_BT = (torch.arange(width) + (~plain.valid_BT).sum(1)[:, None]) % width
    moved.key_BT = plain.key_BT.gather(1, shift_BT)
    moved.valid_BT = plain.valid_BT.gather(1, shift_BT)
    moved.rows = torch.cat([plain.rows[:, :-1].gather(1, shift_BT), plain.rows[:, -1:]], dim=1)
    assert not torch.equal(plain.valid_BT, moved.valid_BT)
    found = []
    for prompt in (plain, moved):
        controller = PolicyController({2: policy("all")}, Decay(0.9), torch.Generator())
        part = JobRows(controller, items, items, len(items))
        batch = Decoding(lm, prompt, [part], record=True)
        batch.run(NEW_TOKENS, None)
        found.append(Generation(batch.tokens, [], [s.living() for s in batch.steps[0]]))
    assert_same(found[:1], found[1:])


def test_prompts_of_like_length_go_together_longest_first(passes, monkeypatch) -> None:
    made = engine("llama", batch_size=3)
    asked: list[list[int]] = []
    store = made.read(PROMPTS)
    batch = store.batch
    monkeypatch.setattr(store, "batch", lambda items: asked.append(list(items)) or batch(items))
    items = [8, 3, 1, 7, 5, 0, 2, 6, 4]
    got = made.generate(store, [Job(Unsteered(), items)], 2)[0].tokens
    by_length = sorted((len(p) for p in PROMPTS), reverse=True)
    for at, chunk in enumerate(asked):
        assert (
            sorted((len(PROMPTS[i]) for i in chunk), reverse=True) == by_length[3 * at : 3 * at + 3]
        )
        assert chunk == [i for i in items if i in chunk], "the caller's order within a batch"
    assert got == [answers("llama", only=[4])[0].tokens[i][:2] for i in items]


@pytest.mark.parametrize("pooling", ["max", "mean", "last_prompt"])
def test_observers_see_the_same_in_any_batch(pooling: str, monkeypatch) -> None:
    saes = {1: random_sae(1, tiny.D_MODEL), 3: random_sae(3, tiny.D_MODEL, seed=1)}
    found = []
    for batch_size, share in ((64, 0.0), (4, 1.0), (1, 1.0)):
        monkeypatch.setattr(decode, "COMPACT_BELOW", share)
        made = engine("gemma2", batch_size)
        observer = Observer(saes, pooling)
        residuals = ResidualObserver({1: 1}, pooling == "last_prompt")
        jobs = [Job(observer, range(9)), Job(residuals, range(9))]
        answered = made.generate(made.read(PROMPTS), jobs, NEW_TOKENS)[0]
        n_tokens = sum(min(len(tokens) + 1, NEW_TOKENS) for tokens in answered.tokens)
        for layer in saes:
            seen = observer.residuals[layer]
            assert seen.moments.n == len(seen.norm_N) == n_tokens
        total = {
            layer: torch.cat([seen.moments.total_F, seen.norm_N.sum()[None]])
            for layer, seen in observer.residuals.items()
        }
        found.append((observer.pooled_BF, total, residuals.mean(1)))
    for other in found[1:]:
        for layer in saes:
            torch.testing.assert_close(other[0][layer], found[0][0][layer], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(other[1][layer], found[0][1][layer], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(other[2], found[0][2], atol=1e-5, rtol=1e-5)


def test_a_rollout_is_collected_the_same_from_any_batches() -> None:
    """The learner's minibatches are drawn by position: the order of the tokens must not change."""
    one, other = (answers("llama", size, only=[2])[0] for size in (64, 2))
    a, b = (collect(2, played, REWARD, ppo()) for played in (one, other))
    assert torch.equal(a.episode_N, b.episode_N) and torch.equal(a.choice_NK, b.choice_NK)
    assert torch.equal(a.observed.token_index_B, b.observed.token_index_B)
    torch.testing.assert_close(a.advantage_N, b.advantage_N, atol=1e-5, rtol=1e-5)
    assert len(a.episode_N) == sum(min(len(tokens) + 1, NEW_TOKENS) for tokens in one.tokens)
