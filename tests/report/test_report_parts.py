"""Reports of sweeps over several tasks, models or SAE releases, from synthetic run directories."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from crl_exp.analysis.statistics import share_interval
from crl_exp.config.errors import UserError
from crl_exp.report.command import main
from crl_exp.report.parts import ReportPart, SweepParts, best_rows, compare_parts
from crl_exp.report.tables import cells as table_cells
from crl_exp.report.tables import latex as table_latex
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.records import find_records
from tests.helpers.synthetic import config, finished_run

pytestmark = pytest.mark.usefixtures("quick_reports")


def parts_of(folder: Path, *by: str) -> SweepParts:
    return compare_parts(find_records(folder / "demo"), by)


def two_tasks(folder: Path) -> None:
    for task, rise in (("gsm8k", 0.0), ("mmlu", 0.1)):
        name = {"task.name": task}
        for seed, more in enumerate((0.02, 0.04)):
            finished_run(config(folder, seed=seed, more=name), rise + more, n=100)
        for layer, validation in ((8, 0.3), (12, 0.2)):
            made = config(folder, "corrsteer_s", (layer,), more=name)
            finished_run(made, layer / 100, validation=validation, n=100)
        finished_run(config(folder, "none", more=name), 0.0, n=100, half=0.0)


def test_wilson_interval_by_hand():
    # p = 0.5, n = 100, z² = 3.84146: 0.5 ± sqrt(3.84146 * (0.0025 + 0.0000960365)) / 1.0384146
    assert share_interval(0.5, 100) == pytest.approx((0.403832, 0.596168), abs=1e-6)
    low, high = share_interval(0.0, 10)
    assert low == 0.0 and high == pytest.approx(3.84146 / 13.84146, abs=1e-6)
    assert share_interval(1.0, 10)[1] == 1.0


def test_a_table_of_methods_by_task(tmp_path):
    two_tasks(tmp_path)
    parts = parts_of(tmp_path)
    assert parts.keys == ["task"] and [part.title for part in parts.parts] == ["gsm8k", "mmlu"]
    head, lines = table_cells.matrix(parts)
    assert head == ["method", "gsm8k, n = 100", "mmlu, n = 100"]
    cells = {line[0]: line[1:] for line in lines}
    # Two seeds 2 points apart: t(1) = 12.7062 times 1.41421 / sqrt(2) = 12.7 points; items: 2
    assert cells["CRL"] == [
        "71.0 [54.0, 83.6]\n+3.0 [-9.9, 15.9]", "81.0 [62.7, 91.5]\n+13.0 [0.1, 25.9]",
    ]  # fmt: skip
    # 8 is the best on validation, 12 on test; Wilson's interval of 76 %, n = 100
    assert cells["CorrSteer-S"][0] == "76.0 [66.8, 83.3]\n+8.0 [6.0, 10.0]"
    assert cells["unsteered"][1].startswith("68.0 [")


def test_the_report_of_several_tasks(tmp_path, capsys):
    two_tasks(tmp_path)
    assert main([str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo" / "report"
    for task in ("gsm8k", "mmlu"):
        for name in ("table.md", "table.tex", "by_layer.png", "by_layer.pdf"):
            assert (folder / task / name).stat().st_size > 300
    text = (folder / "table.md").read_text()
    assert "## demo: gsm8k, tiny, n = 100" in text and "## demo: mmlu, tiny, n = 100" in text
    lines = list(csv.DictReader((folder / "overview.csv").open()))
    assert [line["task"] for line in lines].count("mmlu") == 3
    (crl,) = [line for line in lines if line["method"] == "CRL" and line["task"] == "mmlu"]
    assert float(crl["accuracy"]) == pytest.approx(0.81) and crl["seeds"] == "0 1"
    assert float(crl["delta_low"]) == pytest.approx(0.13 - (0.127062**2 + 0.02**2) ** 0.5, abs=1e-5)
    every = list(csv.DictReader((folder / "table.csv").open()))
    assert len(every) == 8 and {line["task"] for line in every} == {"gsm8k", "mmlu"}
    said = capsys.readouterr().out
    assert re.search(r"mmlu\s+unsteered", said) and "accuracy is Wilson's" in said


def test_latex_of_several_tasks(tmp_path):
    two_tasks(tmp_path)
    text = table_latex.latex_of_parts(parts_of(tmp_path))
    assert text.count("{") == text.count("}")
    rows = [line for line in text.splitlines() if line.endswith(" \\\\")]
    assert {line.count(" & ") for line in rows} == {2, 7}
    assert "CRL & 71.0 [54.0, 83.6] & 81.0 [62.7, 91.5] \\\\" in rows
    assert " & {\\scriptsize +3.0 [$-$9.9, 15.9]} & {\\scriptsize +13.0 [0.1, 25.9]} \\\\" in rows
    assert rows[0] == "method & gsm8k, n = 100 & mmlu, n = 100 \\\\"


def test_latex_is_escaped():
    got = table_latex.escape("a_b & 5 % {x} < 0.001, -0.5 [-1, p-q] Δ 8…22")
    assert got == (
        r"a\_b \& 5 \% \{x\} $<$ 0.001, $-$0.5 [$-$1, p-q] $\Delta$ 8\dots{}22"
    )  # fmt: skip


def test_within_a_task_unlike_runs_are_still_refused(tmp_path):
    two_tasks(tmp_path)
    odd = config(tmp_path, seed=7, more={"task.name": "mmlu", "task.split_seed": 3})
    key = finished_run(odd, 0.1).key
    with pytest.raises(UserError, match=rf"(?s)task=mmlu: .*task\.split_seed: .*{key}") as caught:
        parts_of(tmp_path)
    assert "gsm8k" not in str(caught.value)
    assert "`--by task.split_seed`" in str(caught.value)
    parts = parts_of(tmp_path, "task.split_seed")
    assert parts.keys == ["task", "task.split_seed"] and len(parts.parts) == 3


PLAIN, NAMED = "Good or bad? {text}", "Good or bad? Say Good or Bad. {text}"


def worded(tmp_path, wording: str, question: str, method: str, delta: float, **figures):
    more = {"task.wording": wording, "task.question": question}
    finished_run(config(tmp_path, method, more=more), delta, **figures)


def test_wordings_stand_side_by_side(tmp_path):
    """Each with an unsteered model of its own; a run of an earlier version is of the plain one."""
    finished_run(config(tmp_path, "none", more={"task.question": PLAIN}), 0.0, baseline=0.545)
    worded(tmp_path, "plain", PLAIN, "crl", 0.30, baseline=0.545)
    worded(tmp_path, "options_named", NAMED, "none", 0.0, baseline=0.691)
    worded(tmp_path, "options_named", NAMED, "crl", 0.12, baseline=0.691)
    parts = parts_of(tmp_path)
    assert parts.keys == ["wording"]
    assert [part.folder for part in parts.parts] == ["options_named", "plain"]
    lines = table_cells.overview_cells(parts)
    assert [(line[0], line[1], line[5].split()[0]) for line in lines] == [
        ("options_named", "unsteered", "69.1"), ("options_named", "CRL", "81.1"),
        ("plain", "unsteered", "54.5"), ("plain", "CRL", "84.5"),
    ]  # fmt: skip
    assert [line[6].split()[0] for line in lines if line[1] == "CRL"] == ["+12.0", "+30.0"]


def test_questions_that_were_typed_are_named_by_how_they_begin(tmp_path):
    """Long ones that begin alike are numbered; chat_template and shots are said as typed."""
    long = "Is this review, taken as a whole, positive or negative? "
    for question in (PLAIN, f"{long}One word. {{text}}", f"{long}Yes? {{text}}"):
        worded(tmp_path, "plain", question, "crl", 0.1)
    found = [part.title for part in parts_of(tmp_path).parts]
    short = "Is this review, taken as a whole, posit…"
    assert found == [PLAIN, short, f"{short} (2)"]
    assert len({part.folder for part in parts_of(tmp_path).parts}) == 3


def folder_of(*values: str) -> str:
    return ReportPart(tuple((f"key{i}", value) for i, value in enumerate(values)), None).folder  # type: ignore[arg-type]


def test_each_part_has_a_folder_of_its_own(tmp_path):
    """Also where names differ in what no folder's name holds; the report writes into both."""
    for question in ("Good or bad? {text}", "Good, or bad: {text}"):
        worded(tmp_path, "plain", question, "crl", 0.1)
    folders = [part.folder for part in parts_of(tmp_path).parts]
    assert len(set(folders)) == 2 and all(one.startswith("Good_or_bad_text") for one in folders)
    assert main([str(tmp_path / "demo")]) == 0
    assert all((tmp_path / "demo" / "report" / one / "table.md").exists() for one in folders)
    assert folder_of("mmlu", "gemma-2-2b_it") == "mmlu-gemma-2-2b_it", "a plain name stays"


