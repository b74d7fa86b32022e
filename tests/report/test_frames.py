"""`read_sweep`: a sweep as tables, by hand-made runs whose figures are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

import crl_exp
from crl_exp.config.errors import UserError
from tests.helpers.synthetic import config, finished_run, run_of_items


@pytest.fixture
def sweep(tmp_path):
    """Two finished runs of 40 items."""
    before = np.array([0.0, 1.0] * 20)
    for method, after in (("crl", np.ones(40)), ("corrsteer_s", before[::-1].copy())):
        run_of_items(config(tmp_path, method), before, after)
    return tmp_path / "demo", before


def test_a_line_a_run(sweep):
    folder, _ = sweep
    tables = crl_exp.read_sweep(folder)
    runs = tables.runs.set_index("method")
    assert list(tables.runs.key) == sorted(tables.runs.key) and len(runs) == 2
    assert runs.loc["crl", "accuracy"] == 1.0 and runs.loc["crl", "baseline"] == 0.5
    assert runs.loc["crl", "delta"] == 0.5 and runs.loc["crl", "n"] == 40
    assert runs.loc["crl", "low"] <= 0.5 <= runs.loc["crl", "high"]
    assert runs.loc["corrsteer_s", "delta"] == 0.0
    assert runs.loc["corrsteer_s", "label"].startswith("CorrSteer-S")
    assert set(runs.state) == {"done"} and not runs.control.any()
    assert runs.n.dtype == "Int64" and isinstance(runs.layers.iloc[0], tuple)


def test_a_column_of_items_a_run(sweep):
    folder, before = sweep
    tables = crl_exp.read_sweep(str(folder))
    key = tables.runs.set_index("method").key
    assert tables.items.shape == (40, 2) == tables.unsteered.shape
    assert (tables.items[key["crl"]].to_numpy() == 1).all()
    assert tables.unsteered[key["crl"]].tolist() == before.tolist()
    paired = tables.items[key["crl"]] - tables.items[key["corrsteer_s"]]
    assert float(paired.to_numpy().mean()) == 0.5
    assert all(isinstance(item, str) for item in tables.items.index)


def test_layers_are_numbers_in_their_order(sweep):
    folder, _ = sweep
    (path,) = [
        p for p in folder.glob("*/result.json") if json.loads(p.read_text())["method"] == "crl"
    ]
    result = json.loads(path.read_text())
    result["by_layer"] = {"fit/l0": {str(n): {"value": n / 2, "n": 7} for n in (10, 2, -1)}}
    result["by_layer"]["fit/l0"]["10"]["value"] = None
    path.write_text(json.dumps(result))
    found = crl_exp.read_sweep(folder).by_layer
    assert found.layer.tolist() == [-1, 2, 10] and found.figure.unique() == ["fit/l0"]
    assert found.value.tolist()[:2] == [-0.5, 1.0] and np.isnan(found.value.iloc[2])
    assert found.key.unique() == [path.parent.name] and found.low.isna().all()


def test_unfinished_runs_have_a_line_and_other_items_leave_gaps(sweep):
    folder, before = sweep
    run_of_items(config(folder.parent, "none"), before[:10], before[:10])
    waiting = folder / "0123456789ab"
    waiting.mkdir()
    (waiting / "config.yaml").write_text(next(folder.glob("*/config.yaml")).read_text())
    tables = crl_exp.read_sweep(folder)
    runs = tables.runs.set_index("key")
    assert runs.loc["0123456789ab", "state"] == "unknown"
    assert np.isnan(runs.loc["0123456789ab", "accuracy"]) and len(runs) == 4
    short = runs.index[runs.method == "none"][0]
    assert int(tables.items[short].notna().to_numpy().sum()) == 10 and len(tables.items) == 40
    assert "0123456789ab" not in tables.items


def test_runs_of_one_key_in_several_sweeps_are_told_apart(tmp_path):
    before = np.array([0.0, 1.0])
    for name in ("a", "b"):
        made = config(tmp_path, "crl")
        made.sweep_name = name
        run_of_items(made, before, before)
    tables = crl_exp.read_sweep(tmp_path)
    assert [key.split("/")[0] for key in tables.runs.key] == ["a", "b"]
    assert list(tables.items) == list(tables.runs.key)


def test_a_name_is_looked_for_in_outputs(sweep, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "outputs").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "work")
    assert len(crl_exp.read_sweep("demo").runs) == 2
    with pytest.raises(UserError, match="did you mean 'demo'"):
        crl_exp.read_sweep("dmo")


def test_a_sweep_without_a_result(tmp_path):
    run = finished_run(config(tmp_path, "crl"), delta=0.1)
    (run.path / "result.json").unlink()
    tables = crl_exp.read_sweep(run.path)
    assert len(tables.runs) == 1 and tables.items.empty and tables.by_layer.empty
