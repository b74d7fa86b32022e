"""The ordered logit pipeline: each stage maps `(logits, context)` to logits.

Shapes: B rows, C features that may be steered (allowed), D d_model, X one value or C values a row.
With `policy.doses` a stage's C are features at each dose; what is known of a feature is repeated.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from crl_exp.analysis.row_random import RowRandom
from crl_exp.config.errors import UserError
from crl_exp.steering.policy.algorithms import Algorithm
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.barred import log_sum

STAGES = ("fusion", "noise", "activation", "mask")


@dataclass
class Observation:
    """All that the action distribution at a token depends on, besides parameters.

    A rollout records it, so that the update computes the same distribution. What nothing asks for
    (`Stage.needs`) is None.
    obs_BD: standardised residual. token_index_B: 0 at the last prompt token.
    feature_acts_BC: SAE activations at this token.
    seen_BC: whether a feature was active at this or an earlier steered token.
    importance_BC: mean activation over the prompt and the answer so far, this token included.
    past_B: log Σ exp ‖logits‖ over the answer's earlier tokens; -inf at the first.
    prompt_tokens_B: tokens of the row's prompt.
    draw_key_B, progress_B: of noise that is on-policy: where its random numbers begin, and the
        share of the training done. With them the same noise is drawn again.
    """

    obs_BD: Tensor
    token_index_B: Tensor
    feature_acts_BC: Tensor | None = None
    seen_BC: Tensor | None = None
    importance_BC: Tensor | None = None
    past_B: Tensor | None = None
    prompt_tokens_B: Tensor | None = None
    draw_key_B: Tensor | None = None
    progress_B: Tensor | None = None

    def rows(self, index: Tensor) -> Observation:
        """These rows of every tensor."""
        made: dict[str, Any] = {}
        for f in fields(self):
            tensor = getattr(self, f.name)
            made[f.name] = None if tensor is None else tensor[index]
        return Observation(**made)

    @staticmethod
    def cat(parts: Sequence[Observation]) -> Observation:
        """All rows of several observations that hold the same things."""
        made: dict[str, Any] = {}
        for f in fields(Observation):
            tensors = [getattr(part, f.name) for part in parts]
            made[f.name] = None if tensors[0] is None else torch.cat(tensors)
        return Observation(**made)


@dataclass
class StageContext:
    """What a stage may look at.

    at: the observation. correlation_C: each allowed feature's score in stage 1, [C] or [B, C].
    value_BX: the critic's estimate, V(s) [B, 1] or Q(s, ·) [B, C], None where there is no critic;
        without gradient, as the critic has its own loss.
    length_B: ‖residual‖, standardised by stage 1's mean and deviation. norm_B: as it is.
    explore: true where noise is drawn: while a rollout chooses, and with noise that is on-policy
        when probabilities are recorded or recomputed too.
    progress: share of the training done, for schedules; a number, [] or [B, 1].
    draws: random numbers of these rows, while exploring.
    barred_BC: features that an earlier stage has ruled out; set for each stage.
    noted: what a stage wants remembered for the answer's next token.
    """

    at: Observation
    correlation_C: Tensor
    value_BX: Tensor | None = None
    length_B: Tensor | None = None
    norm_B: Tensor | None = None
    explore: bool = False
    progress: float | Tensor = 0.0
    draws: RowRandom | None = None
    barred_BC: Tensor | None = None
    noted: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Shape:
    """What a stage is made for. n_features: C. n_tokens: steered tokens an answer has at most."""

    n_features: int
    d_model: int
    n_tokens: int
    k: int


class Stage(nn.Module):
    """Base of all stages: a dataclass whose fields are the keys of its YAML file.

    A logit of -inf marks a feature that may not be chosen. It stays so through every later stage,
    whatever that stage does: subclasses transform finite logits only.

    needs: which optional parts of the observation and context a stage reads: feature_acts, seen,
        importance, past, prompt_past (then past begins with the prompt's tokens), prompt_tokens,
        length (and norm).
    explores: whether it does something else while a rollout chooses (`context.explore`).
    on_policy: whether the probability recorded is that with what it does then.
    samples: whether features are sampled when the policy is evaluated too; else it takes the top.
    plain: whether it is there so as to do nothing (no noise, no mask, logits as they are).
    acts_on_null: whether it also acts on the logit of the null action (`policy.null_action`), which
        is then behind the others. Other stages, which are about features, are not shown it.
    stage1: whether the stage also acts on stage 1's scores, before the fusion reads them.
    bars: whether it may rule features out. Where no stage before has, and this one says it doesn't,
        a pipeline leaves out the looking for -inf, which takes longer than the stage.
    """

    needs: frozenset[str] = frozenset()
    stage1 = False
    explores = False
    on_policy = False
    samples = False
    plain = False
    acts_on_null = False
    bars = True

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "transform" in vars(cls) and "bars" not in vars(cls):
            cls.bars = True  # it does something of its own, of which its base can't know

    def __post_init__(self) -> None:
        # Dataclass fields are set before nn.Module's own set-up, which leaves them alone.
        super().__init__()

    def faults(self) -> list[str]:
        """What is wrong with the values, each with the override that mends it."""
        return []

    def conflicts(self, policy: PolicyConfig, algorithm: Algorithm) -> list[str]:
        """What of the rest of the config this stage can't work with."""
        return []

    def conflicts_behind(self, later: dict[str, Stage]) -> list[str]:
        """What of the stages that come after this one, by name, it can't work with."""
        return []

    def cautions(self, n_tokens: int, k: int) -> list[str]:
        """What of it does nothing, or what a plainer option does, with answers of so many steered
        tokens and k features at once. `stages.effects` finds some of this by trying; what it can't
        see is said here, beginning with the stage's name."""
        return []

    def bind(self, shape: Shape) -> None:
        """Make what depends on sizes, such as learnable parameters. Called once, before use."""

    def setting(self) -> tuple:
        """Of two stages with the same setting, parameters and buffers alone may differ."""
        plain = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return type(self), *((name, known_by(value)) for name, value in sorted(plain.items()))

    def forward(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        barred_BC = logits_BC.isneginf()
        inside = replace(context, barred_BC=barred_BC)
        out_BC = self.transform(logits_BC.masked_fill(barred_BC, 0.0), inside)
        return out_BC.masked_fill(barred_BC, -torch.inf)

    def unbarred(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        """`forward` of logits none of which is -inf; the same numbers."""
        nowhere_BC = torch.zeros((), dtype=torch.bool, device=logits_BC.device)
        inside = replace(context, barred_BC=nowhere_BC.expand(logits_BC.shape))
        return self.transform(logits_BC, inside)

    @abstractmethod
    def transform(self, logits_BC: Tensor, context: StageContext) -> Tensor:
        raise NotImplementedError


class Pipeline(nn.Module):
    """The stages in the configured order."""

    def __init__(self, stages: dict[str, Stage], order: list[str]):
        super().__init__()
        assert sorted(order) == sorted(stages)
        self.stages = nn.ModuleDict(stages)
        self.order = list(order)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs for stage in self.stages.values()))  # type: ignore[arg-type]

    @property
    def explores(self) -> bool:
        return any(stage.explores for stage in self.stages.values())

    @property
    def on_policy(self) -> bool:
        return any(stage.explores and stage.on_policy for stage in self.stages.values())

    @property
    def samples(self) -> bool:
        return any(stage.samples for stage in self.stages.values())

    @property
    def bars(self) -> bool:
        """Whether logits that none was barred of may come out barred."""
        return any(stage.bars for stage in self.stages.values())

    def bind(self, shape: Shape) -> None:
        for stage in self.stages.values():
            stage.bind(shape)  # type: ignore[operator]

    def setting(self) -> tuple:
        """Of two pipelines with the same setting, parameters and buffers alone may differ."""
        return tuple(self.order), *(self.stages[name].setting() for name in self.order)  # type: ignore[operator]

    def forward(self, logits_BC: Tensor, context: StageContext, barred: bool = True) -> Tensor:
        """barred: whether a logit may be -inf already."""
        context = self._scored(logits_BC, context)
        for name in self.order:
            stage: Stage = self.stages[name]  # type: ignore[assignment]
            if stage.plain:
                continue
            made = stage if barred else stage.unbarred
            logits_BC, barred = made(logits_BC, context), barred or stage.bars
        return logits_BC

    def with_null(self, logits_BC: Tensor, null_B: Tensor, context: StageContext) -> Tensor:
        """[B, C + 1], the null action behind the others, its probability sigmoid(null_B).

        That is so whatever the stages do to the other logits, which are given as log-probabilities
        among themselves: the null action has no correlation, activation or importance that a fusion
        or a mask could go by, and an activation changes how the rest is shared. Exploration noise
        acts on all: there its logit is null_B beside the log of the others' summed exponentials.
        Where no feature may be chosen nor may it.
        """
        context = self._scored(logits_BC, context)
        null_B1 = null_B[:, None]
        for name in self.order:
            stage = self.stages[name]
            if stage.plain:
                continue
            if context.explore and stage.acts_on_null:
                both_BX = torch.cat([logits_BC, log_sum(logits_BC) + null_B1], dim=1)
                both_BX = stage(both_BX, context)
                logits_BC = both_BX[:, :-1]
                null_B1 = both_BX[:, -1:] - log_sum(logits_BC)
            else:
                logits_BC = stage(logits_BC, context)
        barred_BC = logits_BC.isneginf()
        share_BC = (logits_BC - log_sum(logits_BC)).masked_fill(barred_BC, -torch.inf)
        null_B1 = null_B1.masked_fill(barred_BC.all(dim=1, keepdim=True), -torch.inf)
        return torch.cat([share_BC, null_B1], dim=1)

    def _scored(self, logits_BC: Tensor, context: StageContext) -> StageContext:
        """With stage 1's scores as the stages that act on them leave them."""
        for stage in self.stages.values():
            if stage.stage1:
                scores_BC = context.correlation_C.expand_as(logits_BC)
                context = replace(context, correlation_C=stage(scores_BC, context))
        return context


def known_by(value: Any) -> Any:
    """Something to compare a setting by: its text, or for a larger thing which one it is."""
    if isinstance(value, list | tuple):
        return tuple(known_by(one) for one in value)
    return (
        repr(value) if value is None or isinstance(value, bool | int | float | str) else id(value)
    )


def check_left(setting: str, left: int, shape: Shape) -> None:
    """Raise `UserError` where a setting leaves fewer features than are chosen at once."""
    if left < shape.k:
        raise UserError(
            f"{setting} leaves {left} of {shape.n_features} features, but policy.k={shape.k}; "
            f"change {setting.split('=')[0]} or set policy.k={left}"
        )


def in_share(name: str, value: float) -> list[str]:
    """A fault where the value isn't in [0, 1)."""
    return [] if 0 <= value < 1 else [f"{name}={value}: must be in [0, 1)"]


def positive(name: str, value: float) -> list[str]:
    """A fault where the value isn't a positive finite number."""
    return [] if 0 < value < float("inf") else [f"{name}={value}: must be a positive finite number"]
