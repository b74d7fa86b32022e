"""Tables and figures of a sweep, from synthetic run directories."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from crl_exp.config.errors import UserError
from crl_exp.report.command import main, next_lines
from crl_exp.report.comparison.rows import SweepComparison, compare_runs
from crl_exp.report.console import terminal as tables
from crl_exp.report.figures.style import look
from crl_exp.report.tables import notes as table_notes
from crl_exp.runs.directory import RunDirectory
from crl_exp.runs.records import find_records, find_sweep
from tests.helpers.synthetic import config, figures, finish, finished_run, result

SHUFFLED = {"task.shuffle_labels": True}


def compared(folder: Path) -> SweepComparison:
    return compare_runs(find_records(folder / "demo"))


def test_headline_compares_the_chosen_ones(tmp_path):
    for seed, delta in enumerate((0.16, 0.18)):
        finished_run(config(tmp_path, seed=seed), delta)
    finished_run(config(tmp_path, "corrsteer_s"), 0.09, validation=0.01)
    finished_run(config(tmp_path, "corrsteer_a", (8, 18)), 0.05, validation=0.06)
    told = table_notes.headline(compared(tmp_path))
    # 12 points over A; t(1) = 12.7062, half width 12.7062 * 1.41421 / sqrt(2) = 12.7 points for the
    # seeds; 1.96 * sqrt(.85 * .15 + .73 * .27) / sqrt(1500) = 2.9 for the items, unpaired
    assert told is not None
    assert "CorrSteer-A, layers 8, 18: 73.0 %" in told and "CRL, layer 18: 85.0 %" in told
    assert (
        "+12.0 [-1.0, 25.0] points (not paired by item, so too wide; seeds: 2 and 1, n = 1500)"
        in told
    )


def test_headline_has_the_best_rival_and_the_best_corrsteer(tmp_path):
    """Of CRL's variants the best on validation; controls are no rivals."""
    finished_run(config(tmp_path), 0.1)
    finished_run(config(tmp_path, "crl_published"), 0.11, validation=0.2)
    finished_run(config(tmp_path, "corrsteer_s"), 0.05)
    finished_run(config(tmp_path, "lora"), 0.14)
    finished_run(config(tmp_path, "random"), 0.3)
    told = table_notes.headline(compared(tmp_path))
    assert told is not None and "CRL as published, layer 18: 79.0 %" in told
    assert "best of all other methods, baselines included: LoRA, layer 18: 82.0 %" in told
    assert "difference -3.0 [" in told
    assert "best CorrSteer: CorrSteer-S, layer 18: 73.0 %; difference +6.0 [" in told


def test_no_two_methods_look_alike(tmp_path):
    methods = (
        "none", "crl", "crl_published", "attribution", "prompting", "calibration", "probe",
        "probe_steering", "lora", "bag_of_words", "listed", "a_users", "corrsteer_s",
    )  # fmt: skip
    for method in methods:
        finished_run(config(tmp_path, method), 0.1)
    finished_run(config(tmp_path, more=SHUFFLED), 0.1)
    sweep = compared(tmp_path)
    looks = look(sweep)
    assert looks["CRL"] == ("#0072B2", "o") == looks.pop("CRL (shuffled labels)")
    assert len(set(looks.values())) == len(looks) == len(methods)
    order = [row.family for row in sweep.rows]
    assert order.index("listed features") < order.index("CRL") < order.index("CRL as published")
    assert order.index("bag of words (no model)") < order.index("LoRA") < order.index("a_users")


@pytest.mark.parametrize("key", ["train_seed", "n_validation", "n_validation_benign"])
def test_training_items_drawn_anew_are_compared(tmp_path, key):
    for value in (5, 6):
        run = finished_run(config(tmp_path, more={f"task.{key}": value}), 0.1)
        written = {**(run.result() or {}), "data_digest": f"digest{value}"}
        run.result_path.write_text(json.dumps(written))
    sweep = compared(tmp_path)
    rows = 1 if key == "train_seed" else 2
    assert len(sweep.rows) == rows
    assert any("task.train_seed" in note for note in table_notes.notes(sweep)) == (rows == 1)


@pytest.mark.usefixtures("quick_reports")
def test_unfinished_runs_are_listed_with_their_state(tmp_path, capsys):
    odd = {"model.name": "a[/red]b", "sae.name": "[bold]s"}  # no markup: rich would raise
    finished_run(config(tmp_path, more=odd), 0.1)
    bad = RunDirectory(config(tmp_path, seed=1, more=odd))
    with pytest.raises(RuntimeError), bad.opened():
        raise RuntimeError("layer 18: loss is nan [/red]\nand more")
    with RunDirectory(config(tmp_path, seed=2, more=odd)).opened():
        assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{bad.key} failed: layer 18: loss is nan [/red]" in said and " running" in said
    assert "a[/red]b" in said
    assert f"- {bad.key} failed" in (tmp_path / "demo" / "report" / "table.md").read_text()


def test_unknown_sweep_names_the_nearest(tmp_path):
    finished_run(config(tmp_path), 0.1)
    with pytest.raises(UserError, match="did you mean 'demo'"):
        find_sweep("dmo", tmp_path)


