"""Runs side by side, from synthetic run directories and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from crl_exp.analysis.statistics import compare, crossed
from crl_exp.config import compatibility
from crl_exp.config.errors import UserError
from crl_exp.report.comparison.rows import Row, SweepComparison, compare_runs, holm
from crl_exp.report.console import terminal as tables
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, figures, finished_run, run_of_items

SHUFFLED = {"task.shuffle_labels": True}


def compared(folder: Path) -> SweepComparison:
    return compare_runs(find_records(folder / "demo"))


def row(sweep: SweepComparison, family: str, *layers: int) -> Row:
    (found,) = [r for r in sweep.rows if r.family == family and r.layers == layers]
    return found


def set_result(run: RunDirectory, **changes) -> None:
    written = run.result()
    assert written is not None
    write_json(run.result_path, {**written, **changes})


def test_synthetic_figures_have_the_keys_of_real_ones():
    real = asdict(compare(np.zeros(4), np.ones(4), np.ones(4, dtype=bool)))
    assert {*real, "invalid_baseline", "invalid_steered"} == set(figures(0.1))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]


def test_seeds_are_put_together(tmp_path):
    runs = [finished_run(config(tmp_path, seed=s), d) for s, d in enumerate((0.10, 0.12, 0.14))]
    for run, p, fixed in zip(runs, (0.01, 0.2, 0.03), (30, 40, 50), strict=True):
        set_result(run, p_value=p, fixed=fixed, broken=10)
    (one,) = compared(tmp_path).rows
    assert one.seeds == [0, 1, 2]
    assert one.mean("delta") == pytest.approx(0.12)
    # Without items.parquet: t(2) = 4.302653, standard deviation 0.02, 4.302653 * 0.02 / sqrt(3) for
    # the seeds; for the items half of a single run's interval, 0.02.
    half = (0.0496828**2 + 0.02**2) ** 0.5
    assert one.interval() == pytest.approx((0.12 - half, 0.12 + half), abs=1e-6)
    low, _ = one.interval()
    assert one.p_value < 0.05 and low > 0, "p and interval say the same"
    assert one.ser == pytest.approx(30 / 150)


def test_seeds_and_items_are_in_the_interval(tmp_path):
    """Of rewards by item: means over seeds .5 of the items that change, seeds that agree."""
    draw = np.random.default_rng(0)
    was = draw.integers(0, 2, 600).astype(float)
    found = []
    for seed in range(3):
        now = np.where(draw.random(600) < 0.2, 1.0, was)
        found.append(now - was)
        run_of_items(config(tmp_path, seed=seed), was, now)
    (one,) = compared(tmp_path).rows
    expected = crossed(np.stack(found))
    assert one.interval() == pytest.approx(expected.interval)
    assert one.p_value == pytest.approx(expected.p_value)
    # Seeds alone, as before, are far too narrow or too wide by luck; items alone leave seeds out.
    means = np.stack(found).mean(axis=1)
    assert one.over_seeds and one.mean("delta") == pytest.approx(means.mean())


def test_seeds_that_got_the_same_keep_the_runs_own_interval_and_p(tmp_path):
    was, now = np.repeat([0.0, 1.0], 50), np.repeat([0.0, 1.0, 1.0, 0.0], 25)
    for seed in range(3):
        run_of_items(config(tmp_path, seed=seed), was, now)
    (one,) = compared(tmp_path).rows
    own = compare(was, now, was != now)
    assert not one.over_seeds and one.interval() == own.delta_ci95 and one.p_value == own.p_value


def test_seeds_of_equal_delta_on_other_items_are_not_alike(tmp_path):
    was = np.zeros(100)
    for seed in range(2):
        now = np.zeros(100)
        now[10 * seed : 10 * seed + 10] = 1
        run_of_items(config(tmp_path, seed=seed), was, now)
    (one,) = compared(tmp_path).rows
    assert one.over_seeds and one.interval() == pytest.approx(
        (0.1 - 1.96 * 0.02, 0.1 + 1.96 * 0.02), abs=1e-4
    )  # item means .5 on 20 of 100: variance .04, and no deviation of seeds


def test_one_seed_or_equal_seeds_have_the_paired_interval(tmp_path):
    for seed in (0, 1):
        finished_run(config(tmp_path, "corrsteer_s", seed=seed), 0.1, half=0.03)
    finished_run(config(tmp_path, "crl"), 0.2, half=0.01)
    sweep = compared(tmp_path)
    assert row(sweep, "CorrSteer-S", 18).interval() == pytest.approx((0.07, 0.13))
    assert row(sweep, "CRL", 18).interval() == pytest.approx((0.19, 0.21))


def test_p_values_are_corrected_for_layers_and_options(tmp_path):
    """What was really tried of a method, stated below the table."""
    multiply = {"fusion": {"_target_": "crl_exp.steering.stages.fusion.Multiply"}}
    for layer, p in ((8, 0.01), (12, 0.04), (15, 0.03)):
        set_result(finished_run(config(tmp_path, layers=(layer,)), 0.1), p_value=p)
    set_result(finished_run(config(tmp_path, layers=(8,), more=multiply), 0.1), p_value=0.012)
    finished_run(config(tmp_path, "none"), 0.0)
    sweep = compared(tmp_path)
    corrected = {(r.family, r.layers[0]): p for r, p in sweep.p_holm.items() if r.method == "crl"}
    assert corrected == pytest.approx(
        {("CRL", 8): 0.04, ("CRL fusion=multiply", 8): 0.04, ("CRL", 15): 0.06, ("CRL", 12): 0.06}
    )
    assert "all its layers and options (CRL 4)" in tables.markdown(sweep)


def test_p_values_are_corrected_within_a_method(tmp_path):
    for layer, p in ((8, 0.01), (12, 0.04), (15, 0.03)):
        set_result(finished_run(config(tmp_path, layers=(layer,)), 0.1), p_value=p)
    set_result(finished_run(config(tmp_path, "random"), 0.0), p_value=0.02)
    sweep = compared(tmp_path)
    corrected = {(r.family, r.layers[0]): p for r, p in sweep.p_holm.items()}
    assert corrected == pytest.approx(
        {("CRL", 8): 0.03, ("CRL", 12): 0.06, ("CRL", 15): 0.06, ("random features", 18): 0.02}
    )


def test_the_layer_is_chosen_on_validation_not_on_test(tmp_path):
    for seed in (0, 1):
        finished_run(config(tmp_path, layers=(8,), seed=seed), 0.20, validation=0.05)
        finished_run(config(tmp_path, layers=(12,), seed=seed), 0.10, validation=0.15)
    # The best single run on validation, but not the best mean.
    finished_run(config(tmp_path, layers=(15,), seed=0), 0.3, validation=0.25)
    finished_run(config(tmp_path, layers=(15,), seed=1), 0.3, validation=0.01)
    for layer in (8, 12):
        finished_run(config(tmp_path, "random", (layer,)), 0.1 * layer / 8)
        finished_run(config(tmp_path, layers=(layer,), more=SHUFFLED), 0.01 * layer)
    sweep = compared(tmp_path)
    assert sweep.chosen == {row(sweep, "CRL", 12)}
    (marked,) = [line for line in tables.markdown(sweep).splitlines() if "◀ |" in line]
    assert marked.startswith("| CRL | 12 ◀ |")


@pytest.mark.parametrize(
    ("key", "value"),
    [("task.n_test", 300), ("task.question", "other {text}"), ("model.name", "bigger"),
     ("task.name", "refusal"), ("model.dtype", "bfloat16")],
)  # fmt: skip
def test_unlike_configs_are_refused(tmp_path, key, value):
    finished_run(config(tmp_path), 0.1)
    odd = finished_run(config(tmp_path, more={key: value}), 0.1)
    with pytest.raises(UserError, match=rf"(?s)can't be compared.*{key}.*{odd.key}.*sweep_name"):
        compared(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("n", 1499), ("scorer", "another rule")])
def test_unlike_results_are_refused(tmp_path, key, value):
    finished_run(config(tmp_path), 0.1)
    set_result(finished_run(config(tmp_path, seed=1), 0.1), **{key: value})
    with pytest.raises(UserError, match=rf"(?s)can't be compared.*  {key}: .*{value}"):
        compared(tmp_path)


def test_what_may_differ(tmp_path):
    """Shuffled labels, size of the training split, device: other rows, no refusal."""
    finished_run(config(tmp_path), 0.1)
    finished_run(config(tmp_path, seed=1), 0.1)
    shuffled = finished_run(config(tmp_path, more=SHUFFLED), 0.0)
    set_result(shuffled, data_digest="another")
    again = finished_run(config(tmp_path, seed=1, more=SHUFFLED), 0.0)
    set_result(again, data_digest="each seed shuffles in its own way")
    finished_run(config(tmp_path, more={"task.n_train": 50}), 0.05)
    assert [(r.family, len(r.runs)) for r in compared(tmp_path).rows] == [
        ("CRL", 2), ("CRL task.n_train=50", 1), ("CRL (shuffled labels)", 2),
    ]  # fmt: skip


def test_options_that_differ_are_named(tmp_path):
    multiply = {"fusion": {"_target_": "crl_exp.steering.stages.fusion.Multiply"}}
    for seed in (0, 1):
        finished_run(config(tmp_path, seed=seed), 0.1)
    finished_run(config(tmp_path, more=multiply), 0.1)
    finished_run(config(tmp_path, more={"fusion.weight": 3.0}), 0.1)
    finished_run(config(tmp_path, more={"method.stage2": False}), 0.1)
    finished_run(config(tmp_path, "corrsteer_a", more=multiply), 0.1)
    assert sorted(r.family for r in compared(tmp_path).rows) == [
        "CRL", "CRL fusion.weight=3.0", "CRL fusion=multiply", "CRL without stage 2", "CorrSteer-A",
    ]  # fmt: skip


def test_no_finished_run(tmp_path):
    bad = RunDirectory(config(tmp_path))
    with pytest.raises(RuntimeError), bad.opened():
        raise RuntimeError
    with pytest.raises(UserError, match=r"no run of demo is finished \(1 failed\)"):
        compared(tmp_path)


# --- controls ---

FALLBACK = ("random", "random_direction", "raw_residual", "top_activation")


def marked(folder: Path) -> set[str]:
    """Families whose best layer on validation is marked."""
    return {row.family for row in compared(folder).chosen}


def at_two_layers(folder: Path, method: str, more: dict | None = None, **changes) -> None:
    for layer in (8, 12):
        run = finished_run(config(folder, method, (layer,), more), 0.01 * layer)
        set_result(run, **changes)


def test_no_control_is_marked_as_the_best_on_validation(tmp_path):
    """By what results say, and by the name where they are of before they said it."""
    for method in FALLBACK:
        at_two_layers(tmp_path, method)
    at_two_layers(tmp_path, "mine", control=True, label="my control")
    at_two_layers(tmp_path, "theirs", control=False, label="their method")
    at_two_layers(tmp_path, "crl", {"sae.dictionary": "random"}, control=True, label="CRL")
    at_two_layers(tmp_path, "corrsteer_s")
    sweep = compared(tmp_path)
    assert marked(tmp_path) == {"CorrSteer-S", "their method"}
    assert {row.family for row in sweep.rows if row.control} == {
        "random features", "random directions", "raw residual", "most active features",
        "my control", "CRL (random dictionary)",
    }  # fmt: skip


def test_a_policy_over_another_dictionary_stands_beside_crl(tmp_path):
    """With the labels shuffled too; and what is in the headline is the SAE's."""
    for kind, delta in (("sae", 0.1), ("random", 0.2), ("permuted", 0.3)):
        for seed in (0, 1):
            more = {"sae.dictionary": kind}
            run = finished_run(config(tmp_path, more=more, seed=seed), delta)
            set_result(run, control=kind != "sae", label="CRL")
    set_result(
        finished_run(config(tmp_path, more={"sae.dictionary": "random", **SHUFFLED}), 0.0),
        control=True, label="CRL",
    )  # fmt: skip
    finished_run(config(tmp_path, "corrsteer_s"), 0.05)
    assert [(r.family, len(r.runs)) for r in compared(tmp_path).rows] == [
        ("CorrSteer-S", 1), ("CRL", 2), ("CRL (permuted dictionary)", 2),
        ("CRL (random dictionary)", 2), ("CRL (random dictionary, shuffled labels)", 1),
    ]  # fmt: skip
    line = tables.headline(compared(tmp_path))
    assert line is not None and "CRL, layer 18: 78.0 %" in line


