"""What a finished run and a sweep say where they were started."""

from __future__ import annotations

import json

import pytest

from crl_exp.report.console.spoken import print_sweep, result_line, run_lines, said_of
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.items import ItemTexts, items_table, write_items
from crl_exp.runs.records import Record
from crl_exp.runs.result import Figure, Result
from tests.helpers.synthetic import config, finished_run


def with_answers(run: RunDirectory, n: int = 1500) -> RunDirectory:
    ids, rewards = [f"item{i}" for i in range(n)], [1.0] * n
    texts = ItemTexts(ids, [None] * n, ids, ids)
    write_items(run.path, [items_table("test", ids, rewards, rewards, [False] * n, ids, texts)])
    return run


def test_a_run_says_its_result_its_folder_and_what_to_type(tmp_path, monkeypatch):
    run = with_answers(finished_run(config(tmp_path / "outputs", seed=3), 0.1, validation=0.3))
    monkeypatch.chdir(tmp_path)
    told = run_lines(Record(run.path.absolute()))
    assert told[1:3] == [
        "CRL, layer 18, seed 3: accuracy 78.0 %, +10.0 [8.0, 12.0] points against the unsteered "
        "model's 68.0 %, n = 1,500 test items",
        f"  in outputs/demo/{run.key}",
    ]
    typed = [line.split("  # ")[0].strip() for line in told[4:]]
    assert typed == [
        f"python -m crl_exp show outputs/demo/{run.key} --fixed",
        f"python -m crl_exp show outputs/demo/{run.key} --broken",
        "python -m crl_exp report outputs/demo",
    ]


def test_a_run_without_answers_offers_none(tmp_path):
    run = finished_run(config(tmp_path, layers=(8, 18)), 0.1)
    told = run_lines(Record(run.path))
    assert ", layers 8, 18, seed 0: " in told[1] and not any(" show " in line for line in told)


def test_an_undefined_figure_is_a_dash(tmp_path):
    run = finished_run(config(tmp_path), 0.1)
    undefined = {"accuracy_steered": None, "delta": None, "delta_ci95": [None, None]}
    run.result_path.write_text(json.dumps({**(run.result() or {}), **undefined}))
    assert ": accuracy – %, – points against the unsteered model's 68.0 %" in said_of(
        Record(run.path)
    )


def test_a_kind_that_is_held_against_nothing_says_its_primary_figure():
    found = Result(
        "counting", "words", {"words": Figure(12.5, 11, 14, 300), "other": Figure(None)},
        said=["more than one would think", "fewer than that"],
    )  # fmt: skip
    assert result_line(found) == (
        "words 12.500 [11.000, 14.000], n = 300; more than one would think; fewer than that"
    )
    bare = Result("counting", "other", {"other": Figure(None)})
    assert result_line(bare) == "other –"


def analysis(folder) -> RunDirectory:
    """A finished run of another kind, whose result knows nothing of steering."""
    kind = {"_target_": "crl_exp.experiments.kinds.probing.Probing", "name": "counting"}
    run = RunDirectory(config(folder, more={"experiment": kind}))
    with run.opened():
        found = Result("counting", "words", {"words": Figure(0.25, 0.2, 0.3, 40)}, said=["few"])
        same = {"run_key": run.key, "sweep": "demo", "method": "counting", "label": "counted",
                "control": False, "model": "tiny", "task": "sentiment", "layers": [18], "seed": 0,
                "n": 1500, "scorer": "exact choice", "data_digest": "0123456789abcdef"}  # fmt: skip
        run.result_path.write_text(json.dumps({**same, **found.plain()}))
    return run


def test_a_sweep_ends_with_a_table_of_its_own_runs(tmp_path, capsys):
    """Seeds are put together, kinds of analyses stand beside; what lies in the folder besides isn't
    of this sweep."""
    runs = [finished_run(config(tmp_path, seed=seed), 0.1) for seed in (0, 1)]
    runs.append(with_answers(finished_run(config(tmp_path, "corrsteer_s", (8,)), 0.05)))
    finished_run(config(tmp_path, "lora"), 0.3)
    print_sweep([Record(run.path) for run in (*runs, analysis(tmp_path))])
    told = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert any(line.startswith("CRL 18 2 1500 68.0 → 78.0 % +10.0 [") for line in lines)
    assert "CorrSteer-S 8 1 1500 68.0 → 73.0 % +5.0 [3.0, 7.0]" in lines
    assert "counted 18 1 40 words 0.250 [0.200, 0.300] –" in lines
    assert "LoRA" not in told
    assert f"python -m crl_exp report {tmp_path / 'demo'}" in told
    assert " show " not in told, "the best on validation has kept no answers"


def test_the_best_on_validation_is_offered_to_be_read(tmp_path, capsys):
    runs = [
        with_answers(finished_run(config(tmp_path, method, (8,)), 0.1, validation=rise))
        for method, rise in (("corrsteer_s", 0.2), ("corrsteer_a", 0.1), ("random", 0.3))
    ]
    print_sweep([Record(run.path) for run in runs])
    assert f"show {tmp_path}/demo:CorrSteer-S@8 --fixed" in capsys.readouterr().out


def test_runs_that_can_not_be_put_side_by_side_say_why(tmp_path, capsys):
    runs = [finished_run(config(tmp_path, seed=seed), 0.1) for seed in (0, 1)]
    runs[1].result_path.write_text(json.dumps({**(runs[1].result() or {}), "n": 7}))
    print_sweep([Record(run.path) for run in runs])
    told = capsys.readouterr().out
    assert told.startswith("no table: ") and "crl_exp status" in told


@pytest.mark.parametrize("name", ["a b", "[red]x"])
def test_a_name_is_quoted_and_shown_as_it_is(tmp_path, capsys, name):
    run = finished_run(config(tmp_path, sweep_name=name), 0.1)
    print_sweep([Record(run.path)])
    told = capsys.readouterr().out
    assert f"report '{tmp_path}/{name}'" in told
