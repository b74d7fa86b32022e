"""What must hold of every logit stage in `conf/`, in any order.

By hand, from their equations: test_stage_equations.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crl_exp.analysis.row_random import RowRandom
from crl_exp.steering.policy import sampling as selection
from crl_exp.steering.stages.base import STAGES, Observation, Pipeline
from tests.helpers.stage_options import (
    EACH,
    INF,
    LOGITS,
    OPTIONS,
    ORDERS,
    PAIRS,
    built,
    context,
    piped,
)

# Masks and activations that rule features out by themselves; the others may not.
RULING = {
    ("activation", "sparse_attention"),
    *(("mask", m) for m in OPTIONS["mask"] if m != "none"),
}


def test_the_globs_find_something() -> None:
    assert {"add", "attention"} <= set(OPTIONS["fusion"]) and len(EACH) >= 22
    assert len(ORDERS) == 24


@pytest.mark.parametrize("pair", EACH, ids="/".join)
def test_barred_stays_barred_and_the_rest_finite(pair) -> None:
    """In every order, explored or not; and only what rules features out does so."""
    group, name = pair
    for order in ORDERS:
        for explore in (False, True):
            out = piped(order, **{group: name})(LOGITS, context(explore))
            barred = LOGITS.isneginf()
            assert out[barred].isneginf().all()
            if pair not in RULING:
                assert out[~barred].isfinite().all()
            else:
                assert not out.isnan().any() and not out.isposinf().any()


@pytest.mark.parametrize("pair", EACH, ids="/".join)
def test_a_stage_says_whether_it_rules_out(pair) -> None:
    """Where none does, a pipeline that isn't told of barred logits gives the same numbers."""
    group, name = pair
    assert built(group, name).bars == (pair in RULING)
    logits = LOGITS.nan_to_num(neginf=-0.5)
    for order in ORDERS[::5]:
        pipeline = piped(order, **{group: name})
        assert pipeline.bars == (pair in RULING)
        for explore in (False, True):
            told = pipeline(logits, context(explore))
            assert torch.equal(pipeline(logits, context(explore), barred=False), told)


def test_a_stage_that_changes_what_its_base_does_is_taken_for_one_that_rules_out() -> None:
    """Until it says that it doesn't: its base can't know."""
    base = type(built("fusion", "add"))
    assert not base.bars
    own = type("Own", (base,), {"transform": lambda self, logits, context: logits})
    says = type("Says", (base,), {"transform": own.transform, "bars": False})
    assert own.bars and not says.bars and not type("Same", (base,), {}).bars


@pytest.mark.parametrize("mask", [m for m in OPTIONS["mask"] if m != "none"])
def test_a_masked_feature_is_never_chosen(mask) -> None:
    """By no activation, noise, fusion or order, for any k."""
    dropped = built("mask", mask)(torch.zeros(2, 4), context()).isneginf()
    assert dropped.any()
    for names in PAIRS:
        if "mask" in names:
            continue
        for order in ORDERS[::5]:
            logits = torch.tensor([[1.0, -2.0, 0.5, 4.0], [3.0, 0.0, -0.5, 2.0]])
            out = piped(order, mask=mask, **names)(logits, context(explore=True))
            for choice in (
                selection.greedy(out, 3),
                selection.sample(out, 3, RowRandom(0, torch.arange(len(out)))),
            ):
                chosen = torch.zeros(2, 5).scatter(1, choice + 1, 1.0)[:, 1:].bool()
                assert not (chosen & dropped).any()
                for row in choice.tolist():
                    filled = [j for j in row if j >= 0]
                    assert len(set(filled)) == len(filled), "k features are distinct"


@pytest.mark.parametrize(
    "names", PAIRS, ids=lambda names: ",".join(f"{k}={v}" for k, v in names.items())
)
def test_two_passes_give_the_same_distribution(names) -> None:
    """Without exploration nothing is drawn: the update sees what the rollout recorded."""
    for order in ORDERS[::3]:
        pipeline = piped(order, **names)
        first = pipeline(LOGITS, context(seed=1))
        assert torch.equal(first, pipeline(LOGITS, context(seed=2)))
        explored = pipeline(LOGITS, context(True, seed=3))
        assert torch.equal(explored, pipeline(LOGITS, context(True, seed=3)))


@pytest.mark.parametrize("noise", [n for n in OPTIONS["noise"] if n != "none"])
def test_noise_comes_only_with_explore(noise) -> None:
    strong = {"gaussian": {"std": 1.0}, "epsilon_greedy": {"epsilon": 0.9}}[noise]
    for order in ORDERS:
        pipeline, plain = piped(order, noise=noise), piped(order)
        pipeline.stages["noise"] = built("noise", noise, **strong)
        assert torch.equal(pipeline(LOGITS, context()), plain(LOGITS, context()))
        assert not torch.equal(pipeline(LOGITS, context(True)), plain(LOGITS, context()))


