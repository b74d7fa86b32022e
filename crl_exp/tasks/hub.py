"""What tasks on public data sets share: reading questions and drawing splits."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.tasks.base import Item, Splits, Task, content_id, of_groups, shuffled, unique
from crl_exp.tasks.data.rows import Row, Source

PARTS = ("test", "validation", "train")  # in the order in which they are cut


@dataclass(frozen=True)
class Question:
    """What a row asks, before it is worded.

    content: what its id is made from. fields: what the prompt's template may name.
    target: the right answer, as the scorer takes it. answer: as a few-shot example shows it.
    group: a subject, subset or category; see `Item`.
    n_options: of a choice question. benign: to be answered, where others are to be refused.
    """

    content: str
    fields: Mapping[str, str]
    target: str | None = None
    answer: str = ""
    group: str = ""
    n_options: int = 0
    benign: bool = False

    @property
    def item_id(self) -> str:
        return content_id(self.content)


@dataclass
class HubTask(Task):
    """A task on a data set of the Hugging Face hub, or on local files with the same columns.

    hub_id: the data set. revision: null for the default branch.
    subsets: its configurations, all used together; null where it has but one.
    sources: which split of the data set train, validation and test are drawn from. Two drawn from
        the same split never share an item; an item of several splits is kept in the one nearest
        to test. Where validation's split has fewer than `n_validation`, the rest is taken off
        train's before train is drawn from it, and the result says so.
    data_files: null, or what is read instead of the hub: one parquet, csv or jsonl file (a pattern
        or a list) that everything is drawn from, or a mapping from splits of the data set to files.
    """

    columns: ClassVar[tuple[str, ...]]
    optional_columns: ClassVar[tuple[str, ...]] = ()

    hub_id: str
    revision: str | None
    subsets: list[str] | None
    sources: dict[str, str]
    data_files: Any

    @property
    def is_local(self) -> bool:
        return self.data_files is not None

    @property
    def source(self) -> Source:
        return Source(self.hub_id, self.revision, self.subsets, self.data_files)

    def faults(self) -> list[str]:
        found = super().faults()
        if sorted(self.sources) != sorted(PARTS):
            wrong = [name for name in self.sources if name not in PARTS]
            near = did_you_mean(wrong[0], PARTS) if wrong else ""
            return [*found, f"task.sources={self.sources}: must hold {', '.join(PARTS)}{near}"]
        return found + self.source.faults(self.needed_splits(), self.known_splits())

    def needed_splits(self) -> list[str]:
        return [self.sources[part] for part in PARTS]

    def known_splits(self) -> list[str]:
        """Those and others that a file may be given for."""
        return self.needed_splits()

    @abstractmethod
    def question(self, row: Row) -> Question | None:
        """What a row asks; `None` if it isn't one of this task. Raises `UserError` if it is bad."""
        raise NotImplementedError

    @abstractmethod
    def prompt(self, question: Question, shots: Sequence[Question]) -> str:
        """The user turn."""
        raise NotImplementedError

    def extra(self) -> dict[str, tuple[Item, ...]]:
        """Further test sets."""
        return {}

    def take_shots(self, pools: dict[str, Pool]) -> list[Question]:
        """Few-shot examples, taken out of the pool that they come from."""
        return []

    def draw(self) -> Splits:
        """Raises `UserError` where data is missing, damaged or too small."""
        pools: dict[str, Pool] = {}
        for split in dict.fromkeys(map(self.source.split_name, self.needed_splits())):
            pools[split] = self._pool(split)
        shots = self.take_shots(pools)
        _keep_apart(pools)
        warnings: list[str] = []
        self._keep_groups(pools, warnings)
        parts = self._cut(pools, warnings)

        def items(part: str) -> tuple[Item, ...]:
            return tuple(self._item(question, shots) for question in parts[part])

        worded = "\n".join(f"{shot.fields}{shot.answer}" for shot in shots)
        return Splits(
            train=items("train"),
            validation=items("validation"),
            test=items("test"),
            extra=self.extra(),
            shared=hashlib.sha256(worded.encode()).hexdigest() if shots else "",
            warnings=tuple(warnings),
        )

    def _item(self, question: Question, shots: Sequence[Question]) -> Item:
        return Item(
            question.item_id, self.prompt(question, shots), question.target, question.benign,
            question.n_options, question.group,
        )  # fmt: skip

    def _pool(self, split: str) -> Pool:
        rows = self.source.read(split, self.columns, self.optional_columns)
        asked: list[Question] = []
        answered: dict[str, tuple[tuple[str | None, bool], str]] = {}
        for row in rows:
            if (question := self.question(row)) is None:
                continue
            asked.append(question)
            mine = question.target, question.benign
            before, first = answered.setdefault(question.item_id, (mine, row.where))
            if before != mine and self.data_files is not None:
                raise UserError(
                    f"{row.where}: this question has another answer than in {first} "
                    f"({question.content[:60]!r}); keep one of them"
                )
        return Pool(f"{self.source.name} ({split})", unique(asked), len(asked))

    def _keep_groups(self, pools: dict[str, Pool], warnings: list[str]) -> None:
        """Leave out what is of none of the groups asked for. A split without any groups (MMLU's
        auxiliary_train has no subjects) is used whole, and the result says so."""
        if self.groups is None:
            return
        every = [question for pool in pools.values() for question in pool.questions]
        of_groups(every, self.groups, self.source.name)
        for pool in pools.values():
            if any(question.group for question in pool.questions):
                pool.take([q for q in pool.questions if q.group not in self.groups])
            else:
                warnings.append(
                    f"task.groups={list(self.groups)}: the items of {pool.where} are in no groups; "
                    "all of them are used"
                )

    def _cut(self, pools: dict[str, Pool], warnings: list[str]) -> dict[str, list[Question]]:
        """Cut each pool into the parts that are drawn from it: test, then validation, train.

        What validation's own split lacks is the end of train's, as `split_seed` orders it, so that
        neither `train_seed` nor `n_train` moves it.
        """
        parts: dict[str, list[Question]] = {}
        sizes, lacking = {}, 0
        for split, pool in pools.items():
            sizes[split], lacks = self._sizes(split, pool, warnings)
            lacking += lacks
        filling: list[Question] = []
        for split, pool in pools.items():
            order = shuffled(pool.questions, self.split_seed)
            for part, size in sizes[split].items():
                if part == "train":
                    there = len(order) - lacking
                    if size > there:
                        raise _too_small(pool, {"train": size, "validation": lacking})
                    order, filling = order[:there], order[there:]
                    if self.train_seed is not None:
                        warnings += self.all_taken(len(order))
                        order = shuffled(order, self.train_seed)
                parts[part], order = order[:size], order[size:]
        if lacking:
            warnings.append(
                f"validation's own split holds {len(parts['validation'])} items; {lacking} of "
                f"{pools[self.source.split_name(self.sources['train'])].where} are added to make "
                f"task.n_validation={self.n_validation}"
            )
        parts["validation"] += filling
        return parts

    def _sizes(self, split: str, pool: Pool, warnings: list[str]) -> tuple[dict[str, int], int]:
        """Size of each part that is drawn from a pool, in the order of `PARTS`, and how many items
        of validation it lacks, where those are to be drawn from train's."""
        mine = [p for p in PARTS if self.source.split_name(self.sources[p]) == split]
        sizes = {part: getattr(self, f"n_{part}") for part in mine}
        short = sum(sizes.values()) - len(pool.questions)
        own = "train" not in mine and sizes.get("validation", 0) > short
        if own and short > pool.n_left_out:
            sizes["validation"] -= short
            return sizes, short
        if mine and short > 0:
            largest = max(sizes, key=lambda part: sizes[part])
            if short > pool.n_left_out or sizes[largest] <= short:
                raise _too_small(pool, sizes)
            # Asked for all rows of a data set that holds some twice.
            sizes[largest] -= short
            warnings.append(
                f"{pool.where} holds {pool.n_left_out} items twice or in two splits; each is "
                f"used once, so {largest} has {sizes[largest]} items, not "
                f"task.n_{largest}={sizes[largest] + short}"
            )
        return sizes, 0


