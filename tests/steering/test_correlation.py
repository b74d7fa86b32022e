"""Streaming statistics against numpy and plain loops, on data that is meant to break them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crl_exp.analysis.moments import REWARDED
from crl_exp.generation.controller import StepContext
from crl_exp.steering.controllers.observer import Observer
from crl_exp.steering.feature_statistics.config import POOLINGS, WarmupConfig
from crl_exp.steering.feature_statistics.correlation import StreamingCorrelation
from crl_exp.steering.feature_statistics.measure import measure
from tests.helpers.tiny_steering import random_sae


def stream(
    z_NF: np.ndarray, y_N: np.ndarray, ends: list[int] | None = None, rewarded: str = "positive"
):
    """Fed in the batches that end at `ends`."""
    made, cuts = StreamingCorrelation(rewarded=rewarded), [0, *(ends or []), len(y_N)]
    for a, b in pairwise(cuts):
        made.update(torch.from_numpy(z_NF[a:b]), torch.from_numpy(y_N[a:b]))
    return made


def adversarial(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that go with the reward more or less: offset, tiny, huge, sparse, one outlier."""
    draw = np.random.default_rng(seed)
    y_N = (draw.random(n) < 0.4).astype(float)
    y_N[:2] = [0.0, 1.0]
    base_NF = draw.normal(size=(n, 7)) + y_N[:, None] * draw.normal(size=7)
    base_NF[:, 0] += 1e8
    base_NF[:, 1] *= 1e-12
    base_NF[:, 2] = base_NF[:, 2] * 1e12 - 1e15
    base_NF[:, 3] = np.maximum(base_NF[:, 3] - 0.5, 0) + 0.01 * y_N
    base_NF[draw.integers(n), 4] = 1e8
    base_NF[:, 5] = y_N
    base_NF[:, 6] = 5 - 3 * y_N
    return base_NF, y_N


def corrcoef(z_NF: np.ndarray, y_N: np.ndarray) -> list[float]:
    return [np.corrcoef(column, y_N)[0, 1] for column in z_NF.T]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(0, 10_000), st.data())
def test_any_order_and_any_split_equal_numpy(n: int, seed: int, data: st.DataObject) -> None:
    z_NF, y_N = adversarial(n, seed)
    expected = corrcoef(z_NF, y_N)
    order = data.draw(st.permutations(range(n)))
    ends = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    shuffled = z_NF[order], y_N[order]
    one = stream(*shuffled, ends).statistics()["correlation"]
    np.testing.assert_allclose(one, expected, atol=1e-9)
    parts = [slice(a, b) for a, b in zip([0, *ends], [*ends, n], strict=True)]
    streams = [stream(shuffled[0][p], shuffled[1][p]) for p in parts]
    merged = StreamingCorrelation()
    for i in data.draw(st.permutations(range(len(streams)))):
        merged.merge(streams[i])
    assert merged.n == n
    np.testing.assert_allclose(merged.statistics()["correlation"], expected, atol=1e-9)


def test_thousands_of_samples_equal_numpy() -> None:
    z_NF, y_N = adversarial(5000, 1)
    got = stream(z_NF, y_N, list(range(0, 5000, 37)))
    np.testing.assert_allclose(got.statistics()["correlation"], corrcoef(z_NF, y_N), atol=1e-9)


@pytest.mark.parametrize("ends", [[], [1], [1, 2, 3]])
def test_what_does_not_vary_has_no_correlation(ends: list[int]) -> None:
    """Where numpy gives nan the definition is 0."""
    y_N = np.array([0.0, 1, 1, 0])
    constants_NF = np.array([[0.0, 0.1, 1e8 + 0.3, 1e-12]] * 4)
    assert stream(constants_NF, y_N, ends).statistics()["correlation"].tolist() == [0.0] * 4
    varied_NF = np.random.default_rng(0).normal(size=(4, 3)) + 1e8
    for same in (0.0, 0.3, 1.0):
        got = stream(varied_NF, np.full(4, same), ends).statistics()
        assert got["correlation"].tolist() == [0.0] * 3
        assert all(torch.isfinite(t).all() for t in got.values())
    one = stream(varied_NF[:1], y_N[1:2]).statistics()
    assert one["correlation"].tolist() == [0.0] * 3
    assert all(torch.isfinite(t).all() for t in one.values())


