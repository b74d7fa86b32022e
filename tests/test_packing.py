"""Runs of one process that share the model: each ends as if it had been alone."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig

from crl_exp import lab as labs
from crl_exp.controllers.base import Controller, Unsteered
from crl_exp.engine import Engine, EngineConfig
from crl_exp.errors import UserError
from crl_exp.experiment import run_experiment
from crl_exp.generation import Job
from crl_exp.learner import NonFiniteError
from crl_exp.packing import pack_key, run_pack
from crl_exp.preemption import Preempted
from crl_exp.runs import RunDirectory
from crl_exp.seats import Pack, Seat
from crl_exp.tasks.jsonl import JsonLines
from tests import tiny
from tests.test_parity import FreeText
from tests.tiny_run import small

UPDATES = "algorithm.n_updates=4"
# Options, layers, seeds, learning rates and methods that differ; one task, model and SAE release.
CHOICE = [
    ["seed=0"],
    ["seed=1", "mask=active"],
    ["seed=0", "algorithm.lr_policy=0.03", "noise=gaussian"],
    ["layers=all", "fusion=attention"],
    ["algorithm=grpo", "algorithm.prompts_per_update=4", "policy.k=2"],
    ["method=corrsteer_p"],
    ["layers=best_on_validation", "layers.among=[0,2]"],
    ["method=none"],
]
OPEN = [
    ["seed=0", "mask=all"],
    ["seed=1", "activation=gumbel_topk", "activation.top=5"],
    ["layers=list", "layers.layers=[0,2]", "noise=epsilon_greedy"],
    ["method=raw_residual"],
]
NUMBERS = 1e-4
"""Bound on what differs by rounding: matrix products of other shapes."""


def configs(files, folder: Path, variants: list[list[str]], *more: str) -> list[DictConfig]:
    common = [*files.overrides(), UPDATES, f"output_dir={folder}", *more]
    return [small([*common, *variant]) for variant in variants]


def forget() -> None:
    """Another process would have nothing loaded."""
    labs._SHARED.clear()


def close(a: Any, b: Any, where: str = "") -> None:
    """The same, numbers to within `NUMBERS`."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, abs=NUMBERS, rel=NUMBERS, nan_ok=True), where
    else:
        assert a == b, where


def told(folder: Path) -> dict[str, Any]:
    """What a run left behind, without the times."""
    result = json.loads((folder / "result.json").read_text())
    for name in ("seconds", "peak_memory_bytes", "packed"):
        del result[name]
    journal = folder / "journal.jsonl"
    lines = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    for line in lines:
        del line["time"]
        line["metrics"] = {k: v for k, v in line["metrics"].items() if not k.startswith("seconds_")}
    table = pq.read_table(folder / "interventions.parquet").to_pylist()
    features = json.loads((folder / "features.json").read_text())
    return {"result": result, "journal": lines, "interventions": table, "features": features}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choice", "open"])
def test_packed_runs_equal_solo_ones_item_by_item(kind, tiny_files, tmp_path, monkeypatch) -> None:
    """Every action, coefficient, token and reward; losses and log-probabilities up to rounding."""
    variants = CHOICE if kind == "choice" else OPEN
    more = [] if kind == "choice" else ["task.choices=null", "task.max_new_tokens=6"]
    if kind == "open":
        for name in ("draw", "score", "scorer_name"):
            monkeypatch.setattr(JsonLines, name, FreeText.__dict__[name])
    solo = configs(tiny_files, tmp_path / "solo", variants, *more)
    packed = configs(tiny_files, tmp_path / "packed", variants, *more)
    for config in solo:
        forget()
        run_experiment(config, skip_finished=False)
    forget()
    outcomes = run_pack(packed)
    for config, alone, outcome in zip(packed, solo, outcomes, strict=True):
        assert isinstance(outcome, dict), outcome
        assert outcome["packed"] == len(variants)
        folder = RunDirectory(config).path
        close(told(folder), told(RunDirectory(alone).path))
        assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_a_pack_asks_the_model_once_for_all(tiny_files, tmp_path, monkeypatch) -> None:
    """Three runs train with as many calls of the engine as one, and one warmup pass serves all."""
    calls: list[int] = []
    generate = Engine.generate

    def counted(self, prompts, jobs, *arguments, **more):
        calls.append(len(jobs))
        return generate(self, prompts, jobs, *arguments, **more)

    monkeypatch.setattr(Engine, "generate", counted)
    variants = [["layers.layer=0"], ["layers.layer=1"], ["layers.layer=2"]]
    forget()
    outcomes = run_pack(configs(tiny_files, tmp_path / "three", variants))
    assert all(isinstance(outcome, dict) for outcome in outcomes)
    three = list(calls)
    calls.clear()
    forget()
    run_pack(configs(tiny_files, tmp_path / "one", variants[:1]))
    # One by one: the check of a newly loaded model, the warmup (24 items, 16 at a time), the
    # unsteered answers to test and validation.
    assert three.count(1) == 1 + 2 + 2
    assert three.count(3) == len(three) - 5 == len(calls) - 5
    assert set(calls) == {1}


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


