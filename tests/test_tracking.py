"""Run directory to MLflow: a real SQLite file, a real server, no mocks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp.errors import UserError
from crl_exp.records import Record
from crl_exp.runs import RunDirectory, write_json
from crl_exp.tracking import TrackingConfig, connect, main, resolved_uri, sync
from crl_exp.tracking_content import journal_points
from tests.synthetic import config, finish, figures, finished_run, result

TRACKING = TrackingConfig(enabled=True, uri=None, experiment="crl_exp")


@pytest.fixture(scope="session")
def new_database(tmp_path_factory) -> Path:
    """MLflow's file with its tables made, for copying: making them takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    connect(resolved_uri(None, folder))
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path, new_database) -> Path:
    """An output folder with an MLflow file in it."""
    shutil.copy(new_database, tmp_path / "mlflow.db")
    return tmp_path


def client(uri: str):
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs(uri: str, filter_string: str = ""):
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name("crl_exp")
    assert experiment is not None
    return mlflow.search_runs([experiment.experiment_id], filter_string)


def children(uri: str):
    return [r for r in runs(uri) if "mlflow.parentRunId" in r.data.tags]


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, name)]


def test_a_run_is_logged_once_with_all_it_has(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    run = finished_run(config(folder), 0.1, steps=1200)
    for _ in range(3):
        sync(run, TRACKING)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    (parent,) = runs(uri, "tags.`crl_exp.sweep` = 'demo'")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert child.info.run_name == "crl layer 18 seed 0"
    wanted = {"sweep": "demo", "run_key": run.key, "method": "crl", "model": "tiny",
              "sae": "tiny_sae", "task": "sentiment", "layers": "18", "seed": "0",
              "git_commit": "c0ffee" * 6, "git_dirty": "true"}  # fmt: skip
    assert wanted.items() <= child.data.tags.items()
    assert child.data.params["algorithm.n_updates"] == "120"
    assert child.data.params["order"] == '["fusion", "noise", "activation", "mask"]'
    assert not [key for key in child.data.params if key.startswith(("tracking", "checkpoint"))]
    rewards = history(uri, child.info.run_id, "reward")
    assert rewards == [(s, 0.5 + 0.3 * s / 1200) for s in range(1, 1201)]
    assert len(history(uri, child.info.run_id, "validation_reward")) == 120
    assert len(history(uri, child.info.run_id, "layer_18/policy_loss")) == 1200
    files = {a.path for a in client(uri).list_artifacts(child.info.run_id)}
    assert files == {"config.yaml", "result.json", "features.json", "interventions.parquet"}
    assert str(folder / "mlartifacts") in str(child.info.artifact_uri)


def test_final_metrics(folder):
    sets = {"benign": figures(-0.05, n=150, baseline=0.9, ser=None)}
    run = finished_run(config(folder), 0.1, test_sets=sets)
    sync(run, TRACKING)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    metrics = child.data.metrics
    wanted = {"eval/n": 1500, "eval/accuracy_baseline": 0.68, "eval/accuracy_steered": 0.78,
              "eval/delta": 0.1, "eval/delta_low": 0.08, "eval/delta_high": 0.12,
              "eval/p_value": 0.001, "eval/invalid": 0.0, "eval/runtime": 10.5,
              "eval/unique_features": 5, "eval/over_refusal": 0.15, "eval_benign/n": 150,
              "eval_benign/delta_low": -0.07, "eval_validation/n": 500}  # fmt: skip
    assert {key: metrics.get(key) for key in wanted} == pytest.approx(wanted)
    assert metrics["eval/ser"] == pytest.approx(60 / 270)
    assert "eval_benign/ser" not in metrics
    assert len(history(uri, child.info.run_id, "eval/delta")) == 1


def test_an_unsent_note_makes_no_duplicate(folder):
    """As after a kill between sending and noting it: the run and its points are found again."""
    run = finished_run(config(folder), 0.1, steps=20)
    sync(run, TRACKING)
    for noted in (run.path, run.path.parent):
        (note,) = json.loads((noted / "mlflow.json").read_text())
        kept = {key: note[key] for key in ("uri", "experiment", "upload_id")}
        write_json(noted / "mlflow.json", [kept])
    sync(run, TRACKING)
    uri = resolved_uri(None, folder)
    assert len(runs(uri)) == 2
    (child,) = children(uri)
    for name in ("reward", "eval/delta"):
        assert len(history(uri, child.info.run_id, name)) == (20 if name == "reward" else 1)


def test_a_journal_cut_back_and_run_over_is_sent_once(folder):
    run = RunDirectory(config(folder))
    uri = resolved_uri(None, folder)
    with pytest.raises(KeyboardInterrupt), run.opened():
        for step in range(1, 6):
            run.log(step, {"reward": step / 10})
        size = run.journal_path.stat().st_size
        for step in range(6, 9):
            run.log(step, {"reward": step / 10})
        raise KeyboardInterrupt
    sync(run, TRACKING)
    (child,) = children(uri)
    assert child.info.status == "KILLED"
    run.cut_journal(size)
    sync(run, TRACKING)
    with run.opened():
        for step in range(6, 13):
            run.log(step, {"reward": step / 10})
            run.log(step, {"validation_reward": step / 20})
        finish(run, result(run, figures(0.1), figures(0.1)))
    sync(run, TRACKING)
    (again,) = children(uri)
    assert again.info.run_id == child.info.run_id and again.info.status == "FINISHED"
    assert history(uri, again.info.run_id, "reward") == [(s, s / 10) for s in range(1, 13)]
    assert len(history(uri, again.info.run_id, "validation_reward")) == 7


@pytest.mark.parametrize("steps", [0, 5])
def test_a_forced_run_is_a_new_one(folder, steps):
    uri = resolved_uri(None, folder)
    sync(finished_run(config(folder), 0.1, steps=steps), TRACKING)
    (first,) = children(uri)
    time.sleep(0.01)
    sync(finished_run(config(folder, resume="force"), 0.2, steps=steps), TRACKING)
    new = [r for r in children(uri) if r.info.run_id != first.info.run_id]
    assert len(new) == 1 and new[0].data.metrics["eval/delta"] == pytest.approx(0.2)
    (first,) = [r for r in children(uri) if r.info.run_id == first.info.run_id]
    assert first.data.tags["crl_exp.superseded_by"] == new[0].info.run_id
    assert first.data.metrics["eval/delta"] == pytest.approx(0.1)


def test_runs_of_a_sweep_share_their_parent(folder):
    for layer in (8, 12):
        sync(finished_run(config(folder, layers=(layer,)), 0.1), TRACKING)
    sync(finished_run(config(folder, sweep_name="other"), 0.1), TRACKING)
    uri = resolved_uri(None, folder)
    names = {r.info.run_id: r.info.run_name for r in runs(uri)}
    found = sorted((r.info.run_name, names[r.data.tags["mlflow.parentRunId"]]) for r in children(uri))
    assert found == [
        ("crl layer 12 seed 0", "demo"),
        ("crl layer 18 seed 0", "other"),
        ("crl layer 8 seed 0", "demo"),
    ]
    assert len(runs(uri)) == 5


def test_statuses(folder):
    uri = resolved_uri(None, folder)
    run = RunDirectory(config(folder))
    with run.opened():
        sync(run, TRACKING)
        assert children(uri)[0].info.status == "RUNNING"
        assert runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "RUNNING"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_json(run.path / "status.json", {**run.status(), "state": "running", "pid": gone.pid})
    sync(run, TRACKING)
    assert children(uri)[0].info.status == "KILLED"
    with pytest.raises(RuntimeError), run.opened():
        raise RuntimeError("boom")
    sync(run, TRACKING)
    assert children(uri)[0].info.status == "FAILED"
    assert runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "FAILED"


def test_long_and_many_params(folder):
    made = config(folder)
    made.task.question = "w" * 9000 + "{text}"
    for i in range(230):
        OmegaConf.update(made, f"algorithm.option_{i}", i)
    run = finished_run(made, 0.1)
    sync(run, TRACKING)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    assert child.data.params["algorithm.option_229"] == "229"
    cut = child.data.params["task.question"]
    assert len(cut) == 6000 and cut.endswith("…")
    whole = client(uri).download_artifacts(child.info.run_id, "config.yaml", str(folder))
    assert OmegaConf.load(whole).task.question == made.task.question


def test_a_run_deleted_in_mlflow_is_sent_again(folder):
    run = finished_run(config(folder), 0.1, steps=3)
    sync(run, TRACKING)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    client(uri).delete_run(child.info.run_id)
    sync(run, TRACKING)
    (new,) = children(uri)
    assert new.info.run_id != child.info.run_id
    assert len(history(uri, new.info.run_id, "reward")) == 3


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_dead_server_is_a_warning(folder, caplog):
    run = finished_run(config(folder), 0.1)
    uri = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING):
        sync(run, TrackingConfig(True, uri, "crl_exp"))
    (said,) = [r.getMessage() for r in caplog.records if r.name == "crl_exp.tracking"]
    assert f"tracking.uri={uri}): nothing answers there" in said
    assert f"python -m crl_exp sync {run.path}" in said
    assert main([str(run.path)]) == 0
    assert len(children(resolved_uri(None, folder))) == 1


