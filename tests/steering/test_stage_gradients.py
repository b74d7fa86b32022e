"""Where a gradient must pass through a stage, where it must not, and how large it is."""

from __future__ import annotations

import pytest
import torch

from crl_exp.steering.stages.activation import Softmax, SparseAttention, SparseGate, STETopK
from crl_exp.steering.stages.fusion import Attention, LearnableMix
from crl_exp.steering.stages.threshold import JumpReLU, LearnableJumpReLU, QuantileJumpReLU
from tests.helpers.stage_options import LOGITS, OPTIONS, context, made, piped

# What the loss is: a weighted sum of the finite outputs of the first row.
WEIGHT = torch.tensor([1.0, 2.0, -3.0, 0.0])


def gradient_of(stage, **changes) -> torch.Tensor:
    """d(loss)/d(logits) at the first row; parameters of the stage get theirs too."""
    logits = LOGITS[:1].clone().requires_grad_()
    out = made(stage)(logits, context(n=1, **changes))
    (WEIGHT[:3] * out[0, :3]).sum().backward()
    assert logits.grad is not None
    return logits.grad[0]


def test_the_critics_threshold_takes_no_gradient() -> None:
    logits, value = LOGITS.clone().requires_grad_(), torch.tensor([[0.75], [-1.0]])
    value.requires_grad_()
    JumpReLU(None, False)(logits, context(value_BX=value))[:, :3].sum().backward()
    assert value.grad is None
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]


def test_a_quantile_passes_what_is_above_it() -> None:
    assert gradient_of(QuantileJumpReLU(0.5, False)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_the_learned_threshold_by_hand() -> None:
    """−(θ/ε) · 1[|z − θ| < ε/2] at θ = .4, ε = .5: only z = .5 is near; × θ as log θ is learned."""
    stage = LearnableJumpReLU(0.4, 0.5, False)
    assert gradient_of(stage).tolist() == [1.0, 0.0, -3.0, 0.0]
    grad = stage.log_theta_C.grad
    assert grad is not None
    assert grad.tolist() == pytest.approx([0.0, 0.0, -3.0 * -(0.4 / 0.5) * 0.4, 0.0])


def test_a_threshold_learns_within_half_a_bandwidth_only() -> None:
    """θ = .4, ε = .5: .5 and .2 are within .25 of it, .8 and .1 are not."""
    stage = made(LearnableJumpReLU(0.4, 0.5, False))
    stage(torch.tensor([[0.5, 0.8, 0.1, 0.2]]), context(n=1)).sum().backward()
    assert isinstance(stage, LearnableJumpReLU) and stage.log_theta_C.grad is not None
    near = -(0.4 / 0.5) * 0.4
    assert stage.log_theta_C.grad.tolist() == pytest.approx([near, 0.0, 0.0, near])


def test_the_straight_through_gradient_is_the_softmaxs() -> None:
    """Also at the features that the forward pass sets to 0."""
    through, plain = gradient_of(STETopK(2.0, 10.0, 1, "one_hot")), gradient_of(Softmax(2.0, 10.0))
    torch.testing.assert_close(through, plain)
    through = gradient_of(STETopK(2.0, 10.0, 1, "probability"))
    torch.testing.assert_close(through, plain)
    assert through[:3].abs().min() > 0.01 and through[3] == 0


def test_a_gate_by_hand() -> None:
    """g = .6: d/d gate = z · g(1 − g) · weight; a closed gate still gets it, its logit doesn't."""
    for threshold, passed in ((0.5, 1.0), (0.7, 0.0)):
        stage = SparseGate(threshold, 0.6)
        assert gradient_of(stage).tolist() == pytest.approx([passed, 2 * passed, -3 * passed, 0])
        assert stage.gate_C.grad is not None
        expected = [0.24 * 1.0, 0.24 * -2.0 * 2, 0.24 * 0.5 * -3, 0.0]
        assert stage.gate_C.grad.tolist() == pytest.approx(expected)


def test_attention_weights_learn_and_the_quantile_bars() -> None:
    stage = SparseAttention(0.4)
    logits = LOGITS[1:].clone().requires_grad_()
    out = made(stage)(logits, context(n=1))
    out[out.isfinite()][:1].sum().backward()
    grad = stage.attention.bias.grad
    # Kept are features 0, 2 and 3; d(3 · p₀ · z₀)/db = 3 z₀ p₀ (1[j = 0] − p_j) with p = 1/3.
    assert grad is not None and logits.grad is not None
    assert grad.tolist() == pytest.approx([2.0, 0.0, -1.0, -1.0])
    assert logits.grad[0].tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])


def test_the_learned_mix_by_hand() -> None:
    """d/dm = Σ weight · corr = .5 − 2 − .75."""
    stage = LearnableMix(2.0)
    assert gradient_of(stage).tolist() == [1.0, 2.0, -3.0, 0.0]
    assert stage.m.grad is not None and float(stage.m.grad) == pytest.approx(-2.25)


def test_attention_over_tokens_has_no_trouble_with_zero_logits() -> None:
    """Where ‖logits‖ = 0, as with an untrained policy, and at the first token, where past is −∞."""
    logits = torch.zeros(2, 4, requires_grad=True)
    Attention(1.0, "answer")(logits, context()).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("fusion", OPTIONS["fusion"])
@pytest.mark.parametrize("activation", OPTIONS["activation"])
def test_gradients_are_finite_with_features_barred(activation, fusion) -> None:
    """The mask first, as its -inf then goes through all that follows; one row is all barred."""
    order = ("mask", "fusion", "noise", "activation")
    pipeline = piped(order, activation=activation, fusion=fusion, mask="active")
    here = context()
    assert here.at.feature_acts_BC is not None
    here.at.feature_acts_BC = here.at.feature_acts_BC.clone()
    here.at.feature_acts_BC[1] = 0.0
    logits = LOGITS.clone().requires_grad_()
    out = pipeline(logits, here)
    out[out.isfinite()].square().sum().backward()
    assert out[1].isneginf().all()
    for tensor in (logits, *pipeline.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
