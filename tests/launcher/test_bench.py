"""`python -m crl_exp bench`: it runs, and says what it measured and what it left out."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from crl_exp.launcher.bench import command as bench
from crl_exp.launcher.bench import commands
from crl_exp.launcher.bench.command import measure
from crl_exp.launcher.bench.rows import GROUPS, Figure, Group
from crl_exp.launcher.bench.subject import Subject

APART = ("memory", "floor", "startup", "commands")
NAMES = [figure.name for group in GROUPS for figure in group.figures]


@contextmanager
def nothing(_subject):
    yield {}


def test_a_figure_is_the_median_of_the_rounds_ratios() -> None:
    """Rounds 6/2, 9/3 and 8/2 after one to warm up; the third call isn't needed."""
    tops, bottoms, asked = iter([100.0, 6.0, 9.0, 8.0]), iter([1.0, 2.0, 3.0, 2.0]), []
    calls = {
        "a": lambda: next(tops), "b": lambda: next(bottoms), "c": lambda: asked.append(1),
    }  # fmt: skip
    figures = [Figure("most", "", "a", "b", 3.0), Figure("least", "", "a", "b", 3.1, at_least=True)]
    most, least = measure(Group("g", nothing, figures, rounds=3, warm_ups=1), calls, figures)
    assert (most.median, most.low, most.high, most.rounds) == (3.0, 3.0, 4.0, 3)
    assert (most.seconds_top, most.seconds_bottom) == (8.0, 2.0)
    assert most.met and most.goal == "≤ 3" and not least.met and least.goal == "≥ 3.1"
    assert asked == []


def test_rows_have_different_names_and_can_be_listed(capsys) -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert bench.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)


def test_an_unknown_row_is_told(capsys) -> None:
    assert bench.main(["--only", "speed"]) == 1
    assert "no such row: speed" in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["0", "101"])
def test_a_wrong_scale_is_told(scale, capsys) -> None:
    assert bench.main(["--scale", scale]) == 1
    assert f"--scale={scale}: must be from 1 to 100" in capsys.readouterr().err


def test_what_cannot_be_measured_here_is_told(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "bench.json"
    argv = ["--subject", "tiny", "--only", "package", "floor", "--out", str(path)]
    assert bench.main(argv) == 0
    told = json.loads(path.read_text())
    assert told["figures"] == []
    assert "pip install --no-deps steering-vectors==0.12.2" in told["left_out"]["package"]
    assert "GPU" in told["left_out"]["decode_floor"]
    random = Subject("gemma")
    needing_text = [f for g in GROUPS for f in g.figures if f.needs == "text"]
    assert needing_text and all(f.missing(random) for f in needing_text)


@pytest.mark.slow
def test_every_row_of_the_cpu_runs_on_the_tiny_model(tmp_path, monkeypatch) -> None:
    """With fewer rounds; what has processes of its own is left out."""
    monkeypatch.setattr(
        bench, "GROUPS",
        [Group(g.name, g.calls, g.figures, 1) for g in GROUPS if g.name not in APART],
    )  # fmt: skip
    path = tmp_path / "bench.json"
    assert bench.main(["--subject", "tiny", "--out", str(path)]) == 0
    told = json.loads(path.read_text())
    names = {m["name"] for m in told["figures"]} | set(told["left_out"])
    assert names == {f.name for g in GROUPS if g.name not in APART for f in g.figures}
    assert set(told["left_out"]) <= {"package", "static"}
    assert all(
        m["seconds_top"] > 0 and m["low"] <= m["median"] <= m["high"] for m in told["figures"]
    )


@pytest.mark.gpu
def test_every_row_of_the_gpu_runs(tmp_path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    path = tmp_path / "bench.json"
    assert bench.main(["--subject", "gemma", "--out", str(path)]) == 0
    told = json.loads(path.read_text())
    assert {"decode_floor", "steered_policy"} <= {m["name"] for m in told["figures"]}


@pytest.mark.slow
def test_commands_are_timed_in_processes_of_their_own(monkeypatch) -> None:
    monkeypatch.setattr(commands, "FEW", 2)
    monkeypatch.setattr(commands, "MANY", 3)
    with commands.startup_calls(Subject("tiny")) as calls:
        assert all((call() or 0) > 0 for call in calls.values())
    with commands.many_calls(Subject("tiny")) as calls:
        assert set(calls) == {
            f"{what}_{n}" for what in ("status", "report") for n in ("few", "many")
        }
        assert all((call() or 0) > 0 for call in calls.values())
    with pytest.raises(RuntimeError, match="ended with 3"):
        commands.cpu_seconds(["-c", "raise SystemExit(3)"])
