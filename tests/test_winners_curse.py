"""What choosing on few items costs, against what repeating the choice gives."""

from __future__ import annotations

import numpy as np
import pytest

from crl_exp.winners_curse import Tried, expected_largest, winners_curse


def test_the_largest_of_a_few_normal_draws():
    # 1/√π of two, 3/(2√π) of three (David & Nagaraja 2003)
    assert expected_largest(1) == pytest.approx(0, abs=1e-6)
    assert expected_largest(2) == pytest.approx(np.pi**-0.5, rel=1e-3)
    assert expected_largest(3) == pytest.approx(1.5 * np.pi**-0.5, rel=1e-3)


@pytest.mark.parametrize(("n", "m"), [(12, 26), (100, 5), (500, 3)])
def test_it_is_what_the_best_of_equals_gains_by_luck(n, m):
    """Options that change a fifth of the items, all for nothing."""
    draw = np.random.default_rng(0)
    gained, told = [], []
    for _ in range(400):
        base = draw.random(n) < 0.5
        flips = draw.random((m, n)) < 0.2
        reward_MI = np.where(flips, draw.random((m, n)) < 0.5, base).astype(float)
        best = reward_MI[reward_MI.mean(axis=1).argmax()]
        truth = 0.5 * 0.2 + 0.8 * base  # what each item gets on average
        gained.append(best.mean() - truth.mean())
        told.append(winners_curse(reward_MI))
    assert np.mean(told) == pytest.approx(np.mean(gained), rel=0.12)


def test_what_options_share_costs_nothing():
    same = np.random.default_rng(1).integers(0, 2, 40).astype(float)
    assert winners_curse(np.stack([same] * 9)) == 0
    assert winners_curse(same[None]) == 0


def warning_of(m: int, n: int) -> str | None:
    draw, tried = np.random.default_rng(2), Tried()
    for _ in range(m):
        tried.add((draw.random(n) < 0.5).astype(np.float32))
    return tried.warning()


def test_a_choice_among_many_on_few_items_is_warned_of_with_the_number():
    said = warning_of(26, 12)
    assert said is not None and "12 validation items" in said and "26 options" in said
    curse = expected_largest(26) * (0.25 / 12) ** 0.5
    points = float(said.split("would look ")[1].split(" points")[0])
    assert points == pytest.approx(100 * curse, rel=0.1)
    assert "task.n_validation=" in said
    assert warning_of(1, 12) is None
    assert warning_of(2, 2000) is None
