"""What the stages do to the act, tried on made-up logits: what does nothing is told before a run.

Shapes: N rows (made-up answers), T tokens, C features, D d_model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crl_exp.analysis.row_random import RowRandom
from crl_exp.config.compatibility import several_tokens, starts_at_zero
from crl_exp.config.errors import UserError
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.stages.activation import Identity
from crl_exp.steering.stages.base import STAGES, Observation, Pipeline, Shape, Stage, StageContext
from crl_exp.steering.stages.mask import NoMask
from crl_exp.steering.stages.noise import NoNoise
from crl_exp.steering.workspace import SteeringConfig

ROWS, FEWEST_FEATURES, D_MODEL, TOKENS = 12, 24, 6, 3
TRAINED = (0.0, 0.9)
"""Shares of the training done at which exploration is tried: at the second all schedules differ."""
PLAIN: Mapping[str, type[Stage]] = {"noise": NoNoise, "activation": Identity, "mask": NoMask}


@dataclass
class Setting:
    """The stages of one experiment and what they are made for. n_tokens: as in `Shape`; before a
    run, `TOKENS` where the tokenizer alone knows how many an option has. null: whether there is the
    null action, which noise acts on too."""

    stages: dict[str, Stage]
    order: Sequence[str]
    n_tokens: int
    k: int
    trained: bool
    null: bool = False

    @staticmethod
    def of(exp: SteeringConfig, n_tokens: int | None = None) -> Setting:
        """n_tokens: `Workspace.n_tokens`, where there is a workspace."""
        if n_tokens is None:
            n_tokens = TOKENS if several_tokens(_plainly(exp)) else exp.task.max_new_tokens
        trained = exp.method.trains_policy
        null = exp.policy.null_action
        return Setting(exp.stages, exp.order, n_tokens, exp.policy.k, trained, null)

    def but(self, **changes: Stage) -> Setting:
        """With other stages."""
        return replace(self, stages={**self.stages, **changes})

    @property
    def key(self) -> list:
        """Equal for equal settings."""
        stages = [repr(self.stages[name].setting()) for name in STAGES]
        return [stages, list(self.order), self.n_tokens, self.k, self.trained, self.null]

    @property
    def n_features(self) -> int:
        return max(FEWEST_FEATURES, 8 * self.k)

    def pipeline(self, disturbed: bool) -> Pipeline:
        """Ready for use. disturbed: numbers that are learned are moved from where they start.

        Raises `UserError` where the stages can't be had with so few features.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = Pipeline(copy.deepcopy(self.stages), list(self.order))
            made.bind(Shape(self.n_features, D_MODEL, self.n_tokens, self.k))
            with torch.no_grad():
                for parameter in made.parameters() if disturbed else ():
                    parameter.add_(torch.randn(parameter.shape))
        return made


def _plainly(exp: SteeringConfig) -> dict[str, Any]:
    """What `several_tokens` asks for, as a resolved config has it."""
    task = {"_target_": f".{type(exp.task).__name__}", "choices": exp.task.choices}
    return {"task": task, "model": {"path": exp.model.path}}


def _learned(exp: SteeringConfig) -> dict[str, Any]:
    """What `starts_at_zero` asks for."""
    policy = {"policy_depth": exp.policy.policy_depth, "critic_depth": 0}
    if exp.algorithm.uses_critic:
        policy["critic_depth"] = exp.policy.critic_depth
    method = {"_target_": f".{type(exp.method).__name__}", "stage2": exp.method.stage2}  # type: ignore[attr-defined]
    activation = {"_target_": f".{type(exp.activation).__name__}"}
    return {"policy": policy, "method": method, "activation": activation}


class _Spread(RowRandom):
    """One number a row (does it explore?) is spread from 0 to 1, so that small chances show."""

    def uniform(self, n: int) -> Tensor:
        drawn_BN = super().uniform(n)
        return drawn_BN if n > 1 else 1.1 * torch.logspace(-4, -0.1, ROWS)[:, None]


