"""What of a run directory must come through to MLflow, and what must not be asked or sent."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.client import ENVIRONMENT, PatientClient, import_mlflow, resolved_uri
from crl_exp.tracking.sending.content import Params, data_set, files, parameters
from crl_exp.tracking.sending.sent import Reading, Tail
from crl_exp.tracking.sending.target import place_of
from crl_exp.tracking.sync import main
from tests.helpers.mlflow_reading import children, client, history, runs, sync, with_database
from tests.helpers.synthetic import config, finished_run

SWEEP = "tags.`crl_exp.sweep` = 'demo'"


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with an MLflow file in it."""
    return with_database(tmp_path)


def calls(monkeypatch, *names: str) -> list[str]:
    """A list that grows by the name of every such call of MLflow's client."""
    from mlflow import MlflowClient

    made: list[str] = []

    def watched(name: str, plain: Callable) -> Callable:
        def call(self, *words, **more):
            made.append(name)
            return plain(self, *words, **more)

        return call

    for name in names:
        monkeypatch.setattr(MlflowClient, name, watched(name, getattr(MlflowClient, name)))
    return made


# --- a sweep ---


def test_a_sweep_has_the_code_of_the_run_that_started_last(folder, monkeypatch):
    """Runs of one sweep may have been made by different code. A sync again sends nothing, and asks
    for all runs at once; here a page holds one run."""
    from mlflow import MlflowClient

    made = [finished_run(config(folder, layers=(layer,)), 0.1) for layer in (8, 12, 15)]
    for run, started in zip(made, (100.0, 300.0, 200.0), strict=True):
        write_json(run.path / "status.json", {**run.status(), "started": started})
        write_json(run.path / "code.json", {"git_commit": f"of {started:g}", "git_dirty": False})
    assert main([str(folder / "demo")]) == 0
    uri = resolved_uri(None, folder)
    (parent,) = runs(uri, SWEEP)
    assert parent.data.tags["git_commit"] == "of 300" and parent.info.start_time == 100_000
    commits = sorted(run.data.tags["mlflow.source.git.commit"] for run in children(uri))
    assert commits == ["of 100", "of 200", "of 300"]

    plain = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda self, *words, **more: plain(
            self, *words, **{**more, "max_results": 1})
    )  # fmt: skip
    asked = calls(monkeypatch, "get_run", "log_batch", "log_inputs", "log_artifact", "set_tag",
                  "update_run", "set_terminated")  # fmt: skip
    assert main([str(folder / "demo")]) == 0
    assert asked == ["get_run"], "of the sweep's own run"


def test_a_sweep_deleted_in_mlflow_is_made_again_with_its_runs(folder):
    sync(finished_run(config(folder), 0.1))
    uri = resolved_uri(None, folder)
    (before,) = runs(uri, SWEEP)
    client(uri).delete_run(before.info.run_id)
    assert main([str(folder / "demo")]) == 0
    (after,), (child,) = runs(uri, SWEEP), children(uri)
    assert after.info.run_id != before.info.run_id
    assert child.data.tags["mlflow.parentRunId"] == after.info.run_id


def test_runs_of_two_experiments_are_noted_apart(folder):
    run = finished_run(config(folder), 0.1, steps=3)
    sync(run)
    text = (run.path / "config.yaml").read_text()
    (run.path / "config.yaml").write_text(text.replace("experiment: crl_exp", "experiment: two"))
    for _ in range(2):
        sync(run)
    mlflow = client(resolved_uri(None, folder))
    other = mlflow.get_experiment_by_name("two")
    assert other is not None and len(mlflow.search_runs([other.experiment_id])) == 2
    assert len(runs(resolved_uri(None, folder))) == 2


def test_a_deleted_experiment_is_told(folder):
    run = finished_run(config(folder), 0.1)
    sync(run)
    mlflow = client(resolved_uri(None, folder))
    found = mlflow.get_experiment_by_name("crl_exp")
    assert found is not None
    mlflow.delete_experiment(found.experiment_id)
    with pytest.raises(ValueError, match=r"was deleted there; restore it, or set tracking\.exper"):
        main([str(run.path)])


# --- a run ---


