"""Each stage against numbers worked out by hand from its equation."""

from __future__ import annotations

from math import cos, exp, pi

import pytest
import torch

from crl_exp.config.errors import UserError
from crl_exp.steering.policy.config import PolicyConfig
from crl_exp.steering.stages.activation import (
    GumbelTopK,
    Identity,
    Softmax,
    SparseAttention,
    SparseGate,
    STETopK,
)
from crl_exp.steering.stages.author import AdditiveGate, AlwaysGumbel, ReplacingAttention
from crl_exp.steering.stages.barred import masked_softmax, quantile
from crl_exp.steering.stages.base import Shape, Stage, StageContext
from crl_exp.steering.stages.fusion import (
    Add,
    Attention,
    ContextScale,
    LearnableMix,
    Multiply,
    OneOrCorr,
    PositionLinear,
)
from crl_exp.steering.stages.mask import Active, Everything, Generation, Inactive, NoMask
from crl_exp.steering.stages.noise import EpsilonGreedy, Gaussian, NoNoise, scheduled
from crl_exp.steering.stages.threshold import JumpReLU, LearnableJumpReLU, QuantileJumpReLU
from tests.helpers.stage_options import EACH, INF, LOGITS, built, context, made
from tests.helpers.tiny_steering import grpo, ppo

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
        (Multiply("raw"), [[0.5, 2.0, 0.125, -INF], [1.5, 0.0, -0.125, 0.2]]),
        # softplus(1, −2, .5) = 1.313262, .126928, .974077; softplus(3, 0, −.5, 2).
        (Multiply("softplus"), [[0.656631, -0.126928, 0.243519, -INF],
                                [1.524294, -0.693147, 0.118519, 0.212693]]),
        # The .5-quantile of [−1, .1, .25, .5] is .1 (the lower of the middle two).
        (OneOrCorr(0.5, "quantile", "corr"), [[0.5, -2.0, 0.125, -INF], [1.5, 0.0, -0.125, 0.2]]),
        (OneOrCorr(0.7, "quantile", "corr"), [[0.5, -2.0, 0.125, -INF], [1.5, 0.0, -0.125, 2.0]]),
        (OneOrCorr(0.7, "quantile", "one"), [[1.0, 2.0, 0.5, -INF], [3.0, 0.0, -0.5, 0.2]]),
        # Active are features 1, 2 and 3.
        (OneOrCorr(0.7, "active", "one"), [[0.5, -2.0, 0.5, -INF], [1.5, 0.0, -0.5, 2.0]]),
        (OneOrCorr(0.7, "inactive", "one"), [[1.0, 2.0, 0.125, -INF], [3.0, 0.0, -0.125, 0.2]]),
        (OneOrCorr(0.7, "inactive", "corr"), [[0.5, -2.0, 0.5, -INF], [1.5, 0.0, -0.5, 2.0]]),
        (LearnableMix(2.0), [[2.0, -4.0, 1.0, -INF], [4.0, -2.0, 0.0, 2.2]]),
        # sigmoid(0) = .5, sigmoid(1) = .731059.
        (ContextScale(2.0, True), [[1.5, -3.0, 0.75, -INF],
                             [3.731059, -1.462117, -0.134471, 2.146212]]),
        # The residual's own length, 40 and 60.
        (ContextScale(2.0, False), [[2.0, -4.0, 1.0, -INF], [4.0, -2.0, 0.0, 2.2]]),
        # Tokens 0 and 3 of 4: factors .1 and 1.
        (PositionLinear(2.0, 0.1, 1.0, "answer"), [[1.1, -2.2, 0.55, -INF], [4.0, -2.0, 0.0, 2.2]]),
        (PositionLinear(2.0, 1.0, 0.1, "answer"), [[2.0, -4.0, 1.0, -INF],
                                                   [3.1, -0.2, -0.45, 2.02]]),
        # Prompts of 4 and 7 tokens: positions 3 of 6 and 9 of 9, factors .55 and 1.
        (PositionLinear(2.0, 0.1, 1.0, "sequence"), [[1.55, -3.1, 0.775, -INF],
                                                     [4.0, -2.0, 0.0, 2.2]]),
        (Attention(2.0, "answer"), [[2.0, -4.0, 1.0, -INF],
                                    [3 + LATER, -2 * LATER, -0.5 + 0.5 * LATER, 2 + 0.2 * LATER]]),
        (Identity(), LOGITS.tolist()),
        (JumpReLU(0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (JumpReLU(-1.0, False), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]]),
        (JumpReLU(None, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, -0.5, 2.0]]),
        # Medians of [−2, .5, 1] and (the lower) of [−.5, 0, 2, 3]: .5 and 0.
        (QuantileJumpReLU(0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (QuantileJumpReLU(0.0, False), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (LearnableJumpReLU(0.6, 0.5, False), [[1.0, 0.0, 0.0, -INF], [3.0, 0.0, 0.0, 2.0]]),
        (GumbelTopK(0.5, None), [[2.0, -4.0, 1.0, -INF], [6.0, 0.0, -1.0, 4.0]]),
        (Softmax(1.0, 10.0), [[10 * p for p in FIRST] + [-INF], [10 * p for p in SECOND]]),
        (AlwaysGumbel(), LOGITS.tolist()),
        (STETopK(1.0, 10.0, 2, "probability"), [[10 * FIRST[0], 0.0, 10 * FIRST[2], -INF],
                                                [10 * SECOND[0], 0.0, 0.0, 10 * SECOND[3]]]),
        (STETopK(1.0, 1.0, 1, "one_hot"), [[1.0, 0.0, 0.0, -INF], [1.0, 0.0, 0.0, 0.0]]),
        # sigmoid(1) + corr = 1.231, −.269, .981, .831 against .5; −.269 and .831 against .9.
        (AdditiveGate(1.0, 0.5), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, -0.5, 2.0]]),
        (AdditiveGate(1.0, 0.9), [[1.0, 0.0, 0.5, -INF], [3.0, 0.0, -0.5, 0.0]]),
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
        (Gaussian(3.0, "constant", False), LOGITS.tolist()),
        (EpsilonGreedy(1.0, "constant", False), LOGITS.tolist()),
    ],
    ids=str,
)  # fmt: skip
def test_each_stage_by_hand(stage: Stage, expected: list[list[float]]) -> None:
    got = made(stage)(LOGITS, context())
    torch.testing.assert_close(got, torch.tensor(expected), atol=2e-6, rtol=1e-6)


