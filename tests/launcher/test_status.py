"""`status` and `logs`: what a person is told of runs in every state. No model is loaded here."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from crl_exp.__main__ import main
from crl_exp.config.files import write_json
from crl_exp.launcher.commands import logs, status
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, finished_run

GONE = 2**22 + 1


def failing(run: RunDirectory) -> None:
    with run.opened():
        raise RuntimeError("too hot\nand more")


def beat(run: RunDirectory, **told) -> None:
    plain = {
        "time": time.time(), "phase": "train", "what": "training", "done": 30, "total": 120,
        "left_seconds": 900.0, "metrics": {"reward": 0.625}, "seconds": {"train": 1.0},
    }  # fmt: skip
    write_json(run.path / "heartbeat.json", plain | told)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A done, a failed, a lost, a running (held by this process's test) and a queued run."""
    finished_run(config(tmp_path, layers=(8,)), 0.1)
    bad = RunDirectory(config(tmp_path, layers=(12,)))
    with pytest.raises(RuntimeError):
        failing(bad)
    lost = RunDirectory(config(tmp_path, layers=(15,)))
    with lost.opened():
        pass
    lost.set_status("running", pid=GONE)
    waiting = RunDirectory(config(tmp_path, layers=(22,)))
    waiting.freeze()
    waiting.set_status("queued", host="login", slurm_job_id="7_3")
    return tmp_path / "demo"


