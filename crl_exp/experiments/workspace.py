"""What an experiment works with: model, SAEs, task, prompts, statistics, loaded once a process.

Runs of one process share the model, the prompts that were read and the unsteered answers.
Shapes: B answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crl_exp.config.files import home
from crl_exp.config.kept import found_loaded, shared
from crl_exp.experiments.fed import prompt_ids
from crl_exp.experiments.workspace_setup import WorkspaceSetup
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Prompts
from crl_exp.generation.results import Generation, Job
from crl_exp.runs import preemption
from crl_exp.runs.directory import content_key
from crl_exp.runs.preemption import CheckpointTimer
from crl_exp.steering.answerer import Answering, generation_of, get_ready
from crl_exp.steering.answers import AnswerBook, Answers, batches
from crl_exp.steering.controllers.fixed import FixedFeatures
from crl_exp.steering.feature_statistics.measure import measure_of, warn_of_one_outcome
from crl_exp.steering.feature_statistics.store import LayerStatistics, shared_statistics, stored_at
from crl_exp.tasks.base import Item, Score

Scoring = Callable[[Sequence[Item], Sequence[str]], list[Score]]


def _none(items: Sequence[Item], texts: Sequence[str]) -> list[Score]:
    """No rewards yet."""
    return [Score(0.0) for _ in items]


class RunWorkspace(WorkspaceSetup):
    """Everything that a method and the evaluation need of one experiment."""

    def alone(self, layer: int) -> RunWorkspace:
        """This one with one of its layers only, notes and a folder of its own for checkpoints.

        Model, prompts, statistics and warnings are shared.
        """
        part = copy.copy(self)
        part.layers = [layer]
        part.saes = {layer: self.saes[layer]} if layer in self.saes else {}
        part.sites = {layer: self.sites[layer]}
        part.run = self.run.part(f"layer_{layer}")
        part.notes = {}
        part._statistics = None
        part._asked = 0
        return part

    def warn_of_undefined(self, answers: Answers, split: str) -> None:
        """Say how many rewards of a split are no numbers, which makes its mean none."""
        n = int((~answers.reward_B.isfinite()).sum())
        message = (
            f"{n} of {len(answers.scores)} rewards on {split} aren't finite: their mean is "
            f"undefined. They come from the scorer ({self.exp.task.scorer_name})"
        )
        if n and message not in self.warnings:
            self.warn(message)

    # --- prompts and answers ---

    def prompts(self, split: str) -> Prompts:
        """The split's prompts, read when first asked for."""
        ids, _ = self._prompt_ids(split)
        key = [self.engine_key, self.fed(split)]
        return shared("prompts", key, lambda: self._read(split, ids), keep=6)

    def read(self, split: str, ids: list[list[int]]) -> Prompts:
        """These token ids in place of the split's own prompts; where they are the same, its own."""
        if ids == self._prompt_ids(split)[0]:
            return self.prompts(split)
        return self._read(split, ids)

    def _read(self, split: str, ids: list[list[int]]) -> Prompts:
        with self.bar(f"reading {split} prompts", len(ids)) as advance:

            def progress(n: int) -> None:
                advance(n)
                preemption.check()  # prompts are read anew by every attempt

            return self.engine.read(ids, progress, self.own_options(split))

    def prompts_kept(self, split: str) -> Prompts | None:
        """The split's prompts where they were read and are still there."""
        return found_loaded("prompts", [self.engine_key, self.fed(split)])

    def prompt_ids(self, split: str) -> list[list[int]]:
        """Token ids of the split's prompts."""
        return self._prompt_ids(split)[0]

    def fed(self, split: str) -> str:
        """Hash of what the model is really fed for a split; see `crl_exp.experiments.fed`."""
        options = None if self.options is None else self.options.asked
        return content_key([self._prompt_ids(split)[1], options])

    def _prompt_ids(self, split: str) -> tuple[list[list[int]], str]:
        """Token ids of the split's prompts, and their hash."""
        chat = self.exp.task.chat_template
        users = [item.user for item in self.splits.named()[split]]
        key = [self.model_key, chat, users]
        return shared("prompt_ids", key, lambda: prompt_ids(self.lm, users, chat), keep=8)

    def generated(
        self,
        controller: Controller,
        prompts: Prompts,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        """The model's answers to these of the prompts, under a controller."""
        return self.engine.generate(
            prompts, [Job(controller, items)], self.exp.task.max_new_tokens, self.options,
            record, advance, self.exp.task.stop_strings,
        )[0]  # fmt: skip

    def answer(
        self,
        answerer: Answering,
        split: str,
        items: Sequence[int] | None = None,
        record: bool = False,
        advance: Callable[[int], None] | None = None,
        score: Scoring | None = None,
    ) -> Answers:
        """Answers to these items of a split (all, by default), scored by the task or by `score`."""
        there = self.splits.named()[split]
        chosen = range(len(there)) if items is None else items
        generation = generation_of(answerer, self, split, chosen, record, advance)
        asked = [there[i] for i in chosen]
        return Answers(generation, (score or self.exp.task.score)(asked, generation.texts))

    def kept_answers(
        self,
        name: str,
        what: str,
        answerer: Answering,
        split: str,
        record: bool = False,
        score: Scoring | None = None,
    ) -> Answers:
        """Answers to a whole split, saved under a name as they come and read back from there.

        record: what was added at each token too (`Answers.steered`). score: in place of the task's.
        """
        book = AnswerBook(self.run.answers / name, self.run.key)
        whole, pace = book.load(), CheckpointTimer(self.exp.checkpoint)
        n, first = len(self.splits.named()[split]), len(whole.scores)
        if first < n:
            get_ready(answerer, self, split)
            with self.bar(what, n, first) as advance:
                for items in batches(first, n, self.exp.engine.items_together):
                    batch = self.answer(answerer, split, items, record, score=score).compact()
                    book.add(batch)
                    whole.append(batch)
                    advance(len(items))
                    pace.after_step(book.save)
            book.save()
        return whole

    def baseline(self, split: str) -> Answers:
        """The unsteered model's answers to a split, generated once a process."""
        key = [*self.depends_on(split), split]
        name, what = f"unsteered_{split}", f"unsteered on {split}"

        def make() -> Answers:
            if split == "train" and self.exp.task.against_unsteered:
                there = self._unsteered_unscored()
                return Answers(there, self.exp.task.score(self.splits.train, there.texts))
            with self.engine.alone():
                return self.kept_answers(name, what, Unsteered(), split)

        return shared("baseline", key, make, keep=16)

    def ready_to_score(self) -> None:
        """Show the task what the unsteered model answers to the training items, where rewards are
        relative to that. Before anything else is answered, so that a run that goes on draws what it
        would have drawn."""
        if self.exp.task.against_unsteered:
            self.exp.task.take_unsteered(self.splits.train, self._unsteered_unscored().texts)

    def _unsteered_unscored(self) -> Generation:
        """The unsteered model's answers to the training items."""

        def make() -> Generation:
            name, what = "unscored_train", "unsteered on train"
            with self.engine.alone():
                return self.kept_answers(name, what, Unsteered(), "train", score=_none).generation

        return shared("unscored", self.depends_on("train"), make, keep=4)

    def depends_on(self, split: str) -> list[Any]:
        """What answers to a split depend on besides the controller."""
        kind = type(self.exp.task).__qualname__  # which scores answers, whatever its fields
        task = [kind, asdict(self.exp.task), self.splits.asked(), self.fed(split)]
        scorers = [self.scorers] if self.scorers else []  # nothing where none lies in a folder
        return [self.engine_key, self.lm.fingerprint(), *task, *scorers]

    def play(self, controller: Controller, items: list[int]) -> tuple[Generation, Tensor]:
        """A recorded rollout on training items, and its rewards [B]."""
        answers = self.answer(controller, "train", items, record=True)
        return answers.generation, answers.reward_B.to(self.lm.device)

    def validation_reward(self, answerer: Answering) -> float:
        """Mean reward on the validation split, for choosing between controllers and the like.

        -inf where it is undefined, so that such a one isn't chosen.

        Saved by its number: a method asks for the same ones in the same order in every attempt.
        """

        def mean(reward_B: Tensor) -> float:
            reward = float(reward_B.mean())
            return -math.inf if math.isnan(reward) else reward

        def rewards(answers: Answers) -> Tensor:
            self.warn_of_undefined(answers, "validation")
            return answers.reward_B

        if isinstance(answerer, Unsteered):
            return mean(rewards(self.baseline("validation")))
        self._asked += 1
        name, what = f"choice_{self._asked:04d}", f"choice {self._asked} on validation"

        def ask() -> Tensor:
            return rewards(self.kept_answers(name, what, answerer, "validation"))

        if isinstance(answerer, FixedFeatures):
            # CorrSteer-P tries what CorrSteer-S tried at each layer.
            key = [*self.depends_on("validation"), answerer.identity]
            reward_B = shared("choice", key, ask, keep=1000)
        else:
            reward_B = ask()
        self.tried.add(reward_B.numpy())
        return mean(reward_B)

    def training_reward(self, answerer: Answering, rewards: list[float]) -> float:
        """Mean reward on the validation split, in the middle of training.

        rewards: of the items answered so far; goes on behind them and adds to them.
        """
        get_ready(answerer, self, "validation")
        n = len(self.splits.validation)
        for items in batches(len(rewards), n, self.exp.engine.items_together):
            preemption.check()
            rewards += self.answer(answerer, "validation", items).reward_B.tolist()
        return float(torch.tensor(rewards).mean())

    # --- stage 1 ---

    @property
    def warmup_home(self) -> Path:
        """Where what stage 1 found lies for all runs that share it."""
        # Of the data itself and the tokens made of it: a file, a template or a tokenizer may
        # change under the same path.
        folder = home(self.exp.output_dir, "output_dir")
        return stored_at(folder, self.exp.warmup, self.depends_on("train"))

    def statistics(self) -> dict[int, LayerStatistics]:
        """Stage 1's statistics of the steered layers, from the store where they are there."""
        if self._statistics is None:
            store, config = self.warmup_home, self.exp.warmup
            with self.engine.alone():
                measure = partial(measure_of, self)
                found = shared_statistics(store.parent, store.name, self.saes, measure)
            self._statistics = {layer: one.scored(config) for layer, one in found.items()}
            warn_of_one_outcome(self, next(iter(found.values())))
        return self._statistics

    def coefficients(self, layer: int) -> Tensor:
        """Coefficient of every feature [F]; below 0 where `warmup.negative=steer` says so."""
        if layer in self.signed_by_method:
            return self.signed_by_method[layer]
        statistics, coefficient = self.statistics()[layer], self.exp.coefficient
        value_F = coefficient.values(statistics, self.saes[layer])
        if self.exp.warmup.negative != "steer":
            return value_F
        against_F = statistics.by_feature["sign"].to(value_F.device) < 0
        size_F = coefficient.values(statistics, self.saes[layer], against=True).abs()
        return torch.where(against_F, -size_F, value_F)