def test_attention_notes_the_length_for_the_next_token() -> None:
    here = context()
    made(Attention(1.0, "answer"))(LOGITS, here)
    torch.testing.assert_close(here.noted["length_B"], torch.tensor([5.25, 13.25]).sqrt())


def test_the_authors_sparse_attention_by_hand() -> None:
    """W z + b = [0, ln 3, ·, ·] over what isn't barred, above the .6-quantile of corr, which is .1.

    In place of z: 1/(1 + 3 + 1) at the first feature, and 0, not barred, at the other two.
    """
    stage = made(ReplacingAttention(0.6))
    assert isinstance(stage, ReplacingAttention)
    with torch.no_grad():
        stage.attention.weight.zero_()
        stage.attention.bias.copy_(torch.tensor([0.0, 3.0, 1.0, 9.0]).log().nan_to_num(neginf=0.0))
        stage.attention.weight[1, 0] = 1.0
        stage.attention.bias[1] -= 1.0
        got = stage(LOGITS, context())
    assert got[0].tolist() == pytest.approx([0.2, 0.0, 0.2, -INF])
    floor = made(ReplacingAttention(0.9))(LOGITS, context()).detach()
    assert (floor[1] > 0).tolist() == [True, False, False, False], "above the quantile, not at it"


def test_a_selected_feature_gets_no_less_than_another() -> None:
    """All logits 1: those of the highest correlation keep it, the others shrink."""
    ones = torch.ones(1, 4)
    got = built("fusion", "one_or_corr", quantile=0.5)(ones, context(n=1))[0]
    assert got.tolist() == pytest.approx([1.0, -1.0, 1.0, 1.0])
    as_before = built("fusion", "one_or_corr", quantile=0.5, selected="corr")(ones, context(n=1))[0]
    assert as_before.tolist() == pytest.approx([0.5, 1.0, 0.25, 0.1])


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
    from tests.helpers.tiny_steering import pipeline

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
    noise = Gaussian(0.5, schedule, False)(logits, here)[:, 1:] - 1
    assert float(noise.std()) == pytest.approx(0.5 * left, rel=0.03, abs=1e-6)
    assert abs(float(noise.mean())) < 0.02
    rows = LOGITS[:1].expand(4000, -1)
    out = EpsilonGreedy(0.4, schedule, False)(rows, context(True, n=4000, progress=progress))
    level = (out[:, :3] == 0).all(1)
    assert float(level.float().mean()) == pytest.approx(0.4 * left, abs=0.03)
    assert torch.equal(out[~level], rows[~level]) and out[:, 3].isneginf().all()


