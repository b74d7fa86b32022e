"""In how many requests a run goes to MLflow, and that it is the same there in one or in many."""

from __future__ import annotations

import json

import pytest
from mlflow import MlflowClient

from crl_exp.config.errors import UserError
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import Record
from crl_exp.tracking.sending.content import Point
from crl_exp.tracking.sending.requests import batches
from crl_exp.tracking.sending.sent import Reading
from crl_exp.tracking.sending.target import MlflowTarget
from tests.helpers.mlflow_reading import children, client, history, with_database
from tests.helpers.synthetic import config, figures, finish, result

N = 25


@pytest.fixture
def places(tmp_path) -> list[MlflowTarget]:
    """Two MLflows with tables."""
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with_database(tmp_path / name)
        uri = f"sqlite:///{tmp_path / name / 'mlflow.db'}"
        found.append(MlflowTarget(uri, "crl_exp", tmp_path / "outputs"))
    return found


def journal(run: RunDirectory, steps: range) -> None:
    for step in steps:
        run.log(step, {"reward": step / N, f"by_layer/loss_{step % 2}": 0.5 + step})


def done(run: RunDirectory) -> None:
    write_json(run.path / "data.json", {"digest": "00112233", "n": {"test": 1500}})
    finish(run, json.loads(json.dumps(result(run, figures(0.1), figures(0.1, n=500)))))


def held(place: MlflowTarget) -> dict[str, object]:
    """What MLflow holds of the only run, without ids of its own."""
    (run,) = children(place.resolved)
    tags = {k: v for k, v in run.data.tags.items() if k not in ("crl_exp.upload_id", PARENT)}
    names = sorted(run.data.metrics)
    assert run.inputs is not None
    return {
        "tags": tags, "params": run.data.params, "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "points": {name: history(place.resolved, run.info.run_id, name) for name in names},
        "files": sorted(a.path for a in client(place.resolved).list_artifacts(run.info.run_id)),
        "data": [(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs],
    }  # fmt: skip


PARENT = "mlflow.parentRunId"


def test_a_run_sent_as_it_goes_and_one_sent_at_its_end_are_the_same(places, tmp_path):
    run = RunDirectory(config(tmp_path / "outputs"))
    as_it_goes, reading = places[0].uploader(None), Reading()
    with run.opened():
        for part in (range(1, 10), range(10, 20), range(20, N + 1)):
            journal(run, part)
            as_it_goes.send(Record(run.path), reading)
        done(run)
    as_it_goes.send(Record(run.path), reading)
    places[1].uploader(None).send(Record(run.path))
    one, other = map(held, places)
    assert one == other
    assert len(one["points"]["reward"]) == N and one["params"] and one["data"]  # type: ignore


def test_tags_params_and_all_points_of_a_finished_run_are_one_request(
    places, monkeypatch, tmp_path
):
    run = RunDirectory(config(tmp_path / "outputs"))
    with run.opened():
        journal(run, range(1, N + 1))
        done(run)
    asked, plain = [], MlflowClient.log_batch
    monkeypatch.setattr(
        MlflowClient, "log_batch", lambda *a, **k: (asked.append(k), plain(*a, **k))[1]
    )
    uploader = places[0].uploader(None)
    uploader.send(Record(run.path))
    (batch,) = asked
    assert batch["params"] and len(batch["metrics"]) > 2 * N
    assert not batch["tags"], "it was made with them"
    uploader.send(Record(run.path))
    assert len(asked) == 1


def test_what_a_request_failed_to_bring_comes_with_the_next_and_once(places, monkeypatch, tmp_path):
    """Also what was taken in spite of the failure: the reply was lost."""
    run, plain = RunDirectory(config(tmp_path / "outputs")), MlflowClient.log_batch
    uploader, reading = places[0].uploader(None), Reading()

    def lost(self, run_id, metrics=(), **more):
        plain(self, run_id, metrics=metrics[: len(metrics) // 2], **more)
        raise ConnectionError("lost")

    with run.opened():
        journal(run, range(1, 10))
        uploader.send(Record(run.path), reading)
        journal(run, range(10, N + 1))
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_batch", lost)
            with pytest.raises(ConnectionError):
                uploader.send(Record(run.path), reading)
        uploader.runs.forget()
        uploader.send(Record(run.path), reading)
        done(run)
    uploader.send(Record(run.path), reading)
    places[1].uploader(None).send(Record(run.path))
    one, other = map(held, places)
    assert one == other


def test_what_came_before_a_damaged_line_is_sent(places, tmp_path):
    run = RunDirectory(config(tmp_path / "outputs"))
    with run.opened():
        journal(run, range(1, 6))
        write_json(run.path / "data.json", {"digest": "00112233", "n": {"test": 1500}})
    with (run.path / "system.jsonl").open("w") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"system\.jsonl is damaged"):
        places[0].uploader(None).send(Record(run.path))
    found = held(places[0])
    assert len(found["points"]["reward"]) == 5 and found["params"]  # type: ignore


@pytest.mark.parametrize(("n_tags", "n_params", "n_points"), [
    (0, 0, 0), (3, 5, 7), (0, 0, 2500), (250, 120, 1900), (100, 100, 800), (100, 100, 801),
])  # fmt: skip
def test_batches_hold_everything_once_and_what_mlflow_takes(n_tags, n_params, n_points):
    tags = {f"tag{i}": "x" for i in range(n_tags)}
    params = {f"param{i}": "x" for i in range(n_params)}
    points = [Point("p", i, i, 0) for i in range(n_points)]
    made = batches(tags, params, points)
    assert dict(pair for one in made for pair in one.tags) == tags
    assert dict(pair for one in made for pair in one.params) == params
    assert [point for one in made for point in one.points] == points
    for one in made:
        assert len(one.tags) <= 100 and len(one.params) <= 100
        assert 0 < len(one.tags) + len(one.params) + len(one.points) <= 1000
    least = max(-(-n_tags // 100), -(-n_params // 100), -(-n_points // 1000))
    assert least <= len(made) <= least + 2


def test_long_texts_leave_room_for_no_points():
    long = {str(i): "x" * 4900 for i in range(99)}
    made = batches(long, dict.fromkeys("abcd", "y" * 6000), [Point("p", 1.0, 1, 0)])
    assert [len(one.points) for one in made] == [0, 1]
