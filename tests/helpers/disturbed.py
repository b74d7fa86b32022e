"""A process that runs experiments in children of its own and disturbs them: reads plans, a line
each, and answers each with a line. Importing the stack takes many times longer than a tiny run, so
every attempt is a fork of a process that has imported it.

Plan: {"overrides", "output_dir", "signals": [{"name", "position", "delay"}, …]}.
A position counts the calls of `Engine.generate` in all attempts so far.

Or, instead of signals, "gates": [{"place", "nth"}, …]. An attempt is held at its gate, and killed
there by SIGKILL: exactly at that place, however slow the machine is. Then more of a plan are
"variants" (overrides of each run of a pack) and "locked" (the MLflow file, while it is killed).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import threading
import time
import zlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import torch

from crl_exp.experiments.packing import run_pack
from crl_exp.experiments.run import run_experiment
from crl_exp.generation import model_check as probe
from crl_exp.generation.engine import Engine
from crl_exp.runs.checkpoints import _Sink
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from crl_exp.steering.answers import AnswerBook
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.policy.learner import LayerLearner
from crl_exp.tasks.base import Item, Score, content_id
from crl_exp.tasks.sums import Sums
from crl_exp.tracking.sending.client import import_mlflow
from tests.helpers.tiny_run import small

STEP_SECONDS = 0.01


def watch_generation(events: Path) -> None:
    """Write a line for each call of the engine: its prompts, items, controllers and tokens."""
    plain = Engine.generate

    def generate(self: Engine, prompts: Any, jobs: Any, *more: Any, **named: Any) -> Any:
        time.sleep(STEP_SECONDS)
        made = plain(self, prompts, jobs, *more, **named)
        for job, one in zip(jobs, made, strict=True):
            if isinstance(job.controller, probe._Watch):
                continue  # the model is checked whenever it is loaded
            who, n_tokens = type(job.controller).__name__, sum(len(t) + 1 for t in one.tokens)
            line = json.dumps([who, len(prompts), list(job.items), n_tokens])
            with events.open("a") as file:
                file.write(line + "\n")
        return made

    Engine.generate = generate  # type: ignore[method-assign]


def write_freely() -> None:
    """Make task=tiny one of free text whose reward depends on every token, in tiny words."""

    def item(a: int, b: int, c: int) -> Item:
        user = f"w{a} w{b} w{c % 58}"
        return Item(content_id(user), user, "yes")

    def score(self: Sums, items: Any, outputs: Any) -> list[Score]:
        return [Score(float(zlib.crc32(text.encode()) % 2)) for text in outputs]

    Sums._item, Sums.score = staticmethod(item), score  # type: ignore[method-assign]


def hold_at(gate: dict[str, Any], told: int) -> None:
    """Have this process stop for good where it comes to the gate for the nth time, once it has said
    so to the file `told`.

    Places: `before:NAME` and `after:NAME`, a file of that name (a pattern) being put in its place;
    `writing`, in the middle of a checkpoint's bytes; a key of `CALLS`, before or after that call.
    """
    passed = 0

    def come_by() -> None:
        nonlocal passed
        passed += 1
        if passed == gate["nth"]:
            os.write(told, b".")
            threading.Event().wait()

    kind, _, name = gate["place"].partition(":")
    if name:
        plain = os.replace

        def replace(source: Any, target: Any) -> None:
            meant = fnmatch(Path(target).name, name)
            if meant and kind == "before":
                come_by()
            plain(source, target)
            if meant and kind == "after":
                come_by()

        os.replace = replace
        return
    owner, method, before = CALLS[kind]
    call = getattr(owner, method)

    def called(*args: Any, **named: Any) -> Any:
        if before:
            come_by()
        made = call(*args, **named)
        if not before:
            come_by()
        return made

    setattr(owner, method, called)


CALLS: dict[str, tuple[type, str, bool]] = {
    "writing": (_Sink, "write", False),
    "warming up": (Observer, "act", True),
    "learning": (LayerLearner, "update", True),
    "learned": (LayerLearner, "update", False),
    "logged": (RunDirectory, "log", False),
    "answered": (AnswerBook, "add", False),
    "cleared": (RunDirectory, "clear_answers", False),
}
"""By its name, a call and whether the gate is before it."""


def kill_at_gates(plan: dict[str, Any]) -> dict[str, Any]:
    """Run to the end through all the gates; tells which were reached, and how the last attempt
    ended."""
    home = Path(plan["output_dir"])
    home.mkdir(parents=True, exist_ok=True)
    own = plan.get("variants", [[]])
    every = [[*plan["overrides"], *more, f"output_dir={home / 'out'}"] for more in own]
    folders = [RunDirectory(small(overrides)).path for overrides in every]
    if locked := plan.get("locked"):
        import_mlflow()
    reached, states, code = [], [], 0
    for gate in [*plan["gates"], None]:
        heard, told = os.pipe()
        lock = sqlite3.connect(locked) if locked and gate else None
        if lock:
            lock.execute("BEGIN EXCLUSIVE")
        child = os.fork()
        if not child:
            os.close(heard)
            if gate:
                hold_at(gate, told)
            be_a_run(every, home / "output")
        os.close(told)
        if gate:
            reached.append(os.read(heard, 1) == b".")  # b"": it ended without coming there
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(heard)
        if lock:
            lock.close()
        states.append([Record(folder).state for folder in folders])
    return {
        "folders": list(map(str, folders)), "reached": reached, "states": states, "code": code,
        "output": (home / "output").read_text(),
    }  # fmt: skip


def be_a_run(every: list[list[str]], out: Path) -> NoReturn:
    """The rest of a child's life: one run, or a pack of several."""
    code = 1
    try:
        with out.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        configs = [small(overrides) for overrides in every]
        made = run_pack(configs) if len(configs) > 1 else [run_experiment(configs[0], True)]
        code = 0 if all(isinstance(one, dict) for one in made) else 3
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def attempt(overrides: list[str], events: Path, out: Path) -> int:
    """Start a run in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with out.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        watch_generation(events)
        code = 0 if run_experiment(small(overrides), skip_finished=False) else 3
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def disturb(plan: dict[str, Any]) -> dict[str, Any]:
    """Run to the end through all the signals; tells what each attempt did."""
    home = Path(plan["output_dir"])
    home.mkdir(parents=True, exist_ok=True)
    overrides = [*plan["overrides"], f"output_dir={home / 'out'}"]
    folder = RunDirectory(small(overrides)).path
    events, out = home / "events", home / "output"
    attempts = []
    for wanted in [*plan["signals"], None]:
        first = n_lines(events)
        child = attempt(overrides, events, out)
        ended, code = 0, 0

        def ready(number: int = len(attempts), wanted: Any = wanted) -> bool:
            begun = Record(folder).status.get("attempts", 0) > number
            return begun and n_lines(events) >= wanted["position"]

        while wanted and not ended and not ready():
            ended, code = os.waitpid(child, os.WNOHANG)
            time.sleep(0.0005)
        if wanted and not ended:
            time.sleep(wanted["delay"])
            os.kill(child, signal.Signals[wanted["name"]])
        if not ended:
            _, code = os.waitpid(child, 0)
        record = Record(folder)
        attempts.append(
            {
                "code": os.waitstatus_to_exitcode(code), "first": first, "last": n_lines(events),
                "state": record.state, "signal": record.status.get("signal"),
                "phase": record.heartbeat.get("phase"),
            }
        )  # fmt: skip
    lines = events.read_text().splitlines() if events.exists() else []
    return {
        "folder": str(folder), "attempts": attempts, "output": out.read_text(),
        "events": [json.loads(line) for line in lines],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    write_freely()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        plan = json.loads(line)
        told = kill_at_gates(plan) if "gates" in plan else disturb(plan)
        answers.write(json.dumps(told) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
