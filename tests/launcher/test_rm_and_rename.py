"""`rm` and `rename`: run directories, and what MLflow (a real SQLite file) then has of them."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pytest

from crl_exp.__main__ import main as program
from crl_exp.config.errors import UserError
from crl_exp.launcher.commands import rename, rm
from crl_exp.launcher.sweep_file import SweepFile
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import Record, find_records
from crl_exp.tracking.sending import removal
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.removal import REMOVALS
from crl_exp.tracking.sending.target import MlflowTarget
from crl_exp.tracking.sync import main as sync_command
from crl_exp.tracking.sync import send
from tests.helpers.mlflow_reading import children, client, free_port, history, runs, with_database
from tests.helpers.synthetic import config, finished_run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with outputs in it; what is returned."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    return with_database(tmp_path / "outputs")


def sweep_of(folder: Path, *seeds: int, name: str = "demo", sent: bool = True, **more):
    made = [finished_run(config(folder, seed=s, sweep_name=name, **more), 0.1, steps=3)
            for s in seeds]  # fmt: skip
    if sent:
        sync(folder / name)
    return made


def sync(path: Path) -> None:
    assert sync_command([str(path)]) == 0


def in_mlflow(folder: Path) -> list[str]:
    """Names of the runs that are there, parents included."""
    return sorted(run.info.run_name for run in runs(resolved_uri(None, folder)))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


# --- rm ---


def test_a_sweep_goes_with_its_runs_in_mlflow_and_stays_gone(folder, capsys):
    sweep_of(folder, 0, 1)
    sweep_of(folder, 0, name="other")
    assert program(["rm", "demo", "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"removed {folder}/demo" in said and "3 runs deleted in MLflow" in said
    assert names(folder) == {"other", "mlflow.db", "mlartifacts"}
    assert in_mlflow(folder) == ["crl layer 18 seed 0", "other"]
    sync(folder)
    assert in_mlflow(folder) == ["crl layer 18 seed 0", "other"], "it came back"
    sweep_of(folder, 0, 1, name="demo")
    assert len(in_mlflow(folder)) == 5, "a sweep of the same name works"


@pytest.mark.parametrize(
    "how", ["outputs/demo/{key}", "demo/{key}", "{key}", "outputs/demo/{key}/"]
)
def test_a_run_goes_by_folder_or_key_and_the_others_stay(folder, how):
    run, other = sweep_of(folder, 0, 1)
    SweepFile(folder / "demo", {run.key: ["seed=0"], other.key: ["seed=1"]}).write()
    assert program(["rm", how.format(key=run.key), "--yes"]) == 0
    assert not run.path.exists() and other.path.exists()
    assert in_mlflow(folder) == ["crl layer 18 seed 1", "demo"]
    assert list(SweepFile.read(folder / "demo").points) == [other.key]
    sync(folder / "demo")
    assert in_mlflow(folder) == ["crl layer 18 seed 1", "demo"]


def test_it_asks_first(folder, monkeypatch, capsys):
    (run,) = sweep_of(folder, 0, sent=False)
    (folder / "demo" / "report").mkdir()
    (folder / "demo" / "report" / "table.md").write_text("x" * 3_000_000)
    for answer in ("\n", "n\n", "sure\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert program(["rm", "demo"]) == 1
        said = capsys.readouterr().out
        assert "1 done, 3.0 MB" in said and "beside the runs: report" in said
        assert said.endswith("nothing was removed\n") and run.path.exists()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert program(["rm", "demo"]) == 1
    assert "add --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert program(["rm", "demo"]) == 0 and not (folder / "demo").exists()


def test_a_run_at_work_is_never_removed(folder, capsys):
    run = RunDirectory(config(folder))
    sweep_of(folder, 1, sent=False)
    with run.opened():
        for name in ("demo", run.key):
            assert program(["rm", name, "--yes"]) == 1
            said = capsys.readouterr().err
            assert f"{run.key} is running" in said and "crl_exp cancel" in said
    assert len(find_records(folder / "demo")) == 2


def test_a_run_that_starts_while_it_is_asked_about_is_left(folder, monkeypatch):
    (run,) = sweep_of(folder, 0, sent=False)
    chosen = rm.choose("demo", Path("outputs"))
    with RunDirectory(config(folder, seed=0)).held(), pytest.raises(UserError, match="cancel it"):
        rm.remove(chosen)  # held, and not yet said to be running
    assert (run.path / "result.json").exists()


@pytest.mark.parametrize(
    "name", [".", "outputs", "outputs/empty", "", "dem", "..", "outputs/shared"]
)
def test_what_is_no_run_and_no_sweep_is_refused(folder, name, capsys):
    (run,) = sweep_of(folder, 0, sent=False)
    for other in ("empty", "shared"):
        (folder / other).mkdir()
        (folder / other / "file").write_text("mine")
    assert program(["rm", name, "--yes"]) == 1
    assert capsys.readouterr().err
    assert run.path.exists() and (folder / "shared" / "file").exists()


def test_a_key_is_taken_whole_and_of_one_sweep(folder, capsys):
    (run,) = sweep_of(folder, 0, sent=False)
    sweep_of(folder, 0, name="other", sent=False)
    assert program(["rm", run.key[:8], "--yes"]) == 1
    assert program(["rm", run.key, "--yes"]) == 1
    assert f"demo/{run.key}, other/{run.key}" in capsys.readouterr().err
    assert len(find_records(folder)) == 2


def test_a_link_is_left(folder, tmp_path, capsys):
    sweep_of(folder, 0, sent=False)
    os.rename(folder / "demo", tmp_path / "elsewhere")
    (folder / "demo").symlink_to(tmp_path / "elsewhere")
    assert program(["rm", "demo", "--yes"]) == 1
    assert "is a link" in capsys.readouterr().err
    assert len(find_records(tmp_path / "elsewhere")) == 1


def test_where_mlflow_is_away_the_next_sync_tells_it(folder, tmp_path, capsys):
    run, _ = sweep_of(folder, 0, 1)
    database = folder / "mlflow.db"
    os.rename(database, tmp_path / "kept.db")
    database.mkdir()
    assert program(["rm", run.key, "--yes"]) == 0
    said = capsys.readouterr().out
    assert f"removed {run.path}" in said and "MLflow doesn't know yet" in said
    database.rmdir()
    os.rename(tmp_path / "kept.db", database)
    assert len(in_mlflow(folder)) == 3
    sync(folder / "demo")
    assert in_mlflow(folder) == ["crl layer 18 seed 1", "demo"]
    assert not (folder / REMOVALS).exists()


@pytest.mark.parametrize("at", ["rename", "_empty", "send_removals"])
def test_cut_off_anywhere_it_is_healed(folder, monkeypatch, at):
    """By the same line, where something is left to remove, and by the next sync."""
    sweep_of(folder, 0, 1)
    where = {"rename": removal.os, "_empty": rm, "send_removals": rm}[at]
    with monkeypatch.context() as patch:
        patch.setattr(where, at, _interrupted)
        with pytest.raises(KeyboardInterrupt):
            rm.main(["demo", "--yes"])
    there = (folder / "demo").exists()
    assert program(["rm", "demo", "--yes"]) == (0 if there else 1)
    if not there:
        sync(folder)
    assert in_mlflow(folder) == []
    assert names(folder) == {"mlflow.db", "mlartifacts"}


def _interrupted(*_args: object) -> None:
    raise KeyboardInterrupt


def test_runs_that_it_came_in_place_of_go_too(folder):
    """One begun anew is another run in MLflow, and a made one may not have been noted."""
    (run,) = sweep_of(folder, 0)
    finished_run(config(folder, seed=0, resume="force"), 0.2)
    sync(folder / "demo")
    assert len(children(resolved_uri(None, folder))) == 2
    (note,) = json.loads((run.path / "mlflow.json").read_text())
    assert program(["rm", run.key, "--yes"]) == 0
    assert in_mlflow(folder) == ["demo"]
    client(resolved_uri(None, folder)).restore_run(note["run_id"])

    (other,) = sweep_of(folder, 1)
    (note,) = json.loads((other.path / "mlflow.json").read_text())
    write_json(
        other.path / "mlflow.json", [{k: note[k] for k in ("uri", "experiment", "upload_id")}]
    )
    assert program(["rm", other.key, "--yes"]) == 0
    assert in_mlflow(folder) == ["crl layer 18 seed 0", "demo"], "as a crash leaves it"


def test_what_was_deleted_in_mlflow_by_hand_is_no_fault(folder, capsys):
    sweep_of(folder, 0)
    mlflow = client(resolved_uri(None, folder))
    mlflow.delete_experiment(mlflow.get_experiment_by_name("crl_exp").experiment_id)
    assert program(["rm", "demo", "--yes"]) == 0
    assert "deleted in MLflow" not in capsys.readouterr().out
    assert not (folder / REMOVALS).exists()


def test_a_sync_that_is_at_it_brings_nothing_back(folder, monkeypatch):
    """It has the list of runs, and finds them gone one by one."""
    first, second = sweep_of(folder, 0, 1)
    records = [Record(first.path), Record(second.path)]
    assert program(["rm", "demo", "--yes"]) == 0
    assert send(records, _place(folder)) is None
    assert in_mlflow(folder) == [] and "demo" not in names(folder)


def _place(folder: Path):
    return MlflowTarget(None, "crl_exp", folder)


def test_whoever_sends_is_waited_for(folder):
    (run,) = sweep_of(folder, 0)
    uploader = _place(folder).uploader(None)
    with uploader.runs.noted(run.path):
        removing = threading.Thread(target=program, args=(["rm", "demo", "--yes"],))
        removing.start()
        removing.join(0.5)
        assert removing.is_alive() and run.path.exists()
    removing.join()
    assert not run.path.exists() and in_mlflow(folder) == []


# --- rename ---


def test_a_sweep_is_renamed_here_and_in_mlflow(folder, capsys):
    run, _ = sweep_of(folder, 0, 1)
    SweepFile(folder / "demo", {run.key: ["seed=0"]}).write()
    before = {r.info.run_id for r in runs(resolved_uri(None, folder))}
    assert program(["rename", "demo", "final"]) == 0
    assert "2 runs up to date" in capsys.readouterr().out
    assert {r.sweep for r in find_records(folder)} == {"final"} and not (folder / "demo").exists()
    assert json.loads((folder / "final" / "submission.json").read_text())["sweep"] == "final"
    found = runs(resolved_uri(None, folder))
    assert {r.info.run_id for r in found} == before, "the same runs"
    assert {r.data.tags["sweep"] for r in found} == {"final"}
    assert [r.info.run_name for r in found if "crl_exp.sweep" in r.data.tags] == ["final"]
    assert all(
        "/final/" in r.data.tags["run_directory"] for r in children(resolved_uri(None, folder))
    )
    child = children(resolved_uri(None, folder))[0].info.run_id
    assert len(history(resolved_uri(None, folder), child, "reward")) == 3, "no point twice"


def test_a_renamed_sweep_goes_on_under_its_name(folder):
    """Its finished runs are known to a launch under the new name."""
    (run,) = sweep_of(folder, 0, sent=False)
    assert program(["rename", "demo", "final"]) == 0
    again = RunDirectory(config(folder, seed=0, sweep_name="final"))
    assert again.key == run.key and again.result() is not None
    assert not (folder / "mlartifacts").exists(), "what was never sent isn't sent now"


@pytest.mark.parametrize("name", ["2024_11_29", "1e5", "007", "true", "1_000", "0x10"])
def test_a_name_is_taken_as_it_is_typed(folder, name):
    sweep_of(folder, 0, sent=False)
    assert program(["rename", "demo", name]) == 0
    assert (folder / name).is_dir() and program(["status", name]) == 0


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".hidden", "shared", "mlflow.db", "x\n", "other"]
)
def test_a_name_that_no_sweep_can_have_is_refused(folder, name, capsys):
    (run,) = sweep_of(folder, 0, sent=False)
    (folder / "other").mkdir()
    assert program(["rename", "demo", name]) == 1
    assert capsys.readouterr().err and run.path.exists()


def test_a_sweep_at_work_is_not_renamed(folder, capsys):
    run = RunDirectory(config(folder))
    with run.opened():
        assert program(["rename", "demo", "final"]) == 1
    assert f"{run.key} is running" in capsys.readouterr().err
    assert run.path.exists() and not (folder / "final").exists()


def test_cut_off_before_mlflow_knows_the_next_sync_tells_it(folder, monkeypatch):
    sweep_of(folder, 0)
    with monkeypatch.context() as patch:
        patch.setattr(rename, "send_all", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            rename.main(["demo", "final"])
    assert in_mlflow(folder) == ["crl layer 18 seed 0", "demo"]
    sync(folder / "final")
    assert in_mlflow(folder) == ["crl layer 18 seed 0", "final"]


def test_without_mlflow_it_is_renamed_all_the_same(folder, capsys):
    uri = f"http://127.0.0.1:{free_port()}"
    (run,) = sweep_of(folder, 0, sent=False, more={"tracking.uri": uri})
    write_json(run.path / "mlflow.json", [{"uri": uri, "experiment": "crl_exp", "run_id": "x"}])
    assert program(["rename", "demo", "final"]) == 0
    assert "nothing answers there" in capsys.readouterr().out
    assert (folder / "final" / run.key).is_dir()
