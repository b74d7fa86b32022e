"""Layer sets: which layers are steered. Each option is resolved against the layers with an SAE."""

from __future__ import annotations

from dataclasses import dataclass

from crl_exp.errors import UserError


@dataclass
class LayerSet:
    """Base of the layer sets."""

    def wanted(self, available: list[int]) -> list[int]:
        raise NotImplementedError

    def resolve(self, available: list[int], n_layers: int) -> list[int]:
        """The layers, sorted. Raises `UserError` for one out of range or without an SAE."""
        layers = sorted(set(self.wanted(available)))
        if not layers:
            raise UserError("layers: the set is empty; try layers=all")
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise UserError(
                    f"layer {layer} is out of range: the model has layers 0 to {n_layers - 1}; "
                    f"set layers=single layers.layer={available[0]}"
                )
            if layer not in available:
                raise UserError(
                    f"layer {layer} has no SAE; those that have one: {available}. "
                    f"Set layers=single layers.layer={available[0]}, or train one with "
                    f"`python -m crl_exp.train_sae layers=[{layer}]`"
                )
        return layers


@dataclass
class Single(LayerSet):
    """One layer."""

    layer: int

    def wanted(self, available: list[int]) -> list[int]:
        return [self.layer]


@dataclass
class Listed(LayerSet):
    """These layers, steered together."""

    layers: list[int]

    def wanted(self, available: list[int]) -> list[int]:
        return self.layers


@dataclass
class All(LayerSet):
    """Every layer that has an SAE, steered together."""

    def wanted(self, available: list[int]) -> list[int]:
        return available
