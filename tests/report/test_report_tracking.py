"""The report as artifacts of the sweep's run in MLflow: a real SQLite file, no mocks."""

from __future__ import annotations

from pathlib import Path

import pytest

from crl_exp.report.command import main
from crl_exp.runs.records import Record
from crl_exp.tracking.report import attach_report
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.target import MlflowTarget
from crl_exp.tracking.sync import send
from tests.helpers.mlflow_reading import children, client, runs, with_database
from tests.helpers.synthetic import config, finished_run

pytestmark = pytest.mark.usefixtures("quick_figures")
SECTION = {"enabled": True, "uri": None, "experiment": "crl_exp"}


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A sweep over two tasks that MLflow has."""
    folder = with_database(tmp_path)
    for task in ("gsm8k", "mmlu"):
        run = finished_run(config(folder, more={"task.name": task}), 0.1)
        assert send([Record(run.path)], MlflowTarget(None, SECTION["experiment"], folder)) is None
    return folder / "demo"


def artifacts(sweep: Path, under: str = "report") -> set[str]:
    uri = resolved_uri(None, sweep.parent)
    (parent,) = [r for r in runs(uri) if "mlflow.parentRunId" not in r.data.tags]
    found = client(uri).list_artifacts(parent.info.run_id, under)
    return {item.path for item in found}


def test_the_report_is_logged_once_to_the_sweeps_run(sweep):
    assert main([str(sweep)]) == 0
    assert {"report/report.html", "report/overview.csv", "report/mmlu"} <= artifacts(sweep)
    assert "report/mmlu/by_layer.png" in artifacts(sweep, "report/mmlu")
    assert len(children(resolved_uri(None, sweep.parent))) == 2
    assert attach_report(sweep, SECTION) == 0
    (sweep / "report" / "table.md").write_text("changed")
    assert attach_report(sweep, SECTION) == 1


def test_an_attempt_that_was_cut_off_is_gone_on_with(sweep, monkeypatch):
    from mlflow import MlflowClient

    (sweep / "report").mkdir()
    for name in "abc":
        (sweep / "report" / name).write_text(name)
    log_artifact = MlflowClient.log_artifact

    def failing(self, run_id, path, *more):
        if path.endswith("b"):
            raise OSError("no space left")
        log_artifact(self, run_id, path, *more)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_artifact", failing)
        assert attach_report(sweep, SECTION) is None
    assert attach_report(sweep, SECTION) == 2
    assert artifacts(sweep) == {"report/a", "report/b", "report/c"}


def test_mlflow_away_is_warned_of_and_the_report_is_there(tmp_path, caplog):
    gone = "http://127.0.0.1:9"
    finished_run(config(tmp_path, more={"tracking.uri": gone}), 0.1)
    (tmp_path / "demo" / "mlflow.json").write_text(
        f'[{{"uri": "{gone}", "experiment": "crl_exp", "run_id": "0"}}]'
    )
    assert main([str(tmp_path / "demo")]) == 0
    assert "MLflow did not take the report" in caplog.text and gone in caplog.text
    assert (tmp_path / "demo" / "report" / "report.html").exists()


def test_a_sweep_that_mlflow_does_not_have(tmp_path, caplog):
    run = finished_run(config(tmp_path), 0.1)
    assert attach_report(run.path.parent, SECTION) is None
    assert f"crl_exp sync {run.path.parent}" in caplog.text
    assert not (tmp_path / "mlflow.db").exists()
    with_database(tmp_path)
    caplog.clear()
    (run.path.parent / "mlflow.json").write_text('[{"uri": "http://other", "experiment": "x"}]')
    assert attach_report(run.path.parent, SECTION) is None
    assert f"crl_exp sync {run.path.parent}" in caplog.text


def test_without_tracking_nothing_is_sent_or_said(sweep, caplog):
    (sweep / "report").mkdir()
    (sweep / "report" / "a").write_text("a")
    assert attach_report(sweep, {**SECTION, "enabled": False}) is None
    assert not caplog.records and not artifacts(sweep)
