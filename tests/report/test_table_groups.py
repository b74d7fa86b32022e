"""Differences by group of items: in items.parquet, in the report's tables and in groups.csv."""

from __future__ import annotations

import csv
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy.stats import binomtest

from crl_exp.analysis.statistics import crossed
from crl_exp.report.command import main
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.tables.groups import GROUPS_SHOWN, LINES_SHOWN, group_effects, group_tables
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, run_of_items

GROUPS = ["law"] * 20 + ["m[red]aths"] * 16 + ["art"] * 4
BASELINE = np.array([0.0] * 20 + [1.0, 0.0] * 8 + [0.0] * 4)


def steered(n_law: int, n_maths: int) -> np.ndarray:
    """That many of the group's items come right in law, go wrong in maths."""
    now = BASELINE.copy()
    now[:n_law] = 1.0
    now[20 : 20 + 2 * n_maths : 2] = 0.0
    return now


def rows(folder):
    return compare_runs(find_records(folder / "demo"))


def test_one_seed_by_hand(tmp_path):
    run_of_items(config(tmp_path), BASELINE, steered(9, 3), groups=GROUPS)
    law, maths = group_effects(rows(tmp_path).rows[0])
    assert (law.group, law.n, law.baseline, law.steered, law.delta) == ("law", 20, 0, 0.45, 0.45)
    assert (maths.n, maths.baseline, maths.steered) == (16, 0.5, 5 / 16)
    # McNemar: all 9 of 9, all 3 of 3; Holm: the smaller twice, the larger once.
    assert law.found.p_value == pytest.approx(binomtest(9, 9).pvalue)
    assert law.p_holm == pytest.approx(2 * 2 / 2**9) and maths.p_holm == pytest.approx(2 / 2**3)
    # Bootstrap of a share of .45 of 20, near its normal interval.
    assert law.found.interval == pytest.approx((0.45 - 0.218, 0.45 + 0.218), abs=0.04)


def test_seeds_are_in_the_intervals(tmp_path):
    both = [steered(9, 3), steered(4, 8)]
    # The items of the second seed in another order.
    order = np.array(random.Random(0).sample(range(40), 40))
    ids = np.array([f"i{k}" for k in range(40)])
    for seed, now in enumerate(both):
        at = order if seed else np.arange(40)
        run_of_items(
            config(tmp_path, seed=seed), BASELINE[at], now[at], ids=ids[at].tolist(),
            groups=[GROUPS[i] for i in at],
        )  # fmt: skip
    law, _ = group_effects(rows(tmp_path).rows[0])
    expected = crossed(np.stack([now[:20] - BASELINE[:20] for now in both]))
    assert law.found.interval == pytest.approx(expected.interval)
    assert law.found.p_value == pytest.approx(expected.p_value)
    assert law.delta == pytest.approx((9 + 4) / 40)


@pytest.mark.usefixtures("quick_reports")
def test_the_report_has_them(tmp_path, capsys):
    """Table, page, LaTeX and CSV; a group's name is text, whatever it looks like."""
    for method in ("none", "corrsteer_s", "crl"):
        now = BASELINE if method == "none" else steered(9, 3)
        run_of_items(config(tmp_path, method), BASELINE, now, groups=GROUPS)
    assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "m[red]aths 16 50.0 → 31.2 -18.8 [" in said
    folder = tmp_path / "demo" / "report"
    text = (folder / "table.md").read_text()
    assert "## Where the difference comes from: groups of sentiment" in text
    assert "| CRL @ 18 | law | 20 | 0.0 → 45.0 | +45.0 [" in text
    assert "corrected for the 2 groups of a row" in text
    assert "Left out, with fewer than 5 items: art (4)." in text
    assert "unsteered @" not in text, "it differs from itself nowhere"
    for name in ("report.html", "table.tex"):
        assert "m[red]aths" in (folder / name).read_text()
    lines = list(csv.DictReader((folder / "groups.csv").open()))
    wanted = [(m, g) for m in ("CorrSteer-S", "CRL") for g in ("law", "m[red]aths")]
    assert [(line["method"], line["group"]) for line in lines] == wanted
    assert {line["p_holm_of"] for line in lines} == {"2"}


def test_many_groups_and_rows_are_cut_and_said_to_be(tmp_path):
    groups = [f"g{i // 6:02d}" for i in range(6 * 57)]
    draw = np.random.default_rng(0)
    for layer in range(12):
        was, now = draw.integers(0, 2, (2, len(groups))).astype(float)
        run_of_items(
            config(tmp_path, layers=(layer,)), was, now, validation=layer / 100, groups=groups
        )
    sweep = rows(tmp_path)
    (table,) = group_tables(sweep)
    every = [group_effects(row) for row in sweep.rows]
    assert 12 * GROUPS_SHOWN > LINES_SHOWN, "else nothing is cut"
    assert len(table.lines) == GROUPS_SHOWN and table.lines[0][0] == "CRL @ 11"
    best = sorted(effect.found.p_value for effect in every[-1])[:GROUPS_SHOWN]
    shown = {line[1] for line in table.lines}
    kept = sorted(e.found.p_value for e in every[-1] if e.group in shown)
    assert kept == best and all(len(effects) == 57 for effects in every)
    notes = " ".join(table.notes)
    assert "groups.csv has all 57" in notes and "groups.csv has all rows" in notes


def test_items_of_one_group_and_runs_without_groups_have_no_table(tmp_path):
    run_of_items(config(tmp_path), BASELINE, steered(9, 3), groups=["law"] * 40)
    assert group_tables(rows(tmp_path)) == []
    run = run_of_items(config(tmp_path, "corrsteer_s"), BASELINE, steered(9, 3), groups=GROUPS)
    run_of_items(config(tmp_path, "corrsteer_a"), BASELINE, steered(9, 3), groups=GROUPS)
    before_groups(run)
    sweep = rows(tmp_path)
    (table,) = group_tables(sweep)
    assert {line[0] for line in table.lines} == {"CorrSteer-A @ 18"}
    assert any("1 of the rows aren't here" in note for note in table.notes)
    tables.print_report(sweep, Console(width=80, file=(tmp_path / "out").open("w")))


def before_groups(run: RunDirectory) -> None:
    """Its items.parquet as earlier versions wrote it."""
    path = Record(run.path).path / "items.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["group"]), path)
