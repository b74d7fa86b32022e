"""`python -m tests.helpers.planted_table`: which activations and fusions learn what is planted.

Runs every option of both groups on both variants of the planted task, and writes the table into
docs/planted_feature.md between its markers. A run takes a few seconds of one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pyarrow.parquet as pq

from crl_exp.tasks.base import content_id
from tests.helpers.planted import NO, OTHER, PLANTED, YES, plant, plant_conditional
from tests.helpers.tiny_run import CONF, ROOT, run_small

PAGE = ROOT / "docs" / "planted_feature.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
SIZES = ["task.n_train=300", "task.n_validation=100", "task.n_test=400", "engine.batch_size=100"]
TRAINING = [
    "method=crl", "policy.policy_depth=1", "policy.hidden=64", "algorithm.n_updates=80",
    "algorithm.prompts_per_update=50", "algorithm.validate_every=5",
]  # fmt: skip
STRENGTH = ["coefficient=relative", "coefficient.ratio=0.5"]
ONCE = "method.multipliers=[1]"  # CorrSteer at the policy's strength too
MORE = [
    ["fusion.weight=0"],
    ["policy.critic=q"],
    # As many answers an update as the others: 10 prompts, 5 answers each.
    ["algorithm=grpo", "algorithm.prompts_per_update=10"],
]
LEARNED = 0.85
"""Validation reward from which a run counts as having learned."""


def targets(overrides: list[str]) -> dict[str, int]:
    """The right token of each item, from the task's file."""
    path = next(o for o in overrides if o.startswith("task.path=")).removeprefix("task.path=")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {content_id(r["question"]): YES if r["answer"] == "yes" else NO for r in rows}


def right_share(folder: Path, target: dict[str, int]) -> float:
    """Share of the test tokens at which the feature that helps was chosen."""
    rows = pq.read_table(folder / "interventions.parquet").to_pylist()
    right = {YES: [PLANTED], NO: [OTHER]}
    return mean(float(row["features"] == right[target[row["item"]]]) for row in rows)


def learned_at(folder: Path) -> int | None:
    """The first update whose validation reward was at least LEARNED."""
    for line in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["metrics"].get("validation_reward", 0.0) >= LEARNED:
            return entry["step"]
    return None


def cells(common: list[str], more: list[str], seeds: int) -> list[str]:
    """Accuracy, share of the right feature and the update at which it was learned, over seeds."""
    results, shares, updates = [], [], []
    for seed in range(seeds):
        result, folder = run_small([*common, *TRAINING, *more, f"seed={seed}"], skip_finished=True)
        results.append(result["accuracy_steered"])
        shares.append(right_share(folder, targets(common)))
        updates.append(learned_at(folder))
    times = [str(u) if u else "never" for u in updates]
    return [f"{100 * mean(results):.0f}", f"{100 * mean(shares):.0f}", ", ".join(times)]


def table(root: Path, seeds: int, progress: Callable[[str], None]) -> str:
    """The table as Markdown. One row an option, the other groups as they come."""
    variants: dict[str, list[str]] = {}
    for name, make in (("plain", plant), ("conditional", plant_conditional)):
        (root / name).mkdir()
        out = [f"output_dir={root / name / 'out'}"]
        variants[name] = [*make(root / name), *SIZES, *STRENGTH, *out]
    rows = [
        "| option | always the same feature: accuracy, % | right feature, % | learned at update |"
        " by the prompt: accuracy, % | right feature, % | learned at update |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, more in (
        ("unsteered", ["method=none"]),
        ("CorrSteer-S", ["method=corrsteer_s", ONCE]),
    ):
        accuracies = [
            f"{100 * run_small([*common, *more])[0]['accuracy_steered']:.0f}"
            for common in variants.values()
        ]
        rows.append(f"| {name} | {accuracies[0]} | | | {accuracies[1]} | | |")
    globbed = [
        [f"{group}={path.stem}"]
        for group in ("activation", "fusion")
        for path in sorted((CONF / group).glob("*.yaml"))
    ]
    for chosen in [*globbed, *MORE]:
        progress(" ".join(chosen))
        found = [c for common in variants.values() for c in cells(common, chosen, seeds)]
        rows.append(f"| {' '.join(chosen)} | " + " | ".join(found) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        made = table(Path(root), asked.seeds, lambda what: print(what, flush=True))
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
    print(made)


if __name__ == "__main__":
    main()
