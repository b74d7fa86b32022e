"""Run directory to wandb: its real client, offline; what it wrote is read back from its log."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from crl_exp.config.errors import UserError
from crl_exp.launcher.commands import rename, rm
from crl_exp.launcher.doctor import storage
from crl_exp.report.command import where_all_are
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import Record
from crl_exp.tracking import live as module
from crl_exp.tracking.config import TrackingConfig
from crl_exp.tracking.live import Tracker
from crl_exp.tracking.sync import main as sync_command
from crl_exp.tracking.to_wandb.follower import Follower
from crl_exp.tracking.to_wandb.rows import signature
from tests.config.test_foreign_text import CONTROLS
from tests.helpers.mlflow_reading import free_port
from tests.helpers.synthetic import config, figures, finish, finished_run, result
from tests.helpers.wandb_reading import Written
from tests.launcher.test_doctor import subject, the, told
from tests.tracking.test_samples import answered

SECTION = {
    "enabled": True, "target": "wandb", "project": "steer", "entity": None, "mode": "offline",
    "uri": None, "experiment": "crl_exp", "sync_seconds": 0.1, "system_seconds": None,
}  # fmt: skip
TO_WANDB = {"tracking": SECTION}


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path, monkeypatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 300.0)


def to_wandb(folder: Path, **more: Any):
    return config(folder, more={**TO_WANDB, **{f"tracking.{k}": v for k, v in more.items()}})


def sync(path: Path) -> None:
    assert sync_command([str(path)]) == 0


def wait_until(found: Callable[[], Any], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def reopened(run: RunDirectory, **more: Any) -> None:
    """Change what a finished run found."""
    write_json(run.result_path, {**json.loads(run.result_path.read_text()), **more})


def test_a_run_is_there_once_with_all_it_has(tmp_path, capsys):
    made = answered(tmp_path)  # with a table of answers, and texts of every kind
    path = made.path / "config.yaml"
    frozen = made.config.copy()
    frozen.tracking = SECTION
    path.write_text(OmegaConf.to_yaml(frozen))
    made.journal_path.write_text("")
    for step in range(1, 41):
        made.log(step, {"reward": step / 40, "layer_18/policy_loss": -1 / step})
        if step % 10 == 0:
            made.log(step, {"validation_reward": step / 40, "undefined": float("nan")})
    (made.path / "system.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "time": 5.0 + i, "metrics": {"cpu_utilization_percentage": i}})
            + "\n"
            for i in range(3)
        )
    )
    sync(made.path)
    said = capsys.readouterr().out
    assert f"wandb sync {made.path.parent}/*/wandb" in said and "wandb, steer, offline" in said
    there = Written(made.path)
    assert there.whole and there.exit_code == 0
    run = there.run
    assert (run.project, run.run_group, run.job_type) == ("steer", "demo", "crl")
    assert run.display_name == "crl layer 18 seed 0" and run.run_id.startswith(made.key)
    assert set(run.tags) == {"crl", "tiny", "sentiment", "layers 18"}
    assert there.config["algorithm"]["n_updates"] == 120
    assert there.config["run"]["run_key"] == made.key
    assert not {"tracking", "output_dir"} & there.config.keys()
    lines = [(step, step / 40) for step in range(1, 41)]
    assert there.points("reward") == lines
    assert there.points("layer_18/policy_loss") == [(step, -1 / step) for step, _ in lines]
    assert there.points("validation_reward") == lines[9::10]
    assert there.points("system/cpu_utilization_percentage") == [(0, 0), (1, 1), (2, 2)]
    assert there.steps == sorted(set(there.steps)), "wandb drops rows whose own step doesn't rise"
    when = [line["time"] for line in made.journal() if "reward" in line["metrics"]]
    assert [
        t for t, row in zip(there.times, there.history, strict=True) if "reward" in row
    ] == pytest.approx(when, abs=2e-3)
    assert not [row for row in there.history if "undefined" in row]
    assert there.summary["eval/n"] == 300 and there.summary["state"] == "done"
    assert there.summary["eval/primary"] == pytest.approx(0.68)
    assert there.summary["reward"] == 1
    (row,) = [row for row in there.history if "samples.path" in row]
    table = json.loads((there.folder / "files" / row["samples.path"]).read_text())
    assert len(table["data"]) == 50 and table["columns"][:2] == ["what", "item"]
    assert not CONTROLS & set(json.dumps(table, ensure_ascii=False))
    kept = {p.name for p in there.folder.rglob("*") if p.is_file()}
    nothing_of = {"output.log", "requirements.txt", "wandb-metadata.json", "diff.patch"}
    assert not kept & nothing_of and "stats" not in there.kinds and "output_raw" not in there.kinds


def test_nothing_is_sent_twice_and_what_changed_is_sent_whole(tmp_path):
    run = finished_run(to_wandb(tmp_path), 0.1, steps=20)
    sync(run.path)
    first = Written(run.path)
    (note,) = json.loads((run.path / "wandb.json").read_text())
    (log,) = first.folder.glob("*.wandb")
    (first.folder / f"{log.name}.synced").touch()  # as `wandb sync` marks what it uploaded
    before = log.stat().st_mtime_ns
    sync(run.path)
    assert log.stat().st_mtime_ns == before
    assert [note] == json.loads((run.path / "wandb.json").read_text())
    reopened(run, unique_features=6)
    sync(run.path)
    again = Written(run.path)  # one folder: `wandb sync` finds no second of one id
    assert again.run.run_id == first.run.run_id
    assert again.points("reward") == first.points("reward") and len(again.points("reward")) == 20
    assert (first.summary["eval/unique_features"], again.summary["eval/unique_features"]) == (5, 6)
    assert not list(again.folder.glob("*.synced")), "it is to be uploaded again"
    (run.path / "mlflow_begun.json").unlink()  # as resume=force does
    sync(run.path)
    assert Written(run.path).run.run_id != first.run.run_id


def test_steps_in_any_order_are_all_there_over_their_own_axis(tmp_path):
    """Training, then layers as they end, then training that goes over steps again."""
    run = finished_run(to_wandb(tmp_path), 0.1, steps=30)
    for layer in (30, 5, -1):
        run.log(layer, {"by_layer/probe/accuracy": layer / 100, "by_layer/probe/a.b": 1.0})
    for step in range(25, 41):
        run.log(step, {"reward": -step})
    layers = [*range(12), 30, -1]
    random.Random(0).shuffle(layers)
    one = {str(la): {"value": la / 100, "low": la / 200, "high": 0.5, "n": 8} for la in layers}
    reopened(run, by_layer={"probe/accuracy": one})
    sync(run.path)
    there = Written(run.path)
    wanted = sorted((layer, layer / 100) for layer in {*layers, 5})
    assert sorted(there.points("by_layer/probe/accuracy")) == wanted
    assert sorted(there.points("by_layer/probe/accuracy/low")) == [
        (layer, layer / 200) for layer in sorted(layers)
    ]
    assert len(there.points("by_layer/probe/a.b")) == 3
    assert there.axes["by_layer/probe/accuracy"] == "by_layer/layer"
    assert "by_layer/probe/accuracy" in there.no_summary, "a list would show the last layer's"
    assert "by_layer/probe/accuracy" not in there.summary
    rewards = there.points("reward")
    assert [step for step, _ in rewards] == list(range(1, 41))
    assert [value for _, value in rewards[30:]] == [-step for step in range(31, 41)]
    assert there.steps == sorted(set(there.steps))


def test_a_run_is_followed_and_whole_at_its_end(tmp_path, monkeypatch, caplog):
    """Whatever wandb's own variables say: they are of the user's other programs."""
    for name, value in (
        ("RUN_ID", "theirs"), ("RESUME", "must"), ("MODE", "disabled"), ("NAME", "theirs"),
        ("PROJECT", "theirs"), ("RUN_GROUP", "theirs"), ("TAGS", "theirs"), ("DIR", str(tmp_path)),
    ):  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = RunDirectory(to_wandb(tmp_path))
    with Tracker(run, TrackingConfig(**SECTION)) as tracker, run.opened():
        tracker.start()
        run.log(1, {"reward": 0.25})
        wait_until(lambda: list(run.path.glob("wandb/offline-run-*/*.wandb")))
        for step in range(2, 50):
            run.log(step, {"reward": step / 50})
        finish(run, json.loads(json.dumps(result(run, figures(0.1), figures(0.1)))))
    there = Written(run.path)
    assert there.whole and there.run.project == "steer" and there.run.run_group == "demo"
    assert there.run.display_name == "crl layer 18 seed 0" and there.run.run_id.startswith(run.key)
    assert there.points("reward") == [(1, 0.25), *((step, step / 50) for step in range(2, 50))]
    assert there.summary["eval/n"] == 1500 and not caplog.records
    sync(run.path)
    assert Written(run.path).folder == there.folder, "it was noted"


def test_a_killed_run_and_a_killed_process_beside_it_lose_nothing(tmp_path, caplog):
    run = RunDirectory(to_wandb(tmp_path))
    run.path.mkdir(parents=True)
    with run.opened():
        run.log(1, {"reward": 0.25})
        follower = Follower(run.path.absolute(), pytest.fail)
        wait_until(lambda: list(run.path.glob("wandb/offline-run-*/*.wandb")))
        assert follower.end(300) is not None  # as where the run is killed: it didn't end
    assert "signature" not in json.loads((run.path / "wandb.json").read_text())[0]
    with Tracker(run, TrackingConfig(**SECTION)) as tracker, run.opened():
        tracker.start()
        assert tracker._follower is not None
        wait_until(lambda: list(run.path.glob("wandb/offline-run-*/*.wandb")))
        os.kill(tracker._follower._process.pid, signal.SIGKILL)
        tracker._follower._process.wait()
        run.log(2, {"reward": 0.5})
        finish(run, json.loads(json.dumps(result(run, figures(0.1), figures(0.1)))))
    assert run.status()["state"] == "done"
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "Nothing is lost" in said and f"crl_exp sync {run.path}" in said
    sync(run.path)
    there = Written(run.path)
    assert there.whole and there.points("reward") == [(1, 0.25), (2, 0.5)]


def test_online_without_a_login_asks_nobody_and_stays_offline(tmp_path, capsys):
    run = finished_run(to_wandb(tmp_path, mode="online"), 0.1, steps=3)
    for _ in range(2):
        sync(run.path)
        said = capsys.readouterr().out
        (line,) = [one for one in said.splitlines() if "wandb login" in one]
        assert f"crl_exp sync {run.path}" in line and "tracking.mode=offline" in line
        there = Written(run.path)
        assert there.whole and there.folder.name.startswith("offline-run-")
    assert len(there.points("reward")) == 3


def test_runs_that_have_not_ended_are_left_to_themselves(tmp_path, capsys):
    run = RunDirectory(to_wandb(tmp_path))
    with run.opened():
        sync(run.path)
    assert "1 runs haven't ended" in capsys.readouterr().out
    assert not (run.path / "wandb").exists()


def test_a_damaged_run_does_not_keep_the_others(tmp_path):
    bad = finished_run(to_wandb(tmp_path), 0.1)
    good = finished_run(config(tmp_path, more=TO_WANDB, seed=1), 0.1)
    (bad.path / "journal.jsonl").write_text("no JSON\n")
    with pytest.raises(UserError, match=r"journal\.jsonl is damaged"):
        sync_command([str(bad.path.parent)])
    assert Written(good.path).whole


def test_without_wandb_it_is_refused_before_anything_starts(tmp_path, monkeypatch):
    run = finished_run(to_wandb(tmp_path), 0.1)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (fault,) = TrackingConfig(**SECTION).faults()
    assert "pip install 'crl_exp[wandb]'" in fault and "tracking=none" in fault
    assert not TrackingConfig(**{**SECTION, "enabled": False}).faults()
    with pytest.raises(UserError, match="isn't installed here"):
        sync_command([str(run.path)])
    assert not (run.path / "wandb.json").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"uri": "http://localhost:5000"}, "tracking.uri is MLflow's"),
        ({"mode": "onlin"}, "did you mean 'online'"),
        ({"project": "a/b"}, "tracking.project='a/b'"),
        ({"entity": ""}, "tracking.entity=''"),
        ({"target": "wanb"}, "did you mean 'wandb'"),
        ({"target": "mlflow"}, "tracking.project=steer is wandb's; add tracking=wandb"),
    ],
)
def test_faults_of_the_config(more, said):
    (fault,) = TrackingConfig(**{**SECTION, **more}).faults()
    assert said in fault


def test_wandb_is_not_told_of_rm_and_rename_which_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = finished_run(to_wandb(tmp_path / "outputs"), 0.1)
    write_json(run.path / "wandb.json", [{"project": "steer", "entity": None, "id": "x"}])
    assert rename.main(["demo", "other"]) == 0
    said = capsys.readouterr().out
    assert "1 runs were sent to wandb in the group demo" in said
    assert f"crl_exp sync {tmp_path}/outputs/other" in said
    assert not (tmp_path / "outputs" / "mlflow.db").exists()
    assert rm.main(["other", "--yes"]) == 0
    said = capsys.readouterr().out
    assert "1 runs were sent to wandb, which isn't told" in said
    assert not (tmp_path / "outputs" / "other").exists()


def test_nothing_imports_wandb_that_does_not_send_to_it():
    program = (
        "import sys, crl_exp.tracking.sync, crl_exp.tracking.live, crl_exp.report.command\n"
        "print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_report_names_the_line_that_uploads(tmp_path):
    assert where_all_are(SECTION, tmp_path) == (f"wandb sync {tmp_path}/*/wandb", "wandb")
    online, _ = where_all_are({**SECTION, "mode": "online"}, tmp_path)
    assert online == f"python -m crl_exp sync {tmp_path}"


def test_doctor_says_whether_there_is_a_login(tmp_path):
    assert the(told(storage.wandb, subject("tracking=none", tmp_path=tmp_path)), "wandb") == (
        "skipped"
    )
    asked = ("tracking=wandb", "tracking.project=steer")
    offline, online = (
        subject(*asked, *more, tmp_path=tmp_path) for more in ((), ("tracking.mode=online",))
    )
    assert the(told(storage.wandb, offline), "wandb, steer, offline") == "ok"
    assert the(told(storage.wandb, online), "wandb login") == "warning"
    assert the(told(storage.mlflow, online), "runs go to wandb") == "skipped"


def test_a_state_is_in_the_record_of_what_was_sent(tmp_path):
    """A run that was retried since is sent anew."""
    run = finished_run(to_wandb(tmp_path), 0.1)
    before = signature(Record(run.path))
    run.set_status("failed", error="out of memory")
    assert signature(Record(run.path)) != before
    run.set_status("done")
    assert signature(Record(run.path)) == before


def test_a_server_that_is_away_harms_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "0.5")
    run = RunDirectory(to_wandb(tmp_path, mode="online"))
    online = TrackingConfig(**{**SECTION, "mode": "online"})
    with Tracker(run, online) as tracker, run.opened():
        tracker.start()
        wait_until(lambda: caplog.records)
        run.log(1, {"reward": 0.25})
    assert run.status()["state"] == "done"
    (said,) = [r.getMessage() for r in caplog.records]
    assert "(wandb, steer, online)" in said and f"crl_exp sync {run.path}" in said
    assert "signature" not in json.loads((run.path / "wandb.json").read_text())[0]
