"""Where steering lands: its own site, from the last prompt token on, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig, Job
from crl_exp.generation.prompts import PromptStore
from crl_exp.models.language_model import LanguageModel
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.policy import PolicyController
from tests.helpers import tiny
from tests.helpers.tiny_steering import (
    AddVector,
    Look,
    agent,
    explained_variance,
    fitted_sae,
    pipeline,
    random_sae,
)

KINDS = tiny.KINDS
PROMPTS = tiny.prompts(5)
ROWS = range(len(PROMPTS))
MODELS: dict[str, LanguageModel] = {}


def engine(kind: str) -> Engine:
    if kind not in MODELS:
        MODELS[kind] = tiny.language_model(kind)
    return Engine(MODELS[kind], EngineConfig(64, 1.0, "eager"))


@dataclass
class Watched:
    """residual[t][i]: what layer i takes in at forward pass t; the last is what the head takes."""

    residual: list[list[Tensor]] = field(default_factory=list)
    keys_values: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


@contextmanager
def watching(lm: LanguageModel) -> Iterator[Watched]:
    """Hooks are set before the engine's, so a pre-hook of layer 0 sees what comes before it."""
    seen, caches = Watched(), []

    def begin(_module, _args, kwargs):
        seen.residual.append([])
        caches[:] = [kwargs["past_key_values"]]

    handles = [lm.decoder.register_forward_pre_hook(begin, with_kwargs=True)]
    handles += [
        layer.register_forward_pre_hook(lambda _m, args: seen.residual[-1].append(args[0].clone()))
        for layer in lm.layers
    ]
    handles.append(
        lm.decoder.register_forward_hook(
            lambda _m, _i, out: seen.residual[-1].append(out.last_hidden_state)
        )
    )
    try:
        yield seen
        # Copies: the next batch has the same memory for its own.
        seen.keys_values = [(one.keys.clone(), one.values.clone()) for one in caches[0].layers]
    finally:
        for handle in handles:
            handle.remove()


def played(kind: str, *controllers: Controller, new_tokens: int = 4) -> Watched:
    made = engine(kind)
    store = made.read(PROMPTS)
    with watching(made.lm) as seen:
        answers = made.generate(store, [Job(c, ROWS) for c in controllers], new_tokens)
    seen.tokens = [tokens for answer in answers for tokens in answer.tokens]
    return seen


def assert_identical(a: Watched, b: Watched) -> None:
    assert a.tokens == b.tokens
    assert len(a.residual) == len(b.residual)
    for pass_a, pass_b in zip(a.residual, b.residual, strict=True):
        assert len(pass_a) == len(pass_b) == tiny.N_LAYERS + 1
        assert all(torch.equal(x, y) for x, y in zip(pass_a, pass_b, strict=True))
    for layer_a, layer_b in zip(a.keys_values, b.keys_values, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer_a, layer_b, strict=True))


