"""Runs that take turns and are answered together; see `crl_exp.experiments.packing`.

Each run is a thread. One of all works at a time, and gives its turn away only where it asks the
engine for answers. When every run asks or has ended, the questions are answered in one call.
"""

from __future__ import annotations

import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crl_exp.generation.engine import Engine, EngineConfig, Prompts
from crl_exp.generation.prompts import Progress
from crl_exp.generation.results import Generation, Job
from crl_exp.models.choice import ItemOptions, Options
from crl_exp.models.language_model import LanguageModel
from crl_exp.runs import preemption
from crl_exp.runs.checkpoints import rng_state, set_rng_state

log = logging.getLogger(__name__)

Outcome = dict[str, Any] | BaseException | None
"""A run's result, or what it ended with; None where it was left alone."""


@dataclass
class GenerationRequest:
    """What a run asks the engine: the arguments of `Engine.generate`, and later its answers."""

    prompts: Prompts
    jobs: Sequence[Job]
    max_new_tokens: int
    choices: Sequence[int] | Options | ItemOptions | None
    record: bool
    stop: Sequence[str]
    answers: list[Generation] | None = None
    fault: BaseException | None = None

    @property
    def kind(self) -> tuple:
        """Questions of one kind can be answered in one call."""
        choices = self.choices
        if choices is not None and not isinstance(choices, (Options, ItemOptions)):
            choices = tuple(choices)
        return id(self.prompts), self.max_new_tokens, choices, self.record, tuple(self.stop)


class PackedRun:
    """One run's thread. It works between `go_on` and the next time that it gives its turn away, or
    its end. name: of the thread.

    cancel_path: where this file is, the run alone is asked to end.
    """

    def __init__(self, work: Callable[[], dict[str, Any] | None], name: str):
        self.work = work
        self.outcome: Outcome = None
        self.over = False
        self.question: GenerationRequest | None = None
        self.cancel_path: Path | None = None
        self.stopped: BaseException | None = None
        self.at_work = False
        self.turn, self.back = threading.Event(), threading.Event()
        self.rng = rng_state()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._await(self.turn)
        try:
            if self.stopped is not None:
                raise self.stopped
            with preemption.alone(self._wish):
                self.outcome = self.work()
        except BaseException as error:  # the pack's caller is told, whatever it is
            self.outcome = error
            _let_go(error)
        finally:
            self.over = True
            self.back.set()

    def _wish(self) -> BaseException | None:
        """What this run alone is to end by: an interrupt of the pack, or its own cancellation."""
        if self.stopped is not None:
            return self.stopped
        cancelled = self.cancel_path is not None and self.cancel_path.exists()
        return preemption.Preempted(signal.SIGTERM) if cancelled else None

    @staticmethod
    def _await(event: threading.Event) -> None:
        event.wait()
        event.clear()

    def pause(self) -> None:
        """Called by the run: give the turn away, until its next one."""
        self.back.set()
        self._await(self.turn)
        if self.stopped is not None:
            raise self.stopped

    def ask(self, question: GenerationRequest) -> list[Generation]:
        """Called by the run: give the turn away until the answers are there."""
        self.question = question
        self.pause()
        self.question = None
        if question.fault is not None:
            raise question.fault
        assert question.answers is not None
        return question.answers

    def go_on(self) -> None:
        """Called by the pack: let the run work, with the global random generators as it left
        them."""
        before = rng_state()
        set_rng_state(self.rng)
        self.at_work = True
        self.turn.set()
        try:
            self._await(self.back)
            self.at_work = False
        finally:
            self.rng = rng_state()
            set_rng_state(before)
        if self.over:
            self.thread.join()

    def end(self, error: BaseException) -> None:
        """Have the run end by this error, where it could save itself, asks next or begins."""
        self.stopped = error
        if self.at_work:
            self._await(self.back)
        if not self.over:
            self.go_on()


def _let_go(error: BaseException | None) -> None:
    """An error holds the variables of the calls that it came through, and those a run's tensors:
    until the pack's end the others would have to do without their memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class PackedEngine(Engine):
    """What a packed run has for an engine: it asks the pack."""

    def __init__(self, seat: PackedRun, shared: Engine):
        self.lm, self.config, self.batch_size = shared.lm, shared.config, shared.batch_size
        self.compiled = shared.compiled
        self.seat = seat
        self.by_itself = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Answers within come at once, and no other run works meanwhile: it waits for what this
        one makes for all (and may hold a lock for)."""
        self.by_itself += 1
        try:
            yield
        finally:
            self.by_itself -= 1

    def generate(
        self,
        prompts: Prompts,
        jobs: Sequence[Job],
        max_new_tokens: int,
        choices: Sequence[int] | Options | ItemOptions | None = None,
        record: bool = False,
        progress: Progress | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generation]:
        """As `Engine.generate`."""
        if self.by_itself:
            return super().generate(prompts, jobs, max_new_tokens, choices, record, progress, stop)
        question = GenerationRequest(prompts, jobs, max_new_tokens, choices, record, stop)
        answers = self.seat.ask(question)
        if progress:
            progress(sum(len(job.items) for job in jobs))
        return answers


class Pack:
    """The runs and the engine that answers them."""

    def __init__(self) -> None:
        self.seats: list[PackedRun] = []
        self.engine: Engine | None = None

    def seat(self, work: Callable[[Callable], dict[str, Any] | None], name: str = "") -> PackedRun:
        """Add a run. work: called in its thread with what makes its engine."""

        def make(lm: LanguageModel, config: EngineConfig) -> Engine:
            if self.engine is None:
                self.engine = Engine(lm, config)
            return PackedEngine(seat, self.engine)

        seat = PackedRun(lambda: work(make), f"run {name or len(self.seats)}")
        self.seats.append(seat)
        return seat

    def play(self) -> list[Outcome]:
        """Run all to their ends."""
        working = list(self.seats)
        try:
            while working:
                for seat in working:
                    seat.go_on()
                working = [seat for seat in working if not seat.over]
                self._answer([seat.question for seat in working if seat.question is not None])
        except BaseException as error:
            for seat in working:
                seat.end(error)
            raise
        return [seat.outcome for seat in self.seats]

    def _answer(self, questions: list[GenerationRequest]) -> None:
        kinds: dict[tuple, list[GenerationRequest]] = {}
        for question in questions:
            kinds.setdefault(question.kind, []).append(question)
        for alike in kinds.values():
            try:
                self._together(alike)
            except Exception as error:
                # Perhaps one run's controller is at fault: then the others must not suffer.
                if len(alike) > 1:
                    log.warning("answering %d runs together failed (%s); now one by one: slower",
                                len(alike), error)  # fmt: skip
                for question in alike:
                    self._one(question)

    def _together(self, alike: list[GenerationRequest]) -> None:
        assert self.engine is not None
        first, jobs = alike[0], [job for question in alike for job in question.jobs]
        answers = self.engine.generate(
            first.prompts, jobs, first.max_new_tokens, first.choices, first.record, stop=first.stop
        )
        for question in alike:
            question.answers = answers[: len(question.jobs)]
            answers = answers[len(question.jobs) :]

    def _one(self, question: GenerationRequest) -> None:
        try:
            self._together([question])
        except Exception as error:
            question.fault = error
