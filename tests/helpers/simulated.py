"""Sweeps whose truth is known, drawn many times: do intervals hold it, do tests find it?

`python -m tests.helpers.simulated` prints docs/statistics.md's tables (minutes); the tests draw
fewer. Shapes: R repetitions, S seeds, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from crl_exp.analysis.power import Spread, smallest_difference
from crl_exp.analysis.statistics import (
    accuracy_interval,
    bootstrap_interval,
    crossed,
    crossed_difference,
    mcnemar,
    share_interval,
)
from crl_exp.report.comparison.feature_spread import GROUPS, jackknifed

SEEDS, ITEMS = (1, 3, 5, 10), (280, 1500)
DEVIATIONS = (0.0, 0.005, 0.01, 0.02)
AT_ONCE = 100


@dataclass(frozen=True)
class World:
    """How items are answered. An item's difficulty is normal; an answer is right where it and luck
    come out below what the share of right answers asks.

    before, after: shares right, unsteered and steered (of the mean seed). agreement: how far seeds
    answer the same items right (correlation of what decides); the baseline's with them is .5.
    deviation: standard deviation of the seeds' shares.
    """

    before: float
    after: float
    agreement: float
    deviation: float = 0.0

    @property
    def truth(self) -> float:
        return self.after - self.before

    def draws(
        self, repetitions: int, n_seeds: int, n: int, draw: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Rewards of the unsteered model [I], of each seed [S, I], and the seeds' shares [S]."""
        done = 0
        while done < repetitions:
            r = min(AT_ONCE, repetitions - done)
            done += r

            def normal(*shape: int) -> np.ndarray:
                return draw.standard_normal(shape, dtype=np.float32)

            item = normal(r, 1, n)
            own = np.sqrt(1 - self.agreement) * normal(r, n_seeds, n)
            share_RS = self.after + self.deviation * draw.standard_normal((r, n_seeds))
            share_RS = np.clip(share_RS, 0.001, 0.999)
            limit = norm.ppf(share_RS)[..., None].astype(np.float32)
            steered = np.sqrt(self.agreement) * item + own < limit
            unsteered = np.sqrt(0.5) * (item + normal(r, 1, n)) < norm.ppf(self.before)
            for was, now, share_S in zip(unsteered[:, 0], steered, share_RS, strict=True):
                yield was.astype(np.float32), now.astype(np.float32), share_S


WORLDS = (World(0.5, 0.7, 0.5), World(0.545, 0.545, 0.9), World(0.1, 0.12, 0.9),
          World(0.68, 0.8, 0.98))  # fmt: skip


def of(world: World, deviation: float) -> World:
    return World(world.before, world.after, world.agreement, deviation)