def zero_features(layer: int, kind: str) -> FixedFeatures:
    """Coefficient 0, and a b_dec that would ruin everything if it were added."""
    sae = random_sae(layer, tiny.D_MODEL, kind=kind, b_dec=1e3)
    return FixedFeatures([Steer(layer, 3, 0.0)], {layer: sae}, Decay(1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layer", "point"), [(0, "pre"), (2, "pre"), (2, "post"), (3, "post")])
def test_a_zero_action_is_an_exact_identity(kind: str, layer: int, point: str) -> None:
    zero = zero_features(layer, point)
    silent = Look(zero.sites)
    still = played(kind, silent)
    assert_identical(played(kind, zero), still)
    unsteered = played(kind, Unsteered())
    assert unsteered.tokens == still.tokens
    for a, b in zip(unsteered.residual, still.residual, strict=True):
        torch.testing.assert_close(a[-1], b[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [-1, 1, 3])
def test_other_layers_tokens_and_rows_are_untouched(kind: str, site: int) -> None:
    """A push so small that the answers stay: what comes before the site is the same to the bit."""
    delta_D = 1e-3 * torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(1))
    steered = played(kind, AddVector({site: delta_D}), Unsteered())
    still = played(kind, Look({site: site}), Unsteered())
    assert steered.tokens == still.tokens
    mine, other = slice(0, len(PROMPTS)), slice(len(PROMPTS), None)
    for t, (a, b) in enumerate(zip(steered.residual, still.residual, strict=True)):
        for i in range(tiny.N_LAYERS + 1):
            assert torch.equal(a[i][other], b[i][other])
            # The input of layer site + 1 is what the site's hook gives out.
            assert torch.equal(a[i][mine], b[i][mine]) == (i <= site or (site < 0 and i == 0))
        if t == 0 and 0 <= site < tiny.N_LAYERS - 1:
            assert torch.equal(a[site + 1][mine], b[site + 1][mine] + delta_D)
    prompt_keys = max(len(p) for p in PROMPTS) - 1
    for i, (now, was) in enumerate(zip(steered.keys_values, still.keys_values, strict=True)):
        for a, b in zip(now, was, strict=True):
            assert torch.equal(a[other], b[other])
            assert torch.equal(a[mine, :, :prompt_keys], b[mine, :, :prompt_keys])
            assert torch.equal(a[mine], b[mine]) == (i <= site)


@pytest.mark.parametrize("site", [-1, 1, 3])
def test_kept_prompts_are_as_they_were_after_steering(site: int) -> None:
    made = engine("llama")
    store = made.read(PROMPTS)
    assert isinstance(store, PromptStore)
    before = [t.clone() for t in (*store.kv_L, store.residual_SND)]
    delta_D = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(2))
    jobs = [Job(AddVector({site: delta_D}), [0, 3, 1]), Job(Look({2: 2}, steers=False), [4])]
    first = made.generate(store, jobs, 4)
    after = [*store.kv_L, store.residual_SND]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    again = made.generate(store, jobs, 4)
    assert [g.tokens for g in again] == [g.tokens for g in first]


@pytest.mark.parametrize(
    ("layer", "point", "site"), [(0, "pre", -1), (2, "pre", 1), (2, "post", 2)]
)
def test_features_are_added_at_the_saes_own_site(layer: int, point: str, site: int) -> None:
    """As rows of W_dec, without b_dec."""
    sae = random_sae(layer, tiny.D_MODEL, kind=point, b_dec=50.0)
    assert sae.site == site
    fixed = FixedFeatures([Steer(layer, 3, 2.0), Steer(layer, 5, -7.0)], {layer: sae}, Decay(1.0))
    by_hand_D = 2.0 * sae.W_dec_FD[3] - 7.0 * sae.W_dec_FD[5]
    expected = played("llama", AddVector({site: by_hand_D}))
    got = played("llama", fixed)
    assert got.tokens == expected.tokens
    for a, b in zip(got.residual, expected.residual, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert got.tokens != played("llama", AddVector({site + 1: by_hand_D})).tokens


def test_a_policy_adds_rows_of_w_dec_alone() -> None:
    sae = random_sae(2, tiny.D_MODEL, b_dec=50.0)
    chosen = agent(sae, tiny.D_MODEL, pipeline(), k=3)
    made = engine("llama")
    controller = PolicyController({2: chosen}, Decay(0.5))
    steps = made.generate(made.read(PROMPTS), [Job(controller, ROWS)], 3, record=True)[0].steps
    assert {step.token_index for step in steps} == {0, 1, 2}
    for step in steps:
        assert (step.action.coefficient_BK == 2.0 * 0.5**step.token_index).all()
        rows_BKD = sae.W_dec_FD[step.action.feature_idx_BK]
        by_hand_BD = (rows_BKD * step.action.coefficient_BK[..., None]).sum(1)
        torch.testing.assert_close(step.action.delta_BD, by_hand_BD)
        features = step.action.feature_idx_BK
        assert all(len(set(row)) == 3 and 0 not in row for row in features.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_controllers_read_the_residual_of_their_site(kind: str) -> None:
    """Against transformers' own hidden states, where entry L + 1 is the output of layer L."""
    made = engine(kind)
    sites = {layer: layer for layer in range(tiny.N_LAYERS - 1)}
    steering, watching_only = Look(sites), Look(sites, steers=False)
    jobs = [Job(steering, ROWS), Job(watching_only, ROWS)]
    answers = made.generate(made.read(PROMPTS), jobs, 3)
    assert len(steering.seen) == len(watching_only.seen) == 3 * len(sites)
    for look in (steering, watching_only):
        for layer, t, x_BD in look.seen:
            for row, prompt in enumerate(PROMPTS):
                text = prompt + answers[0].tokens[row]
                with torch.no_grad():
                    hidden = made.lm.model(
                        torch.tensor([text]), output_hidden_states=True
                    ).hidden_states
                expected_D = hidden[layer + 1][0, len(prompt) - 1 + t]
                torch.testing.assert_close(x_BD[row], expected_D, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_explains_its_own_site_best(kind: str) -> None:
    """Off by one: fitted to hidden states at layer 2, read by the engine at layers 1, 2, 3."""
    made = engine(kind)
    prompts = tiny.prompts(60, seed=3)
    with torch.no_grad():
        hidden = [
            made.lm.model(torch.tensor([p]), output_hidden_states=True).hidden_states[3][0, 1:]
            for p in tiny.prompts(60, seed=4)
        ]
    sae = fitted_sae(2, torch.cat(hidden), n_directions=16)
    look = Look({1: 1, 2: sae.site, 3: 3})
    made.generate(made.read(prompts), [Job(look, range(60))], 1)
    explained = {layer: explained_variance(sae, x_BD) for layer, _, x_BD in look.seen}
    assert explained[2] > 0.6
    assert explained[2] > max(explained[1], explained[3]) + 0.05
