"""Stage 1's scores besides Pearson's r, by hand and against numpy; negative ones."""

from __future__ import annotations

from math import log

import numpy as np
import pytest
import torch

from crl_exp.steering.controllers.observer import Residuals
from crl_exp.steering.feature_statistics.config import SCORES, WarmupConfig
from crl_exp.steering.feature_statistics.correlation import Moments, StreamingCorrelation
from crl_exp.steering.feature_statistics.measure import LayerPass
from crl_exp.steering.feature_statistics.scores import KEPT, handle_negative
from crl_exp.steering.feature_statistics.store import LayerStatistics
from tests.helpers.tiny_steering import statistics

# Three rewarded samples and two others; features: good, bad, always 1, never.
Z = torch.tensor([[3.0, 0, 1, 0], [1.0, 0, 1, 0], [0.0, 2, 1, 0], [0.0, 4, 1, 0], [1.0, 0, 1, 0]])
Y = torch.tensor([1.0, 1, 1, 0, 0])


def found(cuts: list[int], keep: str = "values") -> dict[str, torch.Tensor]:
    stream = StreamingCorrelation(keep)
    for z, y in zip(Z.tensor_split(cuts), Y.tensor_split(cuts), strict=True):
        stream.update(z, y)
    return stream.statistics()


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4], [3], [2]])
def test_scores_by_hand(cuts) -> None:
    """Means 4/3, 2/3 (rewarded) and 1/2, 2; variances 14/9, 8/9 and 1/4, 4."""
    got = found(cuts)
    assert got["mean_difference"].tolist() == pytest.approx([5 / 6, -4 / 3, 0, 0])
    fisher = [(25 / 36) / (14 / 9 + 1 / 4), -(16 / 9) / (8 / 9 + 4), 0, 0]
    assert got["fisher"].tolist() == pytest.approx(fisher)
    # Active in 2 of 3 and 1 of 2: n = 5, three active.
    mi = (
        2 / 5 * log(2 * 5 / (3 * 3)) + 1 / 5 * log(1 * 5 / (2 * 3))
        + 1 / 5 * log(1 * 5 / (3 * 2)) + 1 / 5 * log(1 * 5 / (2 * 2))
    )  # fmt: skip
    # The second: active in 1 of 3 and 1 of 2.
    mi2 = (
        1 / 5 * log(1 * 5 / (2 * 3)) + 2 / 5 * log(2 * 5 / (3 * 3))
        + 1 / 5 * log(1 * 5 / (2 * 2)) + 1 / 5 * log(1 * 5 / (3 * 2))
    )  # fmt: skip
    assert got["mutual_information"].tolist() == pytest.approx([mi, -mi2, 0, 0], abs=1e-12)
    # Above 1/2: two of three. Above 2: none (not strictly). Above 1 and 0: none.
    assert got["composite"].tolist() == pytest.approx([5 / 6 * 2 / 3, 0, 0, 0])


def test_scores_of_many_samples_equal_numpy() -> None:
    draw = np.random.default_rng(0)
    y = (draw.random(700) < 0.4).astype(float)
    z = np.maximum(draw.normal(size=(700, 9)) + y[:, None] * draw.normal(size=9), 0)
    z[:, 8] -= 5  # values below zero, which an SAE doesn't give but a raw residual does
    stream = StreamingCorrelation(keep="values")
    for at in range(0, 700, 64):
        stream.update(torch.from_numpy(z[at : at + 64]), torch.from_numpy(y[at : at + 64]))
    got, good, bad = stream.statistics(), z[y == 1], z[y == 0]
    difference = good.mean(0) - bad.mean(0)
    fisher = np.sign(difference) * difference**2 / (good.var(0) + bad.var(0))
    np.testing.assert_allclose(got["fisher"], fisher, rtol=1e-9)
    consistency = (good > bad.mean(0)).mean(0)
    np.testing.assert_allclose(got["composite"], difference * consistency, rtol=1e-6)


def test_a_zero_is_above_a_mean_below_zero() -> None:
    """Zeros aren't kept: rewarded 0, −1, 2 and −5 against a mean of −3. Difference −1 + 3 = 2."""
    stream = StreamingCorrelation(keep="values")
    stream.update(
        torch.tensor([[0.0], [-1], [2], [-5], [-2], [-4]]), torch.tensor([1.0] * 4 + [0] * 2)
    )
    assert stream.statistics()["composite"].tolist() == pytest.approx([2 * 3 / 4])


def test_a_feature_may_be_steered_from_the_least_frequency_on() -> None:
    plain = statistics(3, 6, d_sae=4)
    frequency_F = torch.tensor([0.5, 0.02, 0.0199, 0.25], dtype=torch.float64)
    plain.by_feature["frequency"] = frequency_F
    assert plain.allowed(0.02).tolist() == [0, 1, 3] and plain.allowed(0.5).tolist() == [0]


def test_without_values_kept_there_is_no_composite() -> None:
    stream = StreamingCorrelation()
    stream.update(Z, Y)
    assert "composite" not in stream.statistics()


def test_scores_are_ranked_by_as_they_are() -> None:
    """Neither the layer's largest nor one that may not be steered sets a scale."""
    plain = statistics(3, 6, d_sae=4)
    plain.by_feature["fisher"] = torch.tensor([0.5, -8.0, 0.0, 4.87], dtype=torch.float64)
    plain.by_feature["frequency"][1] = 0.0
    assert plain.scored(config("fisher", "keep")).score.tolist() == [0.5, -8.0, 0.0, 4.87]


