"""What a sweep will be able to show, said before anything starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from crl_exp.analysis.power import TARGET, Spread, both_needed, items_needed, smallest_difference
from crl_exp.config.compatibility import is_steering
from crl_exp.config.keys import row_key
from crl_exp.config.sections import Known, build, once
from crl_exp.launcher.planning.plan import Point
from crl_exp.steering.methods.base import Method


def shows_text(points: Sequence[Point]) -> list[str]:
    """A line for each number of test items and seeds that these runs have; none where nothing is
    steered. Before them, what of their configs was found in files."""
    sizes: Counter[tuple[int, int]] = Counter()
    seeds: dict[str, set[tuple[int | None, int | None]]] = {}
    items: dict[str, int] = {}
    known = Known()
    steered = [point for point in points if _steers(point, known)]
    for point in steered:
        task = dict(point.plain["task"])
        draw = task.pop("train_seed", None)
        row = row_key({**point.plain, "task": task})
        seed = int(point.plain["seed"]) if point.uses_seed else None
        seeds.setdefault(row, set()).add((seed, draw))
        items[row] = int(task["n_test"])
    for row, mine in seeds.items():
        draws = {draw for _, draw in mine}
        # Seeds of one draw aren't independent runs: as in a report, which takes their mean.
        crossed = 1 < len(draws) < len(mine)
        sizes[items[row], len(draws) if crossed else len(mine)] += 1
    found = list(dict.fromkeys(point.found for point in points if point.found))
    if not steered:
        return found
    settings = steered[0].settings
    change, deviation = settings.assumed_change, settings.assumed_seed_deviation
    lines = [_line(n, n_seeds, change, deviation) for n, n_seeds in sorted(sizes)]
    assumed = f"assumed: {100 * change:.0f} % of the items change"
    if any(n_seeds > 1 for _, n_seeds in sizes):
        assumed += f", seeds deviate by {100 * deviation:.1f} points"
    return [*found, *lines, f"  ({assumed}; docs/statistics.md)"]


def _steers(point: Point, known: Known) -> bool:
    """Whether its result is a difference to the unsteered model; that of an analysis is none."""
    if not is_steering(point.plain.get("experiment")):
        return False
    method = once(
        known, point.plain["method"], lambda: build(point.config.method, "method", Method)
    )
    return not method.unsteered


def _line(n: int, n_seeds: int, change: float, deviation: float) -> str:
    spread = Spread.assumed(change, deviation)
    found = smallest_difference(spread, n, n_seeds)
    target = f"{100 * TARGET:.0f} points"
    have = f"{n:,} test items, {_seeds(n_seeds)}"
    text = f"can show, with {have}: {100 * found:.1f} points in four of five cases"
    if found <= TARGET:
        return text
    needed = items_needed(spread, n_seeds)
    if needed is not None:
        return f"{text}; {target} would need {needed:,} items with {_seeds(n_seeds)}"
    both = both_needed(spread, n_seeds)
    if both is None:
        return f"{text}; {target} is out of reach"
    return f"{text}; {target} would need {both[0]:,} items and {_seeds(both[1])}"


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"
