"""SAEs, statistics, agents and controllers small enough for unit tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from crl_exp.generation.controller import Action, Controller, StepContext
from crl_exp.generation.engine import Engine, EngineConfig, Generation, Job
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.coefficients import Decay
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.feature_statistics.config import WarmupConfig
from crl_exp.steering.feature_statistics.correlation import Moments
from crl_exp.steering.feature_statistics.store import LayerStatistics
from crl_exp.steering.policy.agent import AgentSetting, LayerAgent
from crl_exp.steering.policy.algorithms import GRPO, PPO
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.activation import Identity
from crl_exp.steering.stages.base import STAGES, Pipeline, Stage
from crl_exp.steering.stages.fusion import Add
from crl_exp.steering.stages.mask import NoMask
from crl_exp.steering.stages.noise import NoNoise
from tests.helpers import tiny


class PlainSAE(nn.Module):
    """relu((x − b_dec) W_enc) W_dec + b_dec, with SAELens' names."""

    W_dec: Tensor
    b_dec: Tensor

    def __init__(self, W_dec_FD: Tensor, b_dec_D: Tensor):
        super().__init__()
        self.register_buffer("W_dec", W_dec_FD)
        self.register_buffer("b_dec", b_dec_D)

    def encode(self, x_BD: Tensor) -> Tensor:
        return torch.relu((x_BD - self.b_dec) @ self.W_dec.T)

    def decode(self, feature_acts_BF: Tensor) -> Tensor:
        return feature_acts_BF @ self.W_dec + self.b_dec


def random_sae(
    layer: int, d_model: int, d_sae: int = 16, kind: str = "post", b_dec: float = 0.0, seed: int = 0
) -> LayerSAE:
    """Random unit features; every entry of b_dec is `b_dec`."""
    draw = torch.Generator().manual_seed(seed)
    W_dec_FD = nn.functional.normalize(torch.randn(d_sae, d_model, generator=draw), dim=1)
    sae = PlainSAE(W_dec_FD, torch.full((d_model,), b_dec))
    return LayerSAE(layer, f"blocks.{layer}.hook_resid_{kind}", sae)


def fitted_sae(layer: int, x_ND: Tensor, n_directions: int) -> LayerSAE:
    """The best linear SAE for these residuals: two features a principal direction, ±."""
    mean_D = x_ND.mean(0)
    directions = torch.linalg.svd(x_ND - mean_D, full_matrices=False).Vh[:n_directions]
    sae = PlainSAE(torch.cat([directions, -directions]), mean_D)
    return LayerSAE(layer, f"blocks.{layer}.hook_resid_post", sae)


