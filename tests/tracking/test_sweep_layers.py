"""The sweep's run in MLflow has one series a method over the layers that its runs steer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crl_exp.analysis.statistics import crossed
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.runs.records import find_records
from crl_exp.tracking.sending.client import resolved_uri
from crl_exp.tracking.sending.sweep_layers import sweep_points
from tests.helpers import mlflow_reading
from tests.helpers.synthetic import config, run_of_items

N = 40


def steered(tmp_path, layer: int, seed: int = 0, method: str = "crl", fixed: int = 0, **more):
    """The unsteered model gets 20 of 40 right; `fixed` more are."""
    made = config(tmp_path, method, (layer,), seed=seed, more=more or None)
    return run_of_items(made, np.arange(N) < 20, np.arange(N) < 20 + fixed)


def series(tmp_path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for point in sweep_points(find_records(tmp_path / "demo")):
        found.setdefault(point.name, {})[point.step] = point.value
    return found


def test_a_series_a_method_with_means_over_seeds(tmp_path):
    for layer, rises in {18: (4, 8), 8: (0, 2)}.items():
        for seed, fixed in enumerate(rises):
            steered(tmp_path, layer, seed, fixed=fixed)
        steered(tmp_path, layer, method="corrsteer_s", fixed=1)
    found = series(tmp_path)
    assert found["by_layer/crl/delta"] == {8: 0.025, 18: pytest.approx(0.15)}
    assert found["by_layer/crl/accuracy"] == {8: 0.525, 18: pytest.approx(0.65)}
    assert found["by_layer/corrsteer_s/delta"] == {8: 0.025, 18: 0.025}
    rise_SI = np.stack(
        [(np.arange(N) < 20 + f).astype(float) - (np.arange(N) < 20) for f in (4, 8)]
    )
    low, high = crossed(rise_SI).interval
    assert found["by_layer/crl/delta/low"][18] == pytest.approx(low)
    assert found["by_layer/crl/delta/high"][18] == pytest.approx(high)


def test_intervals_are_those_of_a_report(tmp_path):
    """Also where all seeds got everything right, whose variance is none."""
    for layer, fixed in {8: 2, 18: 20}.items():
        for seed in (0, 1):
            steered(tmp_path, layer, seed, fixed=fixed)
    rows = compare_runs(find_records(tmp_path / "demo")).rows
    found = series(tmp_path)
    for row in rows:
        for metric, ends in (("delta", row.interval()), ("accuracy", row.accuracy_interval())):
            told = [found[f"by_layer/crl/{metric}/{end}"][row.layers[0]] for end in ("low", "high")]
            assert told == pytest.approx(list(ends))
    assert found["by_layer/crl/accuracy/low"][18] < 1 == found["by_layer/crl/accuracy/high"][18]


def test_options_that_set_runs_of_a_method_apart_are_in_the_name(tmp_path):
    options: list[dict[str, Any]] = [{}, {"fusion.weight": 3.0}, {"task.shuffle_labels": True}]
    for layer in (8, 18):
        for more in options:
            steered(tmp_path, layer, **more)
    names = {name for name in series(tmp_path) if name.endswith("/delta")}
    assert names == {
        "by_layer/crl fusion.weight:1.0/delta", "by_layer/crl fusion.weight:3.0/delta",
        "by_layer/crl shuffled labels/delta",
    }  # fmt: skip


def test_a_layer_waits_for_all_its_seeds_and_a_method_for_a_second_layer(tmp_path):
    steered(tmp_path, 8)
    assert series(tmp_path) == {}, "one layer is no series"
    steered(tmp_path, 18, fixed=4)
    unfinished = steered(tmp_path, 18, seed=1, fixed=8)
    kept = unfinished.result_path.read_bytes()
    unfinished.result_path.unlink()
    assert set(series(tmp_path)["by_layer/crl/delta"]) == {8}
    unfinished.result_path.write_bytes(kept)
    assert set(series(tmp_path)["by_layer/crl/delta"]) == {8, 18}


def test_a_run_without_its_items_or_with_a_damaged_result_leaves_the_others(tmp_path):
    for layer in (8, 12, 18):
        run = steered(tmp_path, layer)
    (run.path / "items.parquet").unlink()
    damaged = steered(tmp_path, 22)
    damaged.result_path.write_text("{")
    assert set(series(tmp_path)["by_layer/crl/delta"]) == {8, 12}


def test_a_run_that_chose_its_layer_is_no_point(tmp_path):
    for layer in (8, 18):
        steered(tmp_path, layer, fixed=2)
        chosen = steered(tmp_path, layer, seed=layer, fixed=8)
        text = (chosen.path / "config.yaml").read_text()
        (chosen.path / "config.yaml").write_text(
            text.replace("layers.Single", "layers.BestOnValidation")
        )
    assert series(tmp_path)["by_layer/crl/delta"] == {8: 0.05, 18: 0.05}


WORDINGS: dict[str, dict[str, Any]] = {
    name: {
        "task.wording": name,
        "task.question": f"{name}? In one word, with = and %.\n\n{{text}} " * 9,
    }
    for name in ("plain", "a/b")
}


def test_a_name_is_of_what_is_short_where_a_text_differs_too(tmp_path):
    for layer in (8, 18):
        for more in WORDINGS.values():
            steered(tmp_path, layer, **more)
    names = {name for name in series(tmp_path) if name.endswith("/delta")}
    assert names == {
        "by_layer/crl task.wording:plain/delta", "by_layer/crl task.wording:a_b/delta"
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [[{"fusion.weight": w} for w in (1.0, 3.0)], [*WORDINGS.values()]]
)
def test_mlflow_takes_names_with_options(tmp_path, options):
    """It refuses the equals sign and all that follows in the request, so the whole run."""
    mlflow_reading.with_database(tmp_path)
    uri = resolved_uri(None, tmp_path)
    for layer in (8, 18):
        for more in options:
            mlflow_reading.sync(steered(tmp_path, layer, fixed=layer // 2, **more))
    (parent,) = [r for r in mlflow_reading.runs(uri) if "mlflow.parentRunId" not in r.data.tags]
    names = sorted(name for name in parent.data.metrics if name.endswith("/delta"))
    assert len(names) == 2 and all(
        len(mlflow_reading.history(uri, parent.info.run_id, name)) == 2 for name in names
    )


def test_mlflow_has_them_in_the_sweeps_run_once(tmp_path):
    mlflow_reading.with_database(tmp_path)
    uri = resolved_uri(None, tmp_path)
    for layer in (18, 8):
        mlflow_reading.sync(steered(tmp_path, layer, fixed=layer // 2))
    for _ in range(2):
        steered_again = steered(tmp_path, 12, fixed=2)
        mlflow_reading.sync(steered_again)
        assert steered_again.path.exists()
    (parent,) = [r for r in mlflow_reading.runs(uri) if "mlflow.parentRunId" not in r.data.tags]
    told = sorted(mlflow_reading.history(uri, parent.info.run_id, "by_layer/crl/delta"))
    assert told == [(8, 0.1), (12, 0.05), (18, pytest.approx(0.225))]
