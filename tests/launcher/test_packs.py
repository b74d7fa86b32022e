"""`hydra.launcher.pack`: which runs share a job, what is planned, and who is ended with whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands import cancel as cancelling
from crl_exp.launcher.commands import retry as retrying
from crl_exp.launcher.commands.cancel import cancel
from crl_exp.launcher.jobs import job, slurm_jobs
from crl_exp.launcher.jobs.lists import read_list, write_list
from crl_exp.launcher.jobs.submit import _chunks
from crl_exp.launcher.launch import plan_text, submitted_text
from crl_exp.launcher.planning.estimate import estimate
from crl_exp.launcher.planning.packs import pack_lines, packs_of
from crl_exp.launcher.planning.plan import Point
from crl_exp.launcher.settings import SlurmSettings
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.records import Record, find_records
from crl_exp.runs.status import RunStatus
from tests.helpers.launching import points_of, settings, tiny


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def packed(pack: int, *overrides: str, kind: str = "local_processes") -> list[Point]:
    return [replace(p, settings=settings(kind, pack=pack)) for p in points_of(*overrides)]


def shape(packs: list[list[Point]]) -> list[list[str]]:
    """The overrides of each pack's runs that these tests vary, without the names of sections."""
    return [
        [" ".join(text.split("=")[1] for text in p.overrides[3:]) for p in pack] for pack in packs
    ]


# --- grouping ---


def test_packs_hold_compatible_runs_in_the_sweeps_order(tmp_path):
    """Layers, methods and seeds may differ; the task may not."""
    typed = tiny(tmp_path, "task.n_test=16,8", "method=crl,none", "layers.layer=3,4")
    assert shape(packs_of(packed(3, *typed))) == [
        ["16 crl 3", "16 crl 4", "16 none 3"], ["16 none 4"],
        ["8 crl 3", "8 crl 4", "8 none 3"], ["8 none 4"],
    ]  # fmt: skip
    turned = tiny(tmp_path, "seed=0,1", "engine.batch_size=16,auto")
    assert shape(packs_of(packed(8, *turned))) == [["0 16", "1 16"], ["0 auto", "1 auto"]]
    assert [len(pack) for pack in packs_of(packed(1, *typed))] == [1] * 8


def test_runs_of_other_resources_are_packed_apart(tmp_path):
    one, two, three = packed(4, *tiny(tmp_path, "seed=0,1,2"))
    two = replace(two, settings=settings("local_processes", pack=4, gpus=1))
    assert [[p.key for p in pack] for pack in packs_of([one, two, three])] == [
        [one.key, three.key], [two.key],
    ]  # fmt: skip


def test_arrays_count_jobs_not_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(slurm_jobs, "max_array_size", lambda settings: 2)
    points: Any = packed(2, *tiny(tmp_path, "seed=range(9)"), kind="slurm")
    chunks = _chunks(packs_of(points))
    assert [[len(pack) for pack in chunk] for chunk in chunks] == [[2, 2], [2, 2], [1]]


def test_lists_keep_what_belongs_together(tmp_path):
    jobs = [[tmp_path / "a b", tmp_path / "c"], [tmp_path / "d"]]
    assert read_list(write_list(tmp_path, jobs)) == jobs
    with pytest.raises(UserError, match=r"output_dir=.*tab"):
        write_list(tmp_path, [[tmp_path / "tab\tbed" / "s" / "key"]])


# --- the plan ---


