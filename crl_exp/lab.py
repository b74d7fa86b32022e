"""What an experiment works with: model, SAEs, task, prompts, statistics, loaded once a process.

Runs of one process share the model, the prompts that were read and the unsteered answers.
Shapes: B answers.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crl_exp import preemption
from crl_exp.answers import AnswerBook, Answers, batches
from crl_exp.config import Experiment
from crl_exp.controllers.base import Controller, Unsteered
from crl_exp.controllers.fixed import FixedFeatures, Steer
from crl_exp.controllers.vector import FixedVectors
from crl_exp.engine import Engine, EngineConfig, Prompts
from crl_exp.files import home
from crl_exp.generation import Generation, Job
from crl_exp.inputs import sae_digest
from crl_exp.loaded import shared, shared_model, shared_sae, shared_splits
from crl_exp.measuring import measure_of, warn_of_one_outcome
from crl_exp.models import LanguageModel, load_model
from crl_exp.preemption import Pace
from crl_exp.probe import checked
from crl_exp.runs import RunDirectory, content_key
from crl_exp.saes import LayerSAE, load_saes
from crl_exp.tasks.base import Splits
from crl_exp.terminal import progress_bar
from crl_exp.warmup import STATISTICS_FORMAT, LayerStatistics, shared_statistics

log = logging.getLogger(__name__)


class Lab:
    """Everything that a method and the evaluation need of one experiment."""

    def __init__(
        self,
        exp: Experiment,
        layers: list[int],
        run: RunDirectory,
        make_engine: Callable[[LanguageModel, EngineConfig], Engine] = Engine,
    ):
        self.exp, self.run = exp, run
        self.notes: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.splits: Splits = shared_splits(exp.task)
        # The items themselves: a file may change under the same path while a process lives.
        self.task_key = [asdict(exp.task), self.splits.digest()]
        self.model_key = asdict(exp.model)
        self.engine_key = [self.model_key, asdict(exp.engine)]
        self.lm = shared_model(self.model_key, lambda: checked(load_model(exp.model)))
        self.engine = make_engine(self.lm, exp.engine)
        self.saes: dict[int, LayerSAE] = {layer: self._sae(layer) for layer in layers}
        for sae in self.saes.values():
            for warning in sae.warnings:
                self.warn(warning)
        for warning in self.splits.warnings:
            self.warn(warning)
        choices = exp.task.constrained_to
        self.choices = None if choices is None else self.lm.choice_ids(choices)
        self._statistics: dict[int, LayerStatistics] | None = None
        self._asked = 0  # times that a controller was tried on validation

    def _sae(self, layer: int) -> LayerSAE:
        exp, lm = self.exp, self.lm

        def load() -> LayerSAE:
            return load_saes(exp.sae, [layer], lm.d_model, lm.name, lm.device)[layer]

        key = [self.model_key, asdict(exp.sae), layer, sae_digest(exp.sae, layer)]
        return shared_sae(key, load)

    def warn(self, message: str) -> None:
        """Say it now and keep it in the result."""
        log.warning(message)
        self.warnings.append(message)

    def warn_of_undefined(self, answers: Answers, split: str) -> None:
        """Say how many rewards of a split are no numbers, which makes its mean none."""
        n = int((~answers.reward_B.isfinite()).sum())
        message = (
            f"{n} of {len(answers.scores)} rewards on {split} aren't finite: their mean is "
            f"undefined. They come from the scorer ({self.exp.task.scorer_name})"
        )
        if n and message not in self.warnings:
            self.warn(message)

    def note(self, name: str, value: Any) -> None:
        """Keep something found on the way (a chosen multiplier, say) in the result."""
        self.notes[name] = value

    def alone(self, layer: int) -> Lab:
        """This lab with one of its layers only, notes and a folder of its own for checkpoints.

        Model, prompts, statistics and warnings are shared.
        """
        part = copy.copy(self)
        part.saes = {layer: self.saes[layer]}
        part.run = self.run.part(f"layer_{layer}")
        part.notes = {}
        part._statistics = None
        part._asked = 0
        return part

    @contextmanager
    def bar(self, what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """A progress bar, told by the heartbeat too. done: steps of an earlier attempt."""
        told = self.run.progress
        told.begin(what, total)
        with progress_bar(what, total) as bar:

            def advance(n: int) -> None:
                told.advance(n)
                bar(n)

            advance(done)
            told.known(done)
            yield advance

    def fixed(self, steers: list[Steer]) -> Controller:
        return FixedFeatures(steers, self.saes, self.exp.decay)

    def vectors(self, vector_D: dict[int, Tensor]) -> Controller:
        sites = {layer: sae.site for layer, sae in self.saes.items()}
        there = {layer: vector.to(self.lm.device) for layer, vector in vector_D.items()}
        return FixedVectors(there, sites, self.exp.decay)

    # --- prompts and answers ---

    def prompts(self, split: str) -> Prompts:
        """The split's prompts, read when first asked for."""
        items = self.splits.named()[split]
        chat = self.exp.task.chat_template

        def read() -> Prompts:
            ids = [self.lm.prompt_ids(item.user, chat) for item in items]
            with self.bar(f"reading {split} prompts", len(ids)) as advance:

                def progress(n: int) -> None:
                    advance(n)
                    preemption.check()  # prompts are read anew by every attempt

                return self.engine.read(ids, progress)

        users = [item.user for item in items]
        return shared("prompts", [self.engine_key, chat, users], read, keep=6)

    def answer(
        self,
        controller: Controller,
        split: str,
        items: Sequence[int] | None = None,
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Answers:
        """Answers to these items of a split (all, by default) under a controller."""
        prompts = self.prompts(split)
        chosen = range(len(prompts)) if items is None else items
        generation = self.engine.generate(
            prompts, [Job(controller, chosen)], self.exp.task.max_new_tokens, self.choices,
            record, advance, self.exp.task.stop_strings,
        )[0]  # fmt: skip
        asked = [self.splits.named()[split][i] for i in chosen]
        return Answers(generation, self.exp.task.score(asked, generation.texts))

    def kept_answers(
        self, name: str, what: str, controller: Controller, split: str, record: bool = False
    ) -> Answers:
        """Answers to a whole split, saved under a name as they come and read back from there.

        record: what was added at each token too (`Answers.steered`).
        """
        book = AnswerBook(self.run.answers / name, self.run.key)
        whole, pace = book.load(), Pace(self.exp.checkpoint)
        n, first = len(self.splits.named()[split]), len(whole.scores)
        if first < n:
            self.prompts(split)
            with self.bar(what, n, first) as advance:
                for items in batches(first, n, self.exp.engine.items_together):
                    batch = self.answer(controller, split, items, record).compact()
                    book.add(batch)
                    whole.append(batch)
                    advance(len(items))
                    pace.after_step(book.save)
            book.save()
        return whole

    def baseline(self, split: str) -> Answers:
        """The unsteered model's answers to a split, generated once a process."""
        key = [self.engine_key, self.task_key, split]
        name, what = f"unsteered_{split}", f"unsteered on {split}"

        def make() -> Answers:
            with self.engine.alone():
                return self.kept_answers(name, what, Unsteered(), split)

        return shared("baseline", key, make, keep=16)

    def play(self, controller: Controller, items: list[int]) -> tuple[Generation, Tensor]:
        """A recorded rollout on training items, and its rewards [B]."""
        answers = self.answer(controller, "train", items, record=True)
        return answers.generation, answers.reward_B.to(self.lm.device)

    def validation_reward(self, controller: Controller) -> float:
        """Mean reward on the validation split, for choosing between controllers: -inf where it is
        undefined, so that such a one isn't chosen.

        Saved by its number: a method asks for the same ones in the same order in every attempt.
        """

        def mean(answers: Answers) -> float:
            self.warn_of_undefined(answers, "validation")
            reward = float(answers.reward_B.mean())
            return -math.inf if math.isnan(reward) else reward

        if isinstance(controller, Unsteered):
            return mean(self.baseline("validation"))
        self._asked += 1
        name, what = f"choice_{self._asked:04d}", f"choice {self._asked} on validation"

        def ask() -> float:
            return mean(self.kept_answers(name, what, controller, "validation"))

        if not isinstance(controller, FixedFeatures):
            return ask()
        # CorrSteer-P tries what CorrSteer-S tried at each layer.
        key = [self.engine_key, self.task_key, controller.identity]
        return shared("choice", key, ask, keep=1000)

    def training_reward(self, controller: Controller, rewards: list[float]) -> float:
        """Mean reward on the validation split, in the middle of training.

        rewards: of the items answered so far; goes on behind them and adds to them.
        """
        n = len(self.prompts("validation"))
        for items in batches(len(rewards), n, self.exp.engine.items_together):
            preemption.check()
            rewards += self.answer(controller, "validation", items).reward_B.tolist()
        return float(torch.tensor(rewards).mean())

    # --- stage 1 ---

    def statistics(self) -> dict[int, LayerStatistics]:
        """Stage 1's statistics of the steered layers, from the store where they are there."""
        if self._statistics is None:
            exp = self.exp
            # The digest is of the data itself: a file may change under the same task.path.
            asked = [asdict(exp.task), self.splits.digest(), exp.warmup.pooling, STATISTICS_FORMAT]
            if self.keeps_values:
                asked.append("values kept")
            key = content_key([self.engine_key, self.lm.fingerprint(), *asked])
            folder = home(exp.output_dir, "output_dir") / "shared" / "warmup"
            with self.engine.alone():
                found = shared_statistics(folder, key, self.saes, partial(measure_of, self))
            self._statistics = {layer: one.scored(exp.warmup) for layer, one in found.items()}
            warn_of_one_outcome(self, next(iter(found.values())))
        return self._statistics

    @property
    def keeps_values(self) -> bool:
        """Whether stage 1 keeps activations: one of its scores can't be streamed without."""
        return self.exp.warmup.score == "composite"

    def coefficients(self, layer: int) -> Tensor:
        """Coefficient of every feature [F]; below 0 where `warmup.negative=steer` says so."""
        statistics = self.statistics()[layer]
        value_F = self.exp.coefficient.values(statistics, self.saes[layer])
        if self.exp.warmup.negative != "steer":
            return value_F
        against_F = statistics.by_feature["sign"].to(value_F.device) < 0
        return torch.where(against_F, -value_F.abs(), value_F)
