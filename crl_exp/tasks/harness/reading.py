"""The documents of an lm-eval task, worded by lm-eval itself.

lm-eval makes the prompt (description, examples, `doc_to_text`), the options and the right one of
each document; which documents are drawn, and which are shown as examples, is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from crl_exp.config.errors import UserError
from crl_exp.config.files import content_key
from crl_exp.tasks.data.drawing import content_id
from crl_exp.tasks.harness.finding import KEY
from crl_exp.tasks.harness.loading import files_instead, local_files, made, quick_and_quiet

PARTS = ("test", "validation", "train")  # in the order in which they are cut


@dataclass(frozen=True)
class Document:
    """One document. question: what it asks by itself, without examples. user: the whole prompt.

    options: as they follow the prompt, delimiter and all. choices: the same as the task has them,
    whose lengths acc_norm divides by. gold: position of the right one.
    """

    question: str
    user: str
    options: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    group: str = ""

    @property
    def item_id(self) -> str:
        """Of the question and its choices: other examples keep the splits."""
        return content_id("\n".join([self.question, *self.choices]))


@dataclass(frozen=True)
class Reading:
    """What was read. pools: by split of the data set the distinct documents, which are in no other
    pool and no example. sources: the split of each part. shots: the examples, as prompts show them.
    """

    pools: Mapping[str, tuple[Document, ...]]
    sources: Mapping[str, str]
    shots: str
    n_shots: int
    warnings: tuple[str, ...]
    facts: Mapping[str, Any]

    @cached_property
    def shared(self) -> tuple[str, tuple[str, ...]] | None:
        """What stands before each option, and the options, where all documents have the same."""
        every = {(one.options, one.choices) for pool in self.pools.values() for one in pool}
        if len(every) != 1:
            return None
        options, choices = every.pop()
        prefixes = {whole.removesuffix(own) for whole, own in zip(options, choices, strict=True)}
        alike = len(prefixes) == 1 and len(set(choices)) == len(choices)
        return (prefixes.pop(), choices) if alike and all(map(str.strip, choices)) else None

    @cached_property
    def digest(self) -> str:
        """Of all that was read."""
        documents = {
            split: sorted([one.user, list(one.options), one.gold] for one in pool)
            for split, pool in self.pools.items()
        }
        return content_key([documents, dict(self.sources), self.shots])


def read(
    name: str, config: Mapping[str, Any], sources: Mapping[str, str] | None, data_files: Any,
    n_shots: int | None, chat: bool,
) -> Reading:  # fmt: skip
    """Raises `UserError` where the data can't be had, or documents aren't of a kind that can be
    used; in one line."""
    where = f"{KEY}={name}"
    given = dict(config)
    if n_shots is not None:
        given["num_fewshot"] = n_shots
    given |= files_instead(data_files) if data_files is not None else local_files(given)
    if chat and given.get("gen_prefix"):
        raise UserError(
            f"{where}: begins each answer for the model (gen_prefix), which a chat template has no "
            "place for; set task.chat_template=false"
        )
    with quick_and_quiet():
        task = made(where, given)
        parts = dict(sources) if sources else sources_of(where, task.config)
        return _Reader(where, task, chat).reading(parts)


def sources_of(where: str, config: Any) -> dict[str, str]:
    """Test items come from where lm-eval evaluates; training ones from the training split, if there
    is one, else from the other one there is; validation from a split of its own only where the task
    has all three."""
    train, valid, test = config.training_split, config.validation_split, config.test_split
    last = test or valid
    if last is None:
        raise UserError(f"{where}: has neither test_split nor validation_split")
    first = train or valid or last
    middle = valid if train and test and valid else first
    return {"train": first, "validation": middle, "test": last}


class _Reader:
    """Reads one task's documents. where: its key, in messages."""

    def __init__(self, where: str, task: Any, chat: bool):
        self.where, self.task, self.chat = where, task, chat
        self.n_shots = int(task.config.num_fewshot or 0)
        self.warnings: list[str] = []

    def reading(self, sources: Mapping[str, str]) -> Reading:
        """Few-shot examples and all pools."""
        shown = self._shots()
        asked = {self._words(lambda one=one: self._question(one), "an example") for one in shown}
        pools: dict[str, tuple[Document, ...]] = {}
        seen: set[str] = set()
        for split in dict.fromkeys(sources[part] for part in PARTS):
            pools[split] = tuple(self._pool(split, asked, seen))
        config = self.task.config
        facts = {
            "task": str(config.task), "data set": str(config.dataset_path),
            "subset": config.dataset_name, "splits": dict(sources), "examples": self.n_shots,
        }  # fmt: skip
        shots = "\n\n".join(str(sorted(one.items(), key=str)) for one in shown)
        return Reading(pools, dict(sources), shots, self.n_shots, tuple(self.warnings), facts)

    def _question(self, shot: Any) -> Any:
        return self.task.doc_to_text(shot, self.task.fewshot_cfg.doc_to_text)

    def _shots(self) -> Sequence[Any]:
        """The first of those that examples may come from: the same for every document."""
        if not self.n_shots:
            return []
        from lm_eval.api.samplers import FirstNSampler

        there = list(self.task.sampler.fewshot_docs())
        if len(there) < self.n_shots:
            raise UserError(
                f"{self.where}: has {len(there)} documents for examples, fewer than "
                f"{self.n_shots}; lower task.n_shots"
            )
        if not isinstance(self.task.sampler, FirstNSampler):
            self.warnings.append(
                f"{self.where}: lm-eval draws other examples for each document (its sampler isn't "
                f"first_n); here all have the first {self.n_shots}, which are in no split, so "
                "accuracies differ from lm-eval's by that"
            )
        shown = there[: self.n_shots]
        self.task.sampler = FirstNSampler(shown, rnd=None)
        return shown

    def _pool(self, split: str, shown: set[Any], seen: set[str]) -> Iterator[Document]:
        """Raises `UserError` where none is left."""
        n_shown = n_twice = n_without = n_kept = 0
        for at, doc in enumerate(self._docs(split)):
            where = f"document {at} of {split}"
            found = self._words(lambda doc=doc, where=where: self._document(doc, where), where)
            if found is None:
                n_without += 1
            elif found.question in shown:
                n_shown += 1
            elif found.item_id in seen:
                n_twice += 1
            else:
                seen.add(found.item_id)
                n_kept += 1
                yield found
        if not n_kept:
            why = " with a right answer among its options" if n_without else ""
            raise UserError(f"{self.where}: its split {split} has no document{why} that is left")
        for n, what in (
            (n_without, "have no right answer among their options, or an empty option"),
            (n_twice, "are there twice, or in another split nearer to test"),
            (n_shown - self.n_shots, "ask what an example asks"),
        ):
            if n > 0:
                self.warnings.append(f"{self.where}: {n} documents of {split} {what}; left out")

    def _docs(self, split: str) -> Any:
        if split not in self.task.dataset:
            there = ", ".join(self.task.dataset)
            raise UserError(f"{self.where}: its data has no split {split!r} (it has {there})")
        docs, process = self.task.dataset[split], self.task.config.process_docs
        return (
            docs
            if process is None
            else self._words(lambda: process(docs), f"process_docs of {split}")
        )

    def _words(self, make: Callable[[], Any], what: str) -> Any:
        """Templates and functions of the task may fail in any way."""
        try:
            return make()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.where}: {what} can't be worded ({error!r})") from error

    def _document(self, doc: Any, where: str) -> Document | None:
        """None where no option is the right one, or one is empty."""
        task = self.task
        asked, choices = task.doc_to_text(doc), task.doc_to_choice(doc)
        if isinstance(asked, int):
            raise UserError(
                f"{self.where}: has several contexts for one continuation (doc_to_text gives an "
                "index, as winogrande's does), and options for one prompt are compared here"
            )
        gold = task.doc_to_target(doc)
        if isinstance(gold, list):
            raise UserError(
                f"{self.where}: {where} has several right answers ({gold}), of which one is taken "
                "as the target here"
            )
        choices = tuple(map(str, choices))
        if isinstance(gold, str):  # as lm-eval reads it
            gold = choices.index(gold) if gold in choices else -1
        if not 0 <= int(gold) < len(choices) or not all(choices):
            return None
        user = task.fewshot_context(
            doc, num_fewshot=self.n_shots, gen_prefix=task.doc_to_prefix(doc)
        )
        delimiter = "" if self.chat else task.config.target_delimiter
        kept = user if self.chat else user.rstrip()
        if not kept:
            raise UserError(
                f"{self.where}: {where} has no context, so that there is no prompt to steer from"
            )
        # As lm-eval has it: blanks at a plain prompt's end belong to the options.
        before = user[len(kept) :] + delimiter
        return Document(asked, kept, tuple(before + one for one in choices), choices, int(gold))