@pytest.mark.parametrize("text", ["評価" * 150, "この文は良いですか？" * 30, "é" * 299 + "?", "?!"])
def test_a_folder_of_any_text_can_be_made(text, tmp_path):
    name = folder_of("mmlu", text)
    assert len(name.encode()) < 255
    (tmp_path / name).mkdir()
    assert (tmp_path / name).parent == tmp_path
    for shots in (0, 5):
        more = {"task.name": "mmlu", "task.n_shots": shots, "task.chat_template": shots == 0}
        finished_run(config(tmp_path, more=more), 0.1)
    finished_run(config(tmp_path, more={"task.name": "gsm8k"}), 0.1)
    parts = parts_of(tmp_path)
    assert parts.keys == ["task", "wording"]
    assert [part.title for part in parts.parts] == [
        "gsm8k", "mmlu, n_shots=0, chat_template=true", "mmlu, n_shots=5, chat_template=false",
    ]  # fmt: skip


def test_data_that_changed_on_disk_is_refused(tmp_path):
    finished_run(config(tmp_path), 0.1)
    run = finished_run(config(tmp_path, seed=1), 0.1)
    write_json(run.result_path, {**(run.result() or {}), "data_digest": "fedcba"})
    with pytest.raises(UserError, match=rf'(?s)data_digest: .*"fedcba" in 1 \({run.key}\)'):
        parts_of(tmp_path)