@pytest.mark.parametrize(("group", "name"), EACH)
def test_a_stage_says_whether_it_explores(group: str, name: str) -> None:
    """A rollout asks for a second distribution only where one does."""
    pipeline = piped(**{group: name})
    same = all(
        torch.equal(pipeline(LOGITS, context(True, seed=s)), pipeline(LOGITS, context(seed=s)))
        for s in range(200)
    )
    assert pipeline.explores != same


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.floats(-50, 50), st.just(-INF)), min_size=4, max_size=4),
    st.sampled_from(ORDERS),
    st.fixed_dictionaries({group: st.sampled_from(OPTIONS[group]) for group in STAGES}),
    st.booleans(),
)
def test_probabilities_sum_to_one(row: list[float], order, names, explore) -> None:
    out = piped(order, **names)(torch.tensor([row]), context(explore, n=1)).double()
    single = selection.log_prob(out.expand(4, -1), torch.arange(4)[:, None]).exp().detach()
    allowed = ~out[0].isneginf()
    assert float(single[allowed].sum()) == pytest.approx(float(allowed.any()), abs=1e-9)
    torch.testing.assert_close(
        selection.probabilities(out)[0].sum(), allowed.any().double(), rtol=0, atol=1e-9
    )


def alone(order: tuple[str, ...], names: dict[str, str]) -> Pipeline:
    """These options, and nothing from stage 1 unless a fusion is among them."""
    pipeline = piped(order, **names)
    if "fusion" not in names:
        pipeline.stages["fusion"] = built("fusion", "add", weight=0.0)
    return pipeline


# Two stages that both do something, neither a fixed factor of the other: their order must show.
@pytest.mark.parametrize(
    ("names", "swapped"),
    [
        ({"fusion": "add", "activation": "jumprelu_constant"}, ("fusion", "activation")),
        ({"fusion": "add", "activation": "softmax"}, ("fusion", "activation")),
        ({"fusion": "multiply", "activation": "jumprelu"}, ("fusion", "activation")),
        ({"fusion": "add", "activation": "ste_topk"}, ("fusion", "activation")),
        ({"fusion": "attention", "activation": "softmax"}, ("fusion", "activation")),
        ({"fusion": "multiply", "noise": "gaussian"}, ("fusion", "noise")),
        ({"activation": "softmax", "noise": "gaussian"}, ("noise", "activation")),
        ({"activation": "softmax", "mask": "active"}, ("activation", "mask")),
        ({"activation": "jumprelu_quantile", "mask": "active"}, ("activation", "mask")),
        ({"activation": "ste_topk", "mask": "active"}, ("activation", "mask")),
    ],
    ids=str,
)
def test_the_order_shows_where_it_should(names, swapped) -> None:
    logits = torch.tensor([[0.1, 0.3, 0.5, 2.0], [3.0, 0.0, -0.5, 2.0]])
    outcomes = {}
    for order in ORDERS:
        pipeline = alone(order, names)
        if "top" in vars(pipeline.stages["activation"]):
            pipeline.stages["activation"].top = 2
        outcomes[order] = pipeline(logits, context(explore=True))
    one, other = swapped
    first = [o for o in ORDERS if o.index(one) < o.index(other)]
    second = [o for o in ORDERS if o.index(one) > o.index(other)]
    for group in (first, second):
        assert all(torch.allclose(outcomes[o], outcomes[group[0]]) for o in group)
    assert not torch.allclose(outcomes[first[0]], outcomes[second[0]])


def test_the_order_does_not_show_where_it_should_not() -> None:
    """A mask commutes with what treats each feature by itself."""
    for names in ({"fusion": "add"}, {"activation": "jumprelu_constant"}, {"fusion": "multiply"}):
        named = {"mask": "active", **names}
        outcomes = [alone(order, named)(LOGITS, context()) for order in ORDERS]
        for out in outcomes[1:]:
            torch.testing.assert_close(out, outcomes[0])


def test_what_stages_need_is_asked_for() -> None:
    assert piped(mask="active").needs == {"feature_acts"}
    assert piped(mask="all", fusion="attention").needs == {"importance", "past"}
    assert piped(mask="generation", fusion="context_scale").needs == {"seen", "length"}
    assert piped(fusion="position_linear_author").needs == {"prompt_tokens"}
    assert piped(fusion="attention_author").needs == {"past", "prompt_past"}
    by_activity = piped()
    by_activity.stages["fusion"] = built("fusion", "one_or_corr", select="active")
    assert by_activity.needs == {"feature_acts"}
    assert not piped().needs


def test_rows_of_an_observation() -> None:
    at = context(n=3).at
    picked = at.rows(torch.tensor([2, 0]))
    assert picked.token_index_B.tolist() == [0, 0]
    both = Observation.cat([at.rows(torch.tensor([0])), at.rows(torch.tensor([1]))])
    assert both.token_index_B.tolist() == [0, 3] and both.past_B is not None
    assert both.past_B.tolist() == [-INF, 2.0]
    bare = Observation(at.obs_BD, at.token_index_B)
    assert bare.rows(torch.tensor([1])).seen_BC is None