@dataclass(repr=False)
class Effect:
    """Logits as a rollout samples from them, at each token for each of `TRAINED` (R in all), and
    as an evaluation takes the top of them, at T tokens. Equal ones give the same acts, recorded
    with the same probability."""

    rollout_RNC: Tensor
    evaluation_TNC: Tensor
    on_policy: bool
    samples: bool

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Effect):
            return NotImplemented
        if (self.on_policy, self.samples) != (other.on_policy, other.samples):
            return False
        pairs = zip(self._probabilities(), other._probabilities(), strict=True)
        return all(torch.allclose(a, b, atol=1e-6, rtol=0) for a, b in pairs)

    def _probabilities(self) -> list[Tensor]:
        return [
            selection.probabilities(logits_XNC.flatten(0, 1))
            for logits_XNC in (self.rollout_RNC, self.evaluation_TNC)
        ]

    def ranks_as(self, other: Effect) -> bool:
        """Whether an evaluation has every two features in the same order, none of them equal."""
        if self.samples or other.samples:
            return False
        a, b = (one.evaluation_TNC.double() for one in (self, other))
        first, second = (torch.sign(x[..., :, None] - x[..., None, :]) for x in (a, b))
        return torch.equal(first.nan_to_num(), second.nan_to_num())


def effect(setting: Setting, turned: bool = False) -> Effect | None:
    """None where the stages can't be tried (they want more features at once than are made up).

    turned: with the correlations of the opposite sign.
    """
    try:
        pipeline = setting.pipeline(disturbed=True)
    except UserError:
        return None
    draw, n = torch.Generator().manual_seed(0), setting.n_features
    correlation_C = (torch.rand(n, generator=draw) * 1.6 - 0.8) * (-1 if turned else 1)
    prompt_tokens_N = torch.randint(4, 30, (ROWS,), generator=draw)
    asks_prompt = "prompt_past" in pipeline.needs
    past_N = torch.full((ROWS,), 1.0 if asks_prompt else -torch.inf)
    seen_NC = torch.zeros(ROWS, n, dtype=torch.bool)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for token in range(min(setting.n_tokens, TOKENS)):
        acts_NC = torch.randn(ROWS, n, generator=draw).clamp(min=0)
        seen_NC = seen_NC | (acts_NC > 0)
        logits_NC = torch.randn(ROWS, n, generator=draw)
        logits_NC[::3] -= 4  # all below 0: thresholds set these apart
        at = Observation(
            torch.randn(ROWS, D_MODEL, generator=draw), torch.full((ROWS,), token), acts_NC,
            seen_NC, torch.randn(ROWS, n, generator=draw).clamp(min=0), past_N, prompt_tokens_N,
        )  # fmt: skip
        length_N = torch.randn(ROWS, generator=draw)
        made = {
            "value_BX": 0.3 * torch.randn(ROWS, 1, generator=draw),
            "length_B": length_N, "norm_B": 60 + 10 * length_N,
        }  # fmt: skip
        noted: dict[str, Tensor] = {}
        for explore, progress in (*((True, done) for done in TRAINED), (False, 0.0)):
            draws = _Spread(0, torch.arange(ROWS), token_index=token)
            context = StageContext(
                at, correlation_C, **made, explore=explore and setting.trained, progress=progress,
                draws=draws, noted=noted,
            )  # fmt: skip
            with torch.no_grad():
                if setting.null:
                    made_NX = pipeline.with_null(logits_NC, torch.zeros(ROWS), context)
                else:
                    made_NX = pipeline(logits_NC, context)
            found[explore].append(made_NX)
        if "length_B" in noted:
            past_N = torch.logaddexp(past_N, noted["length_B"])
    return Effect(
        torch.stack(found[True]), torch.stack(found[False]), pipeline.on_policy, pipeline.samples
    )


