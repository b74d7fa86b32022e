"""Probing, whole: what it reads and what it doesn't, resumed, packed, paired, reported, sent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from crl_exp.config.errors import UserError
from crl_exp.config.keys import frozen_config, run_key
from crl_exp.experiments.config import experiment, validate
from crl_exp.experiments.kinds import probing
from crl_exp.experiments.packing import run_pack
from crl_exp.launcher.planning.plan import unread
from crl_exp.report.command import main as report
from crl_exp.report.console.compare import main as compare
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.items import item_rewards
from crl_exp.runs.records import Record
from crl_exp.runs.result import Result
from crl_exp.tracking.sending.content import final_points
from tests.helpers.tiny_run import quickly_composed, run_small, small

SIZES = ["task.n_train=40", "task.n_validation=16", "task.n_test=20"]


@pytest.fixture
def common(tiny_files, tmp_path) -> list[str]:
    return [*tiny_files.overrides(), *SIZES, "experiment=probing", f"output_dir={tmp_path}"]


def table(folder: Path) -> dict[tuple[str, str], dict[int, dict]]:
    rows = pq.read_table(folder / "by_layer.parquet").to_pylist()
    found: dict[tuple[str, str], dict[int, dict]] = {}
    for row in rows:
        found.setdefault((row["name"], row["metric"]), {})[row["layer"]] = row
    return found


def test_every_layer_and_the_input(common):
    plain, folder = run_small(common)
    result = Result.read(plain)
    assert result.kind == "probing" and plain["layers"] == [0, 1, 2, 3]
    series = table(folder)
    assert list(series["probe", "accuracy"]) == [-1, 0, 1, 2, 3]
    accuracy = series["probe", "accuracy"][2]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"] and accuracy["n"] == 20
    control = series["permuted_labels", "accuracy"][2]
    assert control["low"] <= control["value"] <= control["high"]
    assert {"auc", "brier", "ece"} <= {metric for name, metric in series if name == "probe"}
    best = result.figures["best_layer"].value
    assert isinstance(best, int)
    on_validation = series["probe_on_validation", "accuracy"]
    assert on_validation[best]["value"] == max(row["value"] for row in on_validation.values())
    assert result.figures["validation/accuracy"].value == on_validation[best]["value"]


def test_the_input_of_the_first_layer_reads_nothing(common):
    """All last prompt tokens are one vector there, behind a template: AUC .5, and nothing fails."""
    _, folder = run_small([*common, "layers=single", "layers.layer=0"])
    assert table(folder)["probe", "auc"][-1]["value"] == 0.5


def test_of_absolute_positions_the_input_holds_the_prompts_length(tmp_path, tiny_files):
    """So the prompt's length alone stands beside the curve."""
    from tests.helpers import tiny

    tiny.save_model("gpt2", tmp_path / "gpt2")
    words = [word for word in tiny.WORDS if word.startswith("w")]
    rows = [
        {"question": " ".join(words[(i + j) % 58] for j in range(n)),
         "answer": "yes" if n > 6 else "no"}
        for i in range(20) for n in (2, 3, 4, 9, 10, 11)
    ]  # fmt: skip
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, folder = run_small([
        *tiny_files.overrides(), f"model.path={tmp_path / 'gpt2'}", "experiment=probing", *SIZES,
        f"task.path={tmp_path / 'task.jsonl'}", f"output_dir={tmp_path}", "layers=single",
    ])  # fmt: skip
    assert table(folder)["probe", "auc"][-1]["value"] == 1.0
    assert Result.read(plain).figures["prompt_length/auc"].value == 1.0


def test_at_its_best_layer_it_is_the_probe_that_answers(common, tmp_path):
    """The same items, in pairs: so any run that steers can be compared with it."""
    plain, folder = run_small(common)
    best = Result.read(plain).figures["best_layer"].value
    assert best is not None
    if best == -1:
        pytest.skip("the input isn't a layer that a method can be given")
    answers = [one for one in common if one != "experiment=probing"]
    result, other = run_small(
        [*answers, "method=probe", "layers=single", f"layers.layer={int(best)}"]
    )
    mine, theirs = (item_rewards(Record(path)) for path in (folder, other))
    assert mine.ids == theirs.ids
    np.testing.assert_array_equal(mine.steered, theirs.steered)
    np.testing.assert_array_equal(mine.baseline, theirs.baseline)
    assert plain["delta"] == result["delta"]


