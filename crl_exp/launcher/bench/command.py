"""`make bench`: ratios of times measured side by side in one process. Never asserted anywhere.

Each figure is the median of several ratios, with the smallest and the largest. What is compared is
timed in turn, so that a machine that slows down slows both. The rows are in `bench.rows`,
model and prompts in `bench.subject`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from crl_exp.config.errors import UserError
from crl_exp.experiments.run import peak_memory_bytes
from crl_exp.launcher.bench import against, history
from crl_exp.launcher.bench.rows import GROUPS, Calls, Figure, Group, memory_child
from crl_exp.launcher.bench.subject import SCALE, SUBJECTS, Subject
from crl_exp.runs.code_state import code_state

console = Console(stderr=True)


@dataclass
class Measured:
    """One figure: seconds of its `top` over seconds of its `bottom`, round by round."""

    name: str
    what: str
    goal: str
    met: bool
    median: float
    low: float
    high: float
    seconds_top: float
    seconds_bottom: float
    rounds: int


def seconds(call: Callable[[], float | None]) -> float:
    """What the call says, or else how long it took."""
    _wait()
    started = time.perf_counter()
    said = call()
    _wait()
    return time.perf_counter() - started if said is None else said


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(group: Group, calls: Calls, figures: list[Figure]) -> list[Measured]:
    """Time the calls that the figures need, in turn, round after round."""
    needed = {name for figure in figures for name in (figure.top, figure.bottom)}
    rounds: list[dict[str, float]] = []
    for _ in range(group.warm_ups + group.rounds):
        rounds.append({name: seconds(call) for name, call in calls.items() if name in needed})
    return [_figure(figure, rounds[group.warm_ups :]) for figure in figures]


def _figure(figure: Figure, rounds: list[dict[str, float]]) -> Measured:
    ratios = [found[figure.top] / found[figure.bottom] for found in rounds]
    median = statistics.median(ratios)
    met = median >= figure.goal if figure.at_least else median <= figure.goal
    return Measured(
        figure.name, figure.what, f"{'≥' if figure.at_least else '≤'} {figure.goal:.3g}", met,
        median, min(ratios), max(ratios),
        statistics.median(found[figure.top] for found in rounds),
        statistics.median(found[figure.bottom] for found in rounds), len(rounds),
    )  # fmt: skip


def run(subject: Subject, only: list[str]) -> tuple[list[Measured], dict[str, str]]:
    """All figures, or those named (a group's name stands for all of its); also what was left out,
    and why."""
    found: list[Measured] = []
    left_out: dict[str, str] = {}
    for group in GROUPS:
        wanted = [f for f in group.figures if not only or {f.name, group.name} & set(only)]
        why = {f.name: missing for f in wanted if (missing := f.missing(subject, bool(only)))}
        left_out |= why
        figures = [f for f in wanted if f.name not in why]
        if figures:
            console.print(f"measuring {', '.join(f.name for f in figures)} …")
            with group.calls(subject) as calls:
                found += measure(group, calls, figures)
    return found, left_out


def machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    threads = torch.get_num_threads()
    return f"{device or platform.machine()}, {threads} threads, torch {torch.__version__}"


def table(found: list[Measured], title: str) -> Table:
    made = Table("ratio of times", "goal", "median", "range", "seconds", title=title)
    for m in found:
        median = f"{m.median:.3g}" if m.met else f"{m.median:.3g} (missed)"
        made.add_row(
            m.name, m.goal, median, f"{m.low:.3g}-{m.high:.3g}, n={m.rounds}",
            f"{m.seconds_top:.3g} / {m.seconds_bottom:.3g}",
        )  # fmt: skip
    return made


def _list() -> None:
    for group in GROUPS:
        for figure in group.figures:
            sign = "at least" if figure.at_least else "at most"
            print(f"{figure.name:<20} {figure.what}: {sign} {figure.goal:.3g}")


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m crl_exp bench", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these rows alone")
    parser.add_argument("--list", action="store_true", help="list the rows and their goals")
    parser.add_argument(
        "--subject", choices=SUBJECTS,
        help="model: smollm2 (without a GPU), gemma (random, of Gemma-2-2B's shape, with one), "
        "or tiny, to try the bench itself",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=int, default=SCALE, metavar="N",
        help="make the whole runs N times smaller than the goals name, in prompts and updates "
        "(default %(default)s; 1: takes minutes a run)",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="COMMIT",
        help="measure another commit's code as well, in turn, and print seconds now / then",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=against.ROUNDS, metavar="N",
        help="of --against: how many times each is measured (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", action="store_true", help="keep what is measured in docs/bench, for --history"
    )
    parser.add_argument(
        "--history",
        action="store_true",
        help="print the medians that are kept, and measure nothing",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench.json"))
    parser.add_argument("--memory-child", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    known = {name for g in GROUPS for name in (g.name, *(f.name for f in g.figures))}
    if not 1 <= asked.scale <= 100:
        raise UserError(f"--scale={asked.scale}: must be from 1 to 100")
    if unknown := set(asked.only) - known:
        raise UserError(f"no such row: {', '.join(sorted(unknown))}; --list names them")
    if asked.rounds < 1:
        raise UserError(f"--rounds={asked.rounds}: must be at least 1")
    if asked.keep and asked.against:
        raise UserError("--keep keeps ratios of one commit; leave it out with --against")
    return asked


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and write the JSON file. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _asked(_arguments(argv), argv)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _asked(asked: argparse.Namespace, argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING)
    name = asked.subject or ("gemma" if torch.cuda.is_available() else "smollm2")
    if asked.list:
        _list()
    elif asked.history:
        console.print(history.table(history.measurements()))
    elif asked.memory_child is not None:
        print(memory_child(Subject(name), asked.memory_child))
    elif asked.against:
        _against(asked, name, argv)
    else:
        _measure(asked, name, argv)
    return 0


def _measure(asked: argparse.Namespace, name: str, argv: list[str]) -> None:
    started = time.time()
    kept = [history.place(started)] if asked.keep else []
    found, left_out = run(Subject(name, asked.scale), asked.only)
    console.print(table(found, f"{name} on {machine()}"))
    console.print("--list says what each ratio is of")
    told = {**_facts(asked, name, argv, started), "figures": [asdict(m) for m in found]}
    _write(told, left_out, [asked.out, *kept])


def _against(asked: argparse.Namespace, name: str, argv: list[str]) -> None:
    started, commit = time.time(), against.commit_of(asked.against)
    console.print(f"measuring {commit[:9]} and what is here, {asked.rounds} times in turn …")
    arguments = ["--subject", name, "--scale", str(asked.scale)]
    found, left_out = against.compare(commit, asked.only, arguments, asked.rounds)
    console.print(against.table(found, commit))
    told = {**_facts(asked, name, argv, started), "against": commit,
            "versus": [asdict(one) for one in found]}  # fmt: skip
    _write(told, left_out, [asked.out])


def _facts(asked: argparse.Namespace, name: str, argv: list[str], started: float) -> dict:
    return {
        "subject": name, "scale": asked.scale, "machine": machine(), "started": started,
        "seconds": time.time() - started, "peak_memory_bytes": peak_memory_bytes(),
        "command": "python -m crl_exp bench " + " ".join(argv), **code_state().facts,
    }  # fmt: skip


def _write(told: dict, left_out: dict[str, str], paths: list[Path]) -> None:
    for row, why in left_out.items():
        console.print(f"left out: {row}: {why}")
    text = json.dumps({**told, "left_out": left_out}, indent=2, ensure_ascii=False) + "\n"
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        console.print(f"written to {path}")


if __name__ == "__main__":
    sys.exit(main())
