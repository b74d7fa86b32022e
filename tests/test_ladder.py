"""A ladder of runs: each rung against the one before it, on the same items."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from omegaconf import OmegaConf

from crl_exp.comparison import compare_runs, holm
from crl_exp.errors import UserError
from crl_exp.ladder import changes, ladders
from crl_exp.records import find_records
from crl_exp.report import write_report
from crl_exp.report_parts import compare_parts
from crl_exp.run_keys import run_key
from crl_exp.runs import RunDirectory
from crl_exp.statistics import compare, crossed_difference
from crl_exp.table_ladder import SAME, ladder_tables
from tests.synthetic import config, run_of_items

DRAW = np.random.default_rng(3)
WAS = DRAW.integers(0, 2, 300).astype(float)
FIXED = np.where(DRAW.random(300) < 0.15, 1.0, WAS)
CRL = [np.where(DRAW.random(300) < 0.4, 1.0, WAS) for _ in range(3)]
UNIT = np.where(DRAW.random(300) < 0.02, 1.0, WAS)


@pytest.fixture
def sweep(tmp_path):
    """Four rungs, written in another order; and a run that stands on none."""
    for seed, now in enumerate(CRL):
        run_of_items(config(tmp_path, seed=seed, rung=2), WAS, now)
    run_of_items(config(tmp_path, "corrsteer_s", rung=1), WAS, FIXED)
    unit = {"fusion.weight": 0.0, "algorithm.n_updates": 14}
    run_of_items(config(tmp_path, more=unit, rung=3), WAS, UNIT)
    run_of_items(config(tmp_path, "random"), WAS, UNIT)
    run_of_items(config(tmp_path, "none", rung=0), WAS, WAS)
    return tmp_path


def test_each_step_is_paired_with_the_rung_before(sweep):
    (steps,) = ladders(compare_runs(find_records(sweep / "demo")))
    assert [step.rung for step in steps] == [0, 1, 2, 3]
    assert steps[0].difference is None and steps[0].changes == ()
    alone = compare(WAS, FIXED, WAS != FIXED)
    assert steps[1].difference is not None
    assert steps[1].difference.value == alone.delta
    assert steps[1].difference.interval == alone.delta_ci95
    crossed = crossed_difference(np.array(CRL), FIXED[None])
    assert steps[2].difference is not None and steps[3].difference is not None
    assert steps[2].difference.value == pytest.approx(np.mean(CRL) - FIXED.mean())
    assert steps[2].difference.interval == crossed.interval
    assert steps[2].difference.n_seeds == (3, 1) and steps[3].difference.n_seeds == (1, 3)
    assert steps[3].changes == ("fusion.weight=0.0", "algorithm.n_updates=14")
    p_values = [step.difference.p_value for step in steps[1:] if step.difference]
    assert [step.p_holm for step in steps[1:]] == holm(p_values)


def test_what_changes_is_named_once():
    before = {"method": "crl", "coefficient": "unit", "coefficient.value": 1.0, "policy.k": 1,
              "coefficient.multiplier": 1.0, "method.stage2": False}  # fmt: skip
    after = {"method": "crl", "coefficient": "relative", "coefficient.ratio": 0.5, "policy.k": 4,
             "coefficient.multiplier": 2.0, "method.stage2": True}  # fmt: skip
    assert changes(before, after) == (
        "coefficient=relative", "policy.k=4", "coefficient.multiplier=2.0", "method.stage2=true",
    )  # fmt: skip
    assert changes(before, before) == ()


def test_the_report_shows_it(sweep):
    parts = compare_parts(find_records(sweep / "demo"))
    (table,) = ladder_tables(parts.parts[0].sweep)
    assert [line[0] for line in table.lines] == ["0", "1", "2", "3"]
    written = write_report(parts, sweep / "report")
    assert {"ladder.csv", "ladder.png", "ladder.pdf"} <= {path.name for path in written}
    assert "Step by step, layer 18" in (sweep / "report" / "report.html").read_text("utf-8")
    with open(sweep / "report" / "ladder.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["rung"] for line in lines] == ["0", "1", "2", "3"] and lines[0]["step"] == ""
    assert float(lines[2]["step"]) == pytest.approx(np.mean(CRL) - FIXED.mean())


def test_a_step_that_changes_no_answer_says_so(tmp_path):
    run_of_items(config(tmp_path, "corrsteer_a", rung=0), WAS, FIXED)
    run_of_items(config(tmp_path, "corrsteer_s", rung=1), WAS, FIXED)
    (table,) = ladder_tables(compare_runs(find_records(tmp_path / "demo")))
    assert table.lines[1][6] == SAME


def test_a_rung_that_two_rows_claim_is_refused(tmp_path):
    for method in ("corrsteer_a", "corrsteer_s"):
        run_of_items(config(tmp_path, method, rung=1), WAS, FIXED)
    with pytest.raises(UserError, match="rung=1 is that of several rows"):
        ladders(compare_runs(find_records(tmp_path / "demo")))


def test_a_place_on_a_ladder_is_no_part_of_the_key_and_may_change(tmp_path):
    run = run_of_items(config(tmp_path, rung=3), WAS, FIXED)
    assert run_key(config(tmp_path)) == run.key
    RunDirectory(config(tmp_path, rung=5)).renumber()
    assert OmegaConf.load(run.path / "config.yaml").rung == 5
    assert RunDirectory(config(tmp_path, rung=5)).result() == run.result()
