"""Layer sets against the layers that have an SAE."""

from __future__ import annotations

import pytest

from crl_exp.errors import UserError
from crl_exp.layers import All, LayerSet, Listed, Single

AVAILABLE = [8, 12, 22]


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        (Single(12), [12]),
        (Listed([22, 8, 22]), [8, 22]),
        (All(), AVAILABLE),
    ],
)
def test_sets_resolve_to_sorted_layers(chosen: LayerSet, layers: list[int]) -> None:
    assert chosen.resolve(AVAILABLE, 30) == layers


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (Single(30), "layer 30 is out of range: the model has layers 0 to 29"),
        (Single(-1), "layer -1 is out of range"),
        (Listed([8, 9]), "layer 9 has no SAE; those that have one: [8, 12, 22]"),
        (Listed([]), "layers: the set is empty; try layers=all"),
    ],
)
def test_impossible_sets_are_told(chosen: LayerSet, said: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen.resolve(AVAILABLE, 30)
    assert said in str(caught.value)
    assert "layers=" in str(caught.value)


def test_a_model_with_fewer_layers_than_saes() -> None:
    with pytest.raises(UserError, match="layer 22 is out of range"):
        All().resolve(AVAILABLE, 20)
