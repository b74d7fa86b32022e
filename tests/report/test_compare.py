"""`compare`: any two finished runs or rows, paired by item."""

from __future__ import annotations

import numpy as np
import pytest

from crl_exp.__main__ import main
from crl_exp.analysis.statistics import compare, crossed_difference
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.tables.notes import notes
from crl_exp.report.tables.same_features import same_feature_tables
from crl_exp.runs.directory import write_json
from crl_exp.runs.records import find_records
from crl_exp.steering.feature_lists import read_list
from tests.helpers.synthetic import config, finished_run, run_of_items
from tests.helpers.tiny_run import ROOT

DRAW = np.random.default_rng(0)
WAS = DRAW.integers(0, 2, 400).astype(float)
CRL = [np.where(DRAW.random(400) < 0.3, 1.0, WAS) for _ in range(3)]
FIXED = np.where(DRAW.random(400) < 0.1, 1.0, WAS)


@pytest.fixture
def sweep(tmp_path):
    """CRL at two layers with three seeds, CorrSteer-S at one."""
    runs = {}
    for layer, validation in ((8, 0.1), (18, 0.2)):
        for seed in range(3):
            now = CRL[seed] if layer == 18 else np.roll(CRL[seed], 1)
            made = config(tmp_path, layers=(layer,), seed=seed)
            runs[layer, seed] = run_of_items(made, WAS, now, validation)
    runs["s"] = run_of_items(config(tmp_path, "corrsteer_s"), WAS, FIXED, 0.05)
    return tmp_path, runs


def said(capsys, folder, *asked: str) -> str:
    assert main(["compare", *asked, "--output-dir", str(folder)]) == 0
    return capsys.readouterr().out


def refused(capsys, folder, *asked: str) -> str:
    assert main(["compare", *asked, "--output-dir", str(folder)]) == 1
    return capsys.readouterr().err


def test_two_runs_by_key(sweep, capsys):
    folder, runs = sweep
    told = said(capsys, folder, runs[18, 0].key, f"demo/{runs['s'].key}", "--items", "3")
    right = compare(FIXED, CRL[0], CRL[0] != FIXED)
    low, high = (round(100 * end, 1) for end in right.delta_ci95)
    assert f"{100 * right.delta:+.1f} [{low:.1f}, {high:.1f}] points, n = 400" in told
    assert "McNemar's exact test" in told
    assert f"right in A and wrong in B: {right.fixed}.0; wrong in A and right in B: " in told
    differ = right.fixed + right.broken
    assert f"items that differ: {differ} of 400" in told
    assert sum("  item" in line for line in told.splitlines()) == 3
    assert f"and {differ - 3} more: --items {differ}" in told
    assert f"{runs[18, 0].key}, CRL @ 18" in told


def test_two_rows_hold_the_seeds_of_both(sweep, capsys):
    folder, _ = sweep
    expected = crossed_difference(np.stack(CRL), FIXED[None])
    low, high = (100 * end for end in expected.interval)
    for a in ("demo:CRL@18", "demo:crl@18", "demo:CRL"):  # chosen on validation: 18
        told = said(capsys, folder, a, "demo:CorrSteer-S@18")
        assert f"{100 * expected.mean:+.1f} [{low:.1f}, {high:.1f}] points" in told
        assert "over items and the seeds of both" in told and "(seed 0 1 2)" in told
    shares = np.stack(CRL).mean(axis=0)
    better = (shares * (1 - FIXED)).sum()
    assert f"right in A and wrong in B: {better:.1f}" in told and "mean over pairs of seeds" in told


def test_fractional_rewards_are_tested_as_they_are(sweep, capsys):
    """All items gain, none crosses .5: p and Δ agree, and the test is named."""
    folder, _ = sweep
    was, gain = np.full(400, 0.6), 0.05 + 0.1 * np.random.default_rng(3).random(400)
    made = [config(folder, method, sweep_name="f") for method in ("none", "corrsteer_s")]
    run_of_items(made[0], was, was)
    run_of_items(made[1], was, was + gain)
    told = said(capsys, folder, "f:CorrSteer-S", "f:unsteered")
    assert "p = < 0.001 (over items, since rewards aren't all 0 or 1" in told
    comparison = compare_runs(find_records(folder / "f"))
    (row,) = [row for row in comparison.rows if row.method != "none"]
    assert row.p_value < 1e-6 and compare(was, was + gain, gain > 0).p_value == row.p_value
    assert any("in place of McNemar's" in note for note in notes(comparison))


def test_a_run_against_itself_differs_by_nothing(sweep, capsys):
    folder, runs = sweep
    told = said(capsys, folder, runs["s"].key, runs["s"].key)
    assert "+0.0 [0.0, 0.0] points" in told and "items that differ: 0 of 400" in told


