"""Files of ours that were cut off, are no text or hold something else: each is named, with what
mends it, by whoever reads it. Little is run here."""

from __future__ import annotations

from pathlib import Path

import pytest

from crl_exp import __main__ as program
from crl_exp.config.errors import UserError
from crl_exp.experiments.run import run_experiment
from crl_exp.launcher.jobs.job import run_all
from crl_exp.launcher.jobs.submit import _restore, _status_bytes
from crl_exp.launcher.launch import look
from crl_exp.launcher.planning.plan import Point
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.directory import RunDirectory
from tests.helpers.launching import launched, points_of, tiny

DAMAGE = {
    "cut off": b'{"state": "done", "attem', "binary": b"\x80\xff\x00\x01", "a list": b"[]",
    "empty": b"", "a number": b"3",
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRL_EXP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def point(tmp_path: Path) -> Point:
    """A run that says it is done, without a result."""
    (made,) = points_of(*tiny(tmp_path, "method=none"))
    made.run.freeze()
    made.run.set_status("done")
    return made


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_who_reads_it_names_it_and_who_begins_anew_does_not_mind(
    name, damage, point, tmp_path, capsys
):
    path = point.run.path / name
    path.write_bytes(DAMAGE[damage])
    says = rf"{name} is damaged .*resume=force"
    with pytest.raises(UserError, match=says):
        run_experiment(point.config, skip_finished=True)
    if name == "status.json":
        with pytest.raises(UserError, match=says):
            launched("local_processes", tiny(tmp_path, "method=none"))
        assert program.main(["status", str(point.run.path)]) == 1
        assert f"{name} is damaged" in capsys.readouterr().err
        before = path.read_bytes()
        assert _status_bytes(point.run) == before
    assert path.read_bytes() == DAMAGE[damage], "nobody touched it"
    (forced,) = points_of(*tiny(tmp_path, "method=none", "resume=force"))
    assert look({forced.key: forced}, SweepFile(tmp_path / "s"))[forced.key][0] in (
        "missing", "done",
    )  # fmt: skip
    if damage == "a list":  # the others are no different
        result = run_experiment(forced.config, skip_finished=True)
        assert result is not None and point.run.status()["state"] == "done"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_job_tells_a_damaged_config_and_runs_the_others(damage, tmp_path, capsys):
    bad, good = points_of(*tiny(tmp_path, "method=none", "seed=0,1"))
    for one in (bad, good):
        one.run.freeze()
        one.run.set_status("queued")
    (bad.run.path / "config.yaml").write_bytes(DAMAGE[damage])
    assert run_all([[bad.run.path, good.run.path]]) == 1
    assert bad.run.status()["state"] == "failed"
    assert "config.yaml is damaged" in bad.run.status()["error"]
    assert good.run.status()["state"] == "done"
    said = capsys.readouterr()
    assert f"=== run {bad.key} {good.key}" in said.out and f"=== run {bad.key}" in said.err


def test_a_run_whose_directory_cannot_be_written_ends_no_other(tmp_path):
    """Its lock can't be taken: a folder lies in its place. Root may write anywhere else."""
    bad, good = points_of(*tiny(tmp_path, "method=none", "seed=0,1"))
    for one in (bad, good):
        one.run.freeze()
        one.run.set_status("queued")
    (bad.run.path / ".lock").unlink(missing_ok=True)
    (bad.run.path / ".lock").mkdir()
    assert run_all([[bad.run.path], [good.run.path]]) == 1
    assert good.run.status()["state"] == "done"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_submission_file_is_named(damage, tmp_path):
    (tmp_path / "submission.json").write_bytes(DAMAGE[damage])
    with pytest.raises(UserError, match=r"submission\.json is damaged .*move it away"):
        SweepFile.read(tmp_path)


def test_a_refused_submission_puts_back_what_was_there(point):
    path = point.run.path / "status.json"
    before = b"\x80not text"
    point.run.set_status("queued")
    _restore(point.run, before)
    assert path.read_bytes() == before


def test_heartbeats_are_named_too(point):
    (point.run.path / "heartbeat.json").write_bytes(b"[]")
    run = RunDirectory(point.config)
    with pytest.raises(UserError, match=r"heartbeat\.json is damaged .*resume=force"), run.opened():
        pass
