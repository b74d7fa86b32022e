"""Series over layers in MLflow: every point once, whatever the order. A real SQLite file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from crl_exp.runs.directory import write_json
from crl_exp.runs.result import read_series
from crl_exp.tracking.sending import requests as tracking_requests
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.content import by_layer_points
from tests.helpers.mlflow_reading import children, client, history, sync, with_database
from tests.helpers.synthetic import config, finished_run

NAMES = [f"probe/{site}/{figure}" for site in ("pre", "mid", "post") for figure in range(9)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return with_database(tmp_path)


def series(layers: list[int]) -> dict[str, dict[str, Any]]:
    return {
        name: {str(layer): {"value": layer / 100, "low": None, "high": None, "n": 8}
               for layer in layers}
        for name in NAMES
    }  # fmt: skip


def everything(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read once a name, by steps."""
    uri = resolved_uri(None, folder)
    (child,) = children(uri)
    return {name: sorted(history(uri, child.info.run_id, f"by_layer/{name}")) for name in NAMES}


def test_a_result_of_more_points_than_a_request_holds(folder):
    """It was synced before it had any of them: 48 layers of 27 figures and the embedding."""
    run = finished_run(config(folder), 0.1)
    sync(run)
    layers = [*range(48), -1]
    random.Random(0).shuffle(layers)
    plain = json.loads(run.result_path.read_text())
    write_json(run.result_path, {**plain, "by_layer": series(layers)})
    for _ in range(2):
        sync(run)
    wanted = [(layer, layer / 100) for layer in sorted(layers)]
    assert len(wanted) * len(NAMES) > tracking_requests.POINTS_A_REQUEST
    assert everything(folder) == dict.fromkeys(NAMES, wanted)


def test_layers_that_end_in_any_order_are_sent_as_they_come(folder, monkeypatch):
    """Also where what was sent last wasn't noted."""
    run = finished_run(config(folder), 0.1)
    run.result_path.rename(folder / "later.json")
    run.set_status("running")
    for layer in (30, 5, -1):
        run.log(layer, {f"by_layer/{name}": layer / 100 for name in NAMES})
        sync(run)
    noted = json.loads((run.path / "mlflow.json").read_text())
    for record in noted:
        record.pop("steps")
    write_json(run.path / "mlflow.json", noted)
    run.log(7, {f"by_layer/{name}": 0.07 for name in NAMES})
    for _ in range(2):
        sync(run)
    run.log(8, {"by_layer/other": 1.0, "reward": 0.5})
    sync(run)
    wanted = [(-1, -0.01), (5, 0.05), (7, 0.07), (30, 0.3)]
    assert everything(folder) == dict.fromkeys(NAMES, wanted)
    (child,) = children(resolved_uri(None, folder))
    assert history(resolved_uri(None, folder), child.info.run_id, "reward") == [(8, 0.5)]
    assert (
        client(resolved_uri(None, folder)).get_run(child.info.run_id).data.metrics["reward"] == 0.5
    )


def test_layers_are_in_the_order_of_numbers_and_undefined_ones_left_out():
    given = {"a": {"10": 1.0, "2": {"value": 0.5}, "-1": {"value": None}, "3": float("inf")}}
    all_series = list(read_series({"by_layer": given}))
    found = [(p.name, p.step, p.value) for p in by_layer_points(all_series, 0)]
    assert found == [("by_layer/a", 2, 0.5), ("by_layer/a", 10, 1.0)]
