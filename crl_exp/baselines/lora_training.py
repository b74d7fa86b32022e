"""Training of an adapter on right answers, which goes on where it was cut off.

Shapes: B rows, T tokens, D d_model, O options, N answer tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from crl_exp.baselines.adapter import Adapter
from crl_exp.baselines.demonstrations import Demonstration
from crl_exp.cache import keys_values
from crl_exp.models import LanguageModel
from crl_exp.preemption import Pace
from crl_exp.prompts import common_prefix

if TYPE_CHECKING:
    from crl_exp.lab import Lab

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
    """See `crl_exp.baselines.lora.Lora`."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


def lessons(lab: Lab, shown: Sequence[Demonstration]) -> list[Lesson]:
    """An answer that was cut at task.max_new_tokens has no end to learn."""
    lm, task = lab.lm, lab.exp.task
    end = lm.tokenizer.eos_token_id
    end = min(lm.eos_ids) if end is None else end
    found = []
    for one in shown:
        context = tuple(lm.prompt_ids(one.user, task.chat_template))
        whole = one.option is None and len(one.tokens) < task.max_new_tokens
        found.append(Lesson(context, (*one.tokens, *([end] if whole else [])), one.option))
    return found


def answer_states(lm: LanguageModel, batch: Sequence[Lesson]) -> Tensor:
    """What the head reads before each token of the answers [N, D], with gradients; lesson by
    lesson. What all contexts begin with is read once."""
    prefix = common_prefix([lesson.context for lesson in batch])
    cache = DynamicCache()
    if prefix:
        head = torch.tensor([batch[0].context[:prefix]], device=lm.device)
        _forward(lm, head, torch.tensor([prefix]), 0, cache)
    own = [[*lesson.context, *lesson.answer[:-1]][prefix:] for lesson in batch]
    lengths_B = torch.tensor([len(ids) for ids in own])
    ids_BT = torch.zeros(len(own), int(lengths_B.max()), dtype=torch.long)
    for row, ids in enumerate(own):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    grown = DynamicCache()
    for index, (keys, values) in enumerate(keys_values(cache)):
        shape = (len(own), -1, -1, -1)
        grown.update(keys.expand(shape), values.expand(shape), index)
    hidden_BTD = _forward(lm, ids_BT.to(lm.device), lengths_B, prefix, grown)
    rows, columns = [], []
    for row, lesson in enumerate(batch):
        first = len(lesson.context) - 1 - prefix
        rows += [row] * len(lesson.answer)
        columns += range(first, first + len(lesson.answer))
    return hidden_BTD[rows, columns]


def _forward(
    lm: LanguageModel, ids_BT: Tensor, lengths_B: Tensor, start: int, cache: DynamicCache
) -> Tensor:
    """The decoder over right-padded tokens that follow `start` cached ones [B, T, D]."""
    n_rows, width = ids_BT.shape
    query_BQ = (start + torch.arange(width, device=lm.device)).expand(n_rows, -1)
    key_BK = torch.arange(start + width, device=lm.device).expand(n_rows, -1)
    valid_BK = key_BK < (start + lengths_B.to(lm.device))[:, None]
    return lm.decoder(
        input_ids=ids_BT,
        attention_mask=lm.mask(query_BQ, key_BK, valid_BK),
        position_ids=query_BQ,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def loss_of(lm: LanguageModel, batch: Sequence[Lesson], choices: Sequence[int] | None) -> Tensor:
    """Mean cross-entropy of the answers' tokens; of the right option among all, where given.

    choices: the options' tokens where each is one; longer ones are learned token by token.
    """
    state_ND = answer_states(lm, batch)
    right = [lesson.option for lesson in batch] if choices else [i for x in batch for i in x.answer]
    score_NX = lm.logits(state_ND, choices).float()
    return nn.functional.cross_entropy(score_NX, torch.tensor(right, device=score_NX.device))


class LoraTrainer:
    """Updates an adapter; leaves the weights of the best epoch in it."""

    def __init__(self, lab: Lab, adapter: Adapter, taught: Sequence[Lesson], recipe: Recipe):
        self.lab, self.adapter, self.taught, self.recipe = lab, adapter, list(taught), recipe
        self.parameters = list(adapter.named().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.rewards: list[float] = []  # on validation, of each epoch
        self.best: dict[str, Tensor] = adapter.state()

    @property
    def per_epoch(self) -> int:
        return -(-len(self.taught) // self.recipe.batch_size)

    def train(self, validate: Callable[[], float]) -> list[float]:
        """Returns the reward on validation after each epoch."""
        state = self.lab.run.load_checkpoint()
        if state is not None:
            self._load(state)
        total = self.per_epoch * self.recipe.epochs
        pace = Pace(self.lab.exp.checkpoint)
        with self.lab.bar("training the adapter", total, self.step) as advance:
            while self.step < total or len(self.rewards) < self.recipe.epochs:
                if self.step == self.per_epoch * (len(self.rewards) + 1):
                    self._save()  # whoever is asked to end meanwhile goes on from here
                    self._end_epoch(validate())
                    continue
                loss = self._update()
                self.lab.run.log(self.step, {"loss": loss})
                advance(1)
                pace.after_step(self._save)
        self._save()
        self.adapter.load(self.best)
        return self.rewards

    def _end_epoch(self, reward: float) -> None:
        if reward > max(self.rewards, default=-1.0):
            self.best = self.adapter.state()
        self.rewards.append(reward)
        self.lab.run.log(self.step, {"validation_reward": reward})

    def _update(self) -> float:
        epoch, at = divmod(self.step, self.per_epoch)
        draw = torch.Generator().manual_seed(self.recipe.seed + 1000 * epoch)
        order = torch.randperm(len(self.taught), generator=draw).tolist()
        size = self.recipe.batch_size
        batch = [self.taught[i] for i in order[at * size : (at + 1) * size]]
        options = self.lab.options
        one_token = None if options is None else options.one_token
        self.optimizer.zero_grad()
        with self.adapter.on(training=True):
            loss = loss_of(self.lab.lm, batch, one_token)
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _save(self) -> None:
        self.lab.run.save_checkpoint({
            "step": self.step, "rewards": self.rewards, "best": self.best,
            "adapter": self.adapter.state(), "optimizer": self.optimizer.state_dict(),
        })  # fmt: skip

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.rewards, self.best = state["step"], state["rewards"], state["best"]
        self.adapter.load(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