def test_a_lost_run_ended_with_its_last_journal_line(folder):
    run = RunDirectory(config(folder))
    with run.opened():
        run.log(1, {"reward": 0.5})
    later = time.time() + 100
    line = {"step": 2, "time": later, "metrics": {"reward": 0.5}}
    run.journal_path.write_text(run.journal_path.read_text() + json.dumps(line) + "\n")
    run.set_status("running", pid=2**22 + 1)
    sync(run)
    (child,) = children(resolved_uri(None, folder))
    assert child.info.status == "KILLED" and child.info.end_time == int(later * 1000)


def test_an_error_is_a_tag_as_long_as_mlflow_takes_and_goes_with_the_next_attempt(folder):
    run, uri = RunDirectory(config(folder)), resolved_uri(None, folder)
    with pytest.raises(RuntimeError), run.opened():
        raise RuntimeError("e" * 9000)
    sync(run)
    tag = children(uri)[0].data.tags["error"]
    assert len(tag) == 5000 and tag.endswith("e…")
    with run.opened():
        sync(run)
        assert children(uri)[0].data.tags["error"] == ""
        kept = {a.path for a in client(uri).list_artifacts(children(uri)[0].info.run_id)}
        assert "status.json" in kept, "of the attempt that failed"


def test_a_status_is_sent_once(folder, monkeypatch):
    run = RunDirectory(config(folder))
    with pytest.raises(KeyboardInterrupt), run.opened():
        raise KeyboardInterrupt
    sync(run)
    asked = calls(monkeypatch, "update_run", "log_inputs")
    write_json(run.path / "data.json", {"digest": "00112233", "n": {"train": 100}})
    with run.opened():
        uploader = place_of(Record(run.path)).uploader(None)
        for _ in range(3):
            uploader.send(Record(run.path))
    assert asked == ["update_run", "log_inputs"]


def test_a_file_that_changed_is_sent_again_and_only_that(folder, monkeypatch):
    run = finished_run(config(folder), 0.1)
    sync(run)
    asked = calls(monkeypatch, "log_artifact")
    (run.path / "features.json").write_text("{}")
    os.utime(run.path / "result.json")  # as a copy of the folder does
    sync(run)
    assert asked == ["log_artifact"]
    mlflow, (child,) = client(resolved_uri(None, folder)), children(resolved_uri(None, folder))
    path = mlflow.download_artifacts(child.info.run_id, "features.json", str(folder))
    assert Path(path).read_text() == "{}"


def test_many_points_are_sent_in_portions(folder):
    """Some 560 KB of journal, in pages of 200 KB; the run goes on being sent where it was left."""
    run, n = RunDirectory(config(folder)), 1000
    with run.opened():
        lines = [{"step": s, "time": s, "metrics": {"reward": s / n}} for s in range(1, n + 1)]
        run.journal_path.write_text("".join(json.dumps(line) + " " * 500 + "\n" for line in lines))
        uploader, reading = place_of(Record(run.path)).uploader(None), Reading()
        sent = [uploader.send(Record(run.path), reading, at_most=100) for _ in range(4)]
    assert sent[0] is False and sent[-1] is True
    (child,) = children(resolved_uri(None, folder))
    found = history(resolved_uri(None, folder), child.info.run_id, "reward")
    assert found == [(s, s / n) for s in range(1, n + 1)]


# --- content ---


def test_names_and_values_at_mlflows_limits():
    given = {"a": {"x[0": 1, "x]0": 2, "n" * 300: 3, "full": "w" * 6000, "long": "w" * 6001}}
    made = parameters(given)
    assert isinstance(made, Params) and len(made.given) == 5
    assert sorted(v for v in made.given.values() if len(v) == 1) == ["1", "2", "3"]
    assert max(map(len, made.given)) <= 250 and made.given["a.full"] == "w" * 6000
    assert len(made.given["a.long"]) == 6000 and made.given["a.long"] != "w" * 6000
    assert set(made.whole) == {"a.x[0", "a.x]0", f"a.{'n' * 300}", "a.long"}


