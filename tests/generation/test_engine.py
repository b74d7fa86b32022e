"""Generation against full recomputation, and what the engine must leave as it was."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job, StreamedPrompts
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import common_prefix
from tests.helpers import tiny
from tests.helpers.tiny_steering import AddVector

KINDS = tiny.KINDS
PROMPTS = tiny.prompts(7)
NEW_TOKENS = 6
FINAL_NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}


@cache
def model(kind: str) -> LanguageModel:
    return tiny.language_model(kind)


def engine(kind: str, batch_size: int = 4, keep_gib: float = 1.0) -> Engine:
    return Engine(model(kind), EngineConfig(batch_size, keep_gib, "eager"))


def vector(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recomputed(lm: LanguageModel, prompt: list[int], vectors: dict[int, Tensor]) -> list[int]:
    """Greedy tokens by running the whole text again for each, with plain hooks and no cache."""
    start, ids, found = len(prompt) - 1, list(prompt), []

    def add(hidden: Tensor, site: int) -> Tensor:
        hidden = hidden.clone()
        hidden[:, start:] += vectors[site]
        return hidden

    handles = []
    for site in vectors:

        def before(_module, args, site=site):
            return (add(args[0], site), *args[1:])

        def after(_module, _inputs, out, site=site):
            return (add(out[0], site), *out[1:]) if isinstance(out, tuple) else add(out, site)

        if site < 0:
            handles.append(lm.layers[0].register_forward_pre_hook(before))
        else:
            handles.append(lm.layers[site].register_forward_hook(after))
    for _ in range(NEW_TOKENS):
        found.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(found[-1])
    for handle in handles:
        handle.remove()
    return until_end(found, lm)


def until_end(tokens: list[int], lm: LanguageModel) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in lm.eos_ids]
    return tokens[: ends[0]] if ends else tokens


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_full_recomputation(kind: str) -> None:
    """Ragged prompts, controllers at different sites in one call, a batch smaller than the rows."""
    lm = model(kind)
    plans = [{-1: vector(1)}, {1: vector(2)}, {0: vector(3), 2: vector(4)}, {3: vector(5)}, {}]
    jobs = [Job(AddVector(plan), range(len(PROMPTS))) for plan in plans]
    jobs[1] = Job(jobs[1].controller, [6, 2, 2])
    expected = [[recomputed(lm, p, plan) for p in PROMPTS] for plan in plans]
    assert all(steered != expected[-1] for steered in expected[:-1])
    for chosen, batch_size in (([0, 1, 2, 3, 4], 11), ([2], 3), ([4], 3)):
        made = engine(kind, batch_size)
        answers = made.generate(made.read(PROMPTS), [jobs[i] for i in chosen], NEW_TOKENS)
        for i, answer in zip(chosen, answers, strict=True):
            assert answer.tokens == [expected[i][item] for item in jobs[i].items]


def test_batches_use_the_same_memory_one_after_the_other() -> None:
    lm = tiny.language_model("llama")
    made = Engine(lm, EngineConfig(64, 1.0, "eager"))
    store = made.read(PROMPTS)

    def ask(items, store=store) -> tuple[list[list[int]], int, set[int]]:
        tokens = made.generate(store, [Job(Unsteered(), items)], 6)[0].tokens
        return tokens, lm.scratch.nbytes, {t.data_ptr() for t in lm.scratch.flat.values()}

    few, small, _ = ask([3, 1])
    every, large, places = ask(range(len(PROMPTS)))
    again, same, there = ask([3, 1])
    assert few == again == [every[3], every[1]]
    assert 0 < small < large == same and there == places, "it grows, and is kept"
    lm.scratch.flat.clear()
    made.generate(store, [Job(AddVector({2: torch.zeros(tiny.D_MODEL)}), [0])], 1)
    assert sorted(lm.scratch.flat) == list(range(3, lm.n_layers)), "lower layers aren't run"
    ask(range(len(PROMPTS)))
    lm.model.to(torch.float64)  # type: ignore[arg-type]
    assert ask(range(2), made.read(PROMPTS))[0] == every[:2], (
        "numbers of another kind need memory of their own"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kept_prompts_equal_a_full_forward(kind: str) -> None:
    """Residuals and output of the last prompt token, whatever the reading batch."""
    lm = model(kind)
    store = engine(kind, batch_size=3).read(PROMPTS)
    batch = store.batch(range(len(PROMPTS)))
    residual_SBD = torch.stack([batch.residual(site) for site in range(-1, lm.n_layers)])
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            out = lm.model(torch.tensor([prompt]), output_hidden_states=True)
            full = torch.stack([h[0, -1] for h in out.hidden_states[:-1]])
            torch.testing.assert_close(residual_SBD[:-1, row], full, atol=1e-5, rtol=1e-5)
            final = lm.decoder.get_submodule(FINAL_NORM.get(kind, "norm"))
            logits = lm.logits(final(residual_SBD[-1, row][None]))[0]
            cap = getattr(lm.model.config, "final_logit_softcapping", None)
            logits = cap * torch.tanh(logits / cap) if cap else logits
        torch.testing.assert_close(logits, out.logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_prompts_equal_kept_ones(kind: str) -> None:
    job = Job(AddVector({1: vector(2)}), [4, 0, 5, 5, 1])
    streaming = engine(kind, keep_gib=0.0)
    streamed = streaming.read(PROMPTS)
    assert isinstance(streamed, StreamedPrompts)
    kept = engine(kind).read(PROMPTS)
    got = streaming.generate(streamed, [job], NEW_TOKENS)[0]
    assert got.tokens == engine(kind).generate(kept, [job], NEW_TOKENS)[0].tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [[[5]], [[5], [9], [5]], [[5], [9, 7, 8]]])
def test_prompts_of_one_token(kind: str, prompts: list[list[int]]) -> None:
    made = engine(kind)
    for plan in ({}, {1: vector(2)}):
        got = made.generate(
            made.read(prompts), [Job(AddVector(plan), range(len(prompts)))], NEW_TOKENS
        )[0]
        assert got.tokens == [recomputed(model(kind), p, plan) for p in prompts]


def test_end_token_ends_an_answer() -> None:
    lm = tiny.language_model("llama")
    made = Engine(lm, EngineConfig(4, 1.0, "eager"))
    store = made.read(PROMPTS)
    job = [Job(Unsteered(), range(len(PROMPTS)))]
    whole = made.generate(store, job, NEW_TOKENS)[0].tokens
    end = next(t for tokens in whole for t in tokens[2:] if t not in tokens[:2])
    lm.model.generation_config.eos_token_id = [1, end]  # type: ignore[union-attr]
    cut = made.generate(store, job, NEW_TOKENS, record=True)[0].tokens
    assert cut == [until_end(tokens, lm) for tokens in whole]
    assert cut != whole
    steered = Job(AddVector({3: torch.zeros(tiny.D_MODEL)}), range(len(PROMPTS)))
    played = made.generate(store, [steered], NEW_TOKENS, record=True)[0]
    living = [0] * len(PROMPTS)
    for step in played.steps:
        for row, alive in zip(step.rows, step.alive_B.tolist(), strict=True):
            living[row] += alive
    # A step for every token, and one more for the end token where there was one.
    assert living == [min(len(tokens) + 1, NEW_TOKENS) for tokens in cut]


def test_choices_restrict_the_answer() -> None:
    made = engine("llama")
    store, choices = made.read(PROMPTS), [4, 5, 12, 20, 33]
    job = [Job(AddVector({2: vector(3)}), range(len(PROMPTS)))]
    got = made.generate(store, job, NEW_TOKENS, choices)[0]
    assert {len(tokens) for tokens in got.tokens} == {1}
    assert len({tokens[0] for tokens in got.tokens} & set(choices)) > 1
    assert got.texts == [tiny.WORDS[tokens[0]] for tokens in got.tokens]
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            handle = made.lm.layers[2].register_forward_hook(
                lambda _m, _i, out: torch.cat([out[:, :-1], out[:, -1:] + vector(3)], 1)
            )
            logits = made.lm.model(torch.tensor([prompt])).logits[0, -1]
            handle.remove()
        assert got.tokens[row] == [max(choices, key=lambda c: logits[c])]


class Failing(Controller):
    def __init__(self, at: int, steers: bool):
        super().__init__({2: 2, 3: 3})
        self.at, self.steers = at, steers

    def act(self, layer, x_BD, context):
        if context.token_index == self.at and layer == 3:
            raise KeyError("planned")


def leftovers(lm: LanguageModel) -> list[str]:
    return [
        name
        for name, module in lm.model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_in_the_model(kind: str) -> None:
    # A model of its own: transformers leaves hooks where hidden states were asked for.
    lm = tiny.language_model(kind)
    made, ids = Engine(lm, EngineConfig(4, 1.0, "eager")), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        before = lm.model(ids).logits
    store, rows = made.read(PROMPTS), range(len(PROMPTS))
    assert leftovers(lm) == []
    made.generate(store, [Job(AddVector({-1: vector(1), 2: vector(2)}), rows)], 3)
    assert leftovers(lm) == []
    for at in (0, 1):
        for steers in (True, False):
            with pytest.raises(KeyError, match="planned"):
                made.generate(store, [Job(Failing(at, steers), rows), Job(Unsteered(), rows)], 3)
            assert leftovers(lm) == []
            with torch.no_grad():
                assert torch.equal(lm.model(ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_position_of_the_model_can_be_used(kind: str) -> None:
    made = engine(kind)
    prompt = (PROMPTS[0] * 40)[:126]
    store = made.read([prompt])
    job = [Job(AddVector({1: vector(2)}), [0])]
    assert len(made.generate(store, job, 3)[0].tokens[0]) == 3
    with pytest.raises(UserError, match=r"task\.max_new_tokens"):
        made.generate(store, job, 4)
    with pytest.raises(UserError, match="128"):
        made.read([(prompt * 2)[:128]])


def test_bad_prompts_and_jobs_are_told() -> None:
    made = engine("llama")
    for prompts in ([], [[5], []]):
        with pytest.raises(UserError, match="empty"):
            made.read(prompts)
    with pytest.raises(UserError, match="no items"):
        made.generate(made.read(PROMPTS), [Job(Unsteered(), [])], 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=5))
def test_common_prefix_is_the_longest_that_spares_last_tokens(prompts: list[list[int]]) -> None:
    def shared(length: int) -> bool:
        fits = all(len(p) > length for p in prompts)
        return fits and len({tuple(p[:length]) for p in prompts}) == 1

    found = common_prefix(prompts)
    assert found == max((n for n in range(7) if prompts and shared(n)), default=0)
