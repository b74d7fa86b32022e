"""Only what is needed is computed, and it equals what computing everything would give."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator

import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from torch import Tensor, nn

from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Job
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.feature_statistics.measure import measure
from crl_exp.steering.policy import learner as learning
from crl_exp.steering.policy.learner import LayerLearner, collect
from tests.helpers import tiny
from tests.helpers.stage_options import EACH, PLAIN, built
from tests.helpers.tiny_steering import agent, pipeline, ppo, random_sae, rolled_out

D_IN, D_SAE = 12, 40
ALLOWED = torch.tensor([0, 3, 7, 21, 39])
REWARD = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 0])


def lens_sae(kind: str, normalize: str) -> LayerSAE:
    """A random SAE of SAELens' own class; biases and thresholds are not zero."""
    torch.manual_seed(0)
    shape = {"d_in": D_IN, "d_sae": D_SAE, "normalize_activations": normalize}
    sae: nn.Module
    if kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shape))
    elif kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**shape))
    else:
        sae = TopKSAE(TopKSAEConfig(k=5, **shape))
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(
                torch.randn_like(tensor).abs() if name == "threshold" else torch.randn_like(tensor)
            )
    return LayerSAE(2, "blocks.2.hook_resid_post", sae.requires_grad_(False), centered=True)


@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
@pytest.mark.parametrize("kind", ["jumprelu", "standard", "topk"])
def test_gathered_columns_equal_the_dense_encoder(kind: str, normalize: str) -> None:
    sae = lens_sae(kind, normalize)
    x_BD = 3 * torch.randn(50, D_IN, generator=torch.Generator().manual_seed(1)) + 1
    dense_BC = sae.encode(x_BD)[:, ALLOWED]
    assert 0 < (dense_BC > 0).float().mean() < 1
    torch.testing.assert_close(sae.encoder(ALLOWED)(x_BD), dense_BC, atol=1e-5, rtol=1e-5)
    assert torch.equal(sae.encoder(torch.arange(D_SAE))(x_BD), sae.encode(x_BD))


def test_only_the_wanted_columns_are_multiplied() -> None:
    """Of JumpReLU and ReLU; which features a top-k SAE keeps depends on all of them."""
    for kind in ("jumprelu", "standard"):
        sae = lens_sae(kind, "none")
        encode = sae.encoder(ALLOWED)
        others = [i for i in range(D_SAE) if i not in ALLOWED]
        before = encode(torch.ones(2, D_IN))
        sae.sae.W_enc[:, others] = torch.nan  # type: ignore[index, operator]
        sae._gathered.clear()
        assert torch.equal(sae.encoder(ALLOWED)(torch.ones(2, D_IN)), before)
    assert lens_sae("topk", "none")._columns(ALLOWED) is None


def test_gathered_columns_are_shared_by_those_who_ask_alike() -> None:
    sae = lens_sae("jumprelu", "none")
    first, again = sae._columns(ALLOWED), sae._columns(ALLOWED.clone())
    assert first is not None and again is not None and first[0] is again[0]
    for i in range(6):
        sae._columns(torch.tensor([i]))
    assert len(sae._gathered) == 4
    assert copy.deepcopy(sae) is sae


def test_the_encoder_runs_only_where_something_asks(monkeypatch) -> None:
    """Not for fixed features or a policy without a mask; once a token for the mask `active`."""
    encoded: list[int] = []
    encode = LayerSAE.encode
    monkeypatch.setattr(LayerSAE, "encode", lambda sae, x: encoded.append(len(x)) or encode(sae, x))
    made = Engine(tiny.language_model("llama"), EngineConfig(16, 1.0, "eager"))
    store, sae = made.read(tiny.prompts(4)), random_sae(2, tiny.D_MODEL)
    plain = agent(sae, tiny.D_MODEL, pipeline())
    masked = agent(sae, tiny.D_MODEL, pipeline(mask=built("mask", "active")))
    fixed = FixedFeatures([Steer(2, 3, 1.0)], {2: sae}, Decay(1.0))
    for controller in (fixed, PolicyController({2: plain}, Decay(1.0))):
        made.generate(store, [Job(controller, range(4))], 3)
    assert encoded == []
    made.generate(store, [Job(PolicyController({2: masked}, Decay(1.0)), range(4))], 3)
    assert encoded == [4, 4, 4]