@pytest.mark.slow
def test_a_silent_server_is_given_up(tmp_path, caplog, monkeypatch):
    """It takes the connection and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    run = finished_run(config(tmp_path), 0.1)
    with socket.socket() as s, caplog.at_level(logging.WARNING):
        s.bind(("127.0.0.1", 0))
        s.listen()
        sync(run, TrackingConfig(True, f"http://127.0.0.1:{s.getsockname()[1]}", "crl_exp"))
    assert "did not answer in time" in caplog.text


@pytest.mark.parametrize("kind", ["folder", "not a database", "no permission"])
def test_an_unusable_file_is_a_warning(tmp_path, caplog, kind):
    run = finished_run(config(tmp_path), 0.1)
    path = tmp_path / "db"
    if kind == "folder":
        path.mkdir()
    elif kind == "not a database":
        path.write_text("a shopping list, long enough to be read as a header" * 50)
    else:
        path = Path("/proc/nowhere/mlflow.db")
    with caplog.at_level(logging.WARNING):
        sync(run, TrackingConfig(True, f"sqlite:///{path}", "crl_exp"))
    assert "did not take" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize("uri", ["localhost:5000", "mlruns", "http://", "sqlite:///", "htp://x"])
def test_a_bad_uri_is_a_fault_of_the_config(uri):
    (fault,) = TrackingConfig(True, uri, "crl_exp").faults()
    assert f"tracking.uri={uri}" in fault


def test_a_password_in_the_uri_is_refused_and_not_repeated():
    (fault,) = TrackingConfig(True, "https://me:secret@host", "crl_exp").faults()
    assert "MLFLOW_TRACKING_PASSWORD" in fault and "secret" not in fault


def test_switched_off_leaves_nothing(tmp_path):
    run = finished_run(config(tmp_path), 0.1)
    sync(run, TrackingConfig(False, None, "crl_exp"))
    assert not (tmp_path / "mlflow.db").exists() and not (run.path / "mlflow.json").exists()


def test_sync_command_on_a_sweep_to_another_file(folder, capsys):
    for layer in (8, 12, 15):
        finished_run(config(folder, layers=(layer,)), 0.1, steps=2)
    other = f"sqlite:///{folder / 'elsewhere' / 'x.db'}"
    for _ in range(2):
        assert main([str(folder / "demo"), "--uri", other]) == 0
        assert main([str(folder)]) == 0
    assert "3 runs up to date" in capsys.readouterr().out
    for uri in (other, resolved_uri(None, folder)):
        assert len(children(uri)) == 3
        assert [len(history(uri, r.info.run_id, "reward")) for r in children(uri)] == [2, 2, 2]


def test_a_damaged_run_does_not_hide_the_others(folder):
    made = [finished_run(config(folder, layers=(layer,)), 0.1) for layer in (8, 12)]
    made[0].result_path.write_text("{")
    with pytest.raises(UserError, match="result.json is damaged"):
        main([str(folder / "demo")])
    assert [r.data.tags["run_key"] for r in children(resolved_uri(None, folder))] == [made[1].key]


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        main([str(tmp_path)])


def test_a_torn_last_line_is_left_for_later(tmp_path):
    run = RunDirectory(config(tmp_path))
    with run.opened():
        run.log(1, {"reward": 0.5})
        with run.journal_path.open("a") as file:
            file.write('{"step": 2, "time": 1.0, "met')
    assert [(p.name, p.step) for p in journal_points(Record(run.path))] == [("reward", 1)]


def start_sync(path: Path, *more: str) -> subprocess.Popen:
    code = "import sys; from crl_exp.tracking import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), *more],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip


@pytest.mark.slow
def test_processes_at_once_on_a_new_file(tmp_path):
    """Different runs, and the same run twice: tables made once, one parent, nothing twice."""
    made = [finished_run(config(tmp_path, layers=(la,)), 0.1, steps=30) for la in (8, 12, 15)]
    started = [start_sync(run.path) for run in [*made, made[0]]]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0] * 4, errors
    uri = resolved_uri(None, tmp_path)
    assert len(runs(uri)) == 4
    assert [len(history(uri, r.info.run_id, "reward")) for r in children(uri)] == [30] * 3


@pytest.fixture
def server(tmp_path):
    """A real MLflow server on loopback."""
    port = free_port()
    folder = tmp_path / "server"
    folder.mkdir()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=quiet, stdout=output, stderr=output, start_new_session=True
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)
            process.wait()


def _wait_for(url: str, process: subprocess.Popen, output: Path) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
    pytest.fail(f"no MLflow server: {output.read_text()}")


@pytest.mark.slow
def test_over_http(tmp_path, server):
    made = config(tmp_path)
    made.tracking.uri = server
    run = finished_run(made, 0.1, steps=1100)
    tracking = TrackingConfig(True, server, "crl_exp")
    for _ in range(2):
        sync(run, tracking)
    (child,) = children(server)
    assert len(runs(server)) == 2 and child.info.status == "FINISHED"
    assert len(history(server, child.info.run_id, "reward")) == 1100
    assert len(history(server, child.info.run_id, "eval/delta")) == 1
    path = client(server).download_artifacts(child.info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == run.result()
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlartifacts").exists()
