"""What choosing on few items costs, against what repeating the choice gives."""

from __future__ import annotations

import numpy as np
import pytest

from crl_exp.analysis.winners_curse import Tried, expected_largest, warnings, winners_curse
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.tables.notes import notes
from crl_exp.runs.directory import write_json
from crl_exp.runs.items import item_rewards, items_table, write_items
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, figures, run_of_items
from tests.helpers.tiny_run import run_small


def test_the_largest_of_a_few_normal_draws():
    # 1/√π of two, 3/(2√π) of three (David & Nagaraja 2003)
    assert expected_largest(1) == pytest.approx(0, abs=1e-6)
    assert expected_largest(2) == pytest.approx(np.pi**-0.5, rel=1e-3)
    assert expected_largest(3) == pytest.approx(1.5 * np.pi**-0.5, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(12, 26), (100, 5), (500, 3)])
def test_it_is_what_the_best_of_equals_gains_by_luck(n, m):
    """Options that change a fifth of the items, all for nothing."""
    draw = np.random.default_rng(0)
    gained, told = [], []
    for _ in range(400):
        base = draw.random(n) < 0.5
        flips = draw.random((m, n)) < 0.2
        reward_MI = np.where(flips, draw.random((m, n)) < 0.5, base).astype(float)
        best = reward_MI[reward_MI.mean(axis=1).argmax()]
        truth = 0.5 * 0.2 + 0.8 * base  # what each item gets on average
        gained.append(best.mean() - truth.mean())
        told.append(winners_curse(reward_MI))
    assert np.mean(told) == pytest.approx(np.mean(gained), rel=0.12)


def test_what_options_share_costs_nothing():
    same = np.random.default_rng(1).integers(0, 2, 40).astype(float)
    assert winners_curse(np.stack([same] * 9)) == 0
    assert winners_curse(same[None]) == 0


def test_neighbours_cost_less_than_strangers():
    """The best of all thresholds on a score that knows nothing: each is right half of the time."""
    draw = np.random.default_rng(0)
    gained, told = [], []
    for _ in range(60):
        score, label = np.sort(draw.standard_normal(200)), draw.random(200) < 0.5
        cuts = [-9, *(score[1:] + score[:-1]) / 2, 9]
        reward_MI = np.array([(score > cut) == label for cut in cuts], dtype=float)
        gained.append(reward_MI.mean(axis=1).max() - 0.5)
        told.append(winners_curse(reward_MI))
    assert np.mean(told) == pytest.approx(np.mean(gained), rel=0.12)
    assert expected_largest(201) * (0.25 / 200) ** 0.5 > 1.5 * np.mean(gained)


def test_who_is_clearly_worse_is_no_rival():
    draw = np.random.default_rng(0)
    good_MI = (draw.random((3, 300)) < 0.8).astype(float)
    bad_MI = (draw.random((40, 300)) < 0.3).astype(float)
    assert winners_curse(np.concatenate([good_MI, bad_MI])) == winners_curse(good_MI) > 0


def warning_of(m: int, n: int, **told: str) -> tuple[str, float]:
    """What is said, and the number that it must hold."""
    reward_MI = (np.random.default_rng(2).random((m, n)) < 0.5).astype(float)
    tried = Tried()
    for reward_I in reward_MI:
        tried.add(reward_I, **told)
    said = warnings(tried.choices())
    return said[0] if said else "", winners_curse(reward_MI)


def test_a_choice_among_many_on_few_items_is_warned_of_with_the_number():
    said, curse = warning_of(26, 12)
    assert "12 validation items" in said and "26 options" in said and curse > 0.2
    assert f"would look {100 * curse:.1f} points better" in said
    assert f"task.n_validation={np.ceil(12 * (curse / 0.02) ** 2):.0f}," in said
    assert warning_of(1, 12)[0] == "" == warning_of(2, 2000)[0]
    on_train, _ = warning_of(26, 12, among="biases", split="train")
    assert "12 train items" in on_train and "26 biases" in on_train and "task.n_train=" in on_train


def test_choices_of_several_kinds_are_told_apart():
    draw, tried = np.random.default_rng(0), Tried()
    for _ in range(5):
        tried.add(draw.random(9), "updates")
        tried.add(draw.random(9), "penalties")
    tried.add(draw.random(9), "of one")
    told = [(one["among"], one["candidates"], one["items"]) for one in tried.choices()]
    assert told == [("updates", 5, 9), ("penalties", 5, 9)]