def test_every_run_is_told(sweep, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no squeue: everything is known from the directories
    running = RunDirectory(config(sweep.parent, layers=(18,)))
    with running.opened():
        beat(running)
        assert main(["status", "demo", "--output-dir", str(sweep.parent)]) == 0
    said = capsys.readouterr().out
    for text in (
        "1 running", "1 done", "1 failed", "1 lost", "1 queued", "train 30/120", "reward 0.625",
        "too hot", "its process is gone", "Δ +10.0 [+8.0, +12.0]", "layer 18", os.uname().nodename,
    ):  # fmt: skip
        assert text in said, said
    assert "and more" not in said, "logs tells that"
    assert said.index("layer 18") < said.index("layer 12") < said.index("layer 15"), "by state"


def test_runs_that_share_a_job_are_shown_with_it(sweep, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = ["status", "demo", "--output-dir", str(sweep.parent)]
    assert main(told) == 0
    assert "7_3" not in capsys.readouterr().out, "each run has a job of its own"
    mate = RunDirectory(config(sweep.parent, layers=(3,)))
    mate.freeze()
    mate.set_status("queued", host="login", slurm_job_id="7_3")
    assert main(told) == 0
    assert capsys.readouterr().out.count("7_3") == 2


def test_the_time_left_is_by_journal_and_by_runs_that_are_done(tmp_path, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr("crl_exp.launcher.commands.status.time.time", lambda: now)
    done = finished_run(config(tmp_path, layers=(8,)), 0.1)  # 3 s of training, 4.5 s of evaluation
    run = RunDirectory(config(tmp_path, layers=(18,)))
    run.path.mkdir(parents=True)
    run.freeze()
    run.set_status("running")
    beat(run, time=now - 5)

    def left(records) -> float | None:
        mine = next(record for record in records if record.key == run.key)
        others = [record for record in records if record.key == done.key]
        return status.left_seconds(mine, status.usual_seconds(others))

    assert left(find_records(tmp_path)) == 900 - 5 + 4.5, "the heartbeat's, 5 s ago"
    lines = [(10, now - 42), (20, now - 22), (30, now - 2)]
    run.journal_path.write_text(
        "".join(f'{{"step": {s}, "time": {t}, "metrics": {{"reward": 0.5}}}}\n' for s, t in lines)
    )
    assert left(find_records(tmp_path)) == 90 * 2 - 2 + 4.5, "2 s an update, the last 2 s ago"
    only = [r for r in find_records(tmp_path) if r.key == run.key]
    assert left(only) is None, "nobody knows how long the evaluation takes"
    beat(run, time=now - 5, phase="evaluate", left_seconds=65.0, seconds={})
    only = [r for r in find_records(tmp_path) if r.key == run.key]
    assert left(only) == 60.0
    assert [status.duration(s) for s in (None, 45.2, 725, 11_100)] == [
        "", "45 s", "12 min", "3 h 05",
    ]  # fmt: skip


def test_logs_tell_the_jobs_output_and_the_traceback(sweep, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    record = next(r for r in find_records(sweep) if r.state == "failed")
    (sweep / "logs").mkdir()
    run = RunDirectory(config(sweep.parent, layers=(12,)))
    kept = run.status()
    run.set_status("failed", **{k: kept[k] for k in ("error", "traceback")}, slurm_job_id="7_1")
    (sweep / "logs" / "7_1_0_log.out").write_text("".join(f"line {i}\n" for i in range(100)))
    (sweep / "logs" / "7_1_0_log.err").write_text("bar 10%\rbar 90%\r\nslurmstepd: killed\n")
    (sweep / "logs" / "7_11_0_log.out").write_text("another's\n")
    assert main(["logs", record.key[:6], "--output-dir", str(sweep.parent), "--lines", "5"]) == 0
    said = capsys.readouterr().out
    for text in ("line 99", "line 95", "bar 90%", "slurmstepd: killed", "Traceback", "and more",
                 "failed: attempt 1, job 7_1, on "):  # fmt: skip
        assert text in said, said
    assert not any(text in said for text in ("line 94", "bar 10%", "another's"))


def test_a_run_is_found_by_folder_sweep_and_key(sweep, capsys):
    record = find_records(sweep)[0]
    for name in (str(record.path), f"demo/{record.key}", record.key, record.key[:8]):
        assert logs.find_run(name, sweep.parent).path == record.path
    for name, words in (("demo", "is a sweep; which run"), ("", "is empty"), ("zz", "no run")):
        assert main(["logs", name, "--output-dir", str(sweep.parent)]) == 1
        assert words in capsys.readouterr().err


def test_logs_of_a_worker_are_those_of_the_run(tmp_path):
    """A worker's files hold many runs, and a run may have been at several workers."""
    first, second = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
    folder = tmp_path / "s" / "logs"
    folder.mkdir(parents=True)
    marked = f"starting\n=== run {first}\none\n=== run {second}\ntwo\n=== run {first}\nagain\n"
    (folder / "10_0_log.out").write_text(marked)
    (folder / "10_0_log.err").write_text("nothing of it\n")
    later = folder / "11_0_log.out"
    later.write_text("=== run cccccccccccc\nthree\n")
    os.utime(later, (later.stat().st_mtime + 100,) * 2)
    for key, lines in ((first, ["again"]), (second, ["two"]), ("cccccccccccc", ["three"])):
        run = tmp_path / "s" / key
        run.mkdir()
        (run / "status.json").write_text('{"slurm_job_id": null}')
        found = dict(logs.log_files(Record(run)))
        text = "\n".join(found.values())
        assert text.split("\n")[1:2] == lines, text
        assert not any(other in text for other in {"one", "two", "three", "again"} - set(lines))
    (tmp_path / "s" / "dddddddddddd").mkdir()
    assert logs.log_files(Record(tmp_path / "s" / "dddddddddddd")) == []
    assert logs.tail("a\rb\r\nc\n", 0) == "b\nc"


def test_names_with_markup_are_shown_as_they_are(tmp_path, capsys):
    config_of = config(tmp_path, sweep_name="[red]s")
    config_of.model.name = "a[/red]b"
    run = finished_run(config_of, 0.1, steps=2)
    assert run.path.exists()
    assert status.main(["[red]s", "--output-dir", str(tmp_path)]) == 0
    assert "[red]s: 1 done" in capsys.readouterr().out
