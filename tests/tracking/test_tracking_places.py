"""Where runs are sent: the sync command, real servers, many processes, and what can go wrong."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from crl_exp.config.errors import UserError
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record
from crl_exp.tracking.config import TrackingConfig
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.target import place_of
from crl_exp.tracking.sync import announce, main, send
from tests.helpers import forking
from tests.helpers.mlflow_reading import children, free_port, history, runs, with_database
from tests.helpers.synthetic import config, finished_run


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with an MLflow file in it."""
    return with_database(tmp_path)


def said_of(run: RunDirectory, uri: str) -> str:
    """What a person is told where a run can't be sent to `uri`."""
    record = Record(run.path.absolute())
    told = send([record], place_of(record, uri))
    assert told is not None
    assert "Nothing is lost" in told and f"python -m crl_exp sync {run.path}" in told
    assert "Traceback" not in told and "\n" not in told
    return told


def test_a_dead_server_is_told_and_another_place_has_all(folder):
    run = finished_run(config(folder), 0.1)
    uri = f"http://127.0.0.1:{free_port()}"
    assert f"tracking.uri={uri}): nothing answers there" in said_of(run, uri)
    assert main([str(run.path)]) == 0
    assert len(children(resolved_uri(None, folder))) == 1


def test_a_host_that_does_not_exist(tmp_path):
    run = finished_run(config(tmp_path), 0.1)
    assert "there is no host of that name" in said_of(run, "http://no-such-host.invalid:5000")


def test_a_silent_server_is_given_up(tmp_path, monkeypatch):
    """It takes the connection and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    run = finished_run(config(tmp_path), 0.1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        told = said_of(run, f"http://127.0.0.1:{s.getsockname()[1]}")
    assert "did not answer in time" in told


@pytest.mark.parametrize(
    ("code", "page", "words"),
    [(401, "You are not authenticated.", "none or a wrong one; set MLFLOW_TRACKING_USERNAME"),
     (403, "Permission denied", "has no right to it"),
     (404, "<html>nothing here</html>", "it is no MLflow server"),
     (200, "<html>a page of something else</html>", "it is no MLflow server")],
)  # fmt: skip
def test_what_a_server_answers_in_plain_words(tmp_path, code, page, words):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(page.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    run = finished_run(config(tmp_path), 0.1)
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert words in said_of(run, f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_https_to_a_server_of_http(tmp_path):
    run = finished_run(config(tmp_path), 0.1)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = said_of(run, f"https://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "it speaks http, not https" in told


@pytest.mark.parametrize("kind", ["folder", "not a database", "no permission"])
def test_an_unusable_file_is_told(tmp_path, kind):
    run = finished_run(config(tmp_path), 0.1)
    path = tmp_path / "db"
    if kind == "folder":
        path.mkdir()
    elif kind == "not a database":
        path.write_text("a shopping list, long enough to be read as a header" * 50)
    else:
        path = Path("/proc/nowhere/mlflow.db")
    said_of(run, f"sqlite:///{path}")


@pytest.mark.parametrize("uri", ["localhost:5000", "mlruns", "http://", "sqlite:///", "htp://x"])
def test_a_bad_uri_is_a_fault_of_the_config(uri):
    (fault,) = TrackingConfig(True, uri, "crl_exp", 15, 10).faults()
    assert f"tracking.uri={uri}" in fault


def test_a_password_in_the_uri_is_refused_and_not_repeated():
    (fault,) = TrackingConfig(True, "https://me:secret@host", "crl_exp", 15, 10).faults()
    assert "MLFLOW_TRACKING_PASSWORD" in fault and "secret" not in fault


def test_seconds_must_be_positive():
    faults = TrackingConfig(True, None, "crl_exp", 0, -1).faults()
    assert ["sync_seconds=0:" in faults[0], "system_seconds=-1:" in faults[1]] == [True, True]


def test_switched_off_leaves_nothing(tmp_path):
    run = RunDirectory(config(tmp_path))
    off = TrackingConfig(False, None, "crl_exp", 0.1, 0.1)
    with Tracker(run, off) as tracker, run.opened():
        tracker.start()
        time.sleep(0.3)
    announce([Record(run.path)], off)
    assert not (tmp_path / "mlflow.db").exists()
    assert not {"mlflow.json", "system.jsonl"} & {path.name for path in run.path.iterdir()}


@pytest.mark.slow
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
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        main([str(folder / "demo")])
    assert [r.data.tags["run_key"] for r in children(resolved_uri(None, folder))] == [made[1].key]


def test_no_run_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        main([str(tmp_path)])


def start_sync(path: Path, *more: str) -> subprocess.Popen:
    code = "import sys; from crl_exp.tracking.sync import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [forking.python(), "-c", code, str(path), *more],
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
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
