"""What a finished run was asked and answered, item by item, unsteered and steered."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crl_exp.config.errors import UserError
from crl_exp.runs.items import GROUP, NAME, TEXTS
from crl_exp.runs.records import Record

DRAWN_BY = 0
"""Seed of `drawn`."""
AGAIN = "The line that made it, typed again with resume=force, runs it anew and keeps them"
_COLUMNS = ("item_id", "split", "reward_baseline", "reward_steered", "changed", *TEXTS.names)


class NoAnswersError(UserError):
    """A run whose answers aren't on disk, with what is to be done."""


@dataclass(frozen=True)
class Answered:
    """An item of a run. number: its place among the split's items, from 1. prompt: the user's turn.

    changed: whether the tokens of the two answers differ.
    """

    number: int
    item_id: str
    prompt: str
    target: str | None
    baseline: str
    steered: str
    reward_baseline: float
    reward_steered: float
    changed: bool
    group: str = ""

    @property
    def fixed(self) -> bool:
        return self.reward_steered > self.reward_baseline

    @property
    def broken(self) -> bool:
        return self.reward_steered < self.reward_baseline


WHICH: dict[str, Callable[[Answered], bool]] = {
    "fixed": lambda one: one.fixed,
    "broken": lambda one: one.broken,
    "changed": lambda one: one.changed,
}


def has_answers(run: Record) -> bool:
    """Whether the run has kept them. Raises `UserError` for a damaged file."""
    path = run.path / NAME
    try:
        return path.exists() and set(TEXTS.names) <= set(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); resume=force runs it again") from error


def answers(run: Record, split: str = "test") -> list[Answered]:
    """All items of a split with their answers, in the order of evaluation.

    Raises `NoAnswersError` where the run hasn't kept them, and `UserError` for a damaged file and a
    split that it hasn't answered.
    """
    path = run.path / NAME
    if not path.exists():
        raise NoAnswersError(f"{_named(run)} has no {NAME}: {_why_none(run)}")
    try:
        there = pq.read_schema(path).names
        if not set(TEXTS.names) <= set(there):
            raise NoAnswersError(
                f"{_named(run)} has rewards by item and no answers: it was run before answers were "
                f"kept. {AGAIN}"
            )
        table = pq.read_table(path, columns=[name for name in (*_COLUMNS, GROUP) if name in there])
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); resume=force runs it again") from error
    splits = list(dict.fromkeys(table["split"].to_pylist()))
    if split not in splits:
        raise UserError(f"{_named(run)} has no items of {split!r}; it has {', '.join(splits)}")
    lines = [line for line in table.to_pylist() if line["split"] == split]
    return [_answered(number, line) for number, line in enumerate(lines, 1)]


def _answered(number: int, line: dict[str, Any]) -> Answered:
    return Answered(
        number, line["item_id"], line["prompt"], line["target"], line["answer_baseline"],
        line["answer_steered"], line["reward_baseline"], line["reward_steered"], line["changed"],
        line.get(GROUP) or "",
    )  # fmt: skip


def _named(run: Record) -> str:
    return f"{run.sweep}/{run.key}"


def _why_none(run: Record) -> str:
    if run.result is None:
        return f"it is {run.state}; they are written at its end"
    if "delta" not in run.result:
        return f"experiment={run.config['experiment']['name']} answers no item here"
    return f"it was run before there was one. {AGAIN}"


def drawn(items: Sequence[Answered], n: int) -> list[Answered]:
    """`n` of the items (all, where there are fewer), in the order in which they were asked.

    Drawn by a hash of seed and id: the same ones every time, whatever they are.
    """

    def lot(one: Answered) -> str:
        return hashlib.sha256(f"{DRAWN_BY}:{one.item_id}".encode()).hexdigest()

    return sorted(sorted(items, key=lot)[:n], key=lambda one: one.number)
