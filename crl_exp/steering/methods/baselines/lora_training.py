"""Training of an adapter on right answers, which goes on where it was cut off.

Shapes: B rows, T tokens, D d_model, O options, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from crl_exp.models.activations import forward, padded
from crl_exp.models.adapter import Adapter
from crl_exp.models.language_model import LanguageModel
from crl_exp.models.prompt_text import common_prefix
from crl_exp.runs.preemption import CheckpointTimer
from crl_exp.steering.methods.baselines.demonstrations import Demonstration
from crl_exp.steering.workspace import Workspace

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Lesson:
    """context: a prompt's ids, as in evaluation. answer: ids to learn after it, the end among them.
    option: the right one among the task's; then it is learned among these alone."""

    context: tuple[int, ...]
    answer: tuple[int, ...]
    option: int | None


@dataclass(frozen=True)
class Recipe:
    """See `crl_exp.steering.methods.baselines.lora.Lora`."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


def lessons(workspace: Workspace, shown: Sequence[Demonstration]) -> list[Lesson]:
    """An answer that was cut at task.max_new_tokens has no end to learn."""
    lm, task = workspace.lm, workspace.exp.task
    end = lm.tokenizer.eos_token_id
    end = min(lm.eos_ids) if end is None else end
    found = []
    for one in shown:
        context = tuple(lm.prompt_ids(one.user, task.chat_template))
        free = workspace.options is None
        whole = free and len(one.tokens) < task.max_new_tokens
        found.append(Lesson(context, (*one.tokens, *([end] if whole else [])), one.option))
    return found


class LessonReader:
    """Runs the model over lessons, with gradients in the layers from `first` up.

    What lies below them is the same at every update: it is computed once and kept, where it takes
    no more than `keep_bytes`. What all contexts begin with goes through the model once a batch.
    """

    def __init__(self, lm: LanguageModel, taught: Sequence[Lesson], first: int, keep_bytes: float):
        self.lm, self.taught, self.top = lm, list(taught), first - 1
        self.prefix = common_prefix([lesson.context for lesson in taught])
        self.head_1T, self.head_1 = padded([taught[0].context[: self.prefix]])
        self.own = [[*one.context, *one.answer[:-1]][self.prefix :] for one in taught]
        size = sum(map(len, self.own)) * lm.d_model * lm.dtype.itemsize
        self.keeps = self.top >= 0 and size <= keep_bytes
        self.kept: dict[int, Tensor] = {}  # by lesson, [T, D]
        self.below_head_1TD: Tensor | None = None
        self.head_cache = DynamicCache()
        if self.top >= 0 and self.prefix:
            with torch.no_grad():
                self.below_head_1TD = self._below(self.head_1T, self.head_1, 0, self.head_cache)

    def states(self, batch: Sequence[int]) -> Tensor:
        """What the head reads before each token of these lessons' answers [N, D]."""
        ids_BT, lengths_B = padded([self.own[i] for i in batch])
        below_BTD = self._below_own(batch, ids_BT, lengths_B) if self.top >= 0 else None
        cache = DynamicCache()
        if self.prefix:
            self._forward(self.head_1T, self.head_1, 0, cache, self.below_head_1TD)
        grown = expanded(cache, len(batch))
        hidden_BTD = self._forward(ids_BT, lengths_B, self.prefix, grown, below_BTD)
        rows, columns = [], []
        for row, i in enumerate(batch):
            lesson = self.taught[i]
            at = len(lesson.context) - 1 - self.prefix
            rows += [row] * len(lesson.answer)
            columns += range(at, at + len(lesson.answer))
        return hidden_BTD[rows, columns]

    def loss(self, batch: Sequence[int], choices: Sequence[int] | None) -> Tensor:
        """Mean cross-entropy of the answers' tokens; of the right option among all, where given.

        choices: the options' tokens where each is one; longer ones are learned token by token.
        """
        score_NX = self.lm.logits(self.states(batch), choices).float()
        asked = [self.taught[i] for i in batch]
        right = [x.option for x in asked] if choices else [i for x in asked for i in x.answer]
        wanted_N = torch.tensor(right, device=score_NX.device)
        return nn.functional.cross_entropy(score_NX, wanted_N)

    @torch.no_grad()
    def _below_own(self, batch: Sequence[int], ids_BT: Tensor, lengths_B: Tensor) -> Tensor:
        if all(i in self.kept for i in batch):
            return nn.utils.rnn.pad_sequence([self.kept[i] for i in batch], batch_first=True)
        cache = expanded(self.head_cache, len(batch))
        below_BTD = self._below(ids_BT, lengths_B, self.prefix, cache)
        if self.keeps:
            for row, i in enumerate(batch):
                self.kept[i] = below_BTD[row, : len(self.own[i])].clone()
        return below_BTD

    def _below(self, ids_BT: Tensor, lengths_B: Tensor, start: int, cache: DynamicCache) -> Tensor:
        """Residuals [B, T, D] that the first adapted layer reads."""
        seen: list[Tensor] = []
        forward(self.lm, ids_BT, lengths_B, cache, start, see={self.top: seen.append})
        return seen[0]

    def _forward(
        self, ids_BT: Tensor, lengths_B: Tensor, start: int, cache: DynamicCache,
        below_BTD: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states [B, T, D] of tokens that follow `start` cached ones."""
        with ExitStack() as stack:
            if below_BTD is not None:
                stack.enter_context(self.lm.skipping(self.top, below_BTD))
            return forward(self.lm, ids_BT, lengths_B, cache, start)


def expanded(cache: DynamicCache, n_rows: int) -> DynamicCache:
    """A cache of one row as one of several; layers that hold nothing stay empty."""
    made = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values  # type: ignore[union-attr]
        if keys is not None and values is not None and keys.numel():
            shape = (n_rows, -1, -1, -1)
            made.update(keys.expand(shape), values.expand(shape), index)
    return made


class LoraTrainer:
    """Updates an adapter; leaves the weights of the best epoch in it."""

    def __init__(
        self, workspace: Workspace, adapter: Adapter, taught: Sequence[Lesson], recipe: Recipe
    ):
        self.workspace, self.adapter, self.taught, self.recipe = (
            workspace,
            adapter,
            list(taught),
            recipe,
        )
        keep_bytes = workspace.exp.engine.keep_gib * 2**30
        self.reader = LessonReader(workspace.lm, taught, min(workspace.layers), keep_bytes)
        self.parameters = list(adapter.named().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.rewards: list[float] = []  # on validation, of each epoch
        self.tried: list[Tensor] = []  # the same by item [I]
        self.best: dict[str, Tensor] = adapter.state()

    @property
    def per_epoch(self) -> int:
        return -(-len(self.taught) // self.recipe.batch_size)

    def train(self, validate: Callable[[list[float]], float]) -> list[float]:
        """Returns the reward on validation after each epoch.

        validate: the mean reward now; adds the items' to the list that it is given.
        """
        state = self.workspace.run.load_checkpoint()
        if state is not None:
            self._load(state)
        total = self.per_epoch * self.recipe.epochs
        pace = CheckpointTimer(self.workspace.exp.checkpoint)
        with self.workspace.bar("training the adapter", total, self.step) as advance:
            while self.step < total or len(self.rewards) < self.recipe.epochs:
                if self.step == self.per_epoch * (len(self.rewards) + 1):
                    self._save()  # whoever is asked to end meanwhile goes on from here
                    by_item: list[float] = []
                    self._end_epoch(validate(by_item))
                    self.tried.append(torch.tensor(by_item))
                    continue
                loss = self._update()
                self.workspace.run.log(self.step, {"loss": loss})
                advance(1)
                pace.after_step(self._save)
        self._save()
        self.adapter.load(self.best)
        return self.rewards

    def _end_epoch(self, reward: float) -> None:
        if reward > max(self.rewards, default=-1.0):
            self.best = self.adapter.state()
        self.rewards.append(reward)
        self.workspace.run.log(self.step, {"validation_reward": reward})

    def _update(self) -> float:
        epoch, at = divmod(self.step, self.per_epoch)
        draw = torch.Generator().manual_seed((self.recipe.seed + 1000 * epoch) % 2**63)
        order = torch.randperm(len(self.taught), generator=draw).tolist()
        size = self.recipe.batch_size
        batch = order[at * size : (at + 1) * size]
        options = self.workspace.options
        one_token = None if options is None else options.one_token
        self.optimizer.zero_grad()
        with self.adapter.on(training=True):
            loss = self.reader.loss(batch, one_token)
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _save(self) -> None:
        self.workspace.run.save_checkpoint({
            "step": self.step, "rewards": self.rewards, "tried": self.tried, "best": self.best,
            "adapter": self.adapter.state(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.rewards, self.best = state["step"], state["rewards"], state["best"]
        self.tried = state.get("tried", [])  # earlier versions kept none
        self.adapter.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
