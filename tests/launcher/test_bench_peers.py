"""A plain loop around `model.generate` finds the same features and gives the same answers."""

from __future__ import annotations

import pytest
import torch

from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Job
from crl_exp.launcher.bench.peers import HookedLoop
from crl_exp.launcher.bench.subject import random_sae
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.fixed import FixedFeatures, Steer
from crl_exp.steering.feature_statistics.measure import measure
from tests.helpers import tiny

N_TOKENS, BATCH, MIN_FREQUENCY = 6, 8, 0.1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
def test_the_plain_loop_and_the_engine_agree(kind):
    lm = tiny.language_model(kind)
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id = None
    saes = {
        layer: LayerSAE(layer, f"blocks.{layer}.hook_resid_post",
                        random_sae(layer, tiny.D_MODEL, 64, lm.name))
        for layer in range(tiny.N_LAYERS)
    }  # fmt: skip
    prompts = tiny.prompts(40)
    engine = Engine(lm, EngineConfig(batch_size=16, keep_gib=1.0, decode="eager"))
    store = engine.read(prompts)
    rewards = [float(len(set(p)) % 3 == 0) for p in prompts]

    def play(observer, items):
        engine.generate(store, [Job(observer, items)], N_TOKENS)
        return torch.tensor([rewards[i] for i in items])

    ours = measure(saes, "max", len(prompts), BATCH, play)
    loop = HookedLoop(lm, saes, N_TOKENS, BATCH)
    chosen = loop.warm_up(prompts, rewards.__getitem__, MIN_FREQUENCY)
    steers = []
    for one in chosen:
        statistics = ours[one.layer]
        r_F, mean_F = statistics.correlation, statistics.by_feature["mean_positive"]
        allowed_C = (statistics.by_feature["frequency"] >= MIN_FREQUENCY).nonzero()[:, 0]
        assert int(allowed_C[r_F[allowed_C].argmax()]) == one.feature
        assert float(r_F[one.feature]) == pytest.approx(one.r, abs=2e-5)
        assert float(mean_F[one.feature]) == pytest.approx(one.coefficient, rel=1e-5)
        steers.append(Steer(one.layer, one.feature, one.coefficient))

    def answered(controller):
        return engine.generate(store, [Job(controller, range(len(prompts)))], N_TOKENS)[0].tokens

    best = max(range(len(chosen)), key=lambda i: chosen[i].r)
    plain = loop.answer(prompts, {})
    assert plain == answered(Unsteered())
    for some in ([chosen[best]], chosen):
        mine = [steers[chosen.index(one)] for one in some]
        steered = loop.answer(prompts, loop.addition(some))
        assert steered == answered(FixedFeatures(mine, saes, Decay(1.0)))
    assert steered != plain, "or nothing was added"
