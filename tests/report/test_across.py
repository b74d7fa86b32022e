"""`report A B`: several sweeps, their rows paired item by item."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from crl_exp.__main__ import main
from crl_exp.analysis.statistics import compare, crossed_difference
from crl_exp.config.errors import UserError
from crl_exp.config.paths import check_sweep
from crl_exp.report.across import figure
from crl_exp.report.across.compared import MOST, compare_sweeps
from crl_exp.report.across.tables import tables_of
from crl_exp.report.across.write import folder_name, print_comparison
from crl_exp.report.comparison.rows import holm
from crl_exp.report.tables.cells import points, share
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.result import Figure, Result
from tests.helpers.synthetic import config, finished_run, run_of_items

pytestmark = pytest.mark.usefixtures("quick_figures")

DRAW = np.random.default_rng(0)
WAS = DRAW.integers(0, 2, 300).astype(float)
SEEDS = [[np.where(DRAW.random(300) < share, 1.0, WAS) for _ in range(3)] for share in (0.2, 0.4)]
ONE = [np.where(DRAW.random(300) < share, 1.0, WAS) for share in (0.1, 0.15)]
UPDATES = "algorithm.n_updates"


def made(folder: Path, sweep: str, method: str = "crl", layer: int = 18, seed: int = 0, **more):
    keys = {key.replace("__", "."): value for key, value in more.items()}
    return config(folder, method, (layer,), keys, sweep_name=sweep, seed=seed)


@pytest.fixture
def two(tmp_path) -> Path:
    """`few` and `many` updates: CRL at 18 with three seeds and CorrSteer-S with one; CRL at 8 in
    `few` alone."""
    for number, (sweep, updates) in enumerate((("few", 20), ("many", 80))):
        more: dict[str, Any] = {"algorithm__n_updates": updates}
        for seed in range(3):
            run_of_items(made(tmp_path, sweep, seed=seed, **more), WAS, SEEDS[number][seed])
        run_of_items(made(tmp_path, sweep, "corrsteer_s", **more), WAS, ONE[number])
    run_of_items(made(tmp_path, "few", layer=8, algorithm__n_updates=20), WAS, SEEDS[0][0])
    return tmp_path


def lines_of(folder: Path, name: str = "few+many") -> list[dict[str, str]]:
    text = (folder / "comparisons" / name / "table.csv").read_text()
    return list(csv.DictReader(io.StringIO(text)))


def refused(capsys, folder: Path, *names: str) -> str:
    assert main(["report", *names, "--output-dir", str(folder)]) == 1
    said = capsys.readouterr()
    assert not (folder / "comparisons").exists(), "nothing is written"
    return said.err


def test_rows_are_paired_over_items_and_the_seeds_of_both(two, capsys):
    assert main(["report", "few", "many", "--output-dir", str(two)]) == 0
    lines = {(line["sweep"], line["method"], line["layers"]): line for line in lines_of(two)}
    assert len(lines) == 5
    crl = lines["many", "CRL", "18"]
    expected = crossed_difference(np.stack(SEEDS[1]), np.stack(SEEDS[0]))
    assert float(crl["difference"]) == pytest.approx(expected.mean)
    ends = [float(crl[f"difference_{end}"]) for end in ("low", "high")]
    assert ends == pytest.approx(list(expected.interval))
    assert (crl["seeds"], crl["against"], crl["against_seeds"]) == ("0 1 2", "few", "0 1 2")
    single, right = lines["many", "CorrSteer-S", "18"], compare(ONE[0], ONE[1], ONE[0] != ONE[1])
    assert float(single["p_value"]) == pytest.approx(right.p_value)
    assert single["test"] == "McNemar"
    both = holm([float(crl["p_value"]), right.p_value])
    assert [float(crl["p_holm"]), float(single["p_holm"])] == pytest.approx(both)
    assert crl["p_holm_of"] == "2"
    alone = lines["few", "CRL", "8"]
    assert alone["difference"] == "" and alone["alone_because"] == "B: not at these layers there"
    told = " ".join(capsys.readouterr().out.split())
    assert "differs: algorithm.n_updates: A 20; B 80 (corrsteer_s, crl)" in told
    low, high = (100 * end for end in expected.interval)
    assert f"{100 * expected.mean:+.1f} [{low:.1f}, {high:.1f}]" in told
    assert "only in A: CRL @ 8, sentiment, tiny" in told
    assert "The family of Holm's correction: these 2" in told


def test_its_folder_is_its_own_and_made_again_is_the_same(two, capsys):
    assert main(["report", "few", "--output-dir", str(two)]) == 0
    own = {path: path.read_bytes() for path in (two / "few" / "report").iterdir()}
    inside, reports = two / "comparisons" / "few+many", []
    for _ in range(2):
        assert main(["report", "few", "many", "--output-dir", str(two)]) == 0
        reports.append({p.name: p.read_bytes() for p in inside.iterdir() if p.is_file()})
    there = reports[0]
    assert reports[1] == there
    assert set(there) == {"table.csv", "table.md", "table.tex", "report.html", "sweeps.png",
                          "sweeps.pdf"}  # fmt: skip
    assert {path: path.read_bytes() for path in own} == own
    command = f"python -m crl_exp report few many --output-dir {two}"
    assert command in there["report.html"].decode() and command in there["table.md"].decode()
    assert b"data:image/png;base64," in there["report.html"]


def test_a_comparison_is_no_sweep(two, capsys):
    assert main(["report", "few", "many", "--output-dir", str(two)]) == 0
    capsys.readouterr()
    inside = two / "comparisons" / "few+many"
    for command in ("status", "report", "rm"):
        for name in ("comparisons", str(inside)):
            assert main([command, name, "--output-dir", str(two)]) == 1
            assert "no run in" in (told := capsys.readouterr().err) or "no sweep" in told
    assert main(["report", "nosuch", "--output-dir", str(two)]) == 1
    assert "has few, many\n" in capsys.readouterr().err
    assert (inside / "report.html").exists()
    with pytest.raises(UserError, match="is no sweep"):
        check_sweep("comparisons")


def test_a_key_that_a_sweep_varies_tells_rows_apart(tmp_path):
    """And one that each holds at a value is paired across."""
    for sweep, updates, depths in (("a", 20, (0, 1)), ("b", 80, (1, 2))):
        for depth in depths:
            more: dict[str, Any] = {"algorithm__n_updates": updates, "fusion__weight": float(depth)}
            run_of_items(made(tmp_path, sweep, **more), WAS, ONE[0])
    found = compare_sweeps([tmp_path / "a", tmp_path / "b"])
    (both,) = found.together
    assert both.label == "CRL fusion.weight=1.0"
    assert both.pairs[1].difference.value == 0
    assert [one.label for one in found.alone] == ["CRL fusion.weight=0.0", "CRL fusion.weight=2.0"]
    apart = {key.key: key.apart for key in found.keys}
    assert apart == {UPDATES: True, "fusion.weight": False}


def test_runs_of_both_are_counted_once(two, capsys):
    """CRL's first two seeds are in both, and CorrSteer-S wholly."""
    for seed in range(4):
        now = [*SEEDS[0][:2], *SEEDS[1][:2]][seed]
        run_of_items(made(two, "more", seed=seed, algorithm__n_updates=20), WAS, now)
    run_of_items(made(two, "more", "corrsteer_s", algorithm__n_updates=20), WAS, ONE[0])
    found = compare_sweeps([two / "few", two / "more"])
    fixed, crl = found.together
    assert crl.rows[1].seeds == [3] and crl.rows[0].seeds == [0, 1, 2]
    assert fixed.same == (1,) and not fixed.pairs
    assert len(found.twice) == 4 and len(found.pairs) == 1
    (seed_2,) = (run.key for run in crl.rows[0].runs if run.config["seed"] == 2)
    assert found.ended_otherwise == [seed_2], "its answers in `more` are others"
    assert main(["report", "few", "more", "--output-dir", str(two)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "4 runs are in several sweeps (the same run key) and counted once" in told
    assert f"1 did not end alike in each sweep ({seed_2})" in told
    assert "the runs of A" in told


def test_rows_that_were_asked_in_other_words_are_set_apart_by_name(two):
    more: dict[str, Any] = {"algorithm__n_updates": 20}
    run_of_items(made(two, "odd", task__question="Is it? {text}", **more), WAS, SEEDS[1][0])
    run_of_items(made(two, "odd", "corrsteer_s", seed=1, **more), WAS, ONE[1])
    found = compare_sweeps([two / "few", two / "odd"])
    assert [one.label for one in found.together] == ["CorrSteer-S"]
    (odd,) = (one for one in found.alone if one.first == 1)
    assert "task.question" in odd.why[0] and odd.rows[1].runs[0].key not in odd.why[0]
    (table,) = (one for one in tables_of(found) if one.slug == "alone")
    text = "\n".join("\n".join(line) for line in table.lines)
    assert "asked something else: " in text and "B: asked something else there: " in text


@pytest.mark.parametrize(("key", "value"), [("n_test", 300), ("split_seed", 5)])
def test_a_sweep_over_another_split_is_refused_by_name(two, capsys, key, value):
    for method, now in (("crl", SEEDS[1][0]), ("corrsteer_s", ONE[1])):
        run_of_items(made(two, "odd", method, **{f"task__{key}": value}), WAS, now)
    told = refused(capsys, two, "few", "odd")
    assert "CRL @ 18 of odd: asked something else: task." + key in told


def test_other_items_under_the_same_config_are_set_apart_with_counts(two):
    ids = [f"item{i:04d}" for i in range(3, 303)]
    run_of_items(made(two, "odd", seed=7, algorithm__n_updates=20), WAS, SEEDS[1][0], ids=ids)
    run_of_items(made(two, "odd", "corrsteer_s", algorithm__n_updates=30), WAS, ONE[1])
    found = compare_sweeps([two / "few", two / "odd"])
    assert [one.label for one in found.together] == ["CorrSteer-S"]
    (odd,) = (one for one in found.alone if one.first == 1)
    assert "3 are only in the first, 3 only in the second" in odd.why[0]


def test_tasks_that_only_one_has_are_set_apart_by_name(two):
    run_of_items(made(two, "odd", task__name="gsm8k"), WAS, ONE[0])
    run_of_items(made(two, "odd", "corrsteer_s", algorithm__n_updates=20, seed=1), WAS, ONE[1])
    found = compare_sweeps([two / "few", two / "odd"])
    (other,) = (one for one in found.alone if one.first == 1)
    assert "gsm8k" in other.where
    (table,) = (one for one in tables_of(found) if one.slug == "alone")
    assert any("A: no task=gsm8k there" in line for line in table.lines)


def test_other_models_are_paired_and_said(two):
    run_of_items(made(two, "big", model__name="bigger", algorithm__n_updates=20), WAS, ONE[0])
    found = compare_sweeps([two / "few", two / "big"])
    (both,) = found.together
    assert both.label == "CRL" and both.pairs[1].difference.paired
    assert ("model.name", (("tiny",), ("bigger",))) in [(k.key, k.values) for k in found.keys]


def test_of_three_sweeps_each_row_is_set_against_the_first_that_has_it(two, capsys):
    more: dict[str, Any] = {"algorithm__n_updates": 160}
    run_of_items(made(two, "most", **more), WAS, ONE[0])
    run_of_items(made(two, "most", "lora", **more), WAS, ONE[1])
    run_of_items(made(two, "many", "lora", algorithm__n_updates=80), WAS, ONE[0])
    found = compare_sweeps([two / name for name in ("few", "many", "most")])
    pairs = {one.label: (one.first, set(one.pairs)) for one in found.together}
    assert pairs == {"CRL": (0, {1, 2}), "CorrSteer-S": (0, {1}), "LoRA": (1, {2})}
    assert {pair.p_holm for pair in found.pairs} == set(
        holm([pair.difference.p_value for pair in found.pairs])
    )
    assert main(["report", "few", "many", "most", "--output-dir", str(two)]) == 0
    told = capsys.readouterr().out
    assert "C − B: " in told and "C − A" in told
    assert f"{100 * (ONE[0].mean() - np.stack(SEEDS[0]).mean()):+.1f} [" in told, "not cut off"


@pytest.mark.parametrize("width", [80, 130])
def test_a_narrow_terminal_cuts_no_figure_off(two, width):
    run_of_items(made(two, "most", algorithm__n_updates=160), WAS, ONE[0])
    found = compare_sweeps([two / name for name in ("few", "many", "most")])
    text = io.StringIO()
    print_comparison(found, Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    for number, accuracy in ((0, SEEDS[0]), (1, SEEDS[1]), (2, ONE[:1])):
        row = found.together[1].rows[number]
        told = share(float(np.mean(accuracy)), row.accuracy_interval())
        assert any(told in line for line in lines), told
    for pair in found.pairs:
        told = points(pair.difference.value, pair.difference.interval)
        assert any(told in line for line in lines), told


def test_runs_without_items_are_not_paired_and_it_is_said(two, capsys):
    finished_run(made(two, "old", algorithm__n_updates=40), 0.1, n=300)
    assert main(["report", "few", "old", "--output-dir", str(two)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not paired, since a run has no items.parquet" in told
    (line,) = (line for line in lines_of(two, "few+old") if line["sweep"] == "old")
    assert line["paired"] == "False"


def test_of_many_rows_those_with_the_smallest_p_are_drawn(two, monkeypatch):
    found = compare_sweeps([two / "few", two / "many"])
    assert len(figure.shown(found)) == 2
    monkeypatch.setattr(figure, "MOST_ROWS", 1)
    (one,) = figure.shown(found)
    assert one.pairs[1].difference.p_value == min(p.difference.p_value for p in found.pairs)


def test_bad_names_are_refused(two, capsys):
    assert "did you mean 'many'" in refused(capsys, two, "few", "mny")
    assert "few is given twice" in refused(capsys, two, "few", "few")
    assert "given twice, also as" in refused(capsys, two, str(two / "few"), f"{two}/many/../few")
    with RunDirectory(made(two, "begun")).opened():
        assert "no run of begun is finished" in refused(capsys, two, "few", "begun")
    sweeps = [f"s{i}" for i in range(MOST + 1)]
    for name in sweeps:
        (two / name).mkdir()
    assert f"{MOST} at most" in refused(capsys, two, *sweeps)


def test_sweeps_with_nothing_in_common_are_refused_with_reasons(two, capsys):
    run_of_items(made(two, "odd", "lora"), WAS, ONE[0])
    told = refused(capsys, two, "few", "odd")
    assert "nothing can be paired" in told and "LoRA @ 18 of odd: A: no such method there" in told
    assert "compare 'few:METHOD@LAYERS' 'odd:METHOD@LAYERS'" in told


def test_analyses_alone_are_refused(two, capsys):
    kind = {"_target_": "crl_exp.experiments.kinds.probing.Probing", "name": "counting"}
    run = RunDirectory(made(two, "reads", experiment=kind))
    with run.opened():
        found = Result("counting", "words", {"words": Figure(0.25, 0.2, 0.3, 40)}, said=["few"])
        same = {"run_key": run.key, "sweep": "reads", "method": "counting", "label": "counted",
                "control": False, "model": "tiny", "task": "sentiment", "layers": [18], "seed": 0,
                "n": 300, "scorer": "exact choice", "data_digest": "0123456789abcdef"}  # fmt: skip
        write_json(run.result_path, {**same, **found.plain()})
    assert "are analyses, which answer no item" in refused(capsys, two, "few", "reads")


def test_other_sweeps_have_another_folder(two, tmp_path_factory):
    """Names may hold a plus, and a sweep may lie elsewhere."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder, name in ((two, "a+b"), (two, "c"), (two, "a"), (two, "b+c"), (elsewhere, "few")):
        run_of_items(made(folder, name), WAS, ONE[0])
    named = [
        folder_name(compare_sweeps(folders).sides, two)
        for folders in ([two / "a+b", two / "c"], [two / "a", two / "b+c"],
                        [two / "few", two / "many"], [elsewhere / "few", two / "many"])
    ]  # fmt: skip
    assert len(set(named)) == 4 and named[2] == "few+many"
    assert compare_sweeps([two / "few", elsewhere / "few"]).sides[1].name == str(elsewhere / "few")
