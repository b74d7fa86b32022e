"""Run directory to MLflow: a real SQLite file, no mocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.sent import Tail
from tests.helpers.mlflow_reading import children, client, history, runs, sync, with_database
from tests.helpers.synthetic import config, figures, finish, finished_run, result


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder with an MLflow file in it."""
    return with_database(tmp_path)


def test_a_run_is_logged_once_with_all_it_has(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    run = finished_run(config(folder), 0.1, steps=1200)
    for _ in range(3):
        sync(run)
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
    assert files == {"config.yaml", "result.json", "features.json", "interventions.parquet",
                     "status.json"}  # fmt: skip
    assert str(folder / "mlartifacts") in str(child.info.artifact_uri)


def test_times_are_those_of_the_run_and_not_of_the_files(folder):
    """Which a copy of the output folder makes new."""
    run = finished_run(config(folder), 0.1, steps=2)
    for path in run.path.iterdir():
        os.utime(path, (2e9, 2e9))
    sync(run)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    (parent,) = runs(uri, "tags.`crl_exp.sweep` = 'demo'")
    status = run.status()
    for made in (child, parent):
        assert made.info.start_time == int(status["started"] * 1000)
        assert made.info.end_time == int(status["updated"] * 1000)


def test_final_metrics(folder):
    sets = {"benign": figures(-0.05, n=150, baseline=0.9, ser=None)}
    run = finished_run(config(folder), 0.1, test_sets=sets)
    sync(run)
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


def test_code_data_load_and_figures(folder):
    """What a run writes at its start and beside its journal."""
    made = config(folder, more={"task.path": "reviews.jsonl", "sae.release": "gemma-scope"})
    run = finished_run(made, 0.1)
    code = {"git_commit": "beef" * 10, "git_dirty": True, "git_diff": "0123456789ab"}
    write_json(run.path / "code.json", code)
    write_json(run.path / "data.json", {"digest": "00112233", "n": {"train": 100, "test": 1500}})
    line = {"step": 0, "time": 5.0, "metrics": {"cpu_utilization_percentage": 80.5}}
    (run.path / "system.jsonl").write_text(json.dumps(line) + "\n")
    (run.path / "attention.png").write_bytes(b"a picture")
    for name, text in (("code-0123456789ab.diff", "- a\n+ b\n"), ("report/table.md", "|")):
        (run.path.parent / name).parent.mkdir(exist_ok=True)
        (run.path.parent / name).write_text(text)
    for _ in range(2):
        sync(run)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    (parent,) = runs(uri, "tags.`crl_exp.sweep` = 'demo'")
    for tagged in (child, parent):
        wanted = {"git_commit": "beef" * 10, "git_dirty": "true", "git_diff": "0123456789ab"}
        assert wanted.items() <= tagged.data.tags.items()
    assert child.data.tags["sae_release"] == "gemma-scope"
    inputs = client(uri).get_run(child.info.run_id).inputs
    assert inputs is not None
    (used,) = inputs.dataset_inputs
    data = used.dataset
    assert (data.name, data.digest, data.source_type) == ("sentiment", "00112233", "local")
    assert json.loads(data.source) == {"uri": "reviews.jsonl"}
    assert data.profile is not None and json.loads(data.profile) == {"train": 100, "test": 1500}
    name = "system/cpu_utilization_percentage"
    assert history(uri, child.info.run_id, name) == [(0, 80.5)]
    assert "attention.png" in {a.path for a in client(uri).list_artifacts(child.info.run_id)}
    kept = {a.path for a in client(uri).list_artifacts(parent.info.run_id)}
    assert kept == {"code-0123456789ab.diff", "report"}


def test_texts_of_many_bytes_are_sent_in_several_requests(folder):
    """A request may have 100 params, 6,000 characters each, and a megabyte: not all at once."""
    made = config(folder)
    for i in range(100):
        OmegaConf.update(made, f"algorithm.option_{i}", "ä" * 5000)
    sync(finished_run(made, 0.1))
    (child,) = children(resolved_uri(None, folder))
    assert child.data.params["algorithm.option_99"] == "ä" * 5000


def test_an_unsent_note_makes_no_duplicate(folder):
    """As after a kill between sending and noting it: the run and its points are found again."""
    run = finished_run(config(folder), 0.1, steps=20)
    sync(run)
    for noted in (run.path, run.path.parent):
        (note,) = json.loads((noted / "mlflow.json").read_text())
        kept = {key: note[key] for key in ("uri", "experiment", "upload_id")}
        write_json(noted / "mlflow.json", [kept])
    sync(run)
    uri = resolved_uri(None, folder)
    assert len(runs(uri)) == 2
    (child,) = children(uri)
    for name in ("reward", "eval/delta"):
        assert len(history(uri, child.info.run_id, name)) == (20 if name == "reward" else 1)


def test_a_journal_cut_back_and_run_over_is_sent_once(folder):
    run = RunDirectory(config(folder))
    uri = resolved_uri(None, folder)
    run.path.mkdir(parents=True)
    for step in range(1, 6):
        run.log(step, {"reward": step / 10})
    size = run.journal_path.stat().st_size
    for step in range(6, 9):
        run.log(step, {"reward": step / 10})
    with pytest.raises(KeyboardInterrupt), run.opened():
        raise KeyboardInterrupt
    sync(run)
    (child,) = children(uri)
    assert child.info.status == "KILLED"
    run.cut_journal(size)
    sync(run)
    with run.opened():
        for step in range(6, 13):
            run.log(step, {"reward": step / 10})
            run.log(step, {"validation_reward": step / 20})
        finish(run, result(run, figures(0.1), figures(0.1)))
    sync(run)
    (again,) = children(uri)
    assert again.info.run_id == child.info.run_id and again.info.status == "FINISHED"
    assert history(uri, again.info.run_id, "reward") == [(s, s / 10) for s in range(1, 13)]
    assert len(history(uri, again.info.run_id, "validation_reward")) == 7


@pytest.mark.parametrize("steps", [0, 5])
def test_a_forced_run_is_a_new_one(folder, steps):
    uri = resolved_uri(None, folder)
    sync(finished_run(config(folder), 0.1, steps=steps))
    (first,) = children(uri)
    time.sleep(0.01)
    sync(finished_run(config(folder, resume="force"), 0.2, steps=steps))
    new = [r for r in children(uri) if r.info.run_id != first.info.run_id]
    assert len(new) == 1 and new[0].data.metrics["eval/delta"] == pytest.approx(0.2)
    (first,) = [r for r in children(uri) if r.info.run_id == first.info.run_id]
    assert first.data.tags["crl_exp.superseded_by"] == new[0].info.run_id
    assert first.data.metrics["eval/delta"] == pytest.approx(0.1)


def test_runs_of_a_sweep_share_their_parent(folder):
    for layer in (8, 12):
        sync(finished_run(config(folder, layers=(layer,)), 0.1))
    sync(finished_run(config(folder, sweep_name="other"), 0.1))
    uri = resolved_uri(None, folder)
    names = {r.info.run_id: r.info.run_name for r in runs(uri)}
    found = sorted(
        (r.info.run_name, names[r.data.tags["mlflow.parentRunId"]]) for r in children(uri)
    )
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
        sync(run)
        assert children(uri)[0].info.status == "RUNNING"
        assert runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "RUNNING"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_json(run.path / "status.json", {**run.status(), "state": "running", "pid": gone.pid})
    sync(run)
    assert children(uri)[0].info.status == "KILLED"
    with pytest.raises(RuntimeError), run.opened():
        raise RuntimeError("boom")
    sync(run)
    assert children(uri)[0].info.status == "FAILED"
    assert runs(uri, "tags.`crl_exp.sweep` = 'demo'")[0].info.status == "FAILED"


def test_long_and_many_params(folder):
    made = config(folder)
    made.task.question = "w" * 9000 + "{text}"
    made.task.data_files = {"train[:9]": "a.jsonl"}
    for i in range(230):
        OmegaConf.update(made, f"algorithm.option_{i}", i)
    run = finished_run(made, 0.1)
    sync(run)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    assert child.data.params["algorithm.option_229"] == "229"
    cut = child.data.params["task.question"]
    assert len(cut) == 6000 and cut.startswith("wwww")
    assert cut.endswith("… (all 9006 characters: artifact long_params.json)")
    whole = client(uri).download_artifacts(child.info.run_id, "long_params.json", str(folder))
    assert json.loads(Path(whole).read_text()) == {
        "task.question": made.task.question,
        "task.data_files.train[:9]": "a.jsonl",
    }
    assert child.data.params["task.data_files.train_:9_"] == "a.jsonl"


def test_a_run_deleted_in_mlflow_is_sent_again(folder):
    run = finished_run(config(folder), 0.1, steps=3)
    sync(run)
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    client(uri).delete_run(child.info.run_id)
    sync(run)
    (new,) = children(uri)
    assert new.info.run_id != child.info.run_id
    assert len(history(uri, new.info.run_id, "reward")) == 3


def test_a_torn_last_line_is_left_for_later(tmp_path):
    run = RunDirectory(config(tmp_path))
    with run.opened():
        run.log(1, {"reward": 0.5})
        with run.journal_path.open("a") as file:
            file.write('{"step": 2, "time": 1.0, "met')
    (lines,) = Tail(run.journal_path).parts()
    assert [line["step"] for line in lines] == [1]
