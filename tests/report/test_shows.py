"""What a finished sweep can show: a row worked by hand, and one of three seeds."""

from __future__ import annotations

import numpy as np

from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.tables.pairs import SHOWS_COLUMNS, pair_tables
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, run_of_items

N = 400


def shown(tmp_path) -> dict[str, str]:
    sweep = compare_runs(find_records(tmp_path / "demo"))
    (table,) = [table for table in pair_tables(sweep) if table.slug == "shows"]
    assert table.title == "What this sweep can show"
    (line,) = [line for line in table.lines if line[0] == "CRL"]
    return dict(zip(SHOWS_COLUMNS, line, strict=True))


def test_one_seed_by_hand(tmp_path):
    """Ten fixed and ten broken of 400: σ² = .05, (1.96 + .84)·√(.05/400) = .0313, and 2 points need
    (2.80/.02)²·.05 = 981 items and a bit."""
    was = np.arange(N) < 200
    now = was.copy()
    now[:10], now[200:210] = False, True
    run_of_items(config(tmp_path), was, now)
    line = shown(tmp_path)
    assert line["items changed %"] == "5.0" and line["n"] == "400"
    assert line["finds, points"] == "3.1"
    assert line["2 points: items"] == "982"
    assert line["seeds deviate by, points"] == line["2 points: seeds"] == "–", "of one run alone"


def test_seeds_that_differ_are_counted_in(tmp_path):
    """Three seeds that gain 0, 4 and 8 points on other items each: 4 points apart, and 2 points are
    found by no number of items with three of them."""
    was = np.zeros(N)
    for seed, fixed in enumerate((0, 16, 32)):
        now = was.copy()
        now[100 * seed : 100 * seed + fixed] = 1
        run_of_items(config(tmp_path, seed=seed), was, now)
    line = shown(tmp_path)
    assert line["seeds"] == "3" and line["items changed %"] == "4.0"
    assert 3.5 < float(line["seeds deviate by, points"]) < 4.0, "4.0 less what items explain"
    assert float(line["finds, points"]) > 10
    assert line["2 points: items"] == "–"
    assert "×" in line["2 points: items × seeds"]