def follows_correlation(setting: Setting) -> bool:
    """Whether an untrained (zero) policy's choice is by stage 1's scores: it moves with them."""
    try:
        pipeline = setting.but(mask=NoMask(), noise=NoNoise()).pipeline(disturbed=False)
    except UserError:
        return True
    n = setting.n_features
    order_C = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    correlation_C = torch.linspace(-0.8, 0.9, n)[order_C]
    chosen = []
    for moved_C in (torch.arange(n), torch.arange(n).flip(0)):
        at = Observation(
            torch.zeros(1, D_MODEL), torch.zeros(1, dtype=torch.long), torch.ones(1, n),
            torch.ones(1, n, dtype=torch.bool), torch.ones(1, n), torch.zeros(1),
            torch.full((1,), 9),
        )  # fmt: skip
        one_1 = torch.zeros(1)
        context = StageContext(at, correlation_C[moved_C], torch.zeros(1, 1), one_1, one_1 + 60)
        with torch.no_grad():
            logits_1C = pipeline(torch.zeros(1, n), context)
        chosen.append(int(moved_C[logits_1C.argmax()]))
    return chosen[0] == chosen[1]


def cautions(
    exp: SteeringConfig, n_tokens: int | None = None, compared: Collection[str] = ()
) -> list[str]:
    """What of the config is no fault, but does nothing, the same as a plainer option, or something
    that is easily overlooked.

    Each line names the option and what it equals. n_tokens: as of `Setting.of`. compared: keys of
    which the same sweep has this config with another value, so that what they do isn't overlooked.
    """
    setting = Setting.of(exp, n_tokens)
    found = exp.decay.cautions(setting.n_tokens)
    if exp.sae.dictionary != "sae" and not exp.method.uses_dictionary:
        found.append(
            f"sae.dictionary={exp.sae.dictionary}: does nothing, as method={exp.method.name} adds "
            "no feature of the SAE; as well sae.dictionary=sae"
        )
    if setting.n_tokens == 1 and exp.warmup.pooling != "max":
        found.append(f"warmup.pooling={exp.warmup.pooling}: in answers of one token it is max")
    if exp.warmup.contrast != "reward" and not exp.method.needs_statistics:
        found.append(
            f"warmup.contrast={exp.warmup.contrast}: does nothing with method={exp.method.name}, "
            "which has no stage 1"
        )
    if not exp.method.has_policy:
        return found
    found += exp.policy.cautions(exp.algorithm.uses_critic, compared)
    if exp.policy.first_weights == "by_layer" and starts_at_zero(_learned(exp)):
        found.append(
            "policy.first_weights=by_layer: does nothing, as no weight that is trained here starts "
            "at random; as well policy.first_weights=by_seed"
        )
    for name in STAGES:
        stage = setting.stages[name]
        if name == "noise" and not (setting.trained or stage.plain):
            found.append("noise: does nothing with method.stage2=false, where nothing is explored")
        found += stage.cautions(setting.n_tokens, setting.k)
    told = {line.split(":")[0].split("=")[0].split(" ")[0] for line in found}
    whole = effect(setting)
    if whole is None:
        return found
    if exp.method.updates_correlations and whole == effect(setting, turned=True):
        found.append(
            "method.online_correlation=true: does nothing, as with these stages no act depends on "
            "the correlations"
        )
    return found + _without_effect(setting, told, whole)


def _without_effect(setting: Setting, told: set[str], whole: Effect) -> list[str]:
    """Stages and an order that change nothing in the situations tried. told: stages left out.
    whole: the effect with all of them."""
    found = []
    for name, plain in PLAIN.items():
        stage = setting.stages[name]
        if stage.plain or name in told:
            continue
        without = effect(setting.but(**{name: plain()}))
        said = f"{name} ({type(stage).__name__})"
        if whole == without:
            found.append(f"{said}: changes no act here; as well {name}={_none(name)}")
        elif name == "activation" and without is not None and whole.ranks_as(without):
            found.append(
                f"{said}: keeps the order of the logits, so that an evaluation takes the same "
                "features as with activation=identity; it changes how a rollout samples, no more"
            )
    if list(setting.order) != list(STAGES) and whole == effect(replace(setting, order=STAGES)):
        found.append(
            f"order=[{','.join(setting.order)}]: with these stages every act is that of "
            f"order=[{','.join(STAGES)}]"
        )
    return found


def _none(name: str) -> str:
    return "identity" if name == "activation" else "none"
