"""What a method hands to the evaluation: something that answers items of a split.

A controller is one, which answers by steering the model. Others (`Answerer`) put another prompt
before the model, read the answer off its residuals, or answer with adapted weights. Validation,
evaluation, resuming and packing ask all of them in the same way, and the task scores the answers,
not they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crl_exp.generation.controller import Controller
from crl_exp.generation.results import Generation
from crl_exp.steering.workspace import Workspace


class Answerer:
    """Base of those that answer otherwise than by steering."""

    def ready(self, workspace: Workspace, split: str) -> None:
        """Called before a whole split is asked about: what takes long and has a bar of its own."""

    def generation(
        self,
        workspace: Workspace,
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


Answering = Controller | Answerer
"""Whatever answers items of a split."""


def get_ready(answerer: Answering, workspace: Workspace, split: str) -> None:
    """Before a whole split is asked about."""
    if isinstance(answerer, Answerer):
        answerer.ready(workspace, split)
    else:
        workspace.prompts(split)


def generation_of(
    answerer: Answering,
    workspace: Workspace,
    split: str,
    items: Sequence[int],
    record: bool = False,
    advance: Callable[[int], None] | None = None,
) -> Generation:
    """Answers to these items of a split; see `Answerer.generation`."""
    if isinstance(answerer, Answerer):
        return answerer.generation(workspace, split, items, record, advance)
    return workspace.generated(answerer, workspace.prompts(split), items, record, advance)
