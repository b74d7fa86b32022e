"""Sampling without replacement and its probability, against counting and by hand."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from crl_exp.analysis.row_random import RowRandom
from crl_exp.steering.policy import sampling as selection

INF = float("inf")


def rows(row: list[float], n: int = 1) -> torch.Tensor:
    return torch.tensor([row], dtype=torch.float64).expand(n, -1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-30, 30), st.just(-INF)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_probabilities_of_all_ordered_choices_sum_to_one(row: list[float], k: int) -> None:
    allowed = [i for i, x in enumerate(row) if x > -INF]
    filled = min(k, len(allowed))
    empty = [-1] * (k - filled)
    choices = torch.tensor([[*p, *empty] for p in permutations(allowed, filled)])
    total = selection.log_prob(rows(row, len(choices)), choices).exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-9)


def test_log_prob_by_hand() -> None:
    row = [0.0, 1.0, -INF, 2.0]
    e = [float(x) for x in torch.tensor(row, dtype=torch.float64).exp()]
    first = e[3] / (e[0] + e[1] + e[3])
    second = e[0] / (e[0] + e[1])
    got = selection.log_prob(rows(row), torch.tensor([[3, 0]])).exp()
    assert float(got) == pytest.approx(first * second, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-5, 5), st.just(-INF)), min_size=1, max_size=8),
    st.integers(1, 10),
    st.integers(0, 1000),
)
def test_choices_are_distinct_and_allowed(row: list[float], k: int, seed: int) -> None:
    allowed = {i for i, x in enumerate(row) if x > -INF}
    logits = rows(row, 5)
    sampled = selection.sample(logits, k, RowRandom(seed, torch.arange(len(logits))))
    for choice in [*sampled.tolist(), *selection.greedy(logits, k).tolist()]:
        assert len(choice) == k
        real = [c for c in choice if c >= 0]
        assert len(set(real)) == len(real) == min(k, len(allowed))
        assert set(real) <= allowed
        assert choice[len(real) :] == [-1] * (k - len(real))


def test_greedy_takes_the_highest_best_first() -> None:
    logits = torch.tensor([[0.1, 3.0, -INF, 2.0], [-INF, -INF, -INF, -INF]])
    assert selection.greedy(logits, 2).tolist() == [[1, 3], [-1, -1]]
    assert selection.greedy(logits, 5)[0].tolist() == [1, 3, 0, -1, -1]


@pytest.mark.parametrize("k", [1, 2])
def test_sampling_follows_the_exact_probabilities(k: int) -> None:
    row, n = [0.0, 1.5, -INF, -1.0, 0.7], 20_000
    choices = list(permutations([0, 1, 3, 4], k))
    exact = selection.log_prob(rows(row, len(choices)), torch.tensor(choices)).exp()
    drawn = selection.sample(rows(row, n).float(), k, RowRandom(0, torch.arange(n))).tolist()
    counts = [sum(tuple(d) == c for d in drawn) for c in choices]
    assert sum(counts) == n
    assert chisquare(counts, (exact / exact.sum() * n).numpy()).pvalue > 1e-3


def test_gradients_are_finite_where_features_are_barred() -> None:
    logits = torch.tensor([[0.5, -INF, 1.0], [-INF, -INF, 2.0], [-INF, -INF, -INF]])
    logits.requires_grad_()
    choice = torch.tensor([[2, 0], [2, -1], [-1, -1]])
    log_prob_B, entropy_B = selection.log_prob(logits, choice), selection.entropy(logits)
    assert log_prob_B[1:].tolist() == [0.0, 0.0]
    assert entropy_B[1:].tolist() == [0.0, 0.0]
    (log_prob_B.sum() + entropy_B.sum()).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().min() == 0 < logits.grad[0].abs().max()
    assert not logits.grad[2].any()


def test_entropy_by_hand() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    row = [float(third.log()), -INF, float((2 * third).log())]
    by_hand = -(third * third.log() + 2 * third * (2 * third).log())
    assert float(selection.entropy(rows(row))) == pytest.approx(float(by_hand), rel=1e-12)
    even = selection.entropy(torch.zeros(1, 8, dtype=torch.float64))
    assert float(even) == pytest.approx(2.0794415416798357, rel=1e-12)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("barred", [False, True])
def test_probability_and_entropy_of_one_softmax_are_those_of_two(barred: bool, k: int) -> None:
    """To the last bit, gradients too."""
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 30, generator=draw)
    if barred:
        logits[torch.rand(40, 30, generator=draw) < 0.5] = -torch.inf
        logits[0] = -torch.inf
    choice = selection.sample(logits, k, RowRandom(0, torch.arange(40)))
    weight = torch.randn(2, 40, generator=draw)

    def gradient(log_prob, entropy, leaf):
        return torch.autograd.grad((weight[0] * log_prob + weight[1] * entropy).sum(), leaf)[0]

    one, two = (logits.clone().requires_grad_() for _ in range(2))
    made = selection.log_prob_and_entropy(one, choice, barred=barred)
    apart = selection.log_prob(two, choice), selection.entropy(two)
    assert all(torch.equal(a, b) for a, b in zip(made, apart, strict=True))
    assert torch.equal(gradient(*made, one), gradient(*apart, two))
    assert gradient(*selection.log_prob_and_entropy(one, choice), one).any()