def test_runs_of_before_a_fault_was_mended_are_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "MENDED", ())
    finished_run(config(tmp_path, seed=0), 0.1)
    finished_run(config(tmp_path, "corrsteer_s", seed=0), 0.1)
    mend = compatibility.Mended("drawn right", lambda plain: plain["method"]["name"] == "crl")
    monkeypatch.setattr(compatibility, "MENDED", (mend,))
    finished_run(config(tmp_path, seed=0), 0.2)
    finished_run(config(tmp_path, seed=1), 0.2)
    assert [(r.family, r.seeds) for r in compared(tmp_path).rows] == [
        ("CorrSteer-S", [0]), ("CRL", [0, 1]), ("CRL (before “drawn right”)", [0]),
    ]  # fmt: skip


def test_an_option_that_came_later_sets_runs_apart_only_where_it_does_something_else(tmp_path):
    """Runs of before don't have it: there `half` is meant, and other tasks' rewards are 0 or 1."""
    for folder, scorer, expected in (
        ("a", None, ["CRL"]),
        ("b", "token_f1", ["CRL warmup.rewarded=half", "CRL warmup.rewarded=positive"]),
    ):
        task = {"task.scorer": scorer} if scorer else {}
        finished_run(config(tmp_path / folder, more={**task, "warmup": {"keep": 5}}), 0.1)
        later = {**task, "warmup": {"keep": 5, "rewarded": "positive"}}
        finished_run(config(tmp_path / folder, more=later, seed=1), 0.1)
        assert [row.family for row in compared(tmp_path / folder).rows] == expected


