"""Answers of a controller to a split, kept on disk as they come.

A test set of 14,000 items is not begun again from its first: what was answered before a run was cut
off is read back. Shapes: B rows of a batch, N of them still being answered, K features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crl_exp.config.files import writing
from crl_exp.generation.results import Generation, Step
from crl_exp.runs.checkpoints import read_state, set_rng_state, write_state
from crl_exp.runs.status import ANEW
from crl_exp.tasks.base import Score


@dataclass
class Steered:
    """What one layer did at one token of the rows of a batch that were still being answered.

    rows: of the answers. token_N: the token produced. delta_norm_N: length of what was added.
    """

    layer: int
    token_index: int
    rows: list[int]
    token_N: Tensor
    feature_idx_NK: Tensor
    coefficient_NK: Tensor
    delta_norm_N: Tensor
    log_prob_N: Tensor | None
    value_N: Tensor | None

    @classmethod
    def of(cls, step: Step) -> Steered:
        """What is worth keeping of a recorded step: not the vectors."""
        action, alive_B = step.action, step.alive_B
        assert step.token_B is not None

        def alive(value_B: Tensor | None) -> Tensor | None:
            return None if value_B is None else value_B[alive_B].detach().cpu()

        kept = {
            "token_N": step.token_B, "feature_idx_NK": action.feature_idx_BK,
            "coefficient_NK": action.coefficient_BK, "delta_norm_N": action.delta_BD.norm(dim=1),
            "log_prob_N": action.log_prob_B, "value_N": action.value_B,
        }  # fmt: skip
        rows = [row for row, lives in zip(step.rows, alive_B.tolist(), strict=True) if lives]
        return cls(step.layer, step.token_index, rows, **{k: alive(v) for k, v in kept.items()})  # type: ignore[arg-type]


@dataclass
class Answers:
    """A controller's answers to items of a split, scored.

    steered: what was added at each token, where it was asked for. `generation.steps` has it with
    all vectors, in answers that were not kept on disk.
    """

    generation: Generation
    scores: list[Score]
    steered: list[Steered] = field(default_factory=list)

    @property
    def reward_B(self) -> Tensor:
        return torch.tensor([score.reward for score in self.scores])

    @property
    def invalid(self) -> float:
        """Share of answers that could not be read as one."""
        return sum(not score.valid for score in self.scores) / len(self.scores)

    def compact(self) -> Answers:
        """Without the vectors."""
        made = Generation(self.generation.tokens, self.generation.texts)
        return Answers(made, self.scores, [Steered.of(step) for step in self.generation.steps])

    def append(self, other: Answers) -> None:
        """Take in the answers to the items that follow."""
        offset = len(self.scores)
        self.generation.tokens += other.generation.tokens
        self.generation.texts += other.generation.texts
        self.scores += other.scores
        for one in other.steered:
            self.steered.append(replace(one, rows=[offset + row for row in one.rows]))


class AnswerBook:
    """A folder of the answers given so far, a file for each time that they were saved.

    key: of the run; answers of a run with another one are refused.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.unsaved: list[Answers] = []
        self.n_saved = 0  # answers

    def load(self) -> Answers:
        """All answers that were saved, up to a damaged file; sets the random generators as they
        were then. Raises `UserError` where they belong to another config.
        """
        whole = Answers(Generation([], []), [])
        for state in self._states():
            for batch in state["batches"]:
                whole.append(_from_plain(batch))
            set_rng_state(state["rng"])
        self.n_saved = len(whole.scores)
        return whole

    def _states(self) -> Iterator[dict[str, Any]]:
        n = 0
        while (path := self._file(n)).exists():
            state = read_state(path, self.key, ANEW)
            if state is None:
                return
            yield state
            n += sum(len(batch["scores"]) for batch in state["batches"])

    def _file(self, first: int) -> Path:
        """Named by the first item in it, so that what follows a damaged file is never taken."""
        return self.folder / f"{first:08d}.pt"

    def add(self, batch: Answers) -> None:
        self.unsaved.append(batch)

    def save(self) -> None:
        """Write what was added since the last time."""
        if not self.unsaved:
            return
        path = self._file(self.n_saved)
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_state(path, {"batches": [_plain(batch) for batch in self.unsaved]}, self.key)
        self.n_saved += sum(len(batch.scores) for batch in self.unsaved)
        self.unsaved = []


def _plain(batch: Answers) -> dict[str, Any]:
    return {
        "tokens": batch.generation.tokens, "texts": batch.generation.texts,
        "scores": [asdict(score) for score in batch.scores],
        "steered": [vars(one).copy() for one in batch.steered],
    }  # fmt: skip


def _from_plain(batch: dict[str, Any]) -> Answers:
    return Answers(
        Generation(batch["tokens"], batch["texts"]),
        [Score(**score) for score in batch["scores"]],
        [Steered(**one) for one in batch["steered"]],
    )


def batches(first: int, n: int, size: int) -> Iterator[Sequence[int]]:
    """Items `first` to n in batches. Resumed with the batch size that they were begun with, the
    batches are those of an undisturbed run."""
    return (range(at, min(at + size, n)) for at in range(first, n, size))