def test_the_plan_tells_jobs_and_what_is_alone(tmp_path):
    typed = tiny(tmp_path, "hydra.sweeper.grids=[{seed: [0, 1, 2]}, {task.n_test: 8, seed: 7}]")
    points = packed(2, *typed)
    states = {point.key: ("missing", "") for point in points}
    said = plan_text(points, points, states, tmp_path / "s")
    assert "packed: 4 runs in 3 jobs, 2 at most in one" in said
    assert "of 2 kinds that can't share a job: they differ in task" in said
    alone = [line.strip() for line in said.split("\n") if line.strip().startswith("alone")]
    assert len(alone) == 2
    assert "seed=2" in alone[0] and "others of its kind fill their jobs" in alone[0]
    assert "seed=7" in alone[1] and "no other run to start has its task" in alone[1]
    assert "batch_size" not in said, "16 rows hold two rollouts of 8"
    assert "can show, with 8 test items, 1 seed: 44.3 points in four of five cases" in said
    assert "2 points would need 3,925 items with 1 seed" in said
    assert "items, 3 seeds: " in said and "assumed: 20 % of the items change, seeds" in said
    fewer = [replace(p, settings=replace(p.settings, assumed_change=0.05)) for p in points]
    said = plan_text(fewer, fewer, states, tmp_path / "s")
    assert "can show, with 8 test items, 1 seed: 22.1 points" in said  # √(.05/.2) of 44.3
    assert "assumed: 5 % of the items change" in said
    assert "packed" not in plan_text(packed(1, *typed), points[:0], states, tmp_path / "s")
    assert pack_lines(packs_of(packed(1, *typed))) == []
    assert "there is no other run" in "".join(pack_lines(packs_of(points[:1])))


def test_rollouts_that_do_not_fit_are_warned_of(tmp_path):
    """Three PPO rollouts of 8 and one of GRPO's 8 prompts x 5 answers, of 16 rows."""
    grids = "[{seed: [0, 1]}, {seed: 2, algorithm: grpo}, {method: none}]"
    points = packed(4, *tiny(tmp_path, f"hydra.sweeper.grids={grids}"))
    (warning,) = [line for line in pack_lines(packs_of(points)) if "warning" in line]
    assert "engine.batch_size=16 counts the rows of all runs of a job" in warning
    assert "3 rollouts together have 56: they are played in 4 parts" in warning
    assert "Set engine.batch_size=56 or engine.batch_size=auto" in warning
    auto = packed(4, *tiny(tmp_path, f"hydra.sweeper.grids={grids}", "engine.batch_size=auto"))
    assert "warning" not in "".join(pack_lines(packs_of(auto)))
    by_itself = "[{seed: 2, algorithm: grpo}, {method: [none, corrsteer_a]}]"
    one = packed(4, *tiny(tmp_path, f"hydra.sweeper.grids={by_itself}"))
    assert "warning" not in "".join(pack_lines(packs_of(one))), "40 rows are too many alone, too"


def test_the_estimate_counts_a_packs_time_once(tmp_path):
    """Of a pack of 4 that took 2 hours each run is counted half an hour."""
    points = packed(4, *tiny(tmp_path / "out", "method=crl", "seed=range(4)", "model.device=cuda"))
    points = [replace(p, settings=p.settings.for_device("cuda")) for p in points]
    names = {"model": "tiny-llama", "task": "tiny", "method": "crl"}
    for i, (seconds, n) in enumerate([(7200, 4), (1200, 1)]):
        folder = tmp_path / "old" / str(i)
        folder.mkdir(parents=True)
        result = {**names, "seconds": {"train": seconds}, "packed": n}
        (folder / "result.json").write_text(json.dumps(result))
    found = estimate([points], tmp_path)
    assert (found.hours, found.gpu_hours, found.known) == (2.0, 2.0, 4)
    assert found.otherwise_packed == 0
    by_two = estimate([points[:2], points[2:]], tmp_path)
    assert by_two.hours == pytest.approx(4 / 3), "of packs of 2 nothing is known; alone is nearer"
    assert "(4 runs from some in packs of another size)" in str(by_two)


def test_what_was_submitted_is_told_by_jobs(tmp_path):
    part = {"job": "76", "workers": [], "runs": list("abc"), "packs": [["a", "b"], ["c"]]}
    said = submitted_text({"parts": [part]}, tmp_path)
    assert "3 runs in 2 jobs are queued as SLURM job 76_[0-1]" in said


# --- who is ended with whom ---


