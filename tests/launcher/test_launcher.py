"""Planning a sweep: composed once what is common, every fault told, what is done left out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from crl_exp.config.errors import UserError
from crl_exp.experiments.config import Known
from crl_exp.launcher.commands.retry import retry
from crl_exp.launcher.commands.typed import typed_sweep
from crl_exp.launcher.jobs import slurm_jobs
from crl_exp.launcher.jobs.job import run_all
from crl_exp.launcher.jobs.local_workers import check_shell
from crl_exp.launcher.jobs.slurm_jobs import refused_for
from crl_exp.launcher.jobs.states import is_started, states_of
from crl_exp.launcher.planning.compose import Composer
from crl_exp.launcher.planning.estimate import estimate
from crl_exp.launcher.planning.plan import check
from crl_exp.launcher.settings import changed, seconds_of
from crl_exp.launcher.sweep_file import SweepFile, alive, this_process
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from tests.helpers.launching import launched, points_of, settings, tiny
from tests.helpers.tiny_run import ROOT

SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# --- composition ---


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.slow
def test_points_are_composed_as_hydra_composes_them(name):
    with typed_sweep([f"+sweep={name}", "task.n_train=77"]) as (loader, master, jobs):
        composer = Composer(loader, master)
        for job in [*jobs[:2], *jobs[len(jobs) // 2 : len(jobs) // 2 + 2], *jobs[-2:]]:
            asked = loader.load_sweep_config(master, job)
            with open_dict(asked):
                del asked["hydra"]
            found, resources = composer.config(job)
            assert OmegaConf.to_container(found) == OmegaConf.to_container(asked), job
            assert resources == []


@pytest.mark.slow
def test_a_thousand_points_are_composed_and_read_once(tmp_path):
    points = points_of(*tiny(tmp_path, "method=crl,corrsteer_a", "seed=range(500)"))
    assert len({point.key for point in points}) == 1000
    known = Known()
    check(points, known)
    # Sections of 18 groups, two of which (method, coefficient) differ; model, SAEs, layer, data;
    # what does nothing, of both methods.
    assert len(known) <= 18 + 2 + 3 + 1 + 2
    with typed_sweep(tiny(tmp_path, "method=crl,corrsteer_a", "seed=range(500)")) as typed:
        loader, master, jobs = typed
        composer = Composer(loader, master)
        for job in jobs[::50]:
            composer.config(job)
    assert composer.n_composed == 2


def test_every_fault_of_every_point_is_told_at_once(tmp_path):
    points = points_of(*tiny(tmp_path, "layers.layer=3,99", "task.n_test=0,16", "policy.k=0"))
    with pytest.raises(UserError) as caught:
        check(points)
    said = str(caught.value)
    assert said.startswith("4 of 4 runs can't be submitted; none was:")
    assert said.count("task.n_test=0") and said.count("policy.k=0: ") == 1
    points = points_of(*tiny(tmp_path, "layers.layer=3,99", "seed=0,1"))
    with pytest.raises(UserError, match=r"2 of 4 runs .*\n- layer 99 is out of range") as caught:
        check(points)
    assert "layers.layer=99 seed=0" in str(caught.value)
    assert "layers.layer=3" not in str(caught.value)


def test_what_cannot_be_had_is_asked_for_once(tmp_path, monkeypatch):
    """The hub, where there is none, says so after half a minute."""
    asked = []

    def no_hub(path: str, **_: Any) -> None:
        asked.append(path)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", no_hub)
    methods = "method=none,corrsteer_s,corrsteer_a"
    points = points_of(*tiny(tmp_path, "model.path=some/model", methods, "seed=0,1"))
    assert asked == ["some/model"]
    with pytest.raises(UserError, match=r"6 of 6 runs [\s\S]*'some/model' \(no network\)"):
        check(points)
    assert len(asked) == 2


def test_faults_of_the_overrides_are_told_with_their_points(tmp_path):
    with pytest.raises(UserError, match="2 of 4 runs") as caught:
        points_of(*tiny(tmp_path, "method=crl,corsteer", "seed=0,1"))
    assert "corsteer" in str(caught.value) and "method=corsteer seed=1" in str(caught.value)


def test_nothing_is_written_where_a_point_is_at_fault(tmp_path):
    with pytest.raises(UserError, match="layer 99"):
        launched("local_processes", tiny(tmp_path / "out", "layers.layer=3,99"))
    assert not (tmp_path / "out").exists()


# --- settings ---


def test_a_point_may_have_resources_of_its_own(tmp_path):
    grid = "hydra.sweeper.grids=[{seed: [0, 1]}, {seed: 2, hydra.launcher.gpus: 1}]"
    gpus = [point.settings.gpus for point in points_of(*tiny(tmp_path, grid))]
    assert gpus == [0, 0, 1]
    on_gpu = points_of(*tiny(tmp_path, "seed=0", "model.device=cpu,cuda"))
    assert [point.settings.gpus for point in on_gpu] == [0, 1], "as many as the device needs"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("cpus=0", "hydra.launcher.cpus=0: must be at least 1"),
        ("time=soon", "hydra.launcher.time=soon: must be minutes"),
        ("time=0:00:00", "hydra.launcher.time=0:00:00: is 0 s .SLURM takes 0 for no limit"),
        ("time=0", "hydra.launcher.time=0: is 0 s"),
        ("time=14400", r"time=14400: a bare number is minutes.*launcher\.time=10-00:00:00$"),
        ("time=1441", r"such as hydra\.launcher\.time=1-00:01:00$"),
        ("time=2", r"time=2: is 120 s .*more than hydra\.launcher\.signal_seconds=120"),
        ("mem=lots", "hydra.launcher.mem=lots: must look like 16GB"),
        ("partion=gpu", "did you mean 'partition'"),
        ("gpus=many", "hydra.launcher.gpus"),
        ("pack=0", "hydra.launcher.pack=0: must be at least 1"),
        ("sbatch.array=1-4", "hydra.launcher.sbatch.array: the launcher sets it itself"),
        ("mem", "mem: must be KEY=VALUE"),
    ],
)
def test_bad_settings_are_named(override, says):
    with pytest.raises(UserError, match=says):
        changed(settings("slurm"), [override])


def test_time_limits_are_read_as_slurm_reads_them():
    for text, seconds in (
        ("90", 5400), ("2:30", 150), ("1:02:03", 3723), ("2-3", 183600), ("1-0:30", 88200),
        ("1-01:00:01", 90001),
    ):  # fmt: skip
        assert seconds_of(text) == seconds, text


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("CPU count per node can not be satisfied", "Change hydra.launcher.cpus=4"),
        ("Batch job submission failed: Requested node configuration is not available",
         "Change hydra.launcher.cpus=4 or hydra.launcher.mem=32GB or hydra.launcher.gpus=1"),
        ("invalid partition specified: nope", "Change hydra.launcher.partition$"),
        ("Requested time limit is invalid", "Change hydra.launcher.time=10"),
        ("something else", "partition, account, qos, gpus, gres, cpus, mem, time"),
    ],
)  # fmt: skip
def test_what_slurm_refuses_is_named_as_it_is_typed(said, names):
    asked: Any = settings("slurm", cpus=4, mem="32GB", gpus=1)
    assert re.search(names, refused_for(said, asked))


@pytest.mark.parametrize(
    "override",
    [{"python": "/nonexistent"}, {"setup": ["exit 3"]}, {"setup": ["no_such_command"]},
     {"python": "python3 -c 'raise SystemExit(1)' #"}],
)  # fmt: skip
def test_a_shell_in_which_no_worker_starts_is_refused(override, tmp_path):
    with pytest.raises(UserError, match=r"hydra\.launcher\.setup=.*no worker could start"):
        launched("local_processes", tiny(tmp_path, "method=none"), **override)
    assert not list(tmp_path.glob("s/*/status.json")), "nothing is queued"
    check_shell(settings("local_processes", setup=["true", "export A=1"]))  # type: ignore[arg-type]


def test_retry_says_what_it_cannot_know(tmp_path, monkeypatch, capsys):
    (point,) = points_of(*tiny(tmp_path, "method=none"))
    point.run.freeze()
    point.run.set_status("preempted", slurm_job_id="7_0")
    part = {"job": "7", "workers": [], "settings": {}, "runs": [point.key], "packs": []}
    sweep = {"cwd": str(tmp_path), "launcher": "slurm", "released": True, "parts": [part]}
    SweepFile(tmp_path / "s", {point.key: []}, [sweep]).write()
    monkeypatch.setenv("PATH", str(tmp_path / "no_squeue"))
    assert retry(tmp_path / "s", []) == []
    said = capsys.readouterr().out
    assert f"left out: {point.key}: squeue can't be asked" in said
    assert "no other run failed" in said


def test_settings_are_changed_as_typed():
    made: Any = changed(
        settings("slurm"), ["time=12:00:00", "hydra.launcher.gpus=2", "sbatch.nice=5"]
    )
    assert (made.time, made.gpus, made.sbatch) == ("12:00:00", 2, {"nice": 5})
    for minutes in ("1440", "1-00:01:00"):
        assert changed(settings("slurm"), [f"time={minutes}"]).time == minutes
    assert changed(settings("slurm"), ["gres=gpu:a100:2,shard:1"]).gpus_asked == 2
    assert changed(settings("slurm"), ["gres=gpu"]).for_device("cuda").gpus_asked == 1
    with pytest.raises(UserError, match="not both"):
        changed(settings("slurm"), ["gres=gpu:1", "gpus=1"])


# --- what is started ---


@pytest.mark.parametrize(
    ("state", "slurm_job", "new", "retry", "force"),
    [
        ("missing", None, True, False, True),
        ("done", None, False, False, True),
        ("queued", "7_0", False, False, False),
        ("running", "7_0", False, False, False),
        ("failed", "7_0", True, True, True),
        ("lost", "7_0", True, True, True),
        ("cancelled", None, True, True, True),
        ("preempted", "7_0", False, False, False),  # SLURM starts it again
        ("preempted", None, True, False, True),
    ],
)
def test_what_a_launch_starts(state, slurm_job, new, retry, force, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"slurm_job_id": slurm_job}))
    record = Record(tmp_path)
    assert is_started(state, record, "new") is new
    assert is_started(state, record, "retry") is retry
    assert is_started(state, record, "force") is force


def test_a_launch_that_is_refused_leaves_what_the_last_one_asked_for(tmp_path):
    for point in points_of(*tiny(tmp_path, "seed=0,1")):
        point.run.freeze()
        point.run.set_status("done")
    assert not launched("local_processes", tiny(tmp_path, "seed=0,1")).started
    asked = tmp_path / "s" / "multirun.yaml"
    before = asked.read_text()
    assert "seed=0,1" in before
    with pytest.raises(UserError, match="holds 2 runs of another sweep"):
        launched("local_processes", tiny(tmp_path, "seed=7,8"))
    assert asked.read_text() == before


def test_a_queued_run_whose_workers_are_gone_is_lost(tmp_path):
    run = tmp_path / "s" / "key"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"state": "queued", "slurm_job_id": null}')
    worker = this_process(1) | {"pid": 1}
    part = {"job": None, "workers": [worker], "runs": ["key"]}
    sweep = SweepFile(tmp_path / "s", {}, [{"parts": [part]}])
    assert states_of([Record(run)], sweep)["key"][0] == "queued"
    worker["born"] -= 100  # another process had this number then
    assert not alive(worker)
    state, why = states_of([Record(run)], sweep)["key"]
    assert state == "lost" and "processes" in why


def test_the_estimate_is_of_finished_runs_of_the_same_kind(tmp_path):
    points = points_of(*tiny(tmp_path, "method=none,crl", "seed=0,1", "model.device=cuda"))
    alone = [[point] for point in points]
    assert "unknown" in str(estimate(alone, tmp_path))
    names = {"model": "tiny-llama", "task": "tiny", "method": "crl"}
    for i, seconds in enumerate((1800, 3600, 36000)):
        folder = tmp_path / "old" / str(i)
        folder.mkdir(parents=True)
        result = {**names, "seconds": {"load": seconds / 2, "train": seconds / 2}}
        (folder / "result.json").write_text(json.dumps(result))
    found = estimate(alone, tmp_path)
    assert (found.hours, found.gpu_hours, found.known, found.unknown) == (2.0, 2.0, 2, 2)
    assert "another size" not in str(found)


# --- frozen configs ---


def test_a_config_of_another_version_is_a_clear_error(tmp_path):
    (point,) = points_of(*tiny(tmp_path, "seed=0"))
    point.run.freeze()
    point.run.set_status("queued")
    path = point.run.path / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 1"))
    assert run_all([[point.run.path]]) == 1
    status = point.run.status()
    assert status["state"] == "failed" and "another version" in status["error"]
    # A key that this version doesn't have, under the name that such a config would have.
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    config.policy.breadth = 3
    other = RunDirectory(config)
    other.path.mkdir(parents=True)
    OmegaConf.save(config, other.path / "config.yaml")
    other.set_status("queued")
    assert run_all([[other.path]]) == 1
    error = other.status()["error"]
    assert "another version" in error and "policy.breadth" in error and "again" in error


def test_a_damaged_or_foreign_submission_file_is_named(tmp_path):
    for text in ("{", '{"format": 99, "points": {}, "submissions": []}', "{}"):
        (tmp_path / "submission.json").write_text(text)
        with pytest.raises(UserError, match=r"submission\.json"):
            SweepFile.read(tmp_path)


def test_where_there_is_no_sbatch_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    with pytest.raises(UserError, match=r"no sbatch here.*local_processes"):
        launched("slurm", tiny(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("ask", "command"),
    [(slurm_jobs.cancel, "scancel 7 8"), (slurm_jobs.release, "scontrol release 7 8")],
)
def test_a_machine_without_slurms_commands_is_told_which(ask, command, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"no {command.split()[0]} here, which `{command}` needs"):
        ask(["7", "8"])
