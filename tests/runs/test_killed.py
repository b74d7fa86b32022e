"""Runs that are held at a chosen place and killed there by SIGKILL, again and again: each goes on,
and ends as if nothing had happened. No place is hit by luck, and none missed on a busy machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.test_packing import close, told
from tests.helpers import forking
from tests.helpers.mlflow_reading import children, history, with_database
from tests.helpers.tiny_run import ROOT
from tests.runs.test_resume import outcome

pytestmark = pytest.mark.slow
SIZES = ["task.n_train=24", "task.n_validation=8", "task.n_test=16", "engine.batch_size=8"]
ALWAYS = ["checkpoint.updates=1", *SIZES]
LAYERS = ["layers=list", "layers.layers=[0,2]"]
UPDATES = 12
TRAINING = [
    f"algorithm.n_updates={UPDATES}", "algorithm.validate_every=4", "noise=gaussian",
    "algorithm.anneal_lr=true", "policy.policy_depth=1",
]  # fmt: skip
METHODS = {
    "crl": [*LAYERS, *TRAINING, "method=crl"],
    "corrsteer_p": [*LAYERS, "method=corrsteer_p", "method.multipliers=[1,2]"],
    "raw_residual": [*LAYERS, "method=raw_residual", "method.norm_match=false"],
    "best_layer": [
        "method=crl", "algorithm.n_updates=3", "layers=best_on_validation", "layers.among=[0,2]",
        "algorithm.validate_every=2",
    ],
}  # fmt: skip
# In the order in which a run comes by: each attempt goes further than the one before.
BEFORE_TRAINING = [
    ("before:config.yaml", 1), ("after:status.json", 1), ("before:data.json", 1),
    ("warming up", 3), ("before:*.safetensors", 1), ("after:*.safetensors", 1),
]  # fmt: skip
IN_TRAINING = [
    ("learning", 3), ("learned", 2), ("logged", 2), ("writing", 5), ("before:checkpoint.pt", 1),
    ("before:checkpoint.prev.pt", 1), ("after:checkpoint.prev.pt", 2), ("after:checkpoint.pt", 2),
]  # fmt: skip
AT_THE_END = [
    ("answered", 1), ("before:0000*.pt", 1), ("after:0000*.pt", 1),
    ("before:interventions.parquet", 1), ("after:interventions.parquet", 1),
    ("before:features.json", 1), ("before:result.json", 1), ("after:result.json", 1),
]  # fmt: skip
GATES = {
    "crl": [*BEFORE_TRAINING, *IN_TRAINING, *AT_THE_END],
    "corrsteer_p": [("after:0000*.pt", 2), ("answered", 3), *AT_THE_END[2:]],
    "raw_residual": [("before:residuals.pt", 1), ("after:residuals.pt", 1), *AT_THE_END[:2]],
    "best_layer": [("after:checkpoint.pt", 2), ("logged", 2), ("answered", 2), *AT_THE_END[5:]],
}


class Killing:
    """Plans for tests/helpers/disturbed.py, which has imported everything."""

    def __init__(self, home: Path, common: list[str]):
        self.home, self.common = home, common
        self._straight: dict[str, dict[str, Any]] = {}
        self.process = subprocess.Popen(
            [forking.python(), "-m", "tests.helpers.disturbed"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, name: str, overrides: list[str], gates: list[tuple[str, int]], **more: Any
    ) -> dict[str, Any]:
        """Every gate must be reached, and the last attempt come to its end."""
        plan = {
            "overrides": [*self.common, *ALWAYS, *overrides], "output_dir": str(self.home / name),
            "gates": [{"place": place, "nth": nth} for place, nth in gates], **more,
        }  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(plan) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        missed = [g for g, reached in zip(gates, told["reached"], strict=True) if not reached]
        assert not missed, f"never came to {missed}\n{told['output']}"
        assert told["code"] == 0 and set(told["states"][-1]) == {"done"}, told["output"]
        return told

    def straight(self, method: str) -> dict[str, Any]:
        """A run that nobody kills; made once."""
        if method not in self._straight:
            self._straight[method] = self.run(f"straight_{method}", METHODS[method], [])
        return self._straight[method]


@pytest.fixture(scope="module")
def killing(tiny_files, tmp_path_factory) -> Iterator[Killing]:
    made = Killing(tmp_path_factory.mktemp("killed"), tiny_files.overrides())
    yield made
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait(timeout=60)


@pytest.mark.parametrize("method", METHODS)
def test_killed_anywhere_it_ends_as_if_nothing_had_happened(killing, method):
    """Loading, warm-up, updates, checkpoints half written and half renamed, choices on validation,
    evaluation, the last files."""
    straight = killing.straight(method)
    broken = killing.run(f"broken_{method}", METHODS[method], GATES[method])
    expected, found = (outcome(Path(one["folders"][0])) for one in (straight, broken))
    assert found == expected
    said = {state for (state,) in broken["states"]}
    assert said <= {"unknown", "lost", "done"}, "whoever looks sees that it was killed"
    status = json.loads((Path(broken["folders"][0]) / "status.json").read_text())
    # Not begun before its config is there, nor again once its result is.
    begun = [g for g in GATES[method] if g != ("before:config.yaml", 1)]
    assert status["attempts"] == len(begun) + (("after:result.json", 1) not in begun)
    if method == "crl":
        steps = [line["step"] for line in expected["journal"] if "reward" in line["metrics"]]
        assert steps == list(range(1, UPDATES + 1))


def test_a_pack_that_is_killed_goes_on(killing):
    """In the middle of another run's update, between the runs' checkpoints, and where one of them
    has its result already."""
    variants = [["method=crl", "seed=0"], ["method=crl", "seed=1"], ["method=corrsteer_s"]]
    overrides = [*LAYERS, *TRAINING]
    gates = [
        ("warming up", 2), ("learning", 4), ("learned", 3), ("after:checkpoint.prev.pt", 3),
        ("after:checkpoint.pt", 3), ("answered", 3), ("after:0000*.pt", 2),
        ("before:result.json", 1), ("after:result.json", 1), ("before:interventions.parquet", 1),
    ]  # fmt: skip
    straight = killing.run("straight_pack", overrides, [], variants=variants)
    broken = killing.run("broken_pack", overrides, gates, variants=variants)
    for one, other in zip(straight["folders"], broken["folders"], strict=True):
        close(told(Path(other)), told(Path(one)))
    assert any("done" in states and "lost" in states for states in broken["states"])


def test_killed_while_mlflow_is_locked(killing):
    """Another program keeps MLflow's file to itself until the last attempt: nothing waits for it,
    and afterwards MLflow has each point once."""
    home = killing.home / "locked"
    (home / "out").mkdir(parents=True)
    with_database(home / "out")
    database = home / "out" / "mlflow.db"
    gates = [("learning", 3), ("after:checkpoint.pt", 3), ("answered", 1)]
    tracked = [*METHODS["crl"], "tracking=mlflow", "tracking.sync_seconds=0.05"]
    broken = killing.run("locked", tracked, gates, locked=str(database))
    straight = killing.straight("crl")
    expected, found = (outcome(Path(one["folders"][0])) for one in (straight, broken))
    assert found == expected
    (child,) = children(f"sqlite:///{database}")
    assert child.info.status == "FINISHED"
    points = history(f"sqlite:///{database}", child.info.run_id, "reward")
    assert [step for step, _ in points] == list(range(1, UPDATES + 1))
