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


def test_a_seeds_shuffling_tells_nothing_of_the_next_ones_exploring() -> None:
    """Both begin at the same state: `Trainer` shuffles by seed + 1 and explores by seed. Seed s's
    place of each prompt in its first order is held against what seed s + 1 draws for that row,
    and so is which prompt comes when."""
    n, n_seeds, update = 64, 400, 8
    places, drawn, reused = [], [], []
    for seed in range(n_seeds):
        shuffle = torch.Generator().manual_seed(seed + 1)  # of the run with this seed
        explore = torch.Generator().manual_seed(seed + 1)  # of the one with the next
        places.append(torch.randperm(n, generator=shuffle).argsort())
        rollouts = [int(torch.randint(2**62, (), generator=explore)) for _ in range(n // update)]
        rows = [RowRandom(one, torch.arange(update)).uniform(1) for one in rollouts]
        drawn.append(torch.cat(rows).flatten())
        reused.append(torch.tensor([one / 2**62 for one in rollouts]).repeat_interleave(update))
    place, uniform, raw = (torch.stack(x).double() for x in (places, drawn, reused))
    bound = 4 / math.sqrt(place.numel())

    def together(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))

    assert together(place, uniform) < bound
    assert together(place.argsort(), uniform) < bound, "nor which prompt comes when"
    assert together(place.argsort(), raw) < 4 * bound, "nor by the seeds of rollouts themselves"
    by_seed = [together(one, other) for one, other in zip(place, uniform, strict=True)]
    assert sum(r > 1.96 / math.sqrt(n) for r in by_seed) < 0.08 * n_seeds, ".05 by chance"
    again = torch.stack([
        torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1)).argsort()
        for seed in range(n_seeds)
    ]).double()  # fmt: skip
    assert together(place, again) > 0.99, "an exploring that shuffled would be found out"
