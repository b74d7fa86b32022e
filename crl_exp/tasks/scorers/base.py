"""What scores an answer. A scorer's name goes into the result, so that no metric is swapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from crl_exp.tasks.base import Item, Score


class Scorer(Protocol):
    """Maps items and their outputs (text without the prompt) to one `Score` an item."""

    @property
    def name(self) -> str: ...

    def __call__(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]: ...
