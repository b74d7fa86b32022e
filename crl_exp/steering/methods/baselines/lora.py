"""Adapted weights in place of a policy, with as many parameters and the same labels.

Shapes: B rows, T tokens, D d_model, O options, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from crl_exp.config.errors import UserError
from crl_exp.generation.controller import Unsteered
from crl_exp.generation.engine import Prompts
from crl_exp.generation.results import Generation
from crl_exp.models.adapter import Adapter, peft_fault, weights_of
from crl_exp.runs import preemption
from crl_exp.steering.answerer import Answerer
from crl_exp.steering.methods.base import WithoutFeatures
from crl_exp.steering.methods.baselines.demonstrations import demonstrations
from crl_exp.steering.methods.baselines.lora_training import LoraTrainer, Recipe, lessons
from crl_exp.steering.policy.actions import Actions
from crl_exp.steering.policy.networks import mlp
from crl_exp.steering.workspace import SteeringConfig, Workspace


class AdaptedModel(Answerer):
    """The model with an adapter, unsteered. The adapter must not change while it is asked."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.read: tuple[str, Prompts] | None = None  # of the split that was asked about last

    def ready(self, workspace: Workspace, split: str) -> None:
        """Read the split with adapted weights: keys and values are others than the model's."""
        if self.read is not None and self.read[0] == split:
            return
        self.read = None  # its memory is free before the next is read
        task, items = workspace.exp.task, workspace.splits.named()[split]
        ids = [workspace.lm.prompt_ids(item.user, task.chat_template) for item in items]
        with workspace.engine.alone(), self.adapter.on():
            own = workspace.own_options(split)
            self.read = split, workspace.engine.read(ids, lambda n: preemption.check(), own)

    def generation(
        self,
        workspace: Workspace,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        self.ready(workspace, split)
        assert self.read is not None
        # Alone: rows of other runs must not go through the adapted weights.
        with workspace.engine.alone(), self.adapter.on():
            return workspace.generated(Unsteered(), self.read[1], items, record, advance)


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
    def uses_seed(self) -> bool:
        return True

    @property
    def needs_statistics(self) -> bool:
        """How many features the policy may choose from is known after stage 1."""
        return self.rank is None

    @property
    def needs_sae(self) -> bool:
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

    def conflicts(self, exp: SteeringConfig) -> list[str]:
        compiled = exp.engine.decode == "compiled"
        return [
            peft_fault(),
            "method=lora can't be compiled; set engine.decode=eager" if compiled else "",
        ]

    def prepare(self, workspace: Workspace) -> AdaptedModel:
        torch.manual_seed(workspace.exp.seed)  # A begins at random
        adapter = Adapter(
            workspace.lm,
            list(workspace.layers),
            self.targets,
            self._rank(workspace),
            self.scale,
            self.dropout,
        )
        workspace.note("adapter_rank", adapter.rank)
        workspace.note("adapter_parameters", adapter.n_parameters)
        taught = lessons(workspace, demonstrations(workspace))
        if not taught:
            raise UserError(
                "method=lora: no training item has a right answer to learn from; raise "
                "task.n_train, or use a task of medium difficulty"
            )
        recipe = Recipe(
            self.epochs, self.batch_size, self.lr, self.weight_decay, workspace.exp.seed
        )
        trainer = LoraTrainer(workspace, adapter, taught, recipe)
        rewards = trainer.train(lambda own: workspace.training_reward(AdaptedModel(adapter), own))
        for reward_I in trainer.tried:
            workspace.tried.add(reward_I.numpy(), "epochs of the adapter")
        if unmoved := adapter.unmoved():
            raise UserError(
                f"method=lora learned nothing at {', '.join(unmoved)}; raise method.lr or "
                "method.epochs"
            )
        workspace.note("items_learned_from", len(taught))
        workspace.note("validation_reward_by_epoch", rewards)
        workspace.note("best_epoch", rewards.index(max(rewards)) + 1)
        return AdaptedModel(adapter)

    def _rank(self, workspace: Workspace) -> int:
        if self.rank is not None:
            return self.rank
        wanted = policy_parameters(workspace)
        per_rank = sum(
            sum(widths)
            for layer in workspace.layers
            for _, widths in weights_of(workspace.lm, layer, self.targets)
        )
        workspace.note("policy_parameters", wanted)
        return max(1, round(wanted / per_rank))


def policy_parameters(workspace: Workspace) -> int:
    """Parameters of the policies that CRL would have here."""
    config, least = workspace.exp.policy, workspace.exp.warmup.min_frequency
    found = 0
    for statistics in workspace.statistics().values():
        policy: nn.Module = mlp(
            workspace.lm.d_model, len(Actions.of(config, len(statistics.allowed(least)))),
            config.policy_depth, config,
        )  # fmt: skip
        found += sum(p.numel() for p in policy.parameters())
    return found
