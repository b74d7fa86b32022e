"""Each stage against numbers worked out by hand from its equation."""

from __future__ import annotations

from math import cos, exp, pi

import pytest
import torch

from crl_exp.networks import PolicyConfig
from crl_exp.stages.activation import (
    GumbelTopK,
    Identity,
    Softmax,
    SparseAttention,
    SparseGate,
    STETopK,
)
from crl_exp.stages.base import Stage, StageContext, masked_softmax, quantile
from crl_exp.stages.fusion import (
    Add,
    Attention,
    ContextScale,
    LearnableMix,
    Multiply,
    OneOrCorr,
    PositionLinear,
)
from crl_exp.stages.mask import Active, Everything, Generation, Inactive, NoMask
from crl_exp.stages.noise import EpsilonGreedy, Gaussian, NoNoise, scheduled
from crl_exp.stages.threshold import JumpReLU, LearnableJumpReLU, QuantileJumpReLU
from tests.stage_options import EACH, INF, LOGITS, built, context, made
from tests.tiny_steering import grpo, ppo

# ‖[1, −2, .5]‖ = √5.25 at the first token; ‖[3, 0, −.5, 2]‖ = √13.25 after tokens of log-sum 2.
LATER = 1 / (1 + exp(2 - 13.25**0.5))


def soft(row: list[float]) -> list[float]:
    total = sum(exp(z) for z in row)
    return [exp(z) / total for z in row]


