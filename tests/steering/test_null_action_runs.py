"""Whole runs with the null action and doses: log, figures, report, resume, parity, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.config.keys import run_key
from crl_exp.experiments import config as configs
from crl_exp.report import command as report
from crl_exp.report.comparison.feature_credit import credits_of, item_lines
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.parts import compare_parts
from crl_exp.report.tables import csv as table_csv
from crl_exp.report.tables.further import further_tables
from crl_exp.runs.records import find_records
from crl_exp.steering.controllers.policy import PolicyController
from crl_exp.steering.stages.effects import cautions
from crl_exp.tracking.sending import content as tracking_content
from tests.helpers.tiny_run import lab_of, quickly_composed, run_small
from tests.runs.test_resume import outcome
from tests.steering.test_parity import TASK, actions

BOTH = ["policy.null_action=true", "policy.doses=[0.5,1.0]"]


@pytest.fixture(scope="module")
def finished(tiny_files, tmp_path_factory) -> tuple[list[str], Path, dict[str, Any]]:
    """Overrides, folder and result of a run that leaves some tokens alone and not others."""
    common = [*tiny_files.overrides(), *BOTH, "policy.k=2", "policy.combine=one_length",
              "checkpoint.updates=2", "algorithm.n_updates=5", "algorithm.lr_policy=0.1",
              "algorithm.average=0", "task.n_test=40"]  # fmt: skip
    result, folder = run_small([*common, f"output_dir={tmp_path_factory.mktemp('finished')}"])
    return common, folder, result


def test_the_log_shows_where_a_policy_steers(finished) -> None:
    _, folder, result = finished
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    alone = [row for row in rows if row["left_alone"]]
    assert 0 < len(alone) < len(rows), "nothing is shown"
    assert result["left_alone"] == pytest.approx(len(alone) / len(rows))
    assert result["unsteered_tokens"] == 0
    for row in rows:
        assert (row["features"] == []) == row["left_alone"] == (row["delta_norm"] == 0)
        assert not (row["left_alone"] and row["changed"]), "one token: the unsteered answer"
    used = json.loads((folder / "features.json").read_text())["1"]["used"]
    assert sum(one["tokens"] for one in used) == sum(len(row["features"]) for row in rows)


def test_its_share_is_in_the_journal_mlflow_and_the_report(finished) -> None:
    _, folder, result = finished
    journal = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    shares = [line["metrics"]["layer_1/left_alone"] for line in journal if len(line["metrics"]) > 1]
    assert len(shares) == 5 and 0 < shares[0] < 1
    sent = {point.name: point.value for point in tracking_content.final_points(result, 0)}
    assert sent["eval/left_alone"] == result["left_alone"]
    sweep = compare_runs(find_records(folder.parent))
    (table,) = [more for more in further_tables(sweep) if more.slug == "left_alone"]
    on_test = f"{100 * result['left_alone']:.1f}"
    rollouts = f"{100 * shares[0]:.1f} → {100 * shares[-1]:.1f}"
    assert table.lines[0][3:5] == [rollouts, on_test]
    assert table.title in tables.markdown(sweep)
    text = table_csv.rows_csv(compare_parts(find_records(folder.parent)))
    head, line = (one.split(",") for one in text.splitlines()[:2])
    assert float(dict(zip(head, line, strict=True))["left_alone"]) == result["left_alone"]
    (row,) = sweep.rows
    steered = [one for one in pq.read_table(folder / "interventions.parquet").to_pylist()
               if one["split"] == "test" and one["features"]]  # fmt: skip
    assert sum(credit.tokens for credit in credits_of(row)) >= len(steered)
    flipped = {line[2] for line in item_lines(row)}
    assert flipped <= {one["item"] for one in steered}


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(finished, tmp_path) -> None:
    common, folder, _ = finished
    copy = tmp_path / folder.parent.name / folder.name
    shutil.copytree(folder, copy)
    (copy / "result.json").unlink()
    (copy / "checkpoint.pt").unlink()  # the one after update 4 is left
    run_small([*common, f"output_dir={tmp_path}"])
    assert outcome(copy) == outcome(folder)


@pytest.mark.slow
def test_left_alone_everywhere_it_is_the_unsteered_model_and_says_so(
    tiny_files, tmp_path, quick_reports
) -> None:
    """And a report of it has no feature to show, and stands it. Without the null action the share
    is null."""
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}", "sweep_name=alone"]
    result, _ = run_small([*common, BOTH[0], "policy.null_start=0.999"])
    assert result["left_alone"] == 1 and result["delta"] == 0 and result["unique_features"] == 0
    assert any("leaves every token of the test alone" in text for text in result["warnings"])
    plain, folder = run_small([*common, "layers.layer=0"])
    assert plain["left_alone"] is None
    assert not any(pq.read_table(folder / "interventions.parquet")["left_alone"].to_pylist())
    sweep = compare_runs(find_records(tmp_path / "alone"))
    (table,) = [more for more in further_tables(sweep) if more.slug == "left_alone"]
    assert len(table.lines) == 1 and table.lines[0][4] == "100.0"
    report.main([str(tmp_path / "alone")])
    assert "Tokens left alone" in (tmp_path / "alone" / "report" / "report.html").read_text()


def test_tokens_without_a_feature_are_not_left_alone(tiny_files, tmp_path) -> None:
    """`active` leaves none of a fixed feature where it isn't active: nobody's choice."""
    common = [*tiny_files.overrides(), f"output_dir={tmp_path}", "method.features=fixed",
              "mask=active", "policy.null_action=true", "policy.null_start=0.01"]  # fmt: skip
    result, folder = run_small(common)
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    nothing = np.array([row["features"] == [] for row in rows])
    assert result["unsteered_tokens"] == pytest.approx(nothing.mean()) and nothing.any()
    assert result["left_alone"] == 0


@pytest.mark.parametrize("bias", [-30.0, 30.0])
def test_parity_with_fixed_features(bias, tiny_files, tmp_path) -> None:
    """Never left alone it is CorrSteer-A token by token; always, the unsteered model."""
    common = [*tiny_files.overrides(), "layers=all", "coefficient=mean_positive",
              f"output_dir={tmp_path}", "algorithm.n_updates=1"]  # fmt: skip
    crl = lab_of([*common, "method=crl", "method.features=fixed", "policy.null_action=true"], TASK)
    controller = crl.exp.method.prepare(crl)
    assert isinstance(controller, PolicyController) and len(controller.agents) == 3
    for one in controller.agents.values():
        with torch.no_grad():
            one.policy[-1].bias[-1] = bias  # type: ignore[union-attr, index, operator]
    got = crl.answer(controller, "test", record=True)
    if bias > 0:
        assert got.generation.tokens == crl.baseline("test").generation.tokens
        return
    other = lab_of([*common, "method=corrsteer_a"], TASK)
    expected = other.answer(other.exp.method.prepare(other), "test", record=True)
    assert got.generation.tokens == expected.generation.tokens
    steered, by_policy = actions(expected), actions(got)
    assert all(torch.equal(steered[place], by_policy[place]) for place in steered)


# --- what is refused, and what does nothing ---


def experiment(*overrides: str) -> configs.Experiment:
    return configs.experiment(quickly_composed(["tracking=none", "+debug=tiny", *overrides]))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["policy.null_start=1.5"], "null_start=1.5: must be between 0 and 1"),
        (["policy.null_start=0"], "can't be learned"),
        (["policy.doses=[0,0.5]"], "set policy.null_action=true instead"),
        (["policy.doses=[-1,0.5]"], "must be positive; warmup.negative=steer"),
        (["policy.doses=[0.5,0.5]"], "holds a dose twice"),
        (["policy.null_action=true", "method.stage2=false"], "needs method.stage2=true"),
        (["policy.doses=[0.5,1.0]", "method.stage2=false"], "no preference among them"),
        (["policy.dose_growth=1.5"], "a share of the updates"),
        (["policy.dose_growth=0.5", "method.stage2=false"], "over which the dose could grow"),
    ],
)
def test_what_cannot_be_is_refused(typed, said) -> None:
    with pytest.raises(UserError) as error:
        configs.validate(experiment(*typed))
    assert said in str(error.value) and "policy." in str(error.value)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["policy.null_start=0.2"], "does nothing without policy.null_action=true"),
        (["policy.doses=[1]"], "does nothing, as a feature is added at dose 1 anyway"),
        (["policy.doses=[0.5]"], "it is coefficient.multiplier=0.5"),
        (["policy.null_action=true", "policy.null_start=0.2", "policy.doses=[0.5,1]"], None),
    ],
)
def test_what_does_nothing_is_told(typed, said) -> None:
    found = [line for line in cautions(experiment(*typed)) if line.startswith("policy")]
    assert (said is None and not found) or (len(found) == 1 and said in found[0])


def test_where_noise_comes_matters_to_it() -> None:
    """Before or behind a sum, noise gives the features the same logits, but not the null action."""
    typed = ["noise=gaussian", "order=[noise,fusion,activation,mask]"]
    told = [line.split("=")[0] for line in cautions(experiment(*typed))]
    assert told == ["order"]
    assert cautions(experiment(*typed, "policy.null_action=true")) == []
    told = [
        line.split("=")[0] for line in cautions(experiment(typed[1], "policy.null_action=true"))
    ]
    assert told == ["order"], "without noise it doesn't"


def test_without_it_keys_are_those_of_before() -> None:
    """What it would start from is then no part of the key; with it, it is."""
    common = ["tracking=none", "+debug=tiny"]
    plain = run_key(quickly_composed(common))
    assert run_key(quickly_composed([*common, "policy.null_start=0.2"])) == plain
    keys = {
        run_key(quickly_composed([*common, *typed]))
        for typed in (["policy.null_action=true"], ["policy.doses=[0.5,1]"],
                      ["policy.null_action=true", "policy.null_start=0.2"])
    }  # fmt: skip
    assert len(keys | {plain}) == 4