def test_compare_pairs_it_with_a_run_that_steers(common, capsys):
    _, folder = run_small(common)
    answers = [one for one in common if one != "experiment=probing"]
    _, other = run_small([*answers, "method=none"])
    assert compare([str(folder), str(other)]) == 0
    assert "A − B on test" in capsys.readouterr().out


# --- keys, and what isn't read ---


def test_the_key_holds_what_is_read_alone(common):
    key = run_key(small(common))
    for other in ("method=none", "coefficient=unit", "sae.name=x", "policy.hidden=3", "mask=all"):
        assert run_key(small([*common, other])) == key, other
    for other in ("seed=1", "experiment.control_draws=20", "layers=single", "task.n_test=18"):
        assert run_key(small([*common, other])) != key, other


def test_the_frozen_config_has_what_is_read_and_runs_on(common):
    _, folder = run_small(common)
    frozen = yaml.safe_load((folder / "config.yaml").read_text())
    assert "method" not in frozen and "sae" not in frozen and frozen["task"]
    again = frozen_config(folder)
    assert run_key(again) == folder.name
    assert validate(experiment(again)) == [0, 1, 2, 3]


def test_a_section_that_isnt_read_cant_be(common):
    exp = experiment(small(common))
    assert exp.model.name == "tiny"
    with pytest.raises(AttributeError, match=r"experiment=probing doesn't read `method`"):
        _ = exp.method.name
    with pytest.raises(AttributeError, match=r"name it in the class's `reads`"):
        _ = exp.order.index


def test_what_is_typed_for_a_section_that_isnt_read_is_told(common):
    exp = experiment(small(common))
    typed = ["experiment=probing", "method=crl", "+policy.k=2", "task.n_test=20", "seed=1"]
    assert unread(exp, typed) == [
        "method=crl changes nothing: experiment=probing doesn't read method",
        "+policy.k=2 changes nothing: experiment=probing doesn't read policy",
    ]
    steered = experiment(small([one for one in common if one != "experiment=probing"]))
    assert unread(steered, ["method=crl", "policy.k=2"]) == []


# --- the frame ---


def test_cut_off_between_layers_it_goes_on_and_ends_the_same(common, tmp_path, monkeypatch):
    whole, folder = run_small(common)
    seen: list[int] = []
    fit_at = probing.Probing._at

    def cut(self, workspace, lesson, layer, check):
        seen.append(layer)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return fit_at(self, workspace, lesson, layer, check)

    elsewhere = [*common[:-1], f"output_dir={tmp_path / 'again'}", "checkpoint.updates=1"]
    monkeypatch.setattr(probing.Probing, "_at", cut)
    with pytest.raises(KeyboardInterrupt):
        run_small(elsewhere)
    again, other = run_small(elsewhere)
    assert seen == [-1, 0, 1, 1, 2, 3], "what was done is not done twice"
    same = ("figures", "by_layer", "said", "choices", "delta", "data_digest")
    assert {name: whole[name] for name in same} == {name: again[name] for name in same}
    assert pq.read_table(folder / "items.parquet") == pq.read_table(other / "items.parquet")


def test_packed_they_get_what_they_get_alone(common, tmp_path):
    alone, _ = run_small(common)
    packed = [*common[:-1], f"output_dir={tmp_path / 'packed'}"]
    ours, other = run_pack([small(packed), small([*packed, "seed=1"])])
    assert isinstance(ours, dict) and isinstance(other, dict)
    assert ours["figures"] == alone["figures"] and ours["packed"] == 2
    assert other["by_layer"]["probe/auc"] == ours["by_layer"]["probe/auc"], "no seed is in a probe"
    name = "permuted_labels/accuracy"
    assert other["by_layer"][name] != ours["by_layer"][name], "it is in the permutations"


def test_report_shows_it_beside_methods(common, tmp_path):
    run_small(common)
    answers = [one for one in common if one != "experiment=probing"]
    for layer in (1, 2):
        run_small([*answers, "method=crl", "layers=single", f"layers.layer={layer}"])
    assert report(["single", "--output-dir", str(tmp_path)]) == 0
    made = tmp_path / "single" / "report"
    page = (made / "report.html").read_text()
    for text in ("linear probe by layer", "readable", "CRL", "validation/accuracy"):
        assert text in page
    assert (made / "analyses.png").exists() and (made / "by_layer.png").exists()
    lines = (made / "analyses.csv").read_text().splitlines()
    assert lines[0].startswith("sweep,run_key,analysis,name,metric")
    assert sum(",permuted_labels,accuracy," in line for line in lines) == 5