@dataclass
class Pool:
    """The distinct questions of one split. n_rows: with repetitions."""

    where: str
    questions: list[Question]
    n_rows: int
    n_taken: int = field(default=0)

    @property
    def n_left_out(self) -> int:
        """Rows that are used once already, here or elsewhere."""
        return self.n_rows - self.n_taken - len(self.questions)

    def take(self, questions: Sequence[Question]) -> None:
        """Take these out: they are used otherwise."""
        ids = {question.item_id for question in questions}
        before = len(self.questions)
        self.questions = [q for q in self.questions if q.item_id not in ids]
        self.n_taken += before - len(self.questions)


def _keep_apart(pools: dict[str, Pool]) -> None:
    """A question of several splits stays in the first of them."""
    seen: set[str] = set()
    for pool in pools.values():
        pool.questions = [q for q in pool.questions if q.item_id not in seen]
        seen |= {question.item_id for question in pool.questions}


def _too_small(pool: Pool, sizes: dict[str, int]) -> UserError:
    wanted = " + ".join(f"task.n_{part}" for part in reversed(sizes))
    at_present = ", ".join(f"task.n_{part}={size}" for part, size in reversed(sizes.items()))
    return UserError(
        f"{pool.where} has {len(pool.questions)} different items, but {wanted} = "
        f"{sum(sizes.values())}; lower one of them ({at_present} at present){_fitting(pool, sizes)}"
    )


def _fitting(pool: Pool, sizes: dict[str, int]) -> str:
    """A smaller training split with which the others fit, to be typed."""
    left = len(pool.questions) - sum(n for part, n in sizes.items() if part != "train")
    return f": task.n_train={left} fits" if "train" in sizes and left > 0 else ""
