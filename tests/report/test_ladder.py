"""A ladder of runs: each rung against the one before it, on the same items."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from omegaconf import OmegaConf

from crl_exp.analysis.statistics import compare, crossed_difference
from crl_exp.config.keys import run_key
from crl_exp.report.command import write_report
from crl_exp.report.comparison.ladder import changes, doubled, ladders
from crl_exp.report.comparison.rows import compare_runs, holm
from crl_exp.report.parts import compare_parts
from crl_exp.report.tables.ladder import SAME, ladder_tables
from crl_exp.report.tables.notes import notes
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, run_of_items
from tests.helpers.tiny_run import quickly_composed

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


def test_what_a_run_never_reads_is_no_change():
    """Features are free, and a network without hidden layers; a critic's are read by itself."""
    before = {"method": "crl", "method.features": "fixed", "method.multipliers": [1.0],
              "policy": "mlp", "policy.policy_depth": 1, "policy.critic_depth": 1,
              "policy.hidden": 64}  # fmt: skip
    free = {**before, "method.features": "free", "method.multipliers": [1.0, 2.0],
            "method.n_candidates": 4}  # fmt: skip
    assert changes(before, free) == ("method.features=free",)
    assert changes(free, before) == ("method.features=fixed", "method.multipliers=[1.0]")
    linear = {**before, "policy": "linear", "policy.policy_depth": 0, "policy.critic_depth": 0,
              "policy.hidden": 256, "policy.nonlinearity": "relu"}  # fmt: skip
    depths = "policy=linear", "policy.policy_depth=0", "policy.critic_depth=0"
    assert changes(before, linear) == depths
    assert "policy.hidden=256" in changes(before, linear | {"policy.critic_depth": 2})


def test_keys_that_are_never_read_are_called_so_in_whole_configs(tmp_path):
    common = ["method=crl", "policy=linear", f"output_dir={tmp_path}", "sweep_name=demo"]
    for rung, more in ((2, ["method.features=fixed", "method.multipliers=[1.0]"]), (3, [])):
        typed = [*common, *more, f"policy.hidden={rung}", f"rung={rung}"]
        run_of_items(quickly_composed(typed), WAS, FIXED)
    (steps,) = ladders(compare_runs(find_records(tmp_path / "demo")))
    assert steps[1].changes == ("method.features=free",)


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


def test_two_rows_with_one_rung_are_no_ladder_and_a_whole_report(tmp_path, quick_figures):
    run_of_items(config(tmp_path, "none", rung=0), WAS, WAS)
    for method in ("corrsteer_a", "corrsteer_s"):
        run_of_items(config(tmp_path, method, rung=1), WAS, FIXED)
    parts = compare_parts(find_records(tmp_path / "demo"))
    sweep = parts.parts[0].sweep
    said = doubled(sweep)
    assert "rung=1 is that of several rows (CorrSteer-S; CorrSteer-A)" in said
    assert ladders(sweep) == [] and ladder_tables(sweep) == [] and said in notes(sweep)
    names = {path.name for path in write_report(parts, tmp_path / "report")}
    assert {"report.html", "table.csv"} <= names and "ladder.csv" not in names
    page = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert "No ladder: rung=1" in page and "CorrSteer-A" in page


def test_a_ladder_of_which_no_rung_is_double_says_nothing(sweep):
    assert doubled(compare_runs(find_records(sweep / "demo"))) == ""


def test_a_place_on_a_ladder_is_no_part_of_the_key_and_may_change(tmp_path):
    run = run_of_items(config(tmp_path, rung=3), WAS, FIXED)
    assert run_key(config(tmp_path)) == run.key
    RunDirectory(config(tmp_path, rung=5)).renumber()
    assert OmegaConf.load(run.path / "config.yaml").rung == 5
    assert RunDirectory(config(tmp_path, rung=5)).result() == run.result()
