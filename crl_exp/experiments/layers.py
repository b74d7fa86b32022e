"""Layer sets: which layers are steered. Each option is resolved against the layers with an SAE."""

from __future__ import annotations

import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from crl_exp.config.errors import UserError
from crl_exp.steering.answerer import Answering
from crl_exp.steering.workspace import Workspace

log = logging.getLogger(__name__)


def _repeated(key: str, layers: list[int]) -> list[str]:
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    return [f"{key}={layers}: names {twice} more than once"] if twice else []


@dataclass
class LayerSet:
    """Base of the layer sets.

    chooses: whether one of the layers is chosen on validation, so that it isn't known before and
    another seed may have another.
    """

    chooses: ClassVar[bool] = False

    @abstractmethod
    def wanted(self, available: list[int]) -> list[int]:
        """available: layers that have an SAE; all, where SAEs aren't looked for."""
        raise NotImplementedError

    def asked(self, available: list[int], n_layers: int) -> list[int]:
        """The layers of a model with so many."""
        return self.wanted(available)

    def faults(self) -> list[str]:
        return []

    def resolve(
        self, with_sae: list[int] | None, n_layers: int, sae_needed: bool = True
    ) -> list[int]:
        """The layers, sorted. Raises `UserError` for one out of range, or without an SAE where one
        is needed.

        with_sae: layers that have one; None where SAEs aren't looked for: all layers will do.
        """
        available = list(range(n_layers)) if with_sae is None else with_sae
        layers = sorted(set(self.asked(available, n_layers)))
        if not layers:
            raise UserError(
                f"layers: the set is empty (layers with an SAE: {available}); try layers=all"
            )
        for layer in layers:
            if not 0 <= layer < n_layers:
                raise UserError(
                    f"layer {layer} is out of range: the model has layers 0 to {n_layers - 1}; "
                    f"set layers=single layers.layer={available[0]}"
                )
            if sae_needed and layer not in available:
                raise UserError(
                    f"layer {layer} has no SAE; those that have one: {available}. "
                    f"Set layers=single layers.layer={available[0]}, or train one with "
                    f"`python -m crl_exp train-sae 'layers=[{layer}]' out=saes/mine`"
                )
        return layers

    def prepare(self, workspace: Workspace) -> tuple[Answering, list[int]]:
        """What the method found for these layers, and the layers that it reads or steers."""
        return workspace.exp.method.prepare(workspace), list(workspace.layers)


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

    def faults(self) -> list[str]:
        return _repeated("layers.layers", self.layers)

    def wanted(self, available: list[int]) -> list[int]:
        return self.layers


@dataclass
class Range(LayerSet):
    """Every step-th layer from `first` to `last`, both included, that has an SAE, together."""

    first: int
    last: int
    step: int

    def faults(self) -> list[str]:
        if self.step >= 1 and 0 <= self.first <= self.last:
            return []
        return [
            f"layers: first={self.first}, last={self.last}, step={self.step}: must be "
            "0 ≤ layers.first ≤ layers.last and layers.step ≥ 1"
        ]

    def wanted(self, available: list[int]) -> list[int]:
        return [n for n in range(self.first, self.last + 1, self.step) if n in available]

    def resolve(
        self, with_sae: list[int] | None, n_layers: int, sae_needed: bool = True
    ) -> list[int]:
        if self.last >= n_layers:
            raise UserError(
                f"layers.last={self.last} is out of range: the model has layers 0 to "
                f"{n_layers - 1}; set layers.last={n_layers - 1}"
            )
        return super().resolve(with_sae, n_layers, sae_needed)


@dataclass
class All(LayerSet):
    """Every layer that has an SAE, steered together; of the model, with sae=none."""

    def wanted(self, available: list[int]) -> list[int]:
        return available


@dataclass
class Every(LayerSet):
    """Every layer of the model, whether it has an SAE or not, together."""

    def wanted(self, available: list[int]) -> list[int]:
        return available

    def asked(self, available: list[int], n_layers: int) -> list[int]:
        return list(range(n_layers))


@dataclass
class BestOnValidation(LayerSet):
    """One layer: the one at which the method does best on the validation split.

    The method is run at each candidate alone; the test split plays no part. Of equals the lowest
    layer is taken. The result's notes hold every candidate's mean reward; the run's journal is that
    of the layer chosen, the others' lie in `layer_N/`.

    among: candidates; null, every layer that has an SAE.
    """

    chooses = True

    among: list[int] | None

    def faults(self) -> list[str]:
        return _repeated("layers.among", self.among or [])

    def wanted(self, available: list[int]) -> list[int]:
        return available if self.among is None else self.among

    def prepare(self, workspace: Workspace) -> tuple[Answering, list[int]]:
        tried: dict[int, tuple[float, Answering, Workspace]] = {}
        for layer in workspace.layers:
            alone = workspace.alone(layer)
            found = workspace.exp.method.prepare(alone)
            tried[layer] = (workspace.validation_reward(found), found, alone)
            log.info("layer %d: %.4f on validation", layer, tried[layer][0])
        best = max(tried, key=lambda layer: tried[layer][0])
        workspace.note(
            "validation_reward_by_layer", {str(n): reward for n, (reward, *_) in tried.items()}
        )
        workspace.note("layer_chosen_on_validation", best)
        _, found, alone = tried[best]
        for name, value in alone.notes.items():
            workspace.note(name, value)
        workspace.run.take_journal(alone.run)
        return found, [best]