def said_of_itself(run, **more) -> None:
    write_json(run.result_path, {**(run.result() or {}), **more})


def test_other_weights_and_other_tokens_under_one_config_are_refused(tmp_path):
    """Not those of the items that are trained on, which n_train changes; nor what isn't known."""
    fed = {"train": "t", "validation": "v", "test": "x"}
    first = finished_run(config(tmp_path), 0.1)
    said_of_itself(first, weights="aaaa", fed=fed)
    finished_run(config(tmp_path, seed=1), 0.1)  # of an earlier version, which said neither
    more = finished_run(config(tmp_path, more={"task.n_train": 50}), 0.1)
    said_of_itself(more, weights="aaaa", fed=fed | {"train": "other"})
    assert len(parts_of(tmp_path).parts[0].sweep.rows) == 2
    assert refused(tmp_path, more, fed=fed | {"test": "y"}).startswith("fed.test: ")
    assert refused(tmp_path, more, fed=fed, weights="bbbb").startswith("weights: ")
    alike = finished_run(config(tmp_path, seed=2), 0.1)
    said_of_itself(more, weights="aaaa")
    assert refused(tmp_path, alike, fed=fed | {"train": "other"}).startswith("fed.train: ")


def refused(folder, run, **more) -> str:
    """The line on what differs, which names the run that says something else."""
    said_of_itself(run, **more)
    with pytest.raises(UserError) as told:
        parts_of(folder)
    (line,) = [line.strip() for line in str(told.value).splitlines() if run.key in line]
    return line


