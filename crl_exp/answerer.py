"""What a method hands to the evaluation: something that answers items of a split.

A controller is one, which answers by steering the model. Others put another prompt before the
model, read the answer off its residuals, or answer with adapted weights. Validation, evaluation,
resuming and packing ask all of them in the same way, and the task scores the answers, not they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crl_exp.generation import Generation
    from crl_exp.lab import Lab


class Answerer:
    """Base."""

    def ready(self, lab: Lab, split: str) -> None:
        """Called before a whole split is asked about: what takes long and has a bar of its own."""

    def generation(
        self,
        lab: Lab,
        split: str,
        items: Sequence[int],
        record: bool = False,
        advance: Callable[[int], None] | None = None,
    ) -> Generation:
        """Answers to these items of a split, in their order, without their targets being seen.

        record: with every action on a residual (`Generation.steps`); who takes none has none.
        advance: told how many items are answered.
        """
        raise NotImplementedError
