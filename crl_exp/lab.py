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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crl_exp import preemption
from crl_exp.answerer import Answerer
from crl_exp.answers import AnswerBook, Answers, batches
from crl_exp.config import Experiment
from crl_exp.controllers.base import Controller, Unsteered
from crl_exp.controllers.fixed import FixedFeatures, Steer
from crl_exp.controllers.vector import FixedVectors
from crl_exp.dictionaries import with_dictionary
from crl_exp.engine import Engine, EngineConfig, Prompts
from crl_exp.fed import look_at, options_for, prompt_ids
from crl_exp.files import home
from crl_exp.generation import Generation, Job
from crl_exp.inputs import sae_digest
from crl_exp.loaded import found_loaded, shared, shared_model, shared_sae, shared_splits
from crl_exp.measuring import measure_of, warn_of_one_outcome
from crl_exp.models import LanguageModel, load_model
from crl_exp.preemption import Pace
from crl_exp.probe import checked
from crl_exp.runs import RunDirectory, content_key
from crl_exp.saes import LayerSAE, load_saes
from crl_exp.tasks.base import Splits
from crl_exp.terminal import progress_bar
from crl_exp.warmup import LayerStatistics, shared_statistics, stored_at
from crl_exp.winners_curse import Tried

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
        self.options = options_for(exp.task, self.lm)
        lengths, warning = look_at(exp.task, self.lm, self.options, self.splits.test[0].user)
        if lengths:
            self.note("option_tokens", lengths)
        if warning:
            self.warn(warning)
        self._statistics: dict[int, LayerStatistics] | None = None
        self.signed_by_method: dict[int, Tensor] = {}  # coefficients [F] whose signs aren't r's
        self.tried = Tried()  # on validation, at all layers
        self._asked = 0  # times that a controller was tried on validation

    def _sae(self, layer: int) -> LayerSAE:
        exp, lm = self.exp, self.lm

        def load() -> LayerSAE:
            return load_saes(exp.sae, [layer], lm.d_model, lm.name, lm.device)[layer]

        kind, own = exp.sae.dictionary, asdict(exp.sae) | {"dictionary": "sae"}
        key = [self.model_key, own, layer, sae_digest(exp.sae, layer)]
        sae = shared_sae(key, load)
        if kind == "sae":
            return sae
        return shared_sae([*key, kind, exp.seed], lambda: with_dictionary(sae, kind, exp.seed))

    @property
    def n_tokens(self) -> int:
        """Steered tokens that an answer has at most."""
        return self.exp.task.max_new_tokens if self.options is None else self.options.longest

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
        with told.bar(what, total), progress_bar(what, total) as bar:

            def advance(n: int) -> None:
                told.advance(n)
                bar(n)

            advance(done)
            told.known(done)
            yield advance

    def fixed(self, steers: list[Steer]) -> Controller:
        """Adds these features; none of them: the unsteered model itself."""
        return FixedFeatures(steers, self.saes, self.exp.decay) if steers else Unsteered()

    def vectors(self, vector_D: dict[int, Tensor]) -> Controller:
        """Adds these; none of them: the unsteered model itself."""
        if not vector_D:
            return Unsteered()
        sites = {layer: sae.site for layer, sae in self.saes.items()}
        there = {layer: vector.to(self.lm.device) for layer, vector in vector_D.items()}
        return FixedVectors(there, sites, self.exp.decay)

    # --- prompts and answers ---

    def prompts(self, split: str) -> Prompts:
        """The split's prompts, read when first asked for."""
        ids, _ = self._prompt_ids(split)

        def read() -> Prompts:
            with self.bar(f"reading {split} prompts", len(ids)) as advance:

                def progress(n: int) -> None:
                    advance(n)
                    preemption.check()  # prompts are read anew by every attempt

                return self.engine.read(ids, progress)

        return shared("prompts", [self.engine_key, self.fed(split)], read, keep=6)

    def prompts_kept(self, split: str) -> Prompts | None:
        """The split's prompts where they were read and are still there."""
        return found_loaded("prompts", [self.engine_key, self.fed(split)])

    def prompt_ids(self, split: str) -> list[list[int]]:
        """Token ids of the split's prompts."""
        return self._prompt_ids(split)[0]

    def fed(self, split: str) -> str:
        """Hash of what the model is really fed for a split; see `crl_exp.fed`."""
        options = None if self.options is None else asdict(self.options)
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
        answerer: Answerer,
        split: str,
        items: Sequence[int] | None = None,
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Answers:
        """Answers to these items of a split (all, by default), scored by the task."""
        there = self.splits.named()[split]
        chosen = range(len(there)) if items is None else items
        generation = answerer.generation(self, split, chosen, record, advance)
        asked = [there[i] for i in chosen]
        return Answers(generation, self.exp.task.score(asked, generation.texts))

    def kept_answers(
        self, name: str, what: str, answerer: Answerer, split: str, record: bool = False
    ) -> Answers:
        """Answers to a whole split, saved under a name as they come and read back from there.

        record: what was added at each token too (`Answers.steered`).
        """
        book = AnswerBook(self.run.answers / name, self.run.key)
        whole, pace = book.load(), Pace(self.exp.checkpoint)
        n, first = len(self.splits.named()[split]), len(whole.scores)
        if first < n:
            answerer.ready(self, split)
            with self.bar(what, n, first) as advance:
                for items in batches(first, n, self.exp.engine.items_together):
                    batch = self.answer(answerer, split, items, record).compact()
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
            with self.engine.alone():
                return self.kept_answers(name, what, Unsteered(), split)

        return shared("baseline", key, make, keep=16)

    def depends_on(self, split: str) -> list[Any]:
        """What answers to a split depend on besides the controller."""
        kind = type(self.exp.task).__qualname__  # which scores answers, whatever its fields
        task = [kind, asdict(self.exp.task), self.splits.asked(), self.fed(split)]
        return [self.engine_key, self.lm.fingerprint(), *task]

    def play(self, controller: Controller, items: list[int]) -> tuple[Generation, Tensor]:
        """A recorded rollout on training items, and its rewards [B]."""
        answers = self.answer(controller, "train", items, record=True)
        return answers.generation, answers.reward_B.to(self.lm.device)

    def validation_reward(self, answerer: Answerer) -> float:
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

    def training_reward(self, answerer: Answerer, rewards: list[float]) -> float:
        """Mean reward on the validation split, in the middle of training.

        rewards: of the items answered so far; goes on behind them and adds to them.
        """
        answerer.ready(self, "validation")
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