def test_another_model_has_other_weights_and_reads_other_tokens(tmp_path):
    for name in ("a", "b"):
        run = finished_run(config(tmp_path, more={"model.path": name}), 0.1)
        said_of_itself(run, weights=name, fed={"test": name})
    with pytest.raises(UserError) as told:
        parts_of(tmp_path)
    assert "model.path" in str(told.value)
    assert "weights" not in str(told.value) and "fed" not in str(told.value)


def test_an_unknown_key_names_the_near_ones(tmp_path):
    finished_run(config(tmp_path), 0.1)
    with pytest.raises(UserError, match=r"--by model\.dtpe: .*did you mean 'model\.dtype'"):
        parts_of(tmp_path, "model.dtpe")


def test_models_with_their_saes(tmp_path):
    """The release follows from the model, so it isn't said."""
    for model, sae in (("big", "scope"), ("small", "ours")):
        finished_run(config(tmp_path, more={"model.name": model, "sae.name": sae}), 0.1)
    assert [part.names for part in parts_of(tmp_path).parts] == [
        (("model", "big"),), (("model", "small"),),
    ]  # fmt: skip
    finished_run(config(tmp_path, more={"model.name": "big", "sae.name": "wide"}), 0.1)
    parts = parts_of(tmp_path)
    assert [part.title for part in parts.parts] == ["big, scope", "big, wide", "small, ours"]
    assert parts.parts[0].folder == "big-scope"


def test_seeds_that_chose_a_layer_each_are_one_row(tmp_path):
    for seed, layer in enumerate((12, 18, 12)):
        # `layers` stands in for what the run chose, which the synthetic result takes from there.
        best = {
            "_target_": "crl_exp.experiments.layers.BestOnValidation",
            "among": None,
            "layers": [layer],
        }
        finished_run(config(tmp_path, seed=seed, more={"layers": best}), 0.1 * seed)
    (part,) = parts_of(tmp_path).parts
    (row,) = part.sweep.rows
    assert row.layers == (12, 18) and row.alternatives and len(row.runs) == 3
    assert table_cells.row_layers(row) == "12 or 18"
    assert row.family == "CRL at its best layer"


def test_controls_have_the_same_choice_of_layer(tmp_path):
    for layer, validation in ((8, 0.3), (12, 0.1)):
        finished_run(config(tmp_path, "random", (layer,)), layer / 100, validation=validation)
    (part,) = parts_of(tmp_path).parts
    assert best_rows(part.sweep)["random features"].layers == (8,)
    assert part.sweep.chosen == set()


def test_a_task_without_a_finished_run_is_listed(tmp_path, capsys):
    finished_run(config(tmp_path), 0.1)
    bad = RunDirectory(config(tmp_path, more={"task.name": "mmlu"}))
    with pytest.raises(RuntimeError), bad.opened():
        raise RuntimeError("no data")
    assert main([str(tmp_path / "demo")]) == 0
    assert f"{bad.key} failed: no data" in capsys.readouterr().out
    assert f"{bad.key} failed" in (tmp_path / "demo" / "report" / "table.md").read_text()


def test_what_an_earlier_report_wrote_is_removed(tmp_path):
    finished_run(config(tmp_path, more={"task.name": "gsm8k"}), 0.1)
    assert main([str(tmp_path / "demo")]) == 0
    folder = tmp_path / "demo" / "report"
    (folder / "mine.txt").write_text("kept")
    assert (folder / "by_layer.png").exists()
    finished_run(config(tmp_path, more={"task.name": "mmlu"}), 0.1)
    assert main([str(tmp_path / "demo")]) == 0
    assert not (folder / "by_layer.png").exists() and (folder / "mmlu" / "by_layer.png").exists()
    assert (folder / "mine.txt").read_text() == "kept"