def test_output_scores_are_of_the_last_position_and_the_choices_alone(monkeypatch) -> None:
    lm = tiny.language_model("llama")
    made = Engine(lm, EngineConfig(16, 1.0, "eager"))
    shapes: list[tuple[int, ...]] = []
    logits = lm.logits

    def seen(hidden_BD: Tensor, token_ids=None) -> Tensor:
        out = logits(hidden_BD, token_ids)
        shapes.append(tuple(out.shape))
        return out

    monkeypatch.setattr(lm, "logits", seen)
    store, rows = made.read(tiny.prompts(5)), range(5)
    assert shapes == []
    job = [Job(PolicyController({2: agent(random_sae(2, 32), 32, pipeline())}, Decay(1.0)), rows)]
    made.generate(store, job, 1, choices=[4, 5, 6])
    made.generate(store, job, 2)
    assert shapes == [(5, 3), (5, len(tiny.WORDS)), (5, len(tiny.WORDS))]


def test_an_evaluated_policy_keeps_no_observations() -> None:
    """They are the update's: 131k features of every token would fill the memory."""
    made = Engine(tiny.language_model("llama"), EngineConfig(16, 1.0, "eager"))
    masked = agent(
        random_sae(2, tiny.D_MODEL), tiny.D_MODEL, pipeline(mask=built("mask", "active"))
    )
    store = made.read(tiny.prompts(4))
    for generator, kept in ((None, set()), (torch.Generator(), {"obs_BD", "feature_acts_BC"})):
        job = Job(PolicyController({2: masked}, Decay(1.0), generator), range(4))
        step = made.generate(store, [job], 2, record=True)[0].steps[0]
        assert kept <= set(step.action.notes) and bool(step.action.notes) == bool(kept)
        assert step.action.log_prob_B is not None


@pytest.mark.parametrize(("group", "name"), EACH)
def test_an_update_in_pieces_has_the_same_gradients(group, name, monkeypatch) -> None:
    """Every option, k = 2, tokens of answers that end early."""
    stages = pipeline(**{g: built(g, name if g == group else PLAIN[g]) for g in PLAIN})
    made = agent(random_sae(2, tiny.D_MODEL), tiny.D_MODEL, stages, scale=0.3, critic="q")
    rollout = collect(2, rolled_out([made])[0], REWARD, ppo())
    found = []
    for together in (2**24, 7 * len(made.allowed_C)):
        monkeypatch.setattr(learning, "LOGITS_TOGETHER", together)
        pieces: list[int] = []
        learner = LayerLearner(copy.deepcopy(made), ppo(flatten_tokens=False, max_grad_norm=1e9))
        add = learner._add_gradients
        learner._add_gradients = lambda part, *rest, add=add, pieces=pieces: (  # type: ignore[method-assign]
            pieces.append(len(part.log_prob_N)) or add(part, *rest)
        )
        watched = learner.update(rollout, 1, torch.Generator().manual_seed(0))
        gradients = {n: p.grad for n, p in learner.agent.named_parameters() if p.grad is not None}
        assert learner.first_ratio_N is not None
        found.append((watched, gradients, learner.first_ratio_N, pieces))
    whole, cut = found
    n = len(rollout.log_prob_N)
    assert whole[3] == [n] and cut[3] == [7] * (n // 7) + ([n % 7] if n % 7 else []) and n > 14
    assert whole[0] == pytest.approx(cut[0], rel=1e-4, abs=1e-6)
    assert whole[1].keys() == cut[1].keys() and len(whole[1]) >= 2
    for key, gradient in whole[1].items():
        torch.testing.assert_close(cut[1][key], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(cut[2], whole[2], atol=1e-5, rtol=1e-5)


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """`gc.get_objects` lists what is made from here on, not the libraries' million objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
@pytest.mark.usefixtures("only_new_objects")
def test_warmup_does_not_grow_with_the_samples() -> None:
    """Bytes of all tensors alive while answers are asked for, 4,000 samples against 100."""
    saes = {2: random_sae(2, 64, d_sae=2048), 3: random_sae(3, 64, d_sae=2048, seed=1)}

    def peak(n: int) -> int:
        found = []

        def answer(observer, items) -> Tensor:
            from crl_exp.generation.controller import StepContext

            draw = torch.Generator().manual_seed(items[0])
            context = StepContext(0, list(items), torch.ones(len(items), dtype=torch.bool))
            for layer in saes:
                observer.act(layer, torch.randn(len(items), 64, generator=draw), context)
            observer.end(context)
            # Not what a compiler leaves behind of other tests, which has no memory.
            tensors = [t for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)]
            found.append(
                sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
            )
            return torch.tensor([float(i % 2) for i in items])

        measure(saes, "max", n, 50, answer)
        return max(found[1:])

    small, large = peak(100), peak(4000)
    assert small > 2 * 50 * 2048 * 4, "the pooled activations of a batch are counted"
    assert large <= 1.05 * small