def test_what_to_type_next_is_of_this_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output_dir, also in ((Path("outputs"), ""), (Path("a b"), " 'output_dir=a b'")):
        finished_run(config(output_dir), 0.1)
        for asked, kept in (
            ([], ""),
            (["+sweep=layerwise", "seed=0,1", "k=1,2", "model=hf", "model.path=/a/b"],
             " model=hf model.path=/a/b"),
            (["output_dir=other"], " output_dir=other"),
            (["task.choices=[yes,no]", "method.multipliers=[1.0],[2.0]", "layers.among=[[1,2],3]"],
             " 'task.choices=[yes,no]' 'layers.among=[[1,2],3]'"),
        ):  # fmt: skip
            asking = {"hydra": {"overrides": {"task": asked}}}
            OmegaConf.save(asking, output_dir / "demo" / "multirun.yaml")
            told = next_lines(compared(output_dir), output_dir / "demo")[0].split("  #")[0].strip()
            place = "" if "other" in kept else also
            names = "sweep_name=demo task=sentiment"
            layers = "layers.layer=18 seed=3,4"
            assert told == f"python launch.py -m {names}{kept}{place} {layers}"


def demo_sweep(folder: Path) -> None:
    for layer, delta in ((8, 0.05), (18, 0.15)):
        for seed in (0, 1, 2):
            made = config(folder, layers=(layer,), seed=seed)
            finished_run(made, delta + seed / 100, steps=30)
        finished_run(config(folder, "corrsteer_s", (layer,)), delta / 2)
        finished_run(config(folder, "random", (layer,)), 0.0)
    finished_run(config(folder, layers=(18,), more=SHUFFLED), -0.01, steps=30)
    finished_run(config(folder, "corrsteer_a", (8, 18)), 0.06)
    finished_run(config(folder, "none"), 0.0, half=0.0, ser=None)


@pytest.mark.slow
def test_the_whole_report(tmp_path, capsys):
    from matplotlib.image import imread

    demo_sweep(tmp_path)
    assert main([str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "demo" / "report"
    for name in ("table.md", "table.csv", "by_layer.png", "training.png"):
        assert str(folder / name) in said
    assert re.search(r"CRL\s+8\s+3\s+1500\s+68\.0 → 74\.0\s+\+6\.0 \[2\.8, 9\.2\]", said)
    for line in ("layers.layer=8,18 seed=3,4", "mask=active", "resume=force", "mlflow ui"):
        assert line in said
    lines = {(r["method"], r["layers"]): r for r in csv.DictReader((folder / "table.csv").open())}
    assert len(lines) == 9
    best = lines["CRL", "18"]
    assert best["chosen_on_validation"] == "True" and best["seeds"] == "0 1 2"
    assert float(best["delta"]) == pytest.approx(0.16)
    for name in ("by_layer.png", "training.png"):
        pixels = imread(folder / name)[..., :3]
        colours = np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)
        assert pixels.shape[0] > 600 and len(colours) > 50
    blue = np.array([0, 0x72, 0xB2]) / 255  # CRL's
    shown = np.abs(imread(folder / "by_layer.png")[..., :3] - blue).max(axis=-1) < 0.01
    assert shown.sum() > 500


@pytest.mark.slow
def test_the_report_can_be_made_again(tmp_path):
    """Its own folder and mlflow.json in the sweep's are not taken for runs."""
    demo_sweep(tmp_path)
    for _ in range(2):
        assert main(["demo", "--output-dir", str(tmp_path)]) == 0
    assert len(compared(tmp_path).unfinished) == 0


def refusal_run(folder: Path, method: str, delta: float, benign: float) -> None:
    run = RunDirectory(config(folder, method))
    sets = {
        "harmbench": figures(delta / 2, n=400, baseline=0.02, half=0.01),
        "benign": figures(-benign, n=150, baseline=0.98, half=0.04),
    }
    with run.opened():
        test = figures(delta, n=300, baseline=0.21)
        finish(run, result(run, test, figures(delta, n=50), sets))


@pytest.mark.usefixtures("quick_reports")
def test_refusals_of_harmful_and_benign_prompts_side_by_side(tmp_path):
    refusal_run(tmp_path, "corrsteer_s", 0.1, 0.08)
    text = tables.markdown(compared(tmp_path))
    assert "| sentiment, n = 300 | harmbench, n = 400 | benign (over-refusal), n = 150 |" in text
    (line,) = [line for line in text.splitlines() if line.count("<br>") == 3]
    assert line == (
        "| CorrSteer-S | 18 | 21.0 → 31.0<br>+10.0 [8.0, 12.0] | 2.0 → 7.0<br>+5.0 [4.0, 6.0] | "
        "2.0 → 10.0<br>+8.0 [4.0, 12.0] |"
    )
    assert main([str(tmp_path / "demo")]) == 0


def test_a_narrow_terminal_keeps_its_numbers_whole(tmp_path):
    demo_sweep(tmp_path)
    console = Console(width=80, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    tables.print_report(compared(tmp_path), console)
    text = console.export_text()
    assert "…" not in text.replace("8…18", "") and "68.0 → 84.0  +16.0 [12.8, 19.2]" in text
    assert max(map(len, text.splitlines())) <= 80
