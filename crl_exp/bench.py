"""`make bench`: ratios of times measured side by side in one process. Never asserted anywhere.

Each figure is the median of `REPEATS` ratios, with the smallest and largest. Pairs are timed in
turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.table import Table

from crl_exp.cli import register
from crl_exp.config import experiment, validate
from crl_exp.controllers.base import Unsteered
from crl_exp.controllers.fixed import Steer
from crl_exp.engine import Job
from crl_exp.lab import Lab
from crl_exp.learner import LayerLearner, collect
from crl_exp.methods import CRL
from crl_exp.policy import PolicyController
from crl_exp.runs import RunDirectory
from crl_exp.saes import REPO
from crl_exp.terminal import console

REPEATS = 5
PROMPTS, NEW_TOKENS = 50, 32


@dataclass
class Ratio:
    """Time of `what` over time of `against`, both in seconds."""

    what: str
    against: str
    median: float
    low: float
    high: float
    seconds_what: float
    seconds_against: float


def ratio(what: str, a: Callable[[], object], against: str, b: Callable[[], object]) -> Ratio:
    """Time the two in turn, once to warm up and then `REPEATS` times."""
    pairs = [(_seconds(a), _seconds(b)) for _ in range(REPEATS + 1)][1:]
    ratios = [x / y for x, y in pairs]
    return Ratio(
        what, against, statistics.median(ratios), min(ratios), max(ratios),
        statistics.median(x for x, _ in pairs), statistics.median(y for _, y in pairs),
    )  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def make_lab() -> Lab:
    """The default experiment on few prompts."""
    overrides = [
        "task.n_train=100", "task.n_validation=10", "task.n_test=10", "tracking=none",
        "sweep_name=bench", "algorithm.validate_every=0",
    ]  # fmt: skip
    register()
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        config = compose("config", overrides=overrides)
    exp = experiment(config)
    return Lab(exp, validate(exp), RunDirectory(config))


def measure(lab: Lab) -> list[Ratio]:
    """All figures. Times include tokenising nothing: prompts are token ids already."""
    items = list(range(PROMPTS))
    train = lab.splits.train[:PROMPTS]
    ids = [lab.lm.prompt_ids(item.user, lab.exp.task.chat_template) for item in train]
    store = lab.engine.read(ids)
    layer = next(iter(lab.saes))
    fixed = lab.fixed([Steer(layer, 0, 1.0)])

    def answer(prompts, controller, n_tokens: int, choices):
        return lab.engine.generate(prompts, [Job(controller, items)], n_tokens, choices)

    padded = lab.lm.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
    padded = padded.to(lab.lm.device)

    def plain() -> None:
        lab.lm.model.generate(  # type: ignore[operator]
            **padded, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )

    def steered() -> None:
        answer(lab.engine.read(ids), fixed, NEW_TOKENS, None)

    agents = CRL("crl", [1.0], stage2=True, features="free", online_correlation=False).free_agents(
        lab
    )
    generator = torch.Generator(lab.lm.device).manual_seed(0)
    explorer = PolicyController(agents, lab.exp.decay, generator)
    learner = LayerLearner(agents[layer], lab.exp.algorithm)
    shuffle = torch.Generator().manual_seed(0)
    played, reward_B = lab.play(explorer, items)
    rollout = collect(layer, played, reward_B, lab.exp.algorithm)
    return [
        ratio(
            f"rollout of {PROMPTS} choice prompts, kept",
            lambda: answer(store, fixed, 1, lab.choices),
            "prompts read again",
            lambda: answer(lab.engine.read(ids), fixed, 1, lab.choices),
        ),
        ratio(
            f"steered, {PROMPTS} x {NEW_TOKENS} tokens, prompts read too",
            steered,
            "model.generate, prompts read too",
            plain,
        ),
        ratio(
            f"steered, {PROMPTS} x {NEW_TOKENS} tokens",
            lambda: answer(store, fixed, NEW_TOKENS, None),
            "unsteered, same engine",
            lambda: answer(store, Unsteered(), NEW_TOKENS, None),
        ),
        ratio(
            f"PPO update, {PROMPTS} choice prompts",
            lambda: learner.update(rollout, 1, shuffle),
            "its rollout, prompts kept",
            lambda: lab.play(explorer, items),
        ),
    ]


def main() -> None:
    """Measure, print a table, and write `outputs/bench.json`."""
    found = measure(make_lab())
    table = Table("time of", "against", "ratio", "range", "seconds", title=_machine())
    for r in found:
        table.add_row(
            r.what, r.against, f"{r.median:.3f}", f"{r.low:.3f}-{r.high:.3f}",
            f"{r.seconds_what:.3f} / {r.seconds_against:.3f}",
        )  # fmt: skip
    console.print(table)
    path = Path("outputs/bench.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([asdict(r) for r in found], indent=2) + "\n")
    console.print(f"written to {path}")


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, n={REPEATS}"


if __name__ == "__main__":
    main()