class Submitted:
    """A sweep of three runs: two in SLURM's job 7_0, one in 7_1; what `cancel` tells SLURM."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.points = points_of(*tiny(folder, "seed=0,1,2"))
        self.a, self.b, self.c = (point.run for point in self.points)
        for n, point in enumerate(self.points):
            point.run.freeze()
            point.run.set_status("queued", slurm_job_id=f"7_{n // 2}")
        self.folder = self.a.path.parent
        keys = [point.key for point in self.points]
        part = {"job": "7", "workers": [], "runs": keys, "packs": [keys[:2], keys[2:]]}
        submission = {"released": True, "parts": [part]}
        SweepFile(self.folder, {key: [] for key in keys}, [submission]).write()
        self.told: list[tuple[list[str], str | None]] = []
        patch.setattr(slurm_jobs, "cancel", self.cancel)
        patch.setattr("crl_exp.runs.slurm.job_states", lambda ids: dict.fromkeys(ids, "RUNNING"))
        patch.setattr(cancelling, "POLL_SECONDS", 0.0)

    def cancel(self, jobs: list[str], by_signal: str | None = None) -> None:
        if jobs:
            self.told.append((jobs, by_signal))
        for run in (self.a, self.b, self.c):  # what is told ends at once
            status = run.status()
            if status["slurm_job_id"] in jobs and status["state"] == "running":
                run.set_status("cancelled", slurm_job_id=status["slurm_job_id"])

    def states(self) -> list[str]:
        return [run.status()["state"] for run in (self.a, self.b, self.c)]


@pytest.fixture
def submitted(tmp_path, monkeypatch) -> Submitted:
    return Submitted(tmp_path, monkeypatch)


def test_one_queued_run_of_a_pack_is_cancelled_by_itself(submitted):
    assert cancel(submitted.a.path, now=False) == 0
    assert submitted.told == [] and submitted.states() == ["cancelled", "queued", "queued"]
    assert cancel(submitted.b.path, now=False) == 0, "the last of its job takes the job with it"
    assert submitted.told == [(["7_0"], None)]
    assert submitted.states() == ["cancelled", "cancelled", "queued"]


def test_one_running_run_of_a_pack_is_asked_by_its_file(submitted):
    with submitted.a.held():
        submitted.a.set_status("running", slurm_job_id="7_0")
        with pytest.raises(UserError, match=f"shares its process with {submitted.b.key}"):
            cancel(submitted.a.path, now=True)
        assert not submitted.a.cancel_path.exists()
        assert cancel(submitted.a.path, now=False, patience=0.0) == 1, "it hasn't ended yet"
    assert submitted.told == [] and submitted.a.cancel_path.exists()
    assert submitted.states()[1:] == ["queued", "queued"]


def test_a_sweep_is_cancelled_job_by_job(submitted):
    """The job that runs is told once to save, though one of its runs hasn't begun."""
    with submitted.a.held():
        submitted.a.set_status("running", slurm_job_id="7_0")
        assert cancel(submitted.folder, now=False) == 0
    assert submitted.told == [(["7_0"], "TERM"), (["7_1"], None)]
    assert submitted.states() == ["cancelled"] * 3


def test_a_run_begun_by_hand_in_a_session_is_ended_by_its_process(submitted, monkeypatch):
    """Of the same folder, under another job: that of the person who sits there."""
    session = subprocess.Popen(["sleep", "600"])  # the run's process
    with submitted.a.held():
        submitted.a.set_status("running", slurm_job_id="99", pid=session.pid)
        assert cancel(submitted.a.path, now=False, patience=0.0) == 1, "it hasn't said so yet"
        assert session.wait(timeout=60) == -signal.SIGTERM
    assert submitted.told == [], "job 99 isn't ours"


def test_one_begun_by_hand_elsewhere_keeps_no_other_from_being_ended(submitted):
    submitted.a.set_status("running", slurm_job_id=None, host="another", pid=1)
    with pytest.raises(UserError, match=f"{submitted.a.key} runs on another: cancel it there"):
        cancel(submitted.folder, now=False)
    assert submitted.told == [(["7_0", "7_1"], None)]
    assert submitted.states() == ["running", "cancelled", "cancelled"]