def inside(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def delta_coverage(world: World, n_seeds: int, n: int, repetitions: int, seed: int = 0) -> float:
    """How often the interval of Δ holds the truth: of the one seed where there is one, else the
    mean of all seeds."""
    held = 0
    for was, now, share_S in world.draws(repetitions, n_seeds, n, np.random.default_rng(seed)):
        truth = share_S[0] - world.before if n_seeds == 1 else world.truth
        delta_SI = now - was
        found = (
            bootstrap_interval(delta_SI[0], 2000) if n_seeds == 1 else crossed(delta_SI).interval
        )
        held += inside(found, truth)
    return held / repetitions


def accuracy_coverage(world: World, n_seeds: int, n: int, repetitions: int, seed: int = 0) -> float:
    held = 0
    for _, now, share_S in world.draws(repetitions, n_seeds, n, np.random.default_rng(seed)):
        truth = share_S[0] if n_seeds == 1 else world.after
        held += inside(accuracy_interval(crossed(now)), truth)
    return held / repetitions


def difference_coverage(
    seeds: tuple[int, int], n: int, deviation: float, repetitions: int, seed: int = 0
) -> float:
    """Of two rows on the same items, the second 3 points below. A row of one seed has no deviation
    (a method without chance)."""
    draw, held = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        item = draw.standard_normal((1, n), dtype=np.float32)
        sides = []
        for n_seeds, share in zip(seeds, (0.73, 0.70), strict=True):
            own = deviation if n_seeds > 1 else 0.0
            share_S = np.clip(share + own * draw.standard_normal((n_seeds, 1)), 0.001, 0.999)
            luck = draw.standard_normal((n_seeds, n), dtype=np.float32)
            sides.append(np.sqrt(0.8) * item + np.sqrt(0.2) * luck < norm.ppf(share_S))
        a, b = (side.astype(float) for side in sides)
        held += inside(crossed_difference(a, b).interval, 0.03)
    return held / repetitions


FRACTIONS = {
    "F1: most 0, some 1": lambda draw, shape: np.where(
        draw.random(shape) < 0.5, 0.0, np.where(draw.random(shape) < 0.4, 1.0, draw.random(shape))
    ),
    "similarities, Beta(8, 4)": lambda draw, shape: draw.beta(8, 4, shape),
    "near 1, Beta(20, 2)": lambda draw, shape: draw.beta(20, 2, shape),
    "0, ½ or 1": lambda draw, shape: draw.integers(0, 3, shape) / 2,
    "0 and 1, share .9": lambda draw, shape: (draw.random(shape) < 0.9).astype(float),
    "0 and 1, share .02": lambda draw, shape: (draw.random(shape) < 0.02).astype(float),
}
FRACTION_MEANS = {
    "F1: most 0, some 1": 0.5 * (0.4 + 0.6 * 0.5), "similarities, Beta(8, 4)": 8 / 12,
    "near 1, Beta(20, 2)": 20 / 22, "0, ½ or 1": 0.5, "0 and 1, share .9": 0.9,
    "0 and 1, share .02": 0.02,
}  # fmt: skip


def fraction_coverage(
    kind: str, n: int, repetitions: int, plain: bool = False, seed: int = 0
) -> float:
    """Of the mean of rewards in [0, 1], one seed. plain: Wilson's at n items, as it was."""
    draw, held = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        rewards = FRACTIONS[kind](draw, (1, n))
        found = share_interval(float(rewards.mean()), n) if plain else accuracy_interval(
            crossed(rewards)
        )  # fmt: skip
        held += inside(found, FRACTION_MEANS[kind])
    return held / repetitions


FEATURE_WORLDS = (World(0.0, 0.3, 0.05), World(0.0, 0.3, 0.5))
"""Shares of additions that are of one kind, an addition an item: nothing but what `World.draws`
says of steered answers. What decides is hardly shared by the seeds, or by half."""
FEATURE_DEVIATIONS, QUALITY_DEVIATIONS = (0.0, 0.01, 0.03), (0.0, 0.01, 0.05)


def feature_coverage(world: World, n_seeds: int, n: int, repetitions: int, seed: int = 0) -> float:
    """Of a share of additions, whose items' part is a grouped jackknife's."""
    held, group_I = 0, np.arange(n) % GROUPS
    size_G = np.bincount(group_I, minlength=GROUPS)
    inside_IG = (group_I[:, None] == np.arange(GROUPS)).astype(np.float32)
    for _, found_SI, share_S in world.draws(repetitions, n_seeds, n, np.random.default_rng(seed)):
        by_SG = found_SI @ inside_IG
        without_SG = (by_SG.sum(axis=1, keepdims=True) - by_SG) / (n - size_G)
        truth = share_S[0] if n_seeds == 1 else world.after
        held += inside(jackknifed(found_SI.mean(axis=1), without_SG).interval, truth)
    return held / repetitions


def quality_coverage(
    deviation: float, n_seeds: int, n: int, repetitions: int, seed: int = 0
) -> float:
    """Of the loss of log-likelihood, -0.2 nats a token: items deviate by .8, an answer from seed to
    seed by .4."""
    draw, held = np.random.default_rng(seed), 0
    for _ in range(repetitions):
        item_I = 0.8 * draw.standard_normal(n, dtype=np.float32)
        noise_SI = 0.4 * draw.standard_normal((n_seeds, n), dtype=np.float32)
        own_S1 = deviation * draw.standard_normal((n_seeds, 1))
        delta_SI = -0.2 + item_I + noise_SI + own_S1
        truth = -0.2 + (float(own_S1[0, 0]) if n_seeds == 1 else 0.0)
        held += inside(crossed(delta_SI).interval, truth)
    return held / repetitions


def false_alarms(
    change: float, n_seeds: int, n: int, deviation: float, repetitions: int, alone: bool = False
) -> dict[str, float]:
    """How often p is below .05 where steering changes nothing on average: of the test, and, unless
    that is wanted alone, of the largest McNemar p of the seeds, as it was, and of items put
    together as if seeds were items."""
    draw = np.random.default_rng(0)
    counts = dict.fromkeys(("this", "largest", "pooled"), 0)
    for _ in range(repetitions):
        # An item is one that steering may fix or break, in most seeds alike.
        side = draw.integers(0, 2, (1, n))
        flips = (draw.random((1, n)) < change) & (draw.random((n_seeds, n)) < 0.8)
        tilt = deviation * draw.standard_normal((n_seeds, 1)) if n_seeds > 1 else 0.0
        more = draw.random((n_seeds, n)) < np.abs(tilt)
        was = np.broadcast_to(side, (n_seeds, n)).astype(float)
        now = np.where(flips, 1 - was, np.where(more, np.asarray(tilt) > 0, was))
        ours = range(1 if alone and n_seeds == 1 else 0 if alone else n_seeds)
        each = [mcnemar(int((now[s] > was[s]).sum()), int((now[s] < was[s]).sum())) for s in ours]
        counts["this"] += (each[0] if n_seeds == 1 else crossed(now - was).p_value) < 0.05
        if alone:
            continue
        counts["largest"] += max(each) < 0.05
        counts["pooled"] += crossed((now - was).reshape(1, -1)).p_value < 0.05
    return {name: count / repetitions for name, count in counts.items()}


def few_flips_coverage(flips: float, repetitions: int, n: int = 280) -> float:
    """Of the bootstrap of one seed, where so many items are expected to flip, 7 of 10 to right."""
    draw, held, share = np.random.default_rng(0), 0, flips / n
    for _ in range(repetitions):
        u = draw.random(n)
        delta = (u < 0.7 * share).astype(float) - (u > 1 - 0.3 * share)
        held += inside(bootstrap_interval(delta, 2000), 0.4 * share)
    return held / repetitions


def found_share(spread: Spread, n: int, n_seeds: int, repetitions: int, seed: int = 0) -> float:
    """How often the smallest difference that is found in four of five cases is found.

    Differences of single items are −1, 0 or 1, so that they have the spread's variances.
    """
    delta = smallest_difference(spread, n, n_seeds)
    draw, found = np.random.default_rng(seed), 0
    deviation = np.sqrt(spread.seeds or 0.0) if n_seeds > 1 else 0.0
    for _ in range(repetitions):
        sure = _flips(draw, (1, n), spread.items)
        by_seed = _flips(draw, (n_seeds, n), spread.noise)
        of_seeds = delta + deviation * draw.standard_normal((n_seeds, 1))
        estimate = crossed(sure + by_seed + of_seeds)
        found += abs(estimate.mean) > estimate.half()
    return found / repetitions


def _flips(draw: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    """−1, 0 or 1, of mean 0 and variance `share`."""
    uniform = draw.random(shape, dtype=np.float32)
    return (uniform < share / 2).astype(np.float32) - (uniform > 1 - share / 2)


def main() -> None:
    print("## Δ: coverage, mean [lowest, highest] of four worlds, 1,000 repetitions each")
    for n_seeds in SEEDS:
        for n in ITEMS:
            cells = []
            for deviation in DEVIATIONS:
                got = [delta_coverage(of(w, deviation), n_seeds, n, 1000) for w in WORLDS]
                cells.append(f"{np.mean(got):.3f} [{min(got):.3f}, {max(got):.3f}]")
            print(f"| {n_seeds} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## accuracy: likewise")
    for n_seeds in SEEDS:
        for n in ITEMS:
            cells = []
            for deviation in DEVIATIONS:
                got = [accuracy_coverage(of(w, deviation), n_seeds, n, 500) for w in WORLDS]
                cells.append(f"{np.mean(got):.3f} [{min(got):.3f}, {max(got):.3f}]")
            print(f"| {n_seeds} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## difference of two rows, 2,000 repetitions")
    for seeds in ((3, 1), (3, 3), (5, 3), (10, 5)):
        for n in ITEMS:
            cells = [f"{difference_coverage(seeds, n, d, 2000):.3f}" for d in DEVIATIONS]
            print(f"| {seeds[0]} and {seeds[1]} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## rewards between 0 and 1, one seed, 4,000 repetitions: this, Wilson's at n")
    for kind in FRACTIONS:
        cells = [f"{fraction_coverage(kind, n, 4000, plain):.3f}"
                 for plain in (False, True) for n in (50, 280, 1500)]  # fmt: skip
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)
    print("## a share of additions, 1,500 repetitions: mean [lowest, highest] of two worlds")
    for n_seeds in SEEDS:
        for n in ITEMS:
            cells = []
            for deviation in FEATURE_DEVIATIONS:
                worlds = [of(world, deviation) for world in FEATURE_WORLDS]
                got = [feature_coverage(world, n_seeds, n, 1500) for world in worlds]
                cells.append(f"{np.mean(got):.3f} [{min(got):.3f}, {max(got):.3f}]")
            print(f"| {n_seeds} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## log-likelihood, 1,500 repetitions")
    for n_seeds in SEEDS:
        for n in ITEMS:
            cells = [f"{quality_coverage(d, n_seeds, n, 1500):.3f}" for d in QUALITY_DEVIATIONS]
            print(f"| {n_seeds} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## false alarms at .05, 1,000 repetitions: this, largest p of the seeds, pooled")
    for n_seeds in SEEDS:
        for change in (0.02, 0.2):
            for deviation in (0.0, 0.02):
                got = false_alarms(change, n_seeds, 280, deviation, 1000)
                cells = " | ".join(f"{share:.3f}" for share in got.values())
                print(f"| {n_seeds} | {change:.0%} | {deviation} | {cells} |", flush=True)
    print("## power, 2,000 repetitions: smallest difference in points, share found")
    for n_seeds in SEEDS:
        for n in ITEMS:
            cells = []
            for deviation in DEVIATIONS:
                spread = Spread(0.1, deviation**2, 0.1)
                smallest = 100 * smallest_difference(spread, n, n_seeds)
                cells.append(f"{smallest:.2f}: {found_share(spread, n, n_seeds, 2000):.3f}")
            print(f"| {n_seeds} | {n:,} |", " | ".join(cells), "|", flush=True)
    print("## one seed, few flips: percentile bootstrap, 4,000 repetitions")
    for flips in (2, 5, 10, 20, 60):
        print(f"| {flips} | {few_flips_coverage(flips, 4000):.3f} |", flush=True)


if __name__ == "__main__":
    main()
