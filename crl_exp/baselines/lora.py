"""Adapted weights in place of a policy, with as many parameters and the same labels.

Shapes: B rows, T tokens, D d_model, O options, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from crl_exp import preemption
from crl_exp.answerer import Answerer
from crl_exp.baselines.adapter import Adapter, peft_fault, weights_of
from crl_exp.baselines.demonstrations import demonstrations
from crl_exp.baselines.lora_training import LoraTrainer, Recipe, lessons
from crl_exp.controllers.base import Unsteered
from crl_exp.engine import Prompts
from crl_exp.errors import UserError
from crl_exp.generation import Generation
from crl_exp.method_base import WithoutFeatures
from crl_exp.networks import mlp

if TYPE_CHECKING:
    from crl_exp.config import Experiment
    from crl_exp.lab import Lab


class AdaptedModel(Answerer):
    """The model with an adapter, unsteered. The adapter must not change while it is asked."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.read: tuple[str, Prompts] | None = None  # of the split that was asked about last

    def ready(self, lab: Lab, split: str) -> None:
        """Read the split with adapted weights: keys and values are others than the model's."""
        if self.read is not None and self.read[0] == split:
            return
        self.read = None  # its memory is free before the next is read
        task, items = lab.exp.task, lab.splits.named()[split]
        ids = [lab.lm.prompt_ids(item.user, task.chat_template) for item in items]
        with lab.engine.alone(), self.adapter.on():
            self.read = split, lab.engine.read(ids, lambda n: preemption.check())

    def generation(
        self,
        lab: Lab,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        self.ready(lab, split)
        assert self.read is not None
        # Alone: rows of other runs must not go through the adapted weights.
        with lab.engine.alone(), self.adapter.on():
            return lab.generated(Unsteered(), self.read[1], items, record, advance)


@dataclass
class Lora(WithoutFeatures):
    """Baseline: low-rank adaptation of the steered layers (LoRA, arXiv 2106.09685), by peft.

    Trained on the training items' right options by their cross-entropy among the options, or in
    free text on the model's own rewarded answers and their ends, all tokens of a batch weighing
    alike. The epoch that does best on validation is evaluated (the first of equals).

    rank: of the adapters; null: as many parameters as the policy that `policy` describes would
        have at these layers, as nearly as whole ranks allow (the critic, which doesn't answer,
        isn't counted). The result's notes hold both numbers.
    targets: weights that are adapted, by the last part of their names.
    scale: of what is added (alpha / rank). dropout: of its input, while training.
    epochs, batch_size: passes over the training items, and items an update. lr: of AdamW.
    """

    label: ClassVar[str] = "LoRA"

    rank: int | None
    targets: list[str]
    scale: float
    dropout: float
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float

    @property
    def needs_statistics(self) -> bool:
        """How many features the policy may choose from is known after stage 1."""
        return self.rank is None

    def faults(self) -> list[str]:
        found = [
            f"method.{name}={getattr(self, name)}: must be at least 1"
            for name in ("rank", "epochs", "batch_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        for name, least in (("scale", 0), ("lr", 0)):
            value = getattr(self, name)
            if not (math.isfinite(value) and least < value <= 100):
                found.append(f"method.{name}={value}: must be over {least} and at most 100")
        for name in ("dropout", "weight_decay"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"method.{name}={getattr(self, name)}: must be in [0, 1)")
        if not self.targets:
            found.append("method.targets is empty; name weights, e.g. method.targets=[q_proj]")
        return found

    def conflicts(self, exp: Experiment) -> list[str]:
        compiled = exp.engine.decode == "compiled"
        return [
            peft_fault(),
            "method=lora can't be compiled; set engine.decode=eager" if compiled else "",
        ]

    def prepare(self, lab: Lab) -> AdaptedModel:
        torch.manual_seed(lab.exp.seed)  # A begins at random
        adapter = Adapter(
            lab.lm, sorted(lab.saes), self.targets, self._rank(lab), self.scale, self.dropout
        )
        lab.note("adapter_rank", adapter.rank)
        lab.note("adapter_parameters", adapter.n_parameters)
        taught = lessons(lab, demonstrations(lab))
        if not taught:
            raise UserError(
                "method=lora: no training item has a right answer to learn from; raise "
                "task.n_train, or use a task of medium difficulty"
            )
        recipe = Recipe(self.epochs, self.batch_size, self.lr, self.weight_decay, lab.exp.seed)
        trainer = LoraTrainer(lab, adapter, taught, recipe)
        rewards = trainer.train(lambda own: lab.training_reward(AdaptedModel(adapter), own))
        for reward_I in trainer.tried:
            lab.tried.add(reward_I.numpy(), "epochs of the adapter")
        if unmoved := adapter.unmoved():
            raise UserError(
                f"method=lora learned nothing at {', '.join(unmoved)}; raise method.lr or "
                "method.epochs"
            )
        lab.note("items_learned_from", len(taught))
        lab.note("validation_reward_by_epoch", rewards)
        lab.note("best_epoch", rewards.index(max(rewards)) + 1)
        return AdaptedModel(adapter)

    def _rank(self, lab: Lab) -> int:
        if self.rank is not None:
            return self.rank
        wanted = policy_parameters(lab)
        per_rank = sum(
            sum(widths)
            for layer in lab.saes
            for _, widths in weights_of(lab.lm, layer, self.targets)
        )
        lab.note("policy_parameters", wanted)
        return max(1, round(wanted / per_rank))


def policy_parameters(lab: Lab) -> int:
    """Parameters of the policies that CRL would have here."""
    config, least = lab.exp.policy, lab.exp.warmup.min_frequency
    found = 0
    for statistics in lab.statistics().values():
        policy: nn.Module = mlp(
            lab.lm.d_model, len(config.actions(len(statistics.allowed(least)))),
            config.policy_depth, config,
        )  # fmt: skip
        found += sum(p.numel() for p in policy.parameters())
    return found
