"""What a finished run has kept of how it answered; asked for by `Method.restored`."""

from __future__ import annotations

from typing import Any, Protocol

from crl_exp.generation.controller import Controller
from crl_exp.models.language_model import LanguageModel
from crl_exp.saes.layer_sae import LayerSAE
from crl_exp.steering.workspace import SteeringConfig


class KeptRun(Protocol):
    """A finished run; its model and SAEs are loaded when they are asked for."""

    @property
    def exp(self) -> SteeringConfig: ...
    @property
    def lm(self) -> LanguageModel: ...
    @property
    def n_tokens(self) -> int:
        """Steered tokens that an answer has at most."""
        ...

    @property
    def notes(self) -> dict[str, Any]:
        """Of the result."""
        ...

    def sae(self, layer: int) -> LayerSAE:
        """Raises `UserError` where it can't be had, or isn't the same."""
        ...

    def fixed(self) -> Controller:
        """What adds the features that the run added at every token.

        Raises `UserError` where they weren't the same at all of them.
        """
        ...

    def training(self) -> dict[str, Any]:
        """The checkpoint of the last update. Raises `UserError` where there is none."""
        ...
