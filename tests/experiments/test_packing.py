"""Runs of one process that share the model: each ends as if it had been alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig

from crl_exp.config import kept
from crl_exp.config.errors import UserError
from crl_exp.experiments import workspace as labs
from crl_exp.experiments.packing import pack_key, run_pack
from crl_exp.experiments.run import run_experiment
from crl_exp.generation.engine import Engine
from crl_exp.runs.directory import RunDirectory
from crl_exp.tasks.jsonl import JsonLines
from tests.helpers.tiny_run import small
from tests.steering.test_parity import FreeText

UPDATES = "algorithm.n_updates=4"
# Options, layers, seeds, learning rates and methods that differ; one task, model and SAE release.
CHOICE = [
    ["seed=0"],
    ["seed=1", "mask=active"],
    ["seed=0", "algorithm.lr_policy=0.03", "noise=gaussian"],
    ["layers=all", "fusion=attention"],
    ["algorithm=grpo", "algorithm.prompts_per_update=4", "policy.k=2"],
    ["policy.null_action=true", "policy.doses=[0.5,1.0]", "policy.k=2"],
    ["method=corrsteer_p"],
    ["layers=best_on_validation", "layers.among=[0,2]"],
    ["method=none"],
    ["method=calibration"],
    ["method=prompting", "method.shots=[0,2]"],
    ["method=probe_steering", "layers=list"],
    ["method=lora"],
]
OPEN = [
    ["seed=0", "mask=all"],
    ["seed=1", "activation=gumbel_topk", "activation.top=5"],
    ["layers=list", "layers.layers=[0,2]", "noise=epsilon_greedy"],
    ["method=raw_residual"],
    ["method=calibration", "method.tokens=[w3,'<end>']"],
    ["method=probe_steering"],
]
NUMBERS = 1e-4
"""Bound on what differs by rounding: matrix products of other shapes."""


def configs(files, folder: Path, variants: list[list[str]], *more: str) -> list[DictConfig]:
    common = [*files.overrides(), UPDATES, f"output_dir={folder}", *more]
    return [small([*common, *variant]) for variant in variants]


def forget() -> None:
    """Another process would have nothing loaded."""
    kept.LOADED.clear()


def close(a: Any, b: Any, where: str = "") -> None:
    """The same, numbers to within `NUMBERS`."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, abs=NUMBERS, rel=NUMBERS, nan_ok=True), where
    else:
        assert a == b, where


def told(folder: Path) -> dict[str, Any]:
    """What a run left behind, without the times."""
    result = json.loads((folder / "result.json").read_text())
    for name in ("seconds", "peak_memory_bytes", "packed", "git_commit", "git_dirty", "git_diff"):
        result.pop(name, None)
    journal = folder / "journal.jsonl"
    lines = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    for line in lines:
        del line["time"]
        line["metrics"] = {k: v for k, v in line["metrics"].items() if not k.startswith("seconds_")}
    table = pq.read_table(folder / "interventions.parquet").to_pylist()
    features = json.loads((folder / "features.json").read_text())
    return {"result": result, "journal": lines, "interventions": table, "features": features}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["choice", "open"])
def test_packed_runs_equal_solo_ones_item_by_item(kind, tiny_files, tmp_path, monkeypatch) -> None:
    """Every action, coefficient, token and reward; losses and log-probabilities up to rounding."""
    variants = CHOICE if kind == "choice" else OPEN
    more = [] if kind == "choice" else ["task.choices=null", "task.max_new_tokens=6"]
    if kind == "open":
        for name in ("draw", "score", "scorer_name"):
            monkeypatch.setattr(JsonLines, name, FreeText.__dict__[name])
    solo = configs(tiny_files, tmp_path / "solo", variants, *more)
    packed = configs(tiny_files, tmp_path / "packed", variants, *more)
    for config in solo:
        forget()
        run_experiment(config, skip_finished=False)
    forget()
    outcomes = run_pack(packed)
    for config, alone, outcome in zip(packed, solo, outcomes, strict=True):
        assert isinstance(outcome, dict), outcome
        assert outcome["packed"] == len(variants)
        folder = RunDirectory(config).path
        close(told(folder), told(RunDirectory(alone).path))
        assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_a_pack_asks_the_model_once_for_all(tiny_files, tmp_path, monkeypatch) -> None:
    """Three runs train with as many calls of the engine as one, and one warmup pass serves all."""
    calls: list[int] = []
    generate = Engine.generate

    def counted(self, prompts, jobs, *arguments, **more):
        calls.append(len(jobs))
        return generate(self, prompts, jobs, *arguments, **more)

    monkeypatch.setattr(Engine, "generate", counted)
    variants = [["layers.layer=0"], ["layers.layer=1"], ["layers.layer=2"]]
    forget()
    outcomes = run_pack(configs(tiny_files, tmp_path / "three", variants))
    assert all(isinstance(outcome, dict) for outcome in outcomes)
    three = list(calls)
    calls.clear()
    forget()
    run_pack(configs(tiny_files, tmp_path / "one", variants[:1]))
    # One by one: the check of a newly loaded model, the warmup (24 items, 16 at a time) with the
    # answers that its SAEs' fit is measured on, the unsteered answers to test and validation.
    assert three.count(1) == 1 + 2 + 1 + 2
    assert three.count(3) == len(three) - 6 == len(calls) - 6
    assert set(calls) == {1}


def test_runs_that_cannot_share_a_model_are_refused(tiny_files, tmp_path) -> None:
    alike = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1", "layers=all", "method=none"]])
    assert pack_key(alike[0]) == pack_key(alike[1])
    for other in ("model.dtype=bfloat16", "task.n_test=8", "engine.batch_size=7", "sae.name=other"):
        config = configs(tiny_files, tmp_path, [[other]])[0]
        assert pack_key(config) != pack_key(alike[0])
        with pytest.raises(UserError, match="in common"):
            run_pack([alike[0], config])


def test_all_are_at_work_before_anything_is_loaded(tiny_files, tmp_path, monkeypatch) -> None:
    """Else a run would be said to be queued for as long as the first one warms up."""
    packed = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"], ["method=none"]])
    seen: list[tuple[set[str], bool]] = []
    workspace = labs.RunWorkspace.__init__

    def looked(self, *arguments, **more):
        states = {RunDirectory(config).status().get("state", "") for config in packed}
        phases = [RunDirectory(config).path / "heartbeat.json" for config in packed]
        seen.append((states, all(path.exists() for path in phases)))
        workspace(self, *arguments, **more)

    monkeypatch.setattr(labs.RunWorkspace, "__init__", looked)
    run_pack(packed)
    assert seen[0] == ({"running"}, True)


def test_a_result_that_was_cut_off_ends_its_own_run_alone(tiny_files, tmp_path) -> None:
    """It is told where that run begins; whether a run is done is asked before any has begun."""
    packed = configs(tiny_files, tmp_path, [["seed=0"], ["seed=1"]], "method=corrsteer_s")
    run = RunDirectory(packed[0])
    run.path.mkdir(parents=True)
    run.result_path.write_text('{"accuracy_steered": 0.')
    damaged, whole = run_pack(packed)
    assert isinstance(damaged, UserError) and "result.json is damaged" in str(damaged)
    assert isinstance(whole, dict) and whole["packed"] == 2