def test_a_run_that_fails_ends_alone(tiny_files, tmp_path) -> None:
    """A loss that isn't finite, and a setting that can't work."""
    variants = [["seed=0"], ["algorithm.lr_policy=1e37"], ["warmup.min_frequency=0.999999"]]
    solo = configs(tiny_files, tmp_path / "solo", variants[:1])
    run_experiment(solo[0], skip_finished=False)
    packed = configs(tiny_files, tmp_path / "packed", variants)
    good, loss, none_left = run_pack(packed)
    assert isinstance(loss, NonFiniteError)
    assert isinstance(none_left, UserError) and "min_frequency" in str(none_left)
    assert isinstance(good, dict)
    close(told(RunDirectory(packed[0]).path), told(RunDirectory(solo[0]).path))
    states = []
    for config in packed:
        status = json.loads((RunDirectory(config).path / "status.json").read_text())
        states.append(status["state"])
        assert bool(status["traceback"]) == (status["state"] == "failed")
    assert states == ["done", "failed", "failed"]


def test_a_pack_goes_on_from_checkpoints_and_skips_what_is_done(tiny_files, tmp_path) -> None:
    variants = [["seed=0"], ["seed=1"]]
    whole = configs(tiny_files, tmp_path / "whole", variants)
    run_pack(whole)
    broken = configs(tiny_files, tmp_path / "broken", variants, "checkpoint.updates=2")
    run_pack(broken)
    first, second = (RunDirectory(config).path for config in broken)
    for name in ("result.json", "checkpoint.pt"):
        (second / name).unlink()  # it goes on from the checkpoint before, of the second update
    before = (first / "result.json").stat().st_mtime_ns
    run_pack(broken)
    assert (first / "result.json").stat().st_mtime_ns == before
    close(told(second), told(RunDirectory(whole[1]).path))


def test_runs_that_cannot_share_a_model_are_refused(tiny_files, tmp_path) -> None:
    alike = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1", "layers=all", "method=none"]])
    assert pack_key(alike[0]) == pack_key(alike[1])
    for other in ("model.dtype=bfloat16", "task.n_test=8", "engine.batch_size=7", "sae.name=other"):
        config = configs(tiny_files, tmp_path, [[other]])[0]
        assert pack_key(config) != pack_key(alike[0])
        with pytest.raises(UserError, match="in common"):
            run_pack([alike[0], config])


def test_an_interrupt_ends_all_runs_and_is_recorded(tiny_files, tmp_path, monkeypatch) -> None:
    packed = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]])
    together = Pack._together
    rounds: list[int] = []

    def interrupted(self, alike):
        rounds.append(len(alike))
        if len(rounds) == 3:
            raise KeyboardInterrupt
        together(self, alike)

    monkeypatch.setattr(Pack, "_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_pack(packed)
    for config in packed:
        folder = RunDirectory(config).path
        assert json.loads((folder / "status.json").read_text())["state"] == "cancelled"
        assert (folder / "journal.jsonl").exists() and not (folder / "result.json").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("run ")]


def test_a_run_that_is_left_alone_has_ended_too(tiny_files, tmp_path) -> None:
    """resume=retry leaves what was never started; the other of the pack isn't kept waiting."""
    left, done = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]])
    left.resume = "retry"
    first, second = run_pack([left, done])
    assert first is None and isinstance(second, dict)
    assert not (RunDirectory(left).path / "status.json").exists()


def test_a_pack_that_is_asked_to_end_is_saved_and_goes_on(tiny_files, tmp_path) -> None:
    variants = [["seed=0"], ["seed=1"]]
    straight, warned = (configs(tiny_files, tmp_path / name, variants) for name in "ab")
    run_pack(straight)
    asked: list[int] = []

    def at_its_second_update(self, step: int, metrics) -> None:
        if step == 2 and not asked:
            asked.append(step)
            os.kill(os.getpid(), signal.SIGUSR2)
        log(self, step, metrics)

    log = RunDirectory.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "log", at_its_second_update)
        with pytest.raises(Preempted):
            run_pack(warned)
    for config in warned:
        run = RunDirectory(config)
        assert run.status()["state"] == "preempted" and run.load_checkpoint() is not None
    run_pack(warned)
    for one, other in zip(straight, warned, strict=True):
        close(told(RunDirectory(other).path), told(RunDirectory(one).path))


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

    waits = Seat._await
    monkeypatch.setattr(Seat, "_await", staticmethod(interrupted))
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
