"""Copied sweeps are sweeps: their keys are those of their configs, and a report reads them."""

from __future__ import annotations

import numpy as np

from crl_exp.config.keys import frozen_config
from crl_exp.launcher.bench import scale
from crl_exp.launcher.bench.finished_runs import make_sweep
from crl_exp.report.parts import compare_parts
from crl_exp.runs.items import item_rewards
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, run_of_items


def test_copies_are_runs_of_one_sweep_with_the_same_items(tmp_path):
    made = config(tmp_path, more={"algorithm.lr_policy": 0.01})
    template = run_of_items(made, np.zeros(4), np.ones(4))
    paths = make_sweep([template.path], tmp_path / "many", 101, n_items=40)
    assert len({path.name for path in paths}) == 101
    for path in (paths[0], paths[100]):
        assert frozen_config(path).sweep_name == "many"  # which refuses another key
    records = find_records(tmp_path / "many")
    assert len({item_rewards(record).ids for record in records}) == 1
    (part,) = compare_parts(records).parts
    assert len(part.sweep.rows) == 21  # twenty layers of five seeds, and one of another rate
    assert {row.estimates().n for row in part.sweep.rows} == {40}


def test_linked_copies_are_runs_whose_keys_are_those_of_their_configs(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "DISTINCT", 3)
    made = config(tmp_path, more={"algorithm.lr_policy": 0.01})
    template = run_of_items(made, np.zeros(4), np.ones(4))
    paths = scale.linked_sweep(template.path, tmp_path / "many", 8, n_items=10)
    assert len({path.name for path in paths}) == 8
    for path in paths:
        assert frozen_config(path).sweep_name == "many"
        assert Record(path).result["run_key"] == path.name  # type: ignore[index]
    rates = [frozen_config(path).algorithm.lr_policy for path in paths]
    assert rates == [0.01] * 3 + [0.02] * 3 + [0.03] * 2
    first, later = (path / "items.parquet" for path in (paths[1], paths[4]))
    assert first.samefile(later) and not first.samefile(paths[0] / "items.parquet")