def explained_variance(sae: LayerSAE, x_ND: Tensor) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖²."""
    with torch.no_grad():
        error = x_ND - sae.sae.decode(sae.encode(x_ND))  # type: ignore[operator]
    return float(1 - error.square().sum() / (x_ND - x_ND.mean(0)).square().sum())


def statistics(layer: int, d_model: int, d_sae: int = 16, seed: int = 0) -> LayerStatistics:
    """Made-up statistics; all features are active often enough."""
    draw = torch.Generator().manual_seed(seed)
    correlation_F = torch.rand(d_sae, generator=draw, dtype=torch.float64) * 2 - 1
    z_BF = torch.rand(100, d_sae, generator=draw, dtype=torch.float64)
    moments = Moments.of(z_BF, (torch.arange(100) % 2).double())
    return LayerStatistics(
        layer, n=100, accuracy=0.5, median_norm=4.0, norm_mean=4.0, norm_std=1.5, moments=moments,
        mean_D=torch.randn(d_model, generator=draw, dtype=torch.float64),
        std_D=torch.rand(d_model, generator=draw, dtype=torch.float64) + 0.5,
        by_feature={
            "correlation": correlation_F,
            "score": correlation_F.clone(),
            "frequency": torch.ones(d_sae, dtype=torch.float64),
        },
    )  # fmt: skip


def pipeline(order: tuple[str, ...] = STAGES, **stages: Stage) -> Pipeline:
    """Addition and otherwise nothing, unless a stage is given by its kind."""
    plain: Mapping[str, Stage] = {
        "fusion": Add(1.0), "noise": NoNoise(), "activation": Identity(), "mask": NoMask(),
    }  # fmt: skip
    return Pipeline({**plain, **stages}, list(order))


def setting(**changes: Any) -> AgentSetting:
    policy: dict[str, Any] = {
        "policy_depth": 0, "critic_depth": 0, "hidden": 8, "nonlinearity": "relu", "critic": "v",
        "k": 2, "combine": "sum", "first_weights": "by_seed", "null_action": False,
        "null_start": 0.5, "doses": [], "dose_growth": 0.0,
    }  # fmt: skip
    more: dict[str, Any] = {"n_tokens": 4, "with_critic": True, "online": False}
    policy |= {key: value for key, value in changes.items() if key in policy}
    more |= {key: value for key, value in changes.items() if key not in policy}
    warmup = WarmupConfig(
        "max",
        contrast="reward",
        min_frequency=0.02,
        keep=5,
        rewarded="positive",
        score="pearson",
        negative="keep",
    )
    return AgentSetting(policy=PolicyConfig(**policy), warmup=warmup, **more)


def agent(
    sae: LayerSAE, d_model: int, stages: Pipeline, scale: float = 0.1, seed: int = 0, **changes: Any
) -> LayerAgent:
    """An agent over all features but the first, whose networks are random instead of zero.

    changes: of `setting`.
    """
    allowed_C = torch.arange(1, sae.d_sae)
    coefficient_F = torch.full((sae.d_sae,), 2.0)
    made = LayerAgent(
        sae, statistics(sae.layer, d_model, sae.d_sae), allowed_C, coefficient_F, stages,
        setting(**changes),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return made


def rolled_out(agents: list[LayerAgent], seed: int = 0, n: int = 8) -> list[Generation]:
    """Recorded answers of several agents in one call, rows that end early among them."""
    lm = tiny.language_model("llama")
    lm.model.generation_config.eos_token_id = [1, 6, 9, 14, 27]  # type: ignore[union-attr]
    engine = Engine(lm, EngineConfig(4 * len(agents), 1.0, "eager"))
    draw = torch.Generator().manual_seed(seed)
    jobs = [Job(PolicyController({2: made}, Decay(1.0), draw), range(n)) for made in agents]
    return engine.generate(engine.read(tiny.prompts(n)), jobs, 4, record=True)


def ppo(**changes: Any) -> PPO:
    values: dict[str, Any] = {
        "n_updates": 10, "prompts_per_update": 8, "epochs": 1, "minibatches": 1, "clip_coef": 0.2,
        "ent_coef": 0.01, "gae_lambda": 0.95, "max_grad_norm": 0.5, "normalize_advantage": True,
        "lr_policy": 1e-3, "lr_critic": 1e-3, "weight_decay": 0.0, "anneal_lr": False,
        "flatten_tokens": True, "average": 0.0, "validate_every": 0,
    }  # fmt: skip
    return PPO(**(values | changes))


def grpo(**changes: Any) -> GRPO:
    values = {"group_size": 4, **vars(ppo()), **changes}
    for name in ("gae_lambda", "normalize_advantage", "lr_critic"):
        del values[name]
    return GRPO(**values)


class AddVector(Controller):
    """Adds the same vector at one or several sites (layer number = site)."""

    def __init__(self, vectors: dict[int, Tensor]):
        super().__init__({site: site for site in vectors})
        self.vectors = vectors

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        n = len(x_BD)
        return Action(
            self.vectors[layer].expand(n, -1), torch.zeros(n, 1, dtype=torch.long), torch.ones(n, 1)
        )


class Look(Controller):
    """Steers in name, so that it is asked at its site, but adds nothing. Keeps what it saw."""

    def __init__(self, sites: dict[int, int], steers: bool = True):
        super().__init__(sites)
        self.steers = steers
        self.seen: list[tuple[int, int, Tensor]] = []

    def act(self, layer: int, x_BD: Tensor, context: StepContext) -> Action | None:
        self.seen.append((layer, context.token_index, x_BD.clone()))
        return None
