"""The experiment's note and view in MLflow (a real SQLite file)."""

from __future__ import annotations

import json
import re

from mlflow.entities import Experiment

from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.overview import NOTE, VIEW
from tests.helpers.mlflow_reading import children, client, sync, with_database
from tests.helpers.synthetic import config, finished_run


def experiment(uri: str) -> Experiment:
    found = client(uri).get_experiment_by_name("crl_exp")
    assert found is not None
    return found


def test_the_note_links_a_view_whose_columns_are_there_in_points(tmp_path):
    folder = with_database(tmp_path)
    for seed, delta in ((0, 0.1), (1, 0.3), (2, -0.2)):
        sync(finished_run(config(folder, seed=seed), delta))
    uri = resolved_uri(None, folder)
    tags = experiment(uri).tags
    key = re.search(r"#/experiments/(\d+)/runs\?viewStateShareKey=(\w+)\)", tags[NOTE])
    assert key is not None and key[1] == experiment(uri).experiment_id
    state = json.loads(tags[VIEW + key[2]])
    runs = children(uri)
    for column in state["selectedColumns"]:
        kind, name = re.fullmatch(r"(\w+)\.`(.+)`", column).groups()  # type: ignore[union-attr]
        assert all(name in getattr(run.data, kind) for run in runs), column
    found = client(uri).search_runs(
        [experiment(uri).experiment_id], order_by=[f"{state['orderByKey']} DESC"], max_results=3
    )
    assert [round(run.data.metrics["points/delta"], 6) for run in found] == [30, 10, -20]
    first = found[0].data.metrics
    assert (first["points/delta_low"], first["points/delta_high"]) == (
        100 * first["eval/delta_low"], 100 * first["eval/delta_high"],
    )  # fmt: skip
    assert first["points/accuracy"] == 100 * first["eval/accuracy_steered"]


def test_a_persons_note_is_left_and_ours_is_renewed(tmp_path):
    folder = with_database(tmp_path)
    run = finished_run(config(folder), 0.1)
    sync(run)
    uri = resolved_uri(None, folder)
    ours, number = experiment(uri).tags[NOTE], experiment(uri).experiment_id
    client(uri).set_experiment_tag(number, NOTE, f"{ours}\nand mine")
    sync(run)
    assert experiment(uri).tags[NOTE] == f"{ours}\nand mine"
    client(uri).set_experiment_tag(number, NOTE, "")
    sync(run)
    assert experiment(uri).tags[NOTE] == ours