def test_where_the_data_came_from(tmp_path):
    hub = {"task.hub_id": "openai/gsm8k", "task.subsets": ["main"], "task.revision": "abc"}
    for more, kind, source in (
        (hub, "hugging_face", {"path": "openai/gsm8k", "subsets": ["main"], "revision": "abc",
                               "sources": None}),
        ({**hub, "task.data_files": "x.jsonl"}, "local", {"uri": "x.jsonl"}),
        ({}, "code", {"tags": {"mlflow.source.name": "crl_exp.tasks.sentiment.Sentiment"}}),
    ):  # fmt: skip
        made = config(tmp_path, more=more)
        run = RunDirectory(made)
        run.path.mkdir(parents=True)
        (run.path / "config.yaml").write_text(OmegaConf.to_yaml(made))
        write_json(run.path / "data.json", {"digest": "0", "n": {}})
        found = data_set(Record(run.path))
        assert found and (found.source_type, json.loads(found.source)) == (kind, source)


def test_hidden_files_are_no_artifacts(tmp_path):
    for name in ("report/a.csv", "report/.a.csv.partial", "report/sub/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = {(path.name, inside) for path, inside in files(tmp_path, ("report/**/*",))}
    assert found == {("a.csv", "report"), ("b.png", "report/sub")}


def test_a_growing_file_is_read_on_and_one_that_was_cut_back_anew(tmp_path):
    path, long = tmp_path / "journal.jsonl", {"text": "w" * 50}
    path.write_text('{"a": 1}\n{"a": 2}\n' + json.dumps(long) + '\n{"a"')
    tail = Tail(path)

    def read() -> list:
        return [line for part in tail.parts(max_bytes=7) for line in part]

    assert read() == [{"a": 1}, {"a": 2}, long] and read() == []
    path.write_text('{"a": 1}\n' + '{"b": 1}\n' * 20)
    assert read() == [{"a": 1}] + [{"b": 1}] * 20


# --- the client ---


def test_what_the_user_has_set_goes_before_our_settings(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    import_mlflow()
    wanted = {**ENVIRONMENT, "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}
    assert {name: os.environ[name] for name in ENVIRONMENT} == wanted


class Server:
    """Answers as its list says."""

    def __init__(self, *answers: str):
        self.answers = list(answers)

    def ask(self) -> str:
        from mlflow.exceptions import MlflowException

        if (answer := self.answers.pop(0)).startswith("error"):
            raise MlflowException(answer)
        return answer


def test_a_busy_database_is_asked_again_and_nothing_else_is():
    busy = Server("error: database is locked", "error: TEMPORARILY_UNAVAILABLE", "yes")
    assert PatientClient(busy, None).ask() == "yes"
    refusing = Server("error: no", "yes")
    with pytest.raises(Exception, match="error: no"):
        PatientClient(refusing, None).ask()
    assert refusing.answers == ["yes"]
    with pytest.raises(TimeoutError, match="too slow"):
        PatientClient(Server("yes"), time.monotonic() - 1).ask()


@contextmanager
def another_is_quicker(database: Path, insert: str) -> Iterator[list[int]]:
    """The first statement that begins so is done by another connection just before."""
    from sqlalchemy import Engine, event

    others: list[int] = []

    def quicker(connection, cursor, statement, parameters, context, executemany):
        if statement.startswith(insert) and not others:
            with closing(sqlite3.connect(database)) as other:
                others.append(other.execute(statement, parameters).rowcount)
                other.commit()

    event.listen(Engine, "before_cursor_execute", quicker)
    try:
        yield others
    finally:
        event.remove(Engine, "before_cursor_execute", quicker)


def test_a_data_set_that_another_process_makes_first_is_taken(folder):
    """MLflow looks for it, finds none, and is too late with its own."""
    with another_is_quicker(folder / "mlflow.db", "INSERT INTO datasets") as others:
        sync(finished_run(config(folder), 0.1))
    assert others == [1]
    (child,) = children(resolved_uri(None, folder))
    described = data_set(Record(next(folder.glob("*/*/result.json")).parent))
    assert child.inputs is not None and described is not None
    (used,) = child.inputs.dataset_inputs
    assert used.dataset.digest == described.digest


def test_an_experiment_that_another_process_describes_first_is_left_so(folder):
    """Both find no note there, and both write it."""
    with another_is_quicker(folder / "mlflow.db", "INSERT INTO experiment_tags") as others:
        sync(finished_run(config(folder), 0.1))
    assert others == [1]
    found = client(resolved_uri(None, folder)).get_experiment_by_name("crl_exp")
    assert found is not None and "mlflow.note.content" in found.tags
