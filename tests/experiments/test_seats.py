"""Threads that take turns: answers, faults, interrupts and random numbers are each one's own."""

from __future__ import annotations

import random
import threading
import time
import traceback
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from crl_exp.experiments.turns import Pack, PackedRun
from crl_exp.generation.controller import Controller, Unsteered
from crl_exp.generation.engine import Engine, EngineConfig
from crl_exp.generation.results import Job
from crl_exp.runs import preemption
from tests.helpers import tiny


class Exploding(Controller):
    def __init__(self):
        super().__init__({2: 2})

    def act(self, layer, x_BD, context):
        raise KeyError("planned")


def test_a_fault_within_a_shared_call_is_its_own_runs(caplog) -> None:
    lm = tiny.language_model("llama")
    store = Engine(lm, EngineConfig(8, 1.0, "eager")).read(tiny.prompts(3))

    def work(make, controller: Controller) -> dict[str, Any]:
        engine = make(lm, EngineConfig(8, 1.0, "eager"))
        return {"tokens": engine.generate(store, [Job(controller, [0, 1, 2])], 2)[0].tokens}

    pack = Pack()
    for controller in (Unsteered(), Exploding(), Unsteered()):
        pack.seat(lambda make, controller=controller: work(make, controller))
    first, fault, last = pack.play()
    alone = Engine(lm, EngineConfig(8, 1.0, "eager")).generate(
        store, [Job(Unsteered(), [0, 1, 2])], 2
    )
    assert first == last == {"tokens": alone[0].tokens}
    assert isinstance(fault, KeyError)
    assert "planned" in caplog.text and "one by one" in caplog.text


def test_a_run_that_failed_holds_no_memory() -> None:
    """Its error is kept to the pack's end, and with it the calls that it came through."""
    held: list[weakref.ref] = []

    def inner() -> None:
        large = torch.ones(1000)
        held.append(weakref.ref(large))
        raise FloatingPointError("not finite")

    def work(make) -> dict[str, Any]:
        also = torch.ones(10)
        held.append(weakref.ref(also))
        try:
            inner()
        except FloatingPointError as error:
            raise ValueError("the loss") from error
        return {}

    pack = Pack()
    pack.seat(work)
    (outcome,) = pack.play()
    assert isinstance(outcome, ValueError)
    assert [found() for found in held] == [None, None]
    told = "".join(traceback.format_exception(outcome))
    assert "in inner" in told and "not finite" in told


def test_an_interrupt_while_one_works_ends_those_that_have_not_begun(monkeypatch) -> None:
    began: list[int] = []
    fired: list[threading.Event] = []
    lm = tiny.language_model("llama")
    store = Engine(lm, EngineConfig(8, 1.0, "eager")).read(tiny.prompts(2))

    def work(make, number: int) -> dict[str, Any]:
        began.append(number)
        make(lm, EngineConfig(8, 1.0, "eager")).generate(store, [Job(Unsteered(), [0])], 1)
        return {}

    def interrupted(event) -> None:
        if threading.current_thread() is threading.main_thread() and not fired:
            fired.append(event)
            raise KeyboardInterrupt  # the first has its turn
        waits(event)

    waits = PackedRun._await
    monkeypatch.setattr(PackedRun, "_await", staticmethod(interrupted))
    pack = Pack()
    for number in range(3):
        pack.seat(lambda make, number=number: work(make, number))
    with pytest.raises(KeyboardInterrupt):
        pack.play()
    assert all(isinstance(seat.outcome, KeyboardInterrupt) for seat in pack.seats)
    # The first may have been told before it got to its work; the others never get there.
    assert began in ([], [0]) and not any(seat.thread.is_alive() for seat in pack.seats)


def test_each_run_has_its_own_global_random_numbers() -> None:
    """torch.manual_seed in one run must not reach another, whoever works in between."""
    lm = tiny.language_model("llama")
    store = Engine(lm, EngineConfig(8, 1.0, "eager")).read(tiny.prompts(2))

    def work(make, seed: int) -> dict[str, Any]:
        engine = make(lm, EngineConfig(8, 1.0, "eager"))
        torch.manual_seed(seed)
        drawn = [torch.rand(3)]
        for _ in range(3):
            engine.generate(store, [Job(Unsteered(), [0, 1])], 1)
            drawn.append(torch.rand(3))
        return {"drawn": torch.cat(drawn)}

    torch.manual_seed(99)
    before = torch.get_rng_state()
    pack = Pack()
    for seed in (3, 4):
        pack.seat(lambda make, seed=seed: work(make, seed))
    outcomes = pack.play()
    assert torch.equal(torch.get_rng_state(), before)
    for seed, outcome in zip((3, 4), outcomes, strict=True):
        torch.manual_seed(seed)
        assert isinstance(outcome, dict) and torch.equal(outcome["drawn"], torch.rand(12))


def test_an_interrupt_reaches_one_that_never_asks(monkeypatch) -> None:
    """A warmup, say: it is told where it could be saved, and isn't waited for to its end."""
    fired: list[int] = []
    steps: list[int] = []

    def work(make) -> dict[str, Any]:
        while len(steps) < 10**6:
            steps.append(1)
            preemption.check()
        return {}

    def interrupted(event) -> None:
        if threading.current_thread() is threading.main_thread() and not fired:
            fired.append(1)
            while len(steps) < 5:
                time.sleep(0.001)
            raise KeyboardInterrupt
        waits(event)

    waits = PackedRun._await
    monkeypatch.setattr(PackedRun, "_await", staticmethod(interrupted))
    pack = Pack()
    seat = pack.seat(work)
    with pytest.raises(KeyboardInterrupt):
        pack.play()
    assert isinstance(seat.outcome, KeyboardInterrupt) and len(steps) < 10**6


def test_numpys_and_pythons_random_numbers_are_each_runs_own(tmp_path) -> None:
    """A checkpoint sets them; that must not reach the others."""

    def work(make, seed: int) -> dict[str, Any]:
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        drawn = []
        for _ in range(2):
            pack.seats[seed].pause()
            drawn.append((np.random.rand(), random.random(), float(torch.rand(()))))
        return {"drawn": drawn}

    pack = Pack()
    for seed in (0, 1):
        pack.seat(lambda make, seed=seed: work(make, seed))
    for seed, outcome in enumerate(pack.play()):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        alone = [(np.random.rand(), random.random(), float(torch.rand(()))) for _ in range(2)]
        assert isinstance(outcome, dict) and outcome["drawn"] == alone