FIRST, SECOND = soft([1.0, -2.0, 0.5]), soft([3.0, 0.0, -0.5, 2.0])


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Add(2.0), [[2.0, -4.0, 1.0, -INF], [4.0, -2.0, 0.0, 2.2]]),
        (Multiply(), [[0.5, 2.0, 0.125, -INF], [1.5, 0.0, -0.125, 0.2]]),
        # The .5-quantile of [−1, .1, .25, .5] is .1 (the lower of the middle two).
        (OneOrCorr(0.5), [[0.5, -2.0, 0.125, -INF], [1.5, 0.0, -0.125, 0.2]]),
        (OneOrCorr(0.7), [[0.5, -2.0, 0.125, -INF], [1.5, 0.0, -0.125, 2.0]]),
        (LearnableMix(2.0), [[2.0, -4.0, 1.0, -INF], [4.0, -2.0, 0.0, 2.2]]),
        # sigmoid(0) = .5, sigmoid(1) = .731059.
        (ContextScale(2.0), [[1.5, -3.0, 0.75, -INF],
                             [3.731059, -1.462117, -0.134471, 2.146212]]),
        # Tokens 0 and 3 of 4: factors .1 and 1.
        (PositionLinear(2.0, 0.1, 1.0), [[1.1, -2.2, 0.55, -INF], [4.0, -2.0, 0.0, 2.2]]),
        (Attention(2.0), [[2.0, -4.0, 1.0, -INF],
                          [3 + LATER, -2 * LATER, -0.5 + 0.5 * LATER, 2 + 0.2 * LATER]]),
        (Identity(), LOGITS.tolist()),
        (JumpReLU(0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (JumpReLU(-1.0, False), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]]),
        (JumpReLU(None, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, -0.5, 2.0]]),
        # Medians of [−2, .5, 1] and (the lower) of [−.5, 0, 2, 3]: .5 and 0.
        (QuantileJumpReLU(0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (QuantileJumpReLU(0.0, False), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (LearnableJumpReLU(0.6, 0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (GumbelTopK(0.5, 1), [[2.0, -4.0, 1.0, -INF], [6.0, 0.0, -1.0, 4.0]]),
        (Softmax(1.0, 10.0), [[10 * p for p in FIRST] + [-INF], [10 * p for p in SECOND]]),
        (STETopK(1.0, 10.0, 2), [[10 * FIRST[0], 0.0, 10 * FIRST[2], -INF],
                                 [10 * SECOND[0], 0.0, 0.0, 10 * SECOND[3]]]),
        (SparseGate(0.5, 0.6), LOGITS.tolist()),
        (SparseGate(0.7, 0.6), [[0.0, 0.0, 0.0, -INF], [0.0, 0.0, 0.0, 0.0]]),
        (SparseAttention(0.0), LOGITS.tolist()),
        (SparseAttention(0.7), [[1.0, -INF, 0.5, -INF], [3.0, -INF, -0.5, -INF]]),
        (NoMask(), LOGITS.tolist()),
        (Active(), [[-INF, -2.0, 0.5, -INF], [-INF, 0.0, -0.5, 2.0]]),
        (Inactive(), [[1.0, -INF, -INF, -INF], [3.0, -INF, -INF, -INF]]),
        (Generation(), [[1.0, -2.0, -INF, -INF], [3.0, 0.0, -INF, 2.0]]),
        # Means .5, 0, .2, .3: the best one, the best half, and all that aren't 0.
        (Everything(0.25), [[1.0, -INF, -INF, -INF], [3.0, -INF, -INF, -INF]]),
        (Everything(0.5), [[1.0, -INF, -INF, -INF], [3.0, -INF, -INF, 2.0]]),
        (Everything(1.0), [[1.0, -INF, 0.5, -INF], [3.0, -INF, -0.5, 2.0]]),
        (NoNoise(), LOGITS.tolist()),
        (Gaussian(3.0, "constant"), LOGITS.tolist()),
        (EpsilonGreedy(1.0, "constant"), LOGITS.tolist()),
    ],
    ids=str,
)  # fmt: skip
def test_each_stage_by_hand(stage: Stage, expected: list[list[float]]) -> None:
    got = made(stage)(LOGITS, context())
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-6, rtol=1e-6)


def test_attention_notes_the_length_for_the_next_token() -> None:
    here = context()
    made(Attention(1.0))(LOGITS, here)
    torch.testing.assert_close(here.noted["length_B"], torch.tensor([5.25, 13.25]).sqrt())


def test_sparse_attention_by_hand() -> None:
    """Scores [ln 3, ·, 0, ·] at the first row: weights 3/4 and 1/4, times 2 features."""
    stage = made(SparseAttention(0.7))
    assert isinstance(stage, SparseAttention)
    with torch.no_grad():
        stage.attention.weight[0, 0] = torch.tensor(3.0).log()
    got = stage(LOGITS, context())
    assert got[0].tolist() == pytest.approx([1.5, -INF, 0.25, -INF])


def test_a_q_critic_gives_each_feature_its_threshold() -> None:
    q_BC = torch.tensor([[1.5, -3.0, 0.0, 0.0], [2.0, 1.0, -1.0, 5.0]])
    got = JumpReLU(None, False)(LOGITS, context(value_BX=q_BC))
    assert got.tolist() == [[0.0, -2.0, 0.5, -INF], [3.0, 0.0, -0.5, 0.0]]


def test_a_threshold_in_stage_1_acts_on_the_scores() -> None:
    """corr [.5, −1, .25, .1] with θ = .2 becomes [.5, 0, .25, 0] before it is added."""
    from tests.tiny_steering import pipeline

    order = ("activation", "fusion", "noise", "mask")
    zeros = torch.zeros(1, 4)
    here = context(n=1)
    off = pipeline(order, activation=JumpReLU(0.2, False))(zeros, here)
    on = pipeline(order, activation=JumpReLU(0.2, True))(zeros, here)
    assert off[0].tolist() == pytest.approx([0.5, -1.0, 0.25, 0.1])
    assert on[0].tolist() == pytest.approx([0.5, 0.0, 0.25, 0.0])


def test_quantiles_pass_over_what_is_barred() -> None:
    values = torch.tensor([[4.0, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0]])
    barred = torch.tensor([[False] * 4, [False, True, False, True], [True] * 4])
    assert quantile(values, barred, 0.5)[:, 0].tolist() == [2.0, 3.0, 0.0]
    assert quantile(values, barred, 0.99)[:, 0].tolist() == [3.0, 3.0, 0.0]


def test_a_softmax_over_nothing_is_zero() -> None:
    barred = torch.tensor([[True, True], [False, True], [False, False]])
    got = masked_softmax(torch.tensor([[1.0, 2.0]] * 3), barred)
    assert got.tolist() == [[0.0, 0.0], [1.0, 0.0], pytest.approx(soft([1.0, 2.0]))]


def wide(progress: float = 0.0) -> tuple[torch.Tensor, StageContext]:
    logits = torch.ones(500, 40)
    logits[:, 0] = -INF
    return logits, context(True, n=500, progress=progress)


@pytest.mark.parametrize(
    ("schedule", "progress", "left"),
    [("constant", 0.5, 1.0), ("linear", 0.25, 0.75), ("cosine", 0.0, 1.0),
     ("cosine", 0.25, (1 + cos(pi / 4)) / 2), ("cosine", 0.5, 0.5), ("linear", 1.0, 0.0)],
)  # fmt: skip
def test_noise_follows_its_schedule(schedule, progress, left) -> None:
    assert scheduled(schedule, progress) == pytest.approx(left)
    logits, here = wide(progress)
    noise = Gaussian(0.5, schedule)(logits, here)[:, 1:] - 1
    assert float(noise.std()) == pytest.approx(0.5 * left, rel=0.03, abs=1e-6)
    assert abs(float(noise.mean())) < 0.02
    rows = LOGITS[:1].expand(4000, -1)
    out = EpsilonGreedy(0.4, schedule)(rows, context(True, n=4000, progress=progress))
    level = (out[:, :3] == 0).all(1)
    assert float(level.float().mean()) == pytest.approx(0.4 * left, abs=0.03)
    assert torch.equal(out[~level], rows[~level]) and out[:, 3].isneginf().all()


def test_gumbel_topk_keeps_the_top_and_samples_by_the_softmax() -> None:
    """With `top` 1 the one kept is a draw from softmax(z): 2/3 against 1/3."""
    logits = torch.tensor([[2.0, 1.0, -INF]]).log().expand(6000, -1).clone()
    logits[:, 2] = -INF
    here = context(True, n=6000)
    one = GumbelTopK(1.0, 1)(logits, here)
    assert (~one.isneginf()).sum(1).eq(1).all()
    share = float((~one[:, 0].isneginf()).float().mean())
    assert share == pytest.approx(2 / 3, abs=0.02)
    two = GumbelTopK(1.0, 2)(logits, here)
    assert (~two.isneginf()).sum(1).eq(2).all() and two[:, 2].isneginf().all()


def test_barred_features_take_no_place_among_the_top() -> None:
    """The barred one stands at 0 inside a stage, above all others here."""
    first, second, _ = soft([-1.0, -2.0, -3.0])
    got = STETopK(1.0, 10.0, 2)(torch.tensor([[-1.0, -2.0, -3.0, -INF]]), context(n=1))
    assert got[0].tolist() == pytest.approx([10 * first, 10 * second, 0.0, -INF])


def test_gumbel_noise_is_added_before_the_temperature() -> None:
    """With all kept, out · temperature − z is standard Gumbel: mean .5772, deviation π/√6."""
    rows = LOGITS[:1].expand(20_000, -1)
    out = GumbelTopK(0.5, 4)(rows, context(True, n=20_000))
    noise = 0.5 * out[:, :3] - rows[:, :3]
    assert noise.mean(0).tolist() == pytest.approx([0.5772] * 3, abs=0.04)
    assert noise.std(0).tolist() == pytest.approx([pi / 6**0.5] * 3, abs=0.04)


# --- what is wrong with values ---


@pytest.mark.parametrize(
    ("group", "name", "changes", "said"),
    [
        ("noise", "gaussian", {"std": -1.0}, "noise.std"),
        ("noise", "gaussian", {"std": float("nan")}, "noise.std"),
        ("noise", "gaussian", {"schedule": "cosin"}, "'cosine'"),
        ("noise", "epsilon_greedy", {"epsilon": 1.5}, "noise.epsilon"),
        ("noise", "epsilon_greedy", {"schedule": "lin"}, "noise.schedule"),
        ("fusion", "add", {"weight": float("nan")}, "fusion.weight"),
        ("fusion", "one_or_corr", {"quantile": 1.0}, "fusion.quantile"),
        ("fusion", "learnable_mix", {"init": float("inf")}, "fusion.init"),
        ("fusion", "position_linear", {"end": float("nan")}, "fusion.end"),
        ("activation", "jumprelu_constant", {"threshold": float("nan")}, "activation.threshold"),
        ("activation", "jumprelu_quantile", {"quantile": -0.1}, "activation.quantile"),
        ("activation", "jumprelu_learnable", {"init": 0.0}, "activation.init"),
        ("activation", "jumprelu_learnable", {"bandwidth": -1.0}, "activation.bandwidth"),
        ("activation", "gumbel_topk", {"temperature": 0.0}, "activation.temperature"),
        ("activation", "gumbel_topk", {"top": 0}, "activation.top"),
        ("activation", "ste_topk", {"scale": float("nan")}, "activation.scale"),
        ("activation", "sparse_gate", {"init": 1.0}, "activation.init"),
        ("activation", "sparse_attention", {"quantile": 1.0}, "activation.quantile"),
        ("activation", "softmax", {"temperature": -1.0}, "activation.temperature"),
        ("mask", "all", {"keep": 0.0}, "mask.keep"),
    ],
)
def test_bad_values_are_named(group, name, changes, said) -> None:
    assert said in "".join(built(group, name, **changes).faults())


@pytest.mark.parametrize(("group", "name"), EACH)
def test_the_values_in_conf_are_good(group, name) -> None:
    assert built(group, name).faults() == []


def test_what_does_not_go_together_is_said() -> None:
    policy = PolicyConfig(0, 0, 8, "relu", "by_layer", "v", k=3)
    critic = built("activation", "jumprelu")
    assert critic.conflicts(policy, ppo()) == []
    assert "activation.threshold=0.1" in critic.conflicts(policy, grpo())[0]
    assert built("activation", "jumprelu_constant").conflicts(policy, grpo()) == []
    for name in ("gumbel_topk", "ste_topk"):
        assert "policy.k=3" in built("activation", name, top=2).conflicts(policy, ppo())[0]
        assert built("activation", name, top=3).conflicts(policy, ppo()) == []
