"""A run that is killed goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from crl_exp.config import kept
from crl_exp.experiments import workspace as workspace
from crl_exp.generation.engine import Engine
from crl_exp.runs.preemption import Preempted
from tests.helpers.tiny_run import run_small

# What a run measures of the machine and of the moment, not what it computes.
OF_THE_MOMENT = ("seconds", "peak_memory_bytes", "git_commit", "git_dirty", "git_diff")


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be the same: result, features, journal, interventions."""
    result = json.loads((folder / "result.json").read_text())
    journal = folder / "journal.jsonl"
    written = journal.read_text().splitlines() if journal.exists() else []
    lines = [json.loads(line) for line in written]
    for line in lines:
        del line["time"]
        line["metrics"] = {k: v for k, v in line["metrics"].items() if not k.startswith("seconds_")}
    return {
        "result": {k: v for k, v in result.items() if k not in OF_THE_MOMENT},
        "features": (folder / "features.json").read_text(),
        "journal": lines,
        "interventions": (folder / "interventions.parquet").read_bytes(),
    }


@pytest.fixture(scope="module")
def finished(tiny_files, tmp_path_factory) -> tuple[list[str], Path]:
    """Overrides of a finished run, and its run directory."""
    common = [*tiny_files.overrides(), "checkpoint.updates=2", "algorithm.n_updates=5"]
    _, folder = run_small([*common, f"output_dir={tmp_path_factory.mktemp('finished')}"])
    return common, folder


@pytest.fixture
def copied(finished, tmp_path) -> tuple[list[str], Path]:
    """A copy of that run without its result, to be run again."""
    common, folder = finished
    copy = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, copy)
    (copy / "result.json").unlink()
    return [*common, f"output_dir={tmp_path}"], copy


@pytest.mark.parametrize("keep", [0, 100, 4000])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(keep, finished, copied):
    overrides, folder = copied
    path = folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:keep])
    before = torch.load(folder / "checkpoint.prev.pt", weights_only=True)
    kept = (folder / "journal.jsonl").read_bytes()[: before["journal_bytes"]]
    with pytest.warns(UserWarning, match=r"checkpoint\.pt is damaged and is passed over"):
        run_small(overrides)
    assert outcome(folder) == outcome(finished[1])
    journal = (folder / "journal.jsonl").read_bytes()
    assert before["step"] == 4 and journal.startswith(kept), "it didn't go on from there"


def test_with_both_checkpoints_damaged_it_starts_anew(finished, copied):
    overrides, folder = copied
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (folder / name).write_bytes(b"no")
    with pytest.warns(UserWarning, match=r"checkpoint\.prev\.pt is damaged"):
        run_small(overrides)
    assert outcome(folder) == outcome(finished[1])


def test_a_checkpoint_that_was_not_put_in_place_is_dropped(finished, copied):
    """Killed between the two renames: the new one is still a partial file, the old one is prev."""
    overrides, folder = copied
    partial = folder / ".checkpoint.99.partial"
    (folder / "checkpoint.pt").rename(partial)
    run_small(overrides)
    assert outcome(folder) == outcome(finished[1]) and not partial.exists()


def test_lines_logged_after_the_checkpoint_are_not_kept_twice(finished, copied):
    overrides, folder = copied
    (folder / "checkpoint.pt").unlink()
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"step": 6, "time": 0, "metr')
    run_small(overrides)
    assert outcome(folder) == outcome(finished[1])


def test_a_run_killed_after_training_trains_no_more(finished, copied):
    overrides, folder = copied
    before = (folder / "journal.jsonl").read_bytes()
    run_small(overrides)
    assert (folder / "journal.jsonl").read_bytes() == before, "times too: nothing was done again"
    assert outcome(folder) == outcome(finished[1])


@pytest.mark.parametrize(("where", "n_attempts"), [("batch", 16), ("prompts", 5)])
def test_asked_to_end_no_batch_is_answered_twice(
    where, n_attempts, tiny_files, tmp_path, monkeypatch
):
    """In warmup, updates, validations of two batches and evaluation. Asked at every batch: each
    attempt answers one. Or where an attempt reads the prompts of a second split: each has one."""
    sizes = ["task.n_train=8", "task.n_validation=8", "task.n_test=8", "engine.batch_size=4"]
    common = [*tiny_files.overrides(), *sizes, "noise=gaussian"]
    answered: list[Any] = []
    seen = {"batch": 0, "prompts": 0}
    ends_at = {"batch": {"batch": 1}, "prompts": {"prompts": 2}}[where]

    def count(what: str) -> None:
        seen[what] += 1
        if seen[what] == ends_at.get(what):
            os.kill(os.getpid(), signal.SIGUSR2)

    plain_answer, plain_read = workspace.RunWorkspace.answer, Engine.read

    def answer(self, controller, split, items, *given, **named):
        made = plain_answer(self, controller, split, items, *given, **named)
        answered.append((type(controller).__name__, split, list(items)))
        count("batch")
        return made

    def read(self, prompts, progress=None, options=None):
        if len(prompts) == 8:  # those of a split: the model is checked by others
            count("prompts")
        return plain_read(self, prompts, progress, options)

    def attempt(name: str) -> Path:
        monkeypatch.setattr(kept, "LOADED", {})  # as in a process of its own
        seen.update(batch=0, prompts=0)
        return run_small([*common, f"output_dir={tmp_path / name}"])[1]

    monkeypatch.setattr(workspace.RunWorkspace, "answer", answer)
    monkeypatch.setattr(Engine, "read", read)
    for _ in range(n_attempts):
        with pytest.raises(Preempted):
            attempt("broken")
    folder = attempt("broken")
    interrupted, answered[:] = answered[:], []
    ends_at.clear()
    straight = attempt("straight")
    assert interrupted == answered and len(answered) == 2 + 2 * (1 + 2) + 4 * 2
    assert outcome(folder) == outcome(straight)
