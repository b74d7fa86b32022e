"""Random numbers by row: what they follow, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from crl_exp.analysis.row_random import RowRandom

ROWS = torch.arange(200)


def test_a_row_has_its_numbers_in_any_batch() -> None:
    whole = RowRandom(5, ROWS, layer=3, token_index=2)
    first, second = whole.uniform(7), whole.normal(4)
    chosen = torch.tensor([150, 3, 77])
    part = RowRandom(5, chosen, layer=3, token_index=2)
    assert torch.equal(part.uniform(7), first[chosen])
    assert torch.equal(part.normal(4), second[chosen])


@pytest.mark.parametrize("changed", [{"seed": 6}, {"layer": 4}, {"token_index": 3}, {}])
def test_other_seeds_layers_tokens_and_calls_give_other_numbers(changed: dict[str, int]) -> None:
    place = {"seed": 5, "layer": 3, "token_index": 2}
    draws = RowRandom(row_B=ROWS, **place)
    a = draws.uniform(50)
    b = RowRandom(row_B=ROWS, **(place | changed)).uniform(50) if changed else draws.uniform(50)
    assert not (a == b).any(dim=1).all()
    together = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))
    assert abs(float(together[0, 1])) < 5 / math.sqrt(a.numel())


def test_numbers_follow_their_distribution() -> None:
    """Against the distribution function at 20 places, and between neighbours."""
    draws = RowRandom(0, torch.arange(1000))
    u, n, g = draws.uniform(300), draws.normal(300), draws.gumbel(300)
    assert float(u.min()) > 0 and float(u.max()) < 1 and bool(g.isfinite().all())
    error = 5 * 0.5 / math.sqrt(u.numel())
    for p in torch.linspace(0.02, 0.98, 20).tolist():
        quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1)))
        assert abs(float((u < p).float().mean()) - p) < error
        assert abs(float((n < quantile).float().mean()) - p) < error
        assert abs(float((g < -math.log(-math.log(p))).float().mean()) - p) < error
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(r)) < 5 / math.sqrt(a.numel())


def test_extreme_numbers_stay_inside() -> None:
    """The largest and the smallest hash."""
    for bits, expected in ((0x7FFFFF, 1 - 2.0**-24), (0, 2.0**-24)):
        value = (torch.tensor(bits).float() + 0.5) * 2.0**-23
        assert float(value) == expected
        assert math.isfinite(float(-(-value.log()).log()))