@pytest.mark.parametrize(
    ("asked", "among", "candidates"),
    [
        (["method=crl", "algorithm.n_updates=3"], "updates of the policy", 3),
        (["method=crl", "layers=best_on_validation", "layers.among=[0,1]"], "options", 2),
        (["method=crl", "layers=best_on_validation", "layers.among=[0,1]"],
         "updates of the policy", 4),
        (["method=lora", "method.rank=1", "method.epochs=2", "method.batch_size=8"],
         "epochs of the adapter", 2),
        (["method=probe", "method.penalties=[0.1,1,10]"], "penalties of the probe of site 1", 3),
        (["method=calibration"], "biases between the options", None),
        (["method=prompting", "method.shots=[0,1]"], "options", None),
        (["method=raw_residual", "method.norm_match=false"], "options", 2),
        (["method=attribution"], "options", 2),
    ],
)  # fmt: skip
def test_a_result_says_among_how_many_its_method_chose_and_on_how_many_items(
    asked, among, candidates, tiny_files, tmp_path
):
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}", "task.n_validation=7"]
    result, _ = run_small([*common, *asked])
    (told,) = [one for one in result["choices"] if one["among"] == among]
    assert told["items"] == 7 and told["split"] == "validation" and told["winners_curse"] >= 0
    assert told["candidates"] == candidates or (candidates is None and told["candidates"] > 1)
    said = [text for text in result["warnings"] if f"choose among {told['candidates']} " in text]
    assert bool(said) >= (told["winners_curse"] >= 0.02)


def run_by_luck(made, draw: np.random.Generator) -> None:
    """A finished run whose items, 30 of test and 40 of validation, came right as a coin fell."""
    run = run_of_items(made, np.zeros(30), draw.random(30) < 0.5)
    on_validation = (draw.random(40) < 0.5).astype(float)
    write_json(run.result_path, {
        **(run.result() or {}),
        "validation": figures(float(on_validation.mean()) - 0.5, n=40, baseline=0.5),
    })  # fmt: skip
    tables = [
        items_table(split, [f"{split}{i}" for i in range(len(now))],
                    (0 * now).tolist(), now.tolist(), (now > 0).tolist(),
                    [""] * len(now))
        for split, now in (("test", item_rewards(Record(run.path)).steered),
                           ("validation", on_validation))
    ]  # fmt: skip
    write_items(run.path, tables)


def test_layers_chosen_by_a_report_are_counted_too(tmp_path):
    """On the means over seeds, from the items; not those of controls, which aren't chosen from."""
    draw = np.random.default_rng(0)
    for method in ("crl", "random"):
        for layer in range(6):
            run_by_luck(config(tmp_path, method, layers=(layer,)), draw)
    sweep = compare_runs(find_records(tmp_path))
    (told,) = sweep.choices
    assert (told["among"], told["candidates"], told["items"]) == ("layers of CRL", 6, 40)
    assert told["winners_curse"] == pytest.approx(expected_largest(6) * (0.25 / 40) ** 0.5, rel=0.2)
    assert any(
        "40 validation items are few to choose among 6 layers of CRL" in n for n in notes(sweep)
    )


def test_options_of_a_method_are_a_choice_too(tmp_path):
    """Though each has one layer, so that none was chosen. Controls, and a method of one option,
    aren't chosen from; with several layers each option's are counted by themselves besides."""
    draw = np.random.default_rng(0)
    for method in ("crl", "random"):
        for weight in range(6):
            run_by_luck(config(tmp_path, method, more={"fusion.weight": float(weight)}), draw)
    run_by_luck(config(tmp_path, "corrsteer_s"), draw)
    sweep = compare_runs(find_records(tmp_path))
    (told,) = sweep.choices
    assert not sweep.chosen
    assert (told["among"], told["candidates"], told["items"]) == ("options of CRL", 6, 40)
    assert any("few to choose among 6 options of CRL tried" in note for note in notes(sweep))
    run_by_luck(config(tmp_path, layers=(8,), more={"fusion.weight": 0.0}), draw)
    found = {
        one["among"]: one["candidates"] for one in compare_runs(find_records(tmp_path)).choices
    }
    assert found == {"layers of CRL fusion.weight=0.0": 2, "options of CRL": 7}