ENVIRONMENT = """#!/bin/sh
env | grep -E '^(SLURM|SBATCH)' | sort > {told}
echo Submitted batch job 7
"""


def test_a_job_submitted_from_inside_a_job_inherits_nothing_of_it(tmp_path, monkeypatch):
    for name in ("sbatch", "srun"):  # submitit wants one of the latter
        (tmp_path / name).write_text(ENVIRONMENT.format(told=tmp_path / "told"))
        (tmp_path / name).chmod(0o755)
    inherited = {"SLURM_JOB_ID": "7", "SLURM_CPU_BIND": "mask_cpu:0x1", "SLURMD_NODENAME": "n",
                 "SLURM_MEM_PER_CPU": "100", "SLURM_CONF": "/x", "SBATCH_ACCOUNT": "a"}  # fmt: skip
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm_settings = settings("slurm")
    assert isinstance(slurm_settings, SlurmSettings)
    assert slurm_jobs.submit_held(slurm_settings, [[tmp_path / "r"]], tmp_path) == "7"
    assert (tmp_path / "told").read_text().split() == ["SBATCH_ACCOUNT=a", "SLURM_CONF=/x"]
    assert {name: os.environ.get(name) for name in inherited} == inherited, "they come back"


def test_a_run_that_was_submitted_again_has_other_mates(submitted):
    sweep = SweepFile.read(submitted.folder)
    a, b, c = (point.key for point in submitted.points)
    assert sweep.mates(a) == {a, b} and sweep.mates(c) == {c}
    again = {"job": "8", "workers": [], "runs": [b, c], "packs": [[b, c]]}
    sweep.submissions.append({"released": True, "parts": [again]})
    assert sweep.mates(a) == {a} and sweep.mates(b) == {b, c} and sweep.mates("x") == {"x"}


def test_a_sweep_that_was_submitted_before_there_were_packs_is_retried(submitted):
    sweep = SweepFile.read(submitted.folder)
    (part,) = sweep.submissions[0]["parts"]
    sweep.submissions[0]["launcher"] = "local_processes"
    part["settings"] = asdict(settings("local_processes"))
    del part["packs"], part["settings"]["pack"]
    record = Record(submitted.a.path)
    assert retrying._start(record, sweep, []).settings.pack == 1
    assert retrying._start(record, sweep, ["pack=3"]).settings.pack == 3
    assert sweep.mates(record.key) == {record.key}


def test_a_config_of_another_version_does_not_hinder_the_others(tmp_path):
    """Retried, it is its own job that says what is wrong with it."""
    points = packed(2, *tiny(tmp_path, "seed=0,1", "engine.batch_size=8"))
    assert "warning" in "".join(pack_lines(packs_of(points)))
    plain: Any = OmegaConf.to_container(points[0].run.config)
    points[0].run.config = OmegaConf.create({**plain, "policy": {"breadth": 3}})
    assert pack_lines(packs_of(points)) == ["  packed: 2 runs in 1 job, 2 at most in one"]


def test_a_job_leaves_out_what_is_no_longer_its_own(submitted, monkeypatch, caplog):
    """Cancelled before it began, failed in an earlier start, submitted again: none is run."""
    monkeypatch.setattr("crl_exp.runs.slurm.job_id", lambda: "7_0")
    submitted.a.set_status("cancelled", slurm_job_id="7_0")
    submitted.b.set_status("queued", slurm_job_id="8_0")
    before = [(run.path / "status.json").read_text() for run in (submitted.a, submitted.b)]
    assert job.main(["--queued", str(submitted.a.path), str(submitted.b.path)]) == 0
    assert [(r.path / "status.json").read_text() for r in (submitted.a, submitted.b)] == before
    submitted.b.set_status("failed", slurm_job_id="7_0", error="as before")
    assert job.main(["--queued", str(submitted.a.path), str(submitted.b.path)]) == 1
    assert RunStatus(submitted.b.path, from_scratch=False).status()["error"] == "as before"
    assert [record.status["attempts"] for record in find_records(submitted.folder)] == [0, 0, 0]
