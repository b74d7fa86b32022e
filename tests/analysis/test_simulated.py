"""Intervals and tests on sweeps whose truth is known (`helpers.simulated`; docs/statistics.md)."""

from __future__ import annotations

import pytest

from crl_exp.analysis.power import (
    Spread,
    both_needed,
    items_needed,
    power,
    seeds_needed,
    smallest_difference,
)
from crl_exp.report.tables import notes
from tests.helpers import simulated
from tests.helpers.simulated import DEVIATIONS, ITEMS, SEEDS, World

CELLS = [(s, n, d) for s in SEEDS for n in ITEMS for d in DEVIATIONS]


@pytest.mark.parametrize(("n_seeds", "n", "deviation"), CELLS)
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(n_seeds, n, deviation):
    """Student's t over seeds alone holds it in .48 to .90 of the cases."""
    world = World(0.545, 0.6, 0.9, deviation)
    assert 0.93 <= simulated.delta_coverage(world, n_seeds, n, 700) <= 0.98


def test_few_flips_make_the_bootstrap_too_narrow_and_five_do_not():
    """Below five a report says so."""
    assert simulated.few_flips_coverage(2, 500) < 0.8
    for flips in (notes.FEW_FLIPS, 20):
        assert 0.93 <= simulated.few_flips_coverage(flips, 500) <= 0.98


@pytest.mark.parametrize(("n_seeds", "n", "deviation"), CELLS)
def test_the_interval_of_the_accuracy_does(n_seeds, n, deviation):
    world = World(0.545, 0.6, 0.9, deviation)
    assert 0.93 <= simulated.accuracy_coverage(world, n_seeds, n, 600) <= 0.98


@pytest.mark.parametrize("n", ITEMS)
@pytest.mark.parametrize("n_seeds", SEEDS)
def test_the_interval_of_a_figure_of_features_does(n_seeds, n):
    """Where all noise is taken off the seeds' part, in .91 of the cases with three seeds."""
    apart, alike = simulated.FEATURE_WORLDS
    for world, deviation in ((apart, 0.0), (apart, 0.03), (alike, 0.01)):
        got = simulated.feature_coverage(simulated.of(world, deviation), n_seeds, n, 700)
        assert 0.93 <= got <= 0.98, (world.agreement, deviation)


@pytest.mark.parametrize("n", ITEMS)
@pytest.mark.parametrize("n_seeds", SEEDS)
def test_the_interval_of_the_log_likelihood_does(n_seeds, n):
    for deviation in (0.0, 0.05):
        assert 0.93 <= simulated.quality_coverage(deviation, n_seeds, n, 700) <= 0.98, deviation


@pytest.mark.parametrize("seeds", [(3, 1), (3, 3), (5, 3)])
@pytest.mark.parametrize("deviation", [0.0, 0.02])
def test_the_interval_of_two_rows_difference_does(seeds, deviation):
    assert 0.93 <= simulated.difference_coverage(seeds, 280, deviation, 1000) <= 0.98


@pytest.mark.parametrize("kind", simulated.FRACTIONS)
def test_the_interval_of_rewards_between_0_and_1_does(kind):
    """Wilson's at n items holds the truth in all cases where rewards vary less than 0 and 1 do."""
    assert 0.93 <= simulated.fraction_coverage(kind, 280, 1500) <= 0.98


@pytest.mark.parametrize(("n_seeds", "deviation"), [(1, 0.0), (3, 0.0), (3, 0.02), (10, 0.02)])
@pytest.mark.parametrize("change", [0.02, 0.2])
def test_no_difference_is_found_in_one_of_twenty_cases_at_most(n_seeds, deviation, change):
    got = simulated.false_alarms(change, n_seeds, 280, deviation, 700, alone=True)
    assert got["this"] <= 0.07


POWER_CELLS = [
    (s, n, Spread(0.2 - noise, d**2, noise))
    for s in SEEDS for n in ITEMS for d, noise in ((0.0, 0.0), (0.005, 0.1), (0.02, 0.1))
]  # fmt: skip


@pytest.mark.parametrize(("n_seeds", "n", "spread"), POWER_CELLS)
def test_what_is_to_be_found_in_four_of_five_cases_is(n_seeds, n, spread):
    assert 0.77 <= simulated.found_share(spread, n, n_seeds, 1000) <= 0.83


def test_the_smallest_difference_by_hand():
    # (1.96 + 0.8416) · √(.2 / 280) = 7.49 points; (2.8016 / .02)² · .2 = 3,924.4 items
    spread = Spread.assumed(0.2, 0.01)
    assert smallest_difference(spread, 280, 1) == pytest.approx(0.07488, abs=1e-5)
    assert items_needed(spread, 1) == 3925


def test_what_is_needed_is_enough_and_one_less_is_not():
    spread = Spread(0.15, 0.008**2, 0.05)
    n = items_needed(spread, 5)
    assert n is not None and power(0.02, spread, n, 5) >= 0.8 > power(0.02, spread, n - 1, 5)
    seeds = seeds_needed(spread, 5000)
    assert seeds is not None and power(0.02, spread, 5000, seeds) >= 0.8
    assert seeds == 2 or power(0.02, spread, 5000, seeds - 1) < 0.8
    assert items_needed(Spread(0.2, 0.02**2), 3) is None  # three seeds differ too much for it
    both = both_needed(Spread(0.2, 0.02**2), 3)
    assert both is not None and both[1] > 3 and power(0.02, Spread(0.2, 0.02**2), *both) >= 0.8
    assert seeds_needed(Spread(0.2, 0.01**2), 280) is None  # these items alone leave too much


def test_spread_is_measured_from_what_was_run():
    import numpy as np

    draw = np.random.default_rng(0)
    delta = (
        np.sqrt(0.2) * draw.standard_normal((1, 20_000))
        + np.sqrt(0.1) * draw.standard_normal((30, 20_000))
        + 0.05 * draw.standard_normal((30, 1))
    )
    spread = Spread.measured(delta)
    assert spread.items == pytest.approx(0.2, rel=0.05)
    assert spread.noise == pytest.approx(0.1, rel=0.02)
    assert spread.seeds == pytest.approx(0.0025, rel=0.5)
    assert Spread.measured(delta[:1]) == Spread(pytest.approx(0.3, rel=0.05))  # type: ignore[arg-type]