def test_barred_features_take_no_place_among_the_top() -> None:
    """The barred one stands at 0 inside a stage, above all others here."""
    first, second, _ = soft([-1.0, -2.0, -3.0])
    got = STETopK(1.0, 10.0, 2, "probability")(
        torch.tensor([[-1.0, -2.0, -3.0, -INF]]), context(n=1)
    )
    assert got[0].tolist() == pytest.approx([10 * first, 10 * second, 0.0, -INF])


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
        ("fusion", "one_or_corr", {"select": "activ"}, "'active'"),
        ("fusion", "one_or_corr", {"selected": "corrr"}, "'corr'"),
        ("fusion", "multiply", {"negative": "row"}, "'raw'"),
        ("fusion", "attention", {"over": "sequense"}, "'sequence'"),
        ("fusion", "position_linear_author", {"over": "prompt"}, "fusion.over"),
        ("fusion", "learnable_mix", {"init": float("inf")}, "fusion.init"),
        ("fusion", "position_linear", {"end": float("nan")}, "fusion.end"),
        ("activation", "jumprelu_constant", {"threshold": float("nan")}, "activation.threshold"),
        ("activation", "jumprelu_quantile", {"quantile": -0.1}, "activation.quantile"),
        ("activation", "jumprelu_learnable", {"init": 0.0}, "activation.init"),
        ("activation", "jumprelu_learnable", {"bandwidth": -1.0}, "activation.bandwidth"),
        ("activation", "gumbel_topk", {"temperature": 0.0}, "activation.temperature"),
        ("activation", "gumbel_topk", {"top": 0}, "activation.top"),
        ("activation", "ste_topk", {"value": "onehot"}, "'one_hot'"),
        ("activation", "sparse_gate_author", {"threshold": float("nan")}, "activation.threshold"),
        ("activation", "sparse_attention_author", {"quantile": 1.0}, "activation.quantile"),
        ("activation", "ste_topk", {"scale": float("nan")}, "activation.scale"),
        ("activation", "sparse_gate", {"init": 1.0}, "activation.init"),
        ("activation", "sparse_attention", {"quantile": 1.0}, "activation.quantile"),
        ("activation", "softmax", {"temperature": -1.0}, "activation.temperature"),
        ("mask", "all", {"keep": 0.0}, "mask.keep"),
    ],
)
def test_bad_values_are_named(group, name, changes, said) -> None:
    """By the stage itself; what no number can mean by whoever fills it in."""
    try:
        faults = "".join(built(group, name, **changes).faults())
    except UserError as error:
        faults = str(error)
    assert said in faults


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
    author = built("activation", "gumbel_topk_author")
    assert "policy.k=1" in author.conflicts(policy, ppo())[0]
    behind = {"noise": built("noise", "none"), "mask": built("mask", "none")}
    assert author.conflicts_behind(behind) == []
    behind["mask"] = built("mask", "active")
    assert "order=[fusion,noise,mask,activation]" in author.conflicts_behind(behind)[0]
    with pytest.raises(UserError, match=r"20000² = 4.0e\+08 a layer; raise warmup.min_frequency"):
        built("activation", "sparse_attention_author").bind(Shape(20_000, 3, 1, 1))
