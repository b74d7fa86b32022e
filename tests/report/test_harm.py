"""Where what is steered does worse than nothing on validation; and multipliers of 0."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from crl_exp.config.errors import UserError
from crl_exp.experiments.kinds.evaluation import _warn_of_harm
from crl_exp.generation.controller import Unsteered
from crl_exp.report.comparison.rows import compare_runs
from crl_exp.report.tables.notes import notes
from crl_exp.runs.records import Record, find_records
from tests.helpers.synthetic import config, run_of_items
from tests.helpers.tiny_run import lab_of, run_small

SIZES = ["task.n_train=24", "task.n_validation=32", "task.n_test=16"]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), *SIZES, f"output_dir={tmp_path}", "coefficient=mean_positive"]


def said(result: dict) -> list[str]:
    return [text for text in result["warnings"] if "worse than the unsteered model" in text]


def validation_gain(result: dict) -> float:
    return result["validation"]["accuracy_steered"] - result["validation"]["accuracy_baseline"]


def test_it_is_said_where_it_does_and_0_among_the_multipliers_ends_it(common):
    """At the first layer it does harm, at the second it helps."""
    helpful, _ = run_small([*common, "method=top_activation", "method.multipliers=[4]"])
    assert validation_gain(helpful) > 0 and not said(helpful)
    at = [*common, "method=top_activation", "layers.layer=0"]
    harmful, _ = run_small([*at, "method.multipliers=[4]"])
    assert validation_gain(harmful) < 0
    (warning,) = said(harmful)
    assert "0 in method.multipliers" in warning and "of 32 items" in warning
    ended, folder = run_small([*at, "method.multipliers=[0,4]"])
    assert validation_gain(ended) == 0 and not said(ended)
    assert ended["delta"] == 0 and ended["unique_features"] == 0
    assert pq.read_table(folder / "interventions.parquet").num_rows == 0
    assert ended["notes"]["multiplier for layers [0]"] == 0


WAYS_OUT = {
    "crl": None,
    "crl method.features=fixed": "0 in method.multipliers",
    "lora": None,
    "attribution": "0 in method.multipliers",
    "raw_residual": "0 in method.multipliers",
    "probe": None,
    "probe_steering": "0 in method.doses",
    "prompting method.shots=[0,2]": None,
    "prompting method.shots=[2]": "0 in method.shots",
    "calibration": None,
    "calibration method.chosen_on=train": "chosen_on=validation",
    "bag_of_words": None,
}


@pytest.mark.parametrize(("method", "way_out"), WAYS_OUT.items())
def test_it_is_said_of_every_method_with_what_would_have_done_nothing(method, way_out, common):
    """CRL's multipliers are of fixed features alone: 0 among them would change nothing."""
    name, *more = method.split()
    workspace = lab_of([*common, f"method={name}", *more])
    _warn_of_harm(workspace, {"accuracy_baseline": 0.5, "accuracy_steered": 0.4, "n": 32})
    (warning,) = said({"warnings": workspace.warnings})
    assert "50.0 → 40.0 % of 32 items, and it is used all the same" in warning
    assert way_out in warning if way_out else warning.endswith("all the same")


def test_a_dose_of_0_adds_nothing_where_nothing_helps(common):
    workspace = lab_of([*common, "method=probe_steering", "method.doses=[0]"])
    assert isinstance(workspace.exp.method.prepare(workspace), Unsteered)


@pytest.mark.parametrize(
    "method",
    ["corrsteer_s", "corrsteer_a", "corrsteer_p", "random", "random_direction", "top_activation",
     "raw_residual", "raw_residual method.norm_match=true", "crl method.features=fixed"],
)  # fmt: skip
def test_times_0_nothing_is_added(method, common):
    name, *more = method.split()
    workspace = lab_of([*common, "layers=all", f"method={name}", *more, "method.multipliers=[0]"])
    assert isinstance(workspace.exp.method.prepare(workspace), Unsteered)


def test_a_multiplier_below_0_is_refused(common):
    with pytest.raises(UserError, match=r"method\.multipliers=\[-1.*0 or more"):
        lab_of([*common, "method=corrsteer_s", "method.multipliers=[-1]"])


@pytest.mark.parametrize(
    ("method", "label", "control"),
    [("none", "unsteered", True), ("random_direction", "random directions", True),
     ("corrsteer_a", "CorrSteer-A", False)],
)  # fmt: skip
def test_a_result_says_what_its_method_is_called_and_whether_it_is_a_control(
    method, label, control, common
):
    result, _ = run_small([*common, f"method={method}"])
    assert (result["label"], result["control"]) == (label, control)


def test_methods_are_called_as_before_results_said_so():
    import yaml
    from hydra.utils import get_class

    from crl_exp.config.compatibility import facts_of_method
    from crl_exp.report.labels import NAMES
    from tests.helpers.tiny_run import CONF

    for path in (CONF / "method").glob("*.yaml"):
        found = yaml.safe_load(path.read_text())
        method = get_class(found["_target_"])
        if found["name"] in NAMES:
            assert method.label == NAMES[found["name"]]
            facts = facts_of_method({}, found["name"], {})
            said = {name: getattr(method, name) for name in facts if name != "chose_layer"}
            assert facts == {**said, "chose_layer": False}


@pytest.mark.parametrize(
    ("typed", "unsteered", "variant_of", "chose_layer"),
    [
        ("method=none", True, "", False),
        ("method=corrsteer_s method.name=mine layers=best_on_validation", False, "corrsteer", True),
        ("method=attribution method.name=crl_of_mine", False, "", False),
        ("method=calibration layers=best_on_validation", False, "", False),
    ],
)
def test_a_result_says_of_its_method_what_a_report_asks(
    typed, unsteered, variant_of, chose_layer, common
):
    """Whatever the method is called."""
    _, folder = run_small([*common, *typed.split()])
    found = Record(folder)
    assert found.unsteered == unsteered and found.variant_of == variant_of
    assert found.chose_layer == chose_layer


def test_shuffled_labels_make_a_control(common):
    result, _ = run_small([*common, "method=corrsteer_s", "task.shuffle_labels=true"])
    assert result["control"] is True


@pytest.mark.parametrize(("flips", "said"), [(0, 0), (3, 1), (5, 0)])
def test_a_row_that_rests_on_hardly_an_item_is_told(tmp_path, flips, said):
    """There the bootstrap is too narrow: 0 fixed and 3 broken leave 0 out of it, and p is .25."""
    run_of_items(config(tmp_path), [1] * 60, [0] * flips + [1] * (60 - flips))
    sweep = compare_runs(find_records(tmp_path / "demo"))
    found = [note for note in notes(sweep) if "Hardly an answer" in note]
    assert len(found) == said and all(f"CRL, 18 ({flips})" in note for note in found)