@pytest.mark.parametrize("rule", REWARDED)
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 1000), cut=st.integers(0, 40))
def test_frequencies_and_coefficients_equal_numpy(rule: str, n: int, seed: int, cut: int) -> None:
    draw = np.random.default_rng(seed)
    z_NF = np.maximum(draw.normal(size=(n, 5)), 0)
    z_NF[:, 0] = 0
    y_N = draw.choice([0.0, 0.3, 0.5, 1.0], size=n)
    good = y_N > 0 if rule == "positive" else y_N >= 0.5
    made = stream(z_NF, y_N, [min(cut, n)], rule)
    got = {k: v.numpy() for k, v in made.statistics().items()}

    def mean(rows_NF: np.ndarray) -> np.ndarray:
        return rows_NF.mean(0) if len(rows_NF) else np.zeros(5)

    def mean_active(group_N: np.ndarray) -> np.ndarray:
        active = [column[group_N & (column > 0)] for column in z_NF.T]
        return np.array([a.mean() if len(a) else 0.0 for a in active])

    expected = {
        "frequency": (z_NF > 0).mean(0),
        "frequency_rewarded": mean(z_NF[good] > 0),
        "frequency_unrewarded": mean(z_NF[~good] > 0),
        "mean_positive": mean(z_NF[good]),
        "mean_active": mean_active(good),
        "mean_unrewarded": mean(z_NF[~good]),
        "mean_active_unrewarded": mean_active(~good),
        "contrastive": mean(z_NF[good]) - mean(z_NF[~good]),
        "mean": z_NF.mean(0),
    }
    # See test_scores.py.
    scores = {"mutual_information", "fisher", "mean_difference", "corrsteer_fisher"}
    assert set(got) == {*expected, *scores, "correlation"}
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=1e-12, err_msg=name)


def test_memory_does_not_grow_with_the_samples() -> None:
    def size(made: StreamingCorrelation) -> int:
        assert made.moments and made.rewarded and made.unrewarded
        groups = (made.moments, made.rewarded, made.unrewarded)
        values = [v for group in groups for v in vars(group).values()]
        stores = [v.untyped_storage().nbytes() for v in values if isinstance(v, torch.Tensor)]
        return sum(stores) + len(values) * 8

    z_NF, y_N = adversarial(3000, 2)
    assert size(stream(z_NF, y_N, list(range(0, 3000, 100)))) == size(stream(z_NF[:2], y_N[:2]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_answers_that_end_early(pooling: str) -> None:
    """Rows live 1, 3 and 5 tokens; what comes after their end doesn't count."""
    draw, lengths = torch.Generator().manual_seed(0), [1, 3, 5]
    x_TBD = torch.randn(5, 3, 8, generator=draw)
    saes = {2: random_sae(2, 8), 3: random_sae(3, 8, seed=1)}
    observer = Observer(saes, pooling)
    state: dict = {}
    for t in range(5):
        alive_B = torch.tensor([t < length for length in lengths])
        for layer in saes:
            assert (
                observer.act(layer, x_TBD[t] * layer, StepContext(t, [0, 1, 2], alive_B, state))
                is None
            )
    observer.end(StepContext(4, [0, 1, 2], alive_B, state))
    for layer, sae in saes.items():
        for row, length in enumerate(lengths):
            acts_TF = torch.stack([sae.encode(x_TBD[t, row] * layer) for t in range(length)])
            by_hand_F = {"max": acts_TF.amax(0), "mean": acts_TF.mean(0), "last_prompt": acts_TF[0]}
            torch.testing.assert_close(observer.pooled_BF[layer][row], by_hand_F[pooling])
        x_ND = torch.cat([x_TBD[: lengths[row], row] * layer for row in range(3)])
        seen = observer.residuals[layer]
        assert seen.moments.n == sum(lengths)
        torch.testing.assert_close(seen.moments.total_F, x_ND.double().sum(0))
        torch.testing.assert_close(seen.norm_N.sort()[0], x_ND.norm(dim=1).sort()[0])


def test_measured_statistics_equal_plain_numpy() -> None:
    x_ND = torch.randn(10, 8, generator=torch.Generator().manual_seed(3)) + 2
    y_N = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 1, 1, 0])
    saes = {4: random_sae(4, 8)}

    def answer(observer, items) -> torch.Tensor:
        rows = torch.ones(len(items), dtype=torch.bool)
        context = StepContext(0, list(items), rows)
        observer.act(4, x_ND[list(items)], context)
        observer.end(context)
        return y_N[list(items)]

    config = WarmupConfig(
        "max",
        contrast="reward",
        min_frequency=0.01,
        keep=5,
        rewarded="positive",
        score="pearson",
        negative="keep",
    )
    got = measure(saes, "max", 10, 4, answer)[4].scored(config)
    assert (got.n, got.accuracy, got.layer) == (10, 0.5, 4)
    acts_NF = saes[4].encode(x_ND).double().numpy()
    varied = acts_NF.std(0) > 0
    expected = np.array(corrcoef(acts_NF[:, varied], y_N.double().numpy()))
    # The SAE works in float32, and rounds a little differently in another batch.
    np.testing.assert_allclose(got.correlation.numpy()[varied], expected, atol=1e-6)
    torch.testing.assert_close(got.mean_D, x_ND.double().mean(0))
    torch.testing.assert_close(got.std_D, x_ND.double().std(0))
    norm_N = x_ND.norm(dim=1)
    assert got.median_norm == pytest.approx(float(norm_N.median()))
    assert got.norm_mean == pytest.approx(float(norm_N.mean()))
    assert got.norm_std == pytest.approx(float(norm_N.std(correction=0)))
    best = int(np.nanargmax(np.where(varied, got.correlation.numpy(), np.nan)))
    assert got.best(0.01) == [best]
    often = got.allowed(0.6).tolist()
    assert often == [i for i in range(16) if (acts_NF[:, i] > 0).mean() >= 0.6]
