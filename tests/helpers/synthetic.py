"""Run directories as `crl_exp.experiments.run` writes them, without running anything."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from crl_exp.analysis.statistics import compare
from crl_exp.experiments.kinds.evaluation import INTERVENTIONS
from crl_exp.runs.directory import RunDirectory, write_json
from crl_exp.runs.items import items_table, write_items


def config(
    folder: Path,
    method: str = "crl",
    layers: tuple[int, ...] = (18,),
    more: dict[str, Any] | None = None,
    **top: Any,
):
    """A composed config. Keys of `more` may have dots; `top` are keys at the top."""
    one = {"_target_": "crl_exp.experiments.layers.Single", "layer": layers[0]}
    several = {"_target_": "crl_exp.experiments.layers.Listed", "layers": list(layers)}
    made = OmegaConf.create(
        {
            "sweep_name": "demo", "seed": 0, "output_dir": str(folder), "resume": "new",
            "order": ["fusion", "noise", "activation", "mask"],
            "model": {"name": "tiny", "path": "tiny", "revision": None, "dtype": "float32",
                      "device": "cpu", "attn_implementation": "sdpa"},
            "sae": {"name": "tiny_sae", "folder": "f", "release": None, "id_template": "x"},
            "task": {"_target_": "crl_exp.tasks.sentiment.Sentiment", "name": "sentiment",
                     "n_train": 100, "n_test": 1500, "shuffle_labels": False, "question": "{text}"},
            "layers": one if len(layers) == 1 else several,
            "method": {"_target_": f"crl_exp.steering.methods.crl.{method}", "name": method},
            "fusion": {"_target_": "crl_exp.steering.stages.fusion.Add", "weight": 1.0},
            "algorithm": {"_target_": "crl_exp.steering.policy.algorithms.PPO", "n_updates": 120},
            "checkpoint": {"updates": 20, "seconds": 60.0},
            "tracking": {"enabled": True, "uri": None, "experiment": "crl_exp"},
        }
    )  # fmt: skip
    for key, value in {**(more or {}), **top}.items():
        OmegaConf.update(made, key, value, merge=False)
    return made


def figures(delta: float, n: int = 1500, baseline: float = 0.68, half: float = 0.02, **more: Any):
    """A split's figures with a rise of `delta`; a test checks their keys."""
    fixed = max(0, round(delta * n)) + 60
    broken = fixed - round(delta * n)
    return {
        "n": n, "accuracy_baseline": baseline, "accuracy_steered": baseline + delta, "delta": delta,
        "delta_ci95": [delta - half, delta + half], "p_value": 0.001, "fixed": fixed,
        "broken": broken, "ser": broken / (fixed + broken), "ser_all_changed": 0.3,
        "invalid_baseline": 0.0, "invalid_steered": 0.0, **more,
    }  # fmt: skip


def result(run: RunDirectory, test: dict, validation: dict, test_sets: dict | None = None) -> dict:
    """result.json of a run."""
    c, sets = run.config, test_sets or {}
    benign = sets.get("benign")
    layers = [c.layers.layer] if "layer" in c.layers else list(c.layers.layers)
    return {
        **test, "validation": validation, "test_sets": sets,
        "over_refusal_baseline": None if benign is None else 1 - benign["accuracy_baseline"],
        "over_refusal_steered": None if benign is None else 1 - benign["accuracy_steered"],
        "unique_features": 5, "run_key": run.key, "sweep": c.sweep_name, "method": c.method.name,
        "model": c.model.name, "sae": c.sae.name, "task": c.task.name, "layers": layers,
        "seed": c.seed, "scorer": "exact choice", "data_digest": "0123456789abcdef",
        "notes": {}, "warnings": [],
        "seconds": {"load": 1.0, "warmup": 2.0, "train": 3.0, "evaluate": 4.5},
        "peak_memory_bytes": 10**9, "versions": {"torch": "2"},
        "git_commit": "c0ffee" * 6, "git_dirty": True,
    }  # fmt: skip


def finish(run: RunDirectory, written: dict) -> None:
    """Write what a run writes at its end."""
    row = {"feature": 7, "correlation": 0.4, "coefficient": 12.0, "frequency": 0.3, "sign": 1}
    used = {**row, "tokens": 100, "mean_coefficient": 12.0, "neuronpedia": None}
    layer = {"n": 100, "allowed": 40, "found": [row], "used": [used]}
    write_json(run.path / "features.json", {str(la): layer for la in written["layers"]})
    pq.write_table(pa.table({name: [] for name in INTERVENTIONS.names}, schema=INTERVENTIONS),
                   run.path / "interventions.parquet")  # fmt: skip
    write_json(run.result_path, written)


def finished_run(made, delta: float, validation: float | None = None, steps: int = 0,
                 test_sets: dict | None = None, **test: Any) -> RunDirectory:  # fmt: skip
    """A finished run in its directory. validation: rise there, by default that on test."""
    run = RunDirectory(made)
    with run.opened():
        for step in range(1, steps + 1):
            run.log(step, {"reward": 0.5 + 0.3 * step / steps, "layer_18/policy_loss": -0.1 / step})
            if step % 10 == 0:
                run.log(step, {"validation_reward": 0.5 + 0.3 * step / steps})
        rise = delta if validation is None else validation
        written = result(run, figures(delta, **test), figures(rise, n=500), test_sets)
        finish(run, json.loads(json.dumps(written)))
    return run


def run_of_items(
    made, baseline, steered, validation: float = 0.0, ids=None, groups=None
) -> RunDirectory:
    """A finished run whose test items got these rewards, with its items.parquet.

    validation: rise there.
    """
    was, now = (np.asarray(rewards, dtype=float) for rewards in (baseline, steered))
    run = finished_run(made, 0.0, validation=validation)
    figures_ = asdict(compare(was, now, was != now))
    figures_["delta_ci95"] = list(figures_["delta_ci95"])
    written = run.result()
    assert written is not None
    write_json(run.result_path, {**written, **figures_})
    names = [f"item{i:04d}" for i in range(len(was))] if ids is None else ids
    kinds = [""] * len(names) if groups is None else groups
    tables = [items_table("test", names, was.tolist(), now.tolist(), (was != now).tolist(), kinds)]
    write_items(run.path, tables)
    return run