def test_what_becomes_of_negative_scores() -> None:
    values = torch.tensor([0.5, -0.8, 0.0])
    assert handle_negative(values, "keep").tolist() == pytest.approx([0.5, -0.8, 0.0])
    assert handle_negative(values, "clip").tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert handle_negative(values, "steer").tolist() == pytest.approx([0.5, 0.8, 0.0])


def config(score: str, negative: str) -> WarmupConfig:
    return WarmupConfig(
        "max",
        contrast="reward",
        min_frequency=0.02,
        keep=5,
        rewarded="positive",
        score=score,
        negative=negative,
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("negative", "best"), [("keep", 0), ("clip", 0), ("steer", 1), ("drop", 0)]
)
def test_features_are_ranked_by_the_chosen_score(score, negative, best, tmp_path) -> None:
    """Feature 1 goes with failure more than feature 0 with success, by every score but two."""
    plain = statistics(3, 6, d_sae=4)
    found_F = {**plain.by_feature, **found([], KEPT.get(score, "values"))}
    made = LayerStatistics(**{**vars(plain), "by_feature": found_F})
    made.save(tmp_path / "s.safetensors")
    chosen = LayerStatistics.load(tmp_path / "s.safetensors").scored(config(score, negative))
    if negative == "steer":
        sizes = found_F["correlation" if score == "pearson" else score].abs()
        best = int(sizes.argmax())
    assert chosen.best(min_frequency=0.02) == [best]
    name = "correlation" if score == "pearson" else score
    assert torch.equal(chosen.by_feature["sign"], found_F[name].sign())


def test_what_is_stored_comes_back(tmp_path) -> None:
    made = statistics(3, 6)
    made.save(tmp_path / "s.safetensors")
    again = LayerStatistics.load(tmp_path / "s.safetensors")
    for name in ("layer", "n", "accuracy", "median_norm", "norm_mean", "norm_std"):
        assert getattr(again, name) == getattr(made, name)
    for name, value in vars(made.moments).items():
        got = getattr(again.moments, name)
        assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value


def test_bad_values_are_named_with_the_nearest() -> None:
    assert "'fisher'" in "".join(config("fischer", "keep").faults())
    assert "'steer'" in "".join(config("pearson", "ster").faults())
    assert config("composite", "steer").faults() == []


# --- those of CorrSteer's table ---


def mutual_information_of(bins: list[int], y: list[int]) -> float:
    """By the entropies of the empirical distributions, in nats."""

    def entropy(values: list) -> float:
        share = np.unique(values, return_counts=True, axis=0)[1] / len(values)
        return float(-(share * np.log(share)).sum())

    return entropy(bins) + entropy(y) - entropy(list(zip(bins, y, strict=True)))


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 4], [3], [2]])
def test_corrsteers_scores_by_hand(cuts) -> None:
    """Squares: (9 + 1)/3 over 1/2; 4/3 over 16/2; 1 over 1; nothing. Bins end at 1.78, 3.16 and
    5.62: 3 and 2 are in one, 1, 4 and 0 in others. Signs are those of r."""
    got = found(cuts, "histogram")
    r = np.array([np.corrcoef(Z[:, f], Y)[0, 1] for f in (0, 1)])
    ratios = [np.sign(r[0]) * (10 / 3) / (1 / 2), np.sign(r[1]) * (4 / 3) / 8, 0, 0]
    assert got["corrsteer_fisher"].tolist() == pytest.approx(ratios)
    y = [1, 1, 1, 0, 0]
    binned = [mutual_information_of([2, 1, 0, 0, 1], y), -mutual_information_of([0, 0, 2, 3, 0], y)]
    assert got["corrsteer_mutual_information"].tolist() == pytest.approx([*binned, 0, 0], abs=1e-12)
    assert "composite" not in got and "corrsteer_mutual_information" not in found(cuts)


def test_the_binned_score_of_many_samples_equals_numpy() -> None:
    """Activations over nine decades; edges as CorrSteer's code makes them, sorted."""
    draw = np.random.default_rng(0)
    y = (draw.random(400) < 0.3).astype(float)
    z = 10 ** draw.uniform(-7, 2, size=(400, 5)) * (draw.random((400, 5)) < 0.6)
    z[:, 0] *= 1 + 30 * y
    edges = [10 ** (d + k / 4) for d in range(-6, 1) for k in range(1, 4)]
    stream = StreamingCorrelation("histogram")
    for at in range(0, 400, 64):
        stream.update(torch.from_numpy(z[at : at + 64]).float(), torch.from_numpy(y[at : at + 64]))
    got = stream.statistics()["corrsteer_mutual_information"].abs()
    bins = np.digitize(z, edges, right=True)
    expected = [mutual_information_of(bins[:, f].tolist(), y.tolist()) for f in range(5)]
    assert got.tolist() == pytest.approx(expected)
    assert got.argmax() == 0


@pytest.mark.parametrize("keep", [None, "values", "histogram"])
def test_a_pass_goes_on_with_what_was_kept(keep) -> None:
    """Saved after three of five answers."""
    norms = Residuals(Moments.of(torch.rand(2, 3), torch.rand(2)), torch.ones(2))
    first = LayerPass(torch.device("cpu"), keep, "positive")
    first.take(Z[:3], norms, Y[:3])
    second = LayerPass(torch.device("cpu"), keep, "positive")
    second.load(first.state())
    second.take(Z[3:], norms, Y[3:])
    whole, got = found([], keep or "none"), second.stream.statistics()
    assert got.keys() == whole.keys()
    for name, values in whole.items():
        torch.testing.assert_close(got[name], values)
