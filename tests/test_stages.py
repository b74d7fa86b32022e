"""Every logit stage by hand, and what must hold in any order of them."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crl_exp import selection
from crl_exp.stages.activation import Identity, JumpReLU
from crl_exp.stages.base import STAGES, Stage, StageContext
from crl_exp.stages.fusion import Add, Multiply
from crl_exp.stages.mask import Active, NoMask
from crl_exp.stages.noise import EpsilonGreedy, Gaussian, NoNoise
from tests.tiny_steering import pipeline

INF = float("inf")
ORDERS = list(permutations(STAGES))
LOGITS = torch.tensor([[1.0, -2.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]])


def context(explore: bool = False, seed: int = 0, n: int = 2) -> StageContext:
    acts_C = torch.tensor([0.0, 2.0, 0.1, 3.0])
    return StageContext(
        obs_BD=torch.zeros(n, 3),
        correlation_C=torch.tensor([0.5, -1.0, 0.25, 0.1]),
        feature_acts_BC=acts_C.expand(n, -1),
        value_B=torch.tensor([0.75, -1.0]).repeat(n)[:n],
        token_index_B=torch.zeros(n, dtype=torch.long),
        explore=explore,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Add(2.0), [[2.0, -4.0, 1.0, -INF], [4.0, -2.0, 0.0, 2.2]]),
        (Multiply(), [[0.5, 2.0, 0.125, -INF], [1.5, 0.0, -0.125, 0.2]]),
        (Identity(), LOGITS.tolist()),
        (JumpReLU(0.5), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (JumpReLU(-1.0), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]]),
        (JumpReLU(None), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, -0.5, 2.0]]),
        (NoMask(), LOGITS.tolist()),
        (Active(), [[-INF, -2.0, 0.5, -INF], [-INF, 0.0, -0.5, 2.0]]),
        (NoNoise(), LOGITS.tolist()),
        (Gaussian(3.0), LOGITS.tolist()),
        (EpsilonGreedy(1.0), LOGITS.tolist()),
    ],
)
def test_each_stage_by_hand(stage: Stage, expected: list[list[float]]) -> None:
    torch.testing.assert_close(stage(LOGITS, context()), torch.tensor(expected))


def test_critic_threshold_takes_no_gradient() -> None:
    logits, made = LOGITS.clone().requires_grad_(), context()
    made.value_B.requires_grad_()
    JumpReLU(None)(logits, made)[:, :3].sum().backward()
    assert made.value_B.grad is None
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]


def test_gaussian_noise_has_its_deviation() -> None:
    wide = torch.ones(500, 40)
    wide[:, 0] = -INF
    draw = StageContext(
        wide, wide[0], None, wide[:, 0], wide[:, 0], True, 0.0, torch.Generator().manual_seed(0)
    )
    noise = Gaussian(0.5)(wide, draw)[:, 1:] - 1
    assert float(noise.std()) == pytest.approx(0.5, rel=0.03)
    assert abs(float(noise.mean())) < 0.02
    assert torch.equal(Gaussian(0.0)(wide, draw), wide)


def test_epsilon_greedy_levels_its_share_of_rows() -> None:
    logits = LOGITS[:1].expand(4000, -1)
    out = EpsilonGreedy(0.3)(logits, context(True, n=4000))
    level = (out[:, :3] == 0).all(1)
    assert float(level.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(out[~level], logits[~level])
    assert out[:, 3].isneginf().all()
    assert torch.equal(EpsilonGreedy(0.0)(LOGITS, context(True)), LOGITS)
    assert EpsilonGreedy(1.0)(LOGITS, context(True))[:, :3].eq(0).all()


@pytest.mark.parametrize("noise", [Gaussian(1.0), EpsilonGreedy(0.9)])
def test_noise_comes_only_with_explore(noise: Stage) -> None:
    for order in ORDERS:
        made = pipeline(order, noise=noise, activation=JumpReLU(None), mask=Active())
        still = made(LOGITS, context(seed=1))
        assert torch.equal(still, made(LOGITS, context(seed=2)))
        assert torch.equal(
            still, pipeline(order, activation=JumpReLU(None), mask=Active())(LOGITS, context())
        )
        assert not torch.equal(still, made(LOGITS, context(explore=True)))
        explored = made(LOGITS, context(explore=True, seed=3))
        assert torch.equal(explored, made(LOGITS, context(explore=True, seed=3)))


CHOICES = list(
    product(
        [Add(1.5), Multiply()],
        [NoNoise(), Gaussian(2.0), EpsilonGreedy(0.5)],
        [Identity(), JumpReLU(0.2), JumpReLU(None)],
        [NoMask(), Active()],
    )
)


def test_barred_stays_barred_through_any_stage_and_order() -> None:
    """And nothing else is barred but by the mask."""
    for order in ORDERS:
        for fusion, noise, activation, mask in CHOICES:
            made = pipeline(order, fusion=fusion, noise=noise, activation=activation, mask=mask)
            out = made(LOGITS, context(explore=True))
            barred = LOGITS.isneginf()
            if isinstance(mask, Active):
                barred = barred | torch.tensor([True, False, False, False])
            assert torch.equal(out.isneginf(), barred)
            assert out[~barred].isfinite().all()


def test_order_matters_and_is_kept() -> None:
    stages = {"fusion": Add(1.0), "activation": JumpReLU(1.2)}
    first = pipeline(("fusion", "activation", "noise", "mask"), **stages)(LOGITS, context())
    last = pipeline(("activation", "fusion", "noise", "mask"), **stages)(LOGITS, context())
    assert first[0].tolist() == [1.5, 0.0, 0.0, -INF]
    assert last[0].tolist() == [0.5, -1.0, 0.25, -INF]


def test_feature_activations_are_asked_for_where_needed() -> None:
    assert pipeline(mask=Active()).needs_feature_acts
    assert not pipeline().needs_feature_acts


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-50, 50), st.just(-INF)), min_size=4, max_size=4),
    st.sampled_from(ORDERS),
    st.sampled_from(CHOICES),
)
def test_probabilities_sum_to_one(row: list[float], order, choice) -> None:
    fusion, noise, activation, mask = choice
    made = pipeline(order, fusion=fusion, noise=noise, activation=activation, mask=mask)
    out = made(torch.tensor([row]), context(explore=True, n=1)).double()
    single = selection.log_prob(out.expand(4, -1), torch.arange(4)[:, None]).exp()
    allowed = ~out[0].isneginf()
    assert float(single[allowed].sum()) == pytest.approx(float(allowed.any()), abs=1e-9)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (Gaussian(-1.0), "noise.std"),
        (Gaussian(float("nan")), "noise.std"),
        (EpsilonGreedy(1.5), "noise.epsilon"),
        (EpsilonGreedy(float("nan")), "noise.epsilon"),
    ],
)
def test_bad_values_are_named(stage: Stage, said: str) -> None:
    assert said in "".join(stage.faults())
    assert Gaussian(0.0).faults() == EpsilonGreedy(1.0).faults() == []
