"""A real server: killed, restarted, slow; and many processes at once, on it and on one file."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from crl_exp.runs.records import find_records
from crl_exp.tracking.sync import main
from tests.helpers import forking
from tests.helpers.mlflow_reading import children, client, history, runs, sync, with_database
from tests.helpers.mlflow_server import Server, SlowProxy
from tests.helpers.mlflow_workers import STEPS
from tests.helpers.synthetic import config, finished_run

pytestmark = pytest.mark.slow
MANY = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


def start(what: str, folder: Path, uri: str, n: int) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [forking.python(), "-m", "tests.helpers.mlflow_workers", what, str(folder), uri, str(n)],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=root, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def of_sweep(uri: str, sweep: str):
    return [run for run in children(uri) if run.data.tags["sweep"] == sweep]


def wait_until(found, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.2)


def test_over_http(tmp_path, server):
    made = config(tmp_path, sweep_name="one")
    made.tracking.uri = server.uri
    run = finished_run(made, 0.1, steps=1100)
    for _ in range(2):
        sync(run)
    (child,) = of_sweep(server.uri, "one")
    assert child.info.status == "FINISHED"
    assert len(history(server.uri, child.info.run_id, "reward")) == 1100
    assert len(history(server.uri, child.info.run_id, "eval/delta")) == 1
    path = client(server.uri).download_artifacts(child.info.run_id, "result.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == run.result()
    assert not (tmp_path / "mlflow.db").exists() and not (tmp_path / "mlartifacts").exists()


@pytest.mark.parametrize("where", ["server", "file", "new file"])
def test_many_processes_at_once(tmp_path, where, request):
    """Each sends a run of its own at the same moment: one parent, every run and point once."""
    uri = request.getfixturevalue("server").uri if where == "server" else "-"
    if where == "file":
        with_database(tmp_path)
    workers = start("send", tmp_path, uri, MANY)
    told = workers.communicate()[1]
    assert workers.returncode == 0, told
    reached = f"sqlite:///{tmp_path / 'mlflow.db'}" if uri == "-" else uri
    made = of_sweep(reached, "send")
    assert len(made) == MANY and len({run.data.tags["run_key"] for run in made}) == MANY
    assert len({run.data.tags["mlflow.parentRunId"] for run in made}) == 1
    (parent,) = runs(reached, "tags.`crl_exp.sweep` = 'send'")
    assert parent.info.status == "FINISHED"
    for run in made:
        rewards = history(reached, run.info.run_id, "reward")
        assert rewards == [(s, 0.5 + 0.3 * s / STEPS) for s in range(1, STEPS + 1)]
        assert run.info.status == "FINISHED" and run.data.metrics["eval/n"] == 1500


def test_a_server_killed_slow_and_restarted_in_a_sweep(tmp_path, server):
    """Three runs go on; the server is slow, killed and started again. Every point arrives once."""
    proxy = SlowProxy(server.port, delay=0.3)
    workers = start("track", tmp_path, proxy.uri, 3)
    try:
        wait_until(lambda: sum("reward" in r.data.metrics for r in children(server.uri)
                               if r.data.tags["sweep"] == "track") == 3)  # fmt: skip
        server.kill()
        before = journal_lines(tmp_path)
        wait_until(lambda: journal_lines(tmp_path) > before + 3 * 50)  # they don't stand still
        server.start()
        behind = max(r.data.metrics["reward"] for r in of_sweep(server.uri, "track"))
        wait_until(lambda: all(r.data.metrics["reward"] > behind + 0.05
                               for r in of_sweep(server.uri, "track")))  # fmt: skip
        (tmp_path / "stop").touch()
        told = workers.communicate(timeout=120)[1]
    finally:
        workers.kill()
    assert workers.returncode == 0, told
    assert told.count("did not take") == 3, told
    assert main([str(tmp_path / "track")]) == 0
    proxy.close()
    made = {r.data.tags["run_key"]: r for r in of_sweep(server.uri, "track")}
    records = find_records(tmp_path / "track")
    assert made.keys() == {record.key for record in records}
    for record in records:
        run = made[record.key]
        assert run.info.status == "FINISHED"
        for name in ("reward", "layer_18/policy_loss"):
            wanted = [(line["step"], line["metrics"][name]) for line in record.journal]
            assert history(server.uri, run.info.run_id, name) == wanted
        load = history(server.uri, run.info.run_id, "system/process_memory_usage_megabytes")
        assert [step for step, _ in load] == list(range(len(load))) and len(load) >= 3


def journal_lines(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("track/*/journal.jsonl"))