def test_report_of_analyses_alone(common, tmp_path, capsys):
    run_small(common)
    run_small([*common, "seed=1"])
    assert report(["single", "--output-dir", str(tmp_path)]) == 0
    made = tmp_path / "single" / "report"
    assert (made / "analyses.png").exists() and not (made / "by_layer.png").exists()
    told = capsys.readouterr().out
    assert "linear probe by layer" in told
    typed = [line.strip() for line in told.splitlines() if line.strip().startswith("python launch")]
    assert len(typed) == 2 and "experiment=probing seed=1,2" in typed[0]
    assert "experiment" not in typed[1] and "method=crl layers=single" in typed[1]


def test_mlflow_gets_the_figures_by_layer(common):
    plain, _ = run_small(common)
    points = final_points(plain, 0)
    sent = {(point.name, point.step): point.value for point in points}
    assert ("by_layer/probe/accuracy", -1) in sent and ("by_layer/probe/accuracy/low", 3) in sent
    assert sent["eval/primary", 0] == plain["figures"]["validation/accuracy"]["value"]
    assert len(points) == len(sent), "each once"


# --- what it can't do with ---


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experiment.target=reward2", "must be one of option, reward, did you mean reward?"),
        ("experiment.control_draws=5", "must be 19 or more"),
        ("experiment.penalties=[]", "must be positive numbers"),
        ("experiment.penalties=[0.0]", "must be positive numbers"),
        ("experiment.bins=1", "must be from 2 to 1000"),
        ("experiment.calibration=beta", "must be platt or null"),
        ("layers.layer=9", "layer 9 is out of range"),
    ],
)
def test_bad_options(override, said, common):
    more = ["layers=single"] * override.startswith("layers")
    with pytest.raises(UserError) as caught:
        validate(experiment(small([*common, *more, override])))
    assert said.split(",")[0] in str(caught.value)


def test_free_text_has_no_option_to_read():
    config = quickly_composed(["experiment=probing", "task=one_sentence", "+debug=tiny"])
    config = quickly_composed(["experiment=probing", "task=one_sentence", "model=tiny"])
    with pytest.raises(UserError, match=r"set experiment\.target=reward"):
        validate(experiment(config))


@pytest.mark.parametrize(
    ("kind", "name"), [("probing", "steering"), ("steering", "mine")], ids=["taken", "another"]
)
def test_what_steers_is_called_steering_and_nothing_else_is(kind, name):
    """Reports, status and MLflow tell runs apart by it."""
    with pytest.raises(UserError, match=rf"experiment\.name={name}: .* leave the name as it comes"):
        experiment(quickly_composed([f"experiment={kind}", f"experiment.name={name}"]))


def test_a_negative_seed_is_a_seed(common):
    assert run_small([*common, "seed=-1", "layers=single"])[0]["seed"] == -1


def test_without_saes_there_are_none_to_load(common):
    from crl_exp import load_saes

    steering = [one for one in common if not one.startswith(("sae.", "experiment="))]
    for config in (small(common), small([*steering, "sae=none", "method=probe"])):
        with pytest.raises(UserError, match=r"has no SAEs .* compose one with sae=…"):
            load_saes(config)


def test_a_kind_that_is_none():
    with pytest.raises(UserError, match=r"is not a ExperimentKind|is no kind of experiment"):
        experiment(quickly_composed(["experiment._target_=crl_exp.tasks.sums.Sums"]))


def test_what_the_reward_was_can_be_read(common):
    plain, folder = run_small([*common, "experiment.target=reward"])
    assert plain["kind"] == "probing" and not (folder / "items.parquet").exists()
    with pytest.raises(UserError, match=r"is an analysis \(experiment=probing\)"):
        compare([str(folder), str(folder)])


def test_a_finished_one_is_not_run_again(common):
    run_small(common)
    with pytest.raises(UserError, match="already finished"):
        run_small(common)
    assert RunDirectory(small(common)).result() is not None