def steered_by(run, **features: int) -> None:
    """As features.json has it where fixed features were added: `l8=7`, one a layer."""
    chosen = {name[1:]: [{"feature": f, "coefficient": 1.0}] for name, f in features.items()}
    empty = {"n": 100, "allowed": 40, "found": [], "used": []}
    write_json(run.path / "features.json", {n: empty | {"chosen": c} for n, c in chosen.items()})


def test_the_features_that_two_share_are_counted_by_layer(tmp_path, capsys):
    runs = [
        run_of_items(config(tmp_path, "listed", (8, 9, 10), sweep_name=name), WAS, now)
        for name, now in (("a", FIXED), ("b", CRL[0]))
    ]
    steered_by(runs[0], l8=7, l9=3, l10=5)
    steered_by(runs[1], l8=7, l9=4, l10=5)
    names = [f"{run.path.parent.name}/{run.key}" for run in runs]
    told = said(capsys, tmp_path, *names).splitlines()
    assert "the same feature at 2 of 3 layers; others, A and B: 9: 3, 4" in told
    steered_by(runs[1], l11=7)
    assert "the same feature" not in said(capsys, tmp_path, *names), "no layer in common"
    steered_by(runs[1], l8=6, l11=7)
    assert "the same feature at 0 of 1 layers\n" in said(capsys, tmp_path, *names)


def test_of_several_features_of_a_layer_all_are_compared(sweep, capsys):
    folder, runs = sweep
    for run, features in ((runs[18, 0], (3, 7)), (runs["s"], (5, 7))):
        chosen = [{"feature": f, "coefficient": 1.0} for f in features]
        layer = {"n": 100, "allowed": 40, "found": [], "used": [], "chosen": chosen}
        write_json(run.path / "features.json", {"8": layer, "18": {**layer, "chosen": chosen[1:]}})
    told = said(capsys, folder, "demo:CRL@18", "demo:CorrSteer-S")
    assert "the same feature at 1 of 2 layers (of each row's first seed)" in told
    assert "others, A and B: 8: 3+7, 5+7" in told


def test_of_a_policy_the_feature_that_it_added_most_is_taken(sweep, capsys):
    folder, runs = sweep
    used = [{"feature": f, "tokens": n, "mean_coefficient": 1.0} for f, n in ((1, 5), (2, 9))]
    layer = {"n": 100, "allowed": 40, "found": [], "used": used}
    write_json(runs[18, 0].path / "features.json", {"18": layer})
    steered_by(runs["s"], l18=2)
    told = said(capsys, folder, "demo:CRL@18", "demo:CorrSteer-S")
    assert "the same feature at 1 of 1 layers (of each row's first seed)\n" in told


def test_runs_of_several_sweeps(sweep, capsys):
    folder, runs = sweep
    other = run_of_items(config(folder, "corrsteer_s", sweep_name="more", seed=9), WAS, CRL[1])
    told = said(capsys, folder, "demo:CorrSteer-S", f"more/{other.key}")
    assert f"more/{other.key}" in told
    twin = run_of_items(config(folder, "corrsteer_s", sweep_name="more"), WAS, CRL[1])
    assert twin.key == runs["s"].key
    assert "is in several sweeps" in refused(capsys, folder, twin.key, runs[8, 0].key)


def test_unknown_names_are_told_with_the_nearest(sweep, capsys):
    folder, runs = sweep
    told = refused(capsys, folder, "demo:CLR@18", "demo:CRL@18")
    assert "demo has no row 'CLR@18'; did you mean 'CRL@18'" in told and "demo:CRL@8" in told
    told = refused(capsys, folder, "demo:CRL@19", "demo:CRL@18")
    assert "no row 'CRL@19'" in told and "demo:CRL@8" in told and "CorrSteer" not in told
    assert "did you mean 'demo'" in refused(capsys, folder, "dmo:CRL@18", "demo:CRL@18")
    key = runs[8, 0].key
    told = refused(capsys, folder, key[:-1] + "x", "demo:CRL@18")
    assert f"did you mean '{key}'" in told and "SWEEP:METHOD@LAYERS" in told


def test_runs_that_were_asked_something_else_are_refused(sweep, capsys):
    folder, _ = sweep
    odd = config(folder, "corrsteer_s", sweep_name="odd", more={"task.name": "gsm8k"})
    run = run_of_items(odd, WAS, FIXED)
    told = refused(capsys, folder, "demo:CRL@18", f"odd/{run.key}")
    assert "weren't asked the same" in told and "task.name" in told and "gsm8k" in told