def test_methods_that_do_worse_than_nothing_on_validation_are_named(tmp_path):
    finished_run(config(tmp_path, "corrsteer_s", (22,)), 0.1, validation=-0.3)
    finished_run(config(tmp_path, "corrsteer_s", (8,)), -0.1, validation=0.0)
    finished_run(config(tmp_path, "random", (22,)), 0.0, validation=-0.2)
    for seed, rise in ((0, -0.2), (1, 0.1)):
        finished_run(config(tmp_path, layers=(8, 12), seed=seed), 0.1, validation=rise)
    (note,) = [line for line in tables.notes(compared(tmp_path)) if "Worse than" in line]
    assert "CorrSteer-S, 22 (68.0 → 38.0 %); CRL, 8, 12 (68.0 → 63.0 %)" in note
    assert note.endswith("; of the controls random features, 22 (68.0 → 48.0 %).")
    assert "CorrSteer-S, 8" not in note
    finished_run(config(tmp_path / "good"), 0.1)
    assert not any("Worse than" in line for line in tables.notes(compared(tmp_path / "good")))


def test_draws_with_several_seeds_each_are_as_many_as_there_are_draws(tmp_path):
    """Runs of one draw share its training items: nine of them aren't nine independent ones."""
    baseline = np.zeros(60)
    for draw in range(3):
        for seed in range(3):
            steered = np.arange(60) < 10 + 10 * draw + seed
            run_of_items(config(tmp_path, seed=seed, more={"task.train_seed": draw}),
                         baseline, steered.astype(float))  # fmt: skip
    (row,) = compared(tmp_path).rows
    samples = row.estimates().samples
    assert len(row.runs) == 9 and samples is not None
    assert sorted(samples.delta_SI.mean(axis=1) * 60) == pytest.approx([11, 21, 31])
