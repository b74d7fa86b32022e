"""A multiple-choice task of the lm-evaluation-harness, by its name or a YAML file of one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from crl_exp.config.errors import UserError, did_you_mean
from crl_exp.config.files import content_key, home
from crl_exp.config.sections import fill
from crl_exp.tasks.base import Item, Score, Splits, Task, of_groups, shuffled
from crl_exp.tasks.harness import finding
from crl_exp.tasks.harness.finding import KEY
from crl_exp.tasks.harness.reading import PARTS, Document, Reading, read
from crl_exp.tasks.own.shares import LEFT_OUT

METRICS = {
    "acc": lambda choice: 1,
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
"""lm-eval's accuracies, and what each divides the log-probability of an option by: numbers of
characters or bytes of the option as the task has it, the delimiter before it not counted."""
_READ: dict[str, Reading] = {}
"""By task and the state of its files: once for all points of a sweep."""


@dataclass
class LmEval(Task):
    """A multiple-choice task of lm-eval's, worded by lm-eval. The option whose tokens' summed
    log-probability is highest is the answer, as in lm-eval's `acc`.

    lm_eval_task: its name, or a YAML file of one's own.
    metric: what options are compared by, as lm-eval calls the accuracies: acc, the sum of the
        tokens' log-probabilities; acc_norm, that over the option's characters; acc_bytes, over its
        bytes in UTF-8.
    n_shots: examples before each question; null: as many as the task says. The first of those that
        the task names, which are in no split here.
    sources: the split of its data that train, validation and test are drawn from; null: test from
        where lm-eval evaluates, the others from the training split or, where there is none, from
        the same. Two drawn from one split are divided by `split_seed`.
    data_files: null, or files in the place of its data set, by split.
    choices, choice_prefix: the options, and what stands before each. Found in the task, where all
        documents have the same; null where each has its own.
    documents: digest of all that lm-eval made of the data, found when a run is composed.
    A size that is null: what the others leave of the split, 60 : 15 : 25.
    """

    lm_eval_task: str
    metric: str
    n_shots: int | None
    sources: dict[str, str] | None
    data_files: Any
    choice_prefix: str | None
    documents: str | None

    def faults(self) -> list[str]:
        found = super().faults()
        if self.metric not in METRICS:
            near = did_you_mean(self.metric, METRICS)
            found.append(f"task.metric={self.metric}: must be one of {', '.join(METRICS)}{near}")
        if self.n_shots is not None and self.n_shots < 0:
            found.append(f"task.n_shots={self.n_shots}: must not be negative")
        if self.sources is not None and sorted(self.sources) != sorted(PARTS):
            found.append(f"task.sources={dict(self.sources)}: must hold {', '.join(PARTS)}")
        if self.max_new_tokens != 1:
            found.append(
                f"task.max_new_tokens={self.max_new_tokens}: the answer is an option, however "
                "long; set task.max_new_tokens=1"
            )
        given = [k for k in ("choices", "choice_prefix") if getattr(self, k) is not None]
        if self.documents is None and given:
            found.append(f"task.{given[0]}: is the lm-eval task's own; leave it at null")
        return found

    @classmethod
    def settled(cls, section: Mapping[str, Any]) -> dict[str, Any]:
        """What of a resolved section is to be found in the task: the options, the digest of its
        documents, and sizes that are left out. Raises `UserError` as `draw` does."""
        if shares := [f"task.{n}={section[n]}" for n in LEFT_OUT if isinstance(section[n], float)]:
            raise UserError(f"{shares[0]}: is a share; give a number of documents, or null")
        plain = {**section, **{n: 1 for n in LEFT_OUT if section[n] is None}}
        made = fill(OmegaConf.create(plain), "task", cls)
        made._raise_faults()
        reading = made.reading()
        found: dict[str, Any] = {"documents": reading.digest}
        if reading.shared is not None:
            found["choice_prefix"], choices = reading.shared
            found["choices"] = list(choices)
        for split, parts in _parts(reading.sources).items():
            kept = of_groups(reading.pools[split], made.groups, made._where)
            found |= _fitted({f"n_{p}": section[f"n_{p}"] for p in parts}, len(kept))
        return found

    def reading(self) -> Reading:
        """Its documents. Raises `UserError` as `draw` does."""
        config = finding.config_of(self.lm_eval_task)
        if finding.is_file(self.lm_eval_task):
            config["_folder"] = str(home(self.lm_eval_task, KEY).absolute().parent)
        asked = [self.lm_eval_task, self.sources, self.data_files, self.n_shots,
                 self.chat_template]  # fmt: skip
        key = content_key([*asked, str(sorted(config.items(), key=str)), self._state(config)])
        if key not in _READ:
            _READ[key] = read(self.lm_eval_task, config, *asked[1:])
            while len(_READ) > 4:
                del _READ[next(iter(_READ))]
        return _READ[key]

    def _state(self, config: Mapping[str, Any]) -> list[Any]:
        """What changes when a file that is read is written."""
        given: list[Any] = [(config.get("dataset_kwargs") or {}).get("data_files")]
        given += [self.data_files, self.lm_eval_task * finding.is_file(self.lm_eval_task)]
        found, folder = [], Path(config.get("_folder", "."))
        while given:
            one = given.pop()
            if isinstance(one, (dict, list)):
                given += one.values() if isinstance(one, dict) else one
            elif one:
                for path in (home(str(one), KEY), folder / str(one)):
                    if path.is_file():
                        stat = path.stat()
                        found.append([str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns])
        return sorted(found)

    @property
    def _where(self) -> str:
        return f"{KEY}={self.lm_eval_task}"

    @property
    def is_local(self) -> bool:
        return self.data_files is not None or finding.is_file(self.lm_eval_task)

    @property
    def scorer_name(self) -> str:
        return f"lm_eval({self.metric})"

    @cached_property
    def shared(self) -> tuple[str, tuple[str, ...]] | None:
        """What stands before each option, and the options; None: each item has its own."""
        if self.documents is None:
            return self.reading().shared
        return None if self.choices is None else (self.choice_prefix or "", tuple(self.choices))

    @property
    def options_by_item(self) -> bool:
        return self.shared is None

    @property
    def constrained_to(self) -> list[str] | None:
        return None if self.shared is None else [self.shared[0] + own for own in self.shared[1]]

    @property
    def divisors(self) -> list[int] | None:
        return None if self.shared is None else list(map(METRICS[self.metric], self.shared[1]))

    def divisors_of(self, item: Item) -> list[int]:
        return list(json.loads(item.row)) if item.row else super().divisors_of(item)

    def draw(self) -> Splits:
        """Raises `UserError` where the task can't be used or its data can't be had, and where that
        is another than when the run was composed."""
        reading = self.reading()
        if self.documents not in (None, reading.digest):
            raise UserError(
                f"{self._where}: its documents aren't those that this run was composed with "
                f"(task.documents={self.documents}, now {reading.digest}): its data or wording "
                "changed since. Type the line again, which makes another run"
            )
        warnings = list(reading.warnings)
        parts: dict[str, tuple[Item, ...]] = {}
        for split, of in _parts(reading.sources).items():
            pool = of_groups(reading.pools[split], self.groups, self._where)
            sizes = {part: getattr(self, f"n_{part}") for part in of}
            if sum(sizes.values()) > len(pool):
                raise UserError(self._too_small(split, len(pool), sizes))
            order = shuffled(pool, self.split_seed)
            for part, size in sizes.items():
                if part == "train" and self.train_seed is not None:
                    warnings += self.all_taken(len(order))
                    order = shuffled(order, self.train_seed)
                parts[part], order = tuple(map(self._item, order[:size])), order[size:]
        if len(reading.pools) == 1:
            (split,) = reading.pools
            warnings.append(
                f"{self._where}: has one split of data here, {split}; train, validation and test "
                f"are drawn from it by task.split_seed={self.split_seed}, so that test isn't the "
                "whole of what lm-eval evaluates on"
            )
        shared = content_key(reading.shots) if reading.shots else ""
        return Splits(
            parts["train"], parts["validation"], parts["test"], shared=shared,
            warnings=tuple(warnings),
        )  # fmt: skip

    def _item(self, one: Document) -> Item:
        if self.shared is not None:
            return Item(one.item_id, one.user, one.choices[one.gold])
        over = list(map(METRICS[self.metric], one.choices))
        return Item(
            one.item_id, one.user, str(one.gold), n_options=len(one.options), options=one.options,
            row="" if self.metric == "acc" else json.dumps(over),
        )  # fmt: skip

    def _too_small(self, split: str, n: int, sizes: dict[str, int]) -> str:
        wanted = ", ".join(f"task.n_{part}={size}" for part, size in reversed(sizes.items()))
        nulls = " ".join(f"task.n_{part}=null" for part in reversed(sizes))
        return (
            f"{self._where}: its split {split} has {n} documents, and {wanted} are to be drawn "
            f"from it; lower one of them, or let them share it: {nulls}"
        )

    def score(self, items: Sequence[Item], outputs: Sequence[str]) -> list[Score]:
        """Reward 1 where the answer is the right option."""
        return [self._score(item, said) for item, said in zip(items, outputs, strict=True)]

    def _score(self, item: Item, said: str) -> Score:
        if item.options:
            known = said in item.options
            # Of two options with one text lm-eval takes the first.
            right = known and item.options.index(said) == int(str(item.target))
            return Score(float(right), known)
        prefix, choices = self.shared or ("", ())
        bare = said.removeprefix(prefix)
        return Score(float(bare == item.target), bare in choices)

    def told(self) -> dict[str, Any]:
        return {"lm_eval": {"version": version("lm_eval"), **self.reading().facts}}


def _parts(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """The parts that are drawn from each split, in the order in which they are cut."""
    found: dict[str, list[str]] = {}
    for part in PARTS:
        found.setdefault(sources[part], []).append(part)
    return found


def _fitted(given: dict[str, int | None], n: int) -> dict[str, int]:
    """Sizes of parts of `n` documents: those that are left out share what the others leave."""
    open_ones = {name: LEFT_OUT[name] for name, size in given.items() if size is None}
    found = {name: size for name, size in given.items() if size is not None}
    left, whole = n - sum(found.values()), sum(open_ones.values())
    for name, weight in open_ones.items():
        found[name] = max(1, left * weight // whole)  # where too few are left, `draw` says so
    return found