def test_two_wordings_of_the_same_items_are_paired_and_told(sweep, capsys):
    folder, runs = sweep
    more = {"task.question": "Is it good? {text}", "task.wording": "good"}
    run = run_of_items(config(folder, "corrsteer_s", sweep_name="odd", more=more), WAS, FIXED)
    write_json(run.result_path, {**(run.result() or {}), "data_digest": "of other prompts"})
    told = said(capsys, folder, runs["s"].key, f"odd/{run.key}")
    assert "task.question: " in told and "Is it good? {text}" in told
    assert "items that differ: 0 of 400" in told


def test_runs_of_one_key_with_other_weights_or_tokens_are_paired_and_told(sweep, capsys):
    """They are of several sweeps, and their config is the same to the last letter."""
    folder, runs = sweep
    write_json(runs["s"].result_path,
               {**(runs["s"].result() or {}), "weights": "aa", "fed": {"test": "x"}})  # fmt: skip
    twin = run_of_items(config(folder, "corrsteer_s", sweep_name="more"), WAS, FIXED)
    assert twin.key == runs["s"].key
    one, other = f"demo/{twin.key}", f"more/{twin.key}"
    assert "weights" not in said(capsys, folder, one, other), "it doesn't say"
    write_json(twin.result_path,
               {**(twin.result() or {}), "weights": "bb", "fed": {"test": "y"}})  # fmt: skip
    told = said(capsys, folder, one, other)
    assert f'weights: "aa" in 1 ({one}); "bb" in 1 ({other}) (hashes of' in told
    assert f'fed.test: "x" in 1 ({one}); "y" in 1 ({other}) (hashes of' in told
    assert "items that differ: 0 of 400" in told


def test_other_items_under_the_same_config_are_refused_with_counts(sweep, capsys):
    folder, _ = sweep
    ids = [f"item{i:04d}" for i in range(3, 403)]
    run = run_of_items(config(folder, "corrsteer_s", sweep_name="odd"), WAS, FIXED, ids=ids)
    told = refused(capsys, folder, "demo:CRL@18", f"odd/{run.key}")
    assert "3 are only in the first, 3 only in the second" in told


def test_another_model_is_told_not_refused(sweep, capsys):
    folder, _ = sweep
    made = config(folder, "corrsteer_s", sweep_name="big", more={"model.name": "bigger"})
    run = run_of_items(made, WAS, CRL[2])
    assert 'model.name: "tiny"' in said(capsys, folder, "demo:CorrSteer-S", f"big/{run.key}")


def test_a_run_without_items_says_what_is_missing(sweep, capsys):
    folder, _ = sweep
    old = finished_run(config(folder, "corrsteer_s", sweep_name="old"), 0.1, n=400)
    told = refused(capsys, folder, "demo:CRL@18", f"old/{old.key}")
    assert old.key in told and "no rewards of the single items of test" in told
    assert "resume=force" in told


def test_a_split_that_isn_t_there_is_named(sweep, capsys):
    folder, _ = sweep
    told = refused(capsys, folder, "demo:CRL@18", "demo:CRL@8", "--split", "bening")
    assert "--split bening" in told and "validation" in told


def test_a_report_counts_the_shipped_lists_features(tmp_path, capsys):
    """Two logs on HarmBench: the same feature at 18 of 25 layers."""
    lists = ROOT / "assets" / "feature_lists" / "harmbench_lists.csv"
    layers = tuple(range(1, 26))
    for name, now in (("corrsteer", FIXED), ("crl", CRL[0])):
        more = {"method.path": str(lists), "method.which": name}
        run = run_of_items(config(tmp_path, "listed", layers, more=more), WAS, now)
        steered_by(
            run, **{f"l{one.layer}": one.feature for one in read_list(str(lists), name).features}
        )
    (table,) = same_feature_tables(compare_runs(find_records(tmp_path / "demo")))
    ((_, _, same, others),) = table.lines
    assert same == "18 of 25 layers" and others.endswith("; and 4 more")
    ours, theirs = find_records(tmp_path / "demo")
    told = said(capsys, tmp_path, f"demo/{ours.key}", f"demo/{theirs.key}")
    assert "the same feature at 18 of 25 layers; others" in told


def test_rows_of_one_layer_each_are_a_methods_together_and_controls_are_left_out(tmp_path):
    for method in ("corrsteer_s", "attribution", "random"):
        for layer in (8, 18):
            run = run_of_items(config(tmp_path, method, (layer,)), WAS, FIXED)
            steered_by(run, **{f"l{layer}": 3 if layer == 8 else len(method)})
    (table,) = same_feature_tables(compare_runs(find_records(tmp_path / "demo")))
    assert [line[:3] for line in table.lines] == [["CorrSteer-S", "attribution", "2 of 2 layers"]]
