"""Runs that are asked to end, or killed, at random moments: nothing is lost, nothing done twice."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crl_exp.runs.preemption import EXIT_CODE
from tests.helpers import forking
from tests.helpers.disturbed import STEP_SECONDS
from tests.helpers.tiny_run import ROOT
from tests.runs.test_resume import outcome

pytestmark = pytest.mark.slow
SIZES = [
    "task.n_train=48", "task.n_validation=16", "task.n_test=80", "engine.batch_size=8",
    "task=tiny", "task.choices=null", "task.max_new_tokens=3",
]  # fmt: skip
LAYERS = ["layers=list", "layers.layers=[0,2]"]
METHODS = {
    "crl": [
        *LAYERS, "method=crl", "algorithm.n_updates=24", "algorithm.validate_every=4",
        "noise=gaussian", "policy.policy_depth=1", "method.features=free",
    ],
    "corrsteer_p": [
        *LAYERS, "method=corrsteer_p", "method.multipliers=[1,2,4]", "method.n_candidates=2",
    ],
    "raw_residual": [*LAYERS, "method=raw_residual", "method.norm_match=false"],
    "best_layer": [
        "method=crl", "algorithm.n_updates=4", "layers=best_on_validation", "layers.among=[0,2]",
        "algorithm.validate_every=2",
    ],
}  # fmt: skip
RARELY = ["checkpoint.updates=1000", "checkpoint.seconds=1000"]  # only when asked to end
ALWAYS = ["checkpoint.updates=1"]


class Disturbing:
    """Runs methods under signals, in a process that has imported everything."""

    def __init__(self, home: Path, common: list[str]):
        self.home, self.common = home, common
        self.process = subprocess.Popen(
            [forking.python(), "-m", "tests.helpers.disturbed"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.straight: dict[str, dict[str, Any]] = {}

    def run(self, name: str, method: str, signals: list[dict], how: list[str]) -> dict[str, Any]:
        overrides = [*self.common, *SIZES, *METHODS[method], *how]
        plan = {
            "overrides": overrides, "output_dir": str(self.home / name), "signals": signals,
        }  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def undisturbed(self, method: str) -> dict[str, Any]:
        if method not in self.straight:
            told = self.run(f"straight_{method}", method, [], RARELY)
            assert [a["code"] for a in told["attempts"]] == [0], told["output"]
            self.straight[method] = told
        return self.straight[method]


@pytest.fixture(scope="module")
def disturbing(tiny_files, tmp_path_factory) -> Iterator[Disturbing]:
    common = [o for o in tiny_files.overrides() if not o.startswith("task")]
    made = Disturbing(tmp_path_factory.mktemp("disturbed"), common)
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait(timeout=60)


def moments(n_events: int, names: list[str], seed: int) -> list[dict[str, Any]]:
    """Signals at random places of a run of so many events, in order."""
    draw = random.Random(seed)
    places = sorted(draw.sample(range(1, n_events - 4), len(names)))
    delays = [draw.random() * 2 * STEP_SECONDS for _ in names]
    return [
        {"name": name, "position": place, "delay": delay}
        for name, place, delay in zip(names, places, delays, strict=True)
    ]


@pytest.mark.parametrize(
    ("method", "n"), [("crl", 12), ("corrsteer_p", 5), ("raw_residual", 4), ("best_layer", 4)]
)
def test_asked_to_end_nothing_is_done_twice(disturbing, method, n):
    """25 signals. Saved only when asked to: every batch and update is generated exactly once. (How
    the SAEs fit is measured at one go, and anew where that was cut off.)"""
    straight = disturbing.undisturbed(method)
    names = ["SIGUSR2" if i % 3 else "SIGTERM" for i in range(n)]
    signals = moments(len(straight["events"]), names, seed=n)
    told = disturbing.run(f"asked_{method}", method, signals, RARELY)
    *cut_off, last = told["attempts"]
    assert [a["state"] for a in cut_off] == ["preempted"] * n, told["output"]
    assert [a["code"] for a in cut_off] == [EXIT_CODE] * n
    assert [a["signal"] for a in cut_off] == names
    assert last["code"] == 0 and last["state"] == "done", told["output"]
    done, expected = (
        [event for event in one["events"] if event[0] != "Collector"] for one in (told, straight)
    )
    assert done == expected
    assert outcome(Path(told["folder"])) == outcome(Path(straight["folder"]))


def test_interrupted_in_every_phase(disturbing):
    """What the places drawn above are worth."""
    straight = disturbing.undisturbed("crl")
    signals = moments(len(straight["events"]), ["SIGUSR2"] * 12, seed=12)
    who = {straight["events"][s["position"]][0] for s in signals}
    assert who == {"Observer", "PolicyController", "Unsteered"}


@pytest.mark.parametrize(("method", "n"), [("crl", 10), ("corrsteer_p", 4), ("best_layer", 4)])
def test_killed_it_goes_on_from_the_last_checkpoint(disturbing, method, n):
    """18 SIGKILLs. Saved after every step: no more than the step that was cut off is repeated."""
    straight = disturbing.undisturbed(method)
    expected = straight["events"]
    signals = moments(len(expected) - 2 * n, ["SIGKILL"] * n, seed=n)
    for number, one in enumerate(signals):  # repeated steps count as events too
        one["position"] += 2 * number
    told = disturbing.run(f"killed_{method}", method, signals, ALWAYS)
    *cut_off, last = told["attempts"]
    assert [a["state"] for a in cut_off] == ["lost"] * n, told["output"]
    assert last["code"] == 0 and last["state"] == "done", told["output"]
    assert outcome(Path(told["folder"])) == outcome(Path(straight["folder"]))
    reached = 0
    for one in told["attempts"]:
        done = told["events"][one["first"] : one["last"]]
        # One step: an update with its validation, or a batch.
        begins = [at for at in range(max(0, reached - 3), reached + 1)
                  if expected[at : at + len(done)] == done]  # fmt: skip
        assert begins, (one, done[:2])
        reached = max(reached, begins[-1] + len(done))
    assert reached == len(expected)
